"""One layer's exact block `E[x xᵀ ⊗ Σ_k g_k g_kᵀ]`, stored as its cases and formed only on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.arguments import check_damping, check_exponent, check_plain
from natgrad.linalg.dense import Dense
from natgrad.linalg.eigen import eigh, semidefinite
from natgrad.linalg.gram import MEMORY, add_by_columns, add_gram, add_square, mirrored
from natgrad.linalg.operator import Operator
from natgrad.linalg.pieces import Piece, chunks, squares, stacked, summed
from natgrad.linalg.space import Parts, Space, check_order

COLUMNS = 64
"""How many vectors of the block's size are held at a time."""


class ExactBlock(Operator):
    """`G = S Sᵀ`, with a column `s_ik = √scale · Σ_t g_ikt ⊗ x_it` for every example `i` and column `k` of `D`.

    `x = [h; 1]` with a bias. It acts on the pair `(W, b)`, on `W` alone, or (inputs of width zero) on `b` alone.
    Products cost one pass over the cases. Inverse, powers, log-determinant and spectrum use the Gram matrix `SᵀS`, with
    `(n k)²` instead of `(d_in d_out)²` numbers, or `G` itself if that is smaller.

    Args:
        h: the inputs, `(examples n, positions t, d_in)`.
        g: the columns' gradients in the pre-activation, `(n, k, t, d_out)`.
        bias: whether the layer has one.
        scale: `1/N` for the mean over cases.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> import torch
        >>> h, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[[3.0]]]])     # one case: G = (x xᵀ) ⊗ 9
        >>> G = ExactBlock(h, g, bias=False)
        >>> G.to_dense().tolist(), G.trace().item()
        ([[9.0, 18.0], [18.0, 36.0]], 45.0)
    """

    def __init__(
        self,
        h: Float[Tensor, "n t i"],
        g: Float[Tensor, "n k t o"],
        *,
        bias: bool,
        scale: float | Tensor = 1.0,
    ):
        if h.ndim != 3 or g.ndim != 4 or g.shape[0] != h.shape[0] or g.shape[2] != h.shape[1]:
            raise ValueError(
                f"h has shape {tuple(h.shape)} and g {tuple(g.shape)}; expected (n, t, d_in) and (n, k, t, d_out)"
            )
        self._hold([Piece(h, g)], bias, scale)

    @classmethod
    def of(cls, pieces: Sequence[Piece], *, bias: bool, scale: float | Tensor = 1.0) -> ExactBlock:
        """The block of several batches, each with its own number of positions and of columns."""
        block = cls.__new__(cls)
        block._hold(pieces, bias, scale)
        return block

    def _hold(self, pieces: Sequence[Piece], bias: bool, scale: float | Tensor) -> None:
        self.pieces, self.bias, self.scale = tuple(pieces), bias, float(scale)
        h, g = self.pieces[0]
        self.dtype, self.device = g.dtype, g.device
        self.d_in, d_out = h.shape[-1], g.shape[-1]
        weight = ((d_out, self.d_in),) if self.d_in else ()
        self.space = Space((*weight, (d_out,)) if bias else weight)
        self._spectrum: tuple[Tensor, Tensor] | None = None
        self._formed: Dense | None = None

    @property
    def h(self) -> Float[Tensor, "n t i"]:
        """The inputs of all batches, padded with zeros to the same number of positions."""
        return stacked([p.h for p in self.pieces])

    @property
    def g(self) -> Float[Tensor, "n k t o"]:
        """The gradients of all batches, padded in the same way."""
        return stacked([p.g for p in self.pieces])

    def describe(self) -> str:
        return f"exact, {self.rank_bound} columns"

    # Products ------------------------------------------------------------------------------------------

    def _matmul(self, parts: Parts) -> Parts:
        return tuple(self.scale * p for p in self._outer(self._inner(parts)))

    def _inner(self, parts: Parts) -> Float[Tensor, "*batch nk"]:
        """`Sᵀ v`, without the scale."""
        W, b = self._split(parts)
        inner = [p.inner(W, b) for p in self.pieces]
        return inner[0] if len(inner) == 1 else torch.cat(inner, -1)

    def _outer(self, c: Float[Tensor, "*batch nk"]) -> Parts:
        """`S c`, without the scale."""
        own = c.split([p.columns for p in self.pieces], -1)
        return summed(self._join(*p.outer(part)) for p, part in zip(self.pieces, own, strict=True))

    def _split(self, parts: Parts) -> tuple[Tensor | None, Tensor | None]:
        W = parts[0] if self.d_in else None
        return W, parts[-1] if self.bias else None

    def _join(self, W: Tensor, b: Tensor) -> Parts:
        return (*([W] if self.d_in else []), *([b] if self.bias else []))

    def with_pieces(self, pieces: Sequence[Piece]) -> ExactBlock:
        """The block of other cases, with the same scale."""
        return ExactBlock.of(pieces, bias=self.bias, scale=self.scale)

    def part(self, examples: slice) -> ExactBlock:
        """The block of some of the examples, with the same scale."""
        start, stop, _ = examples.indices(sum(len(p.h) for p in self.pieces))
        kept = []
        for h, g in self.pieces:
            first, last = max(start, 0), min(stop, len(h))
            if first < last:
                kept.append(Piece(h[first:last], g[first:last]))
            start, stop = start - len(h), stop - len(h)
        h, g = self.pieces[0]
        return self.with_pieces(kept or [Piece(h[:0], g[:0])])

    # Spectrum ------------------------------------------------------------------------------------------

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of columns of each batch."""
        return tuple(p.columns for p in self.pieces)

    @property
    def rank_bound(self) -> int:
        """The number of columns `s_ik`: the rank is at most this."""
        return sum(self.counts)

    def gram(self, memory: int = MEMORY) -> Float[Tensor, "nk nk"]:
        """`SᵀS`: `(x_i·x_j)(g_ik·g_jq)` times the scale, summed over the positions of both.

        Args:
            memory: the number of bytes for the part of `S` that is held at a time.
        """
        gram = torch.zeros(self.rank_bound, self.rank_bound, dtype=self.dtype, device=self.device)
        self.add_gram(gram, memory)
        return mirrored(gram)

    def add_gram(self, gram: Float[Tensor, "nk nk"], memory: int = MEMORY, factors: Parts | None = None) -> None:
        """Adds `SᵀS` to the lower triangle of `gram`, or `Sᵀ R² S` with the diagonal matrix `R` of the factors."""
        if factors is None:
            add_gram(gram, self.pieces, self.bias, self.scale, memory)
            return
        W, b = self._split(factors)
        columns = [r for r in (W, None if b is None else b.unsqueeze(1)) if r is not None]
        add_by_columns(gram, self.pieces, self.bias, self.scale, memory, torch.cat(columns, 1).flatten())

    def columns(self) -> Float[Tensor, "size nk"]:
        """`S`, in torch order."""
        every = slice(None)
        rows = [torch.cat([p.written(every, False), p.g.sum(2).flatten(0, 1)][: 1 + self.bias], 1) for p in self.pieces]
        return self.scale**0.5 * torch.cat(rows).mT

    def spectrum(self) -> Float[Tensor, " r"]:
        """The eigenvalues, ascending. If there are fewer columns than rows, the other `size − n k` eigenvalues are
        zero."""
        return self._eigen()[0]

    def _is_small(self) -> bool:
        """Whether `G` has no more rows than the Gram matrix."""
        return self.space.size <= self.rank_bound

    def _dense_form(self) -> Dense:
        if self._formed is None:
            self._formed = Dense(self._form_dense(), self.space)
        return self._formed

    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the smaller of `G` and `SᵀS`."""
        if self._spectrum is None:
            M = self._dense_form().matrix if self._is_small() else self.gram()
            e, Q = eigh(M, "the exact block")
            self._spectrum = semidefinite(e, "the exact block"), Q
        return self._spectrum

    # Operations ----------------------------------------------------------------------------------------

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """`(G + λI)⁻¹ v = (v − S (SᵀS + λI)⁻¹ Sᵀ v) / λ`, by the eigenvectors of `SᵀS`."""
        check_damping(damping, damping_style)
        check_plain("an exact block", damping_style, ", or structure='kfac'")
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        check_exponent(exponent)
        check_damping(damping)
        if self._is_small():
            return self._dense_form().power(exponent, damping)
        return ExactPower(self, exponent, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        if self._is_small():
            return self._dense_form().logdet(damping)
        if damping == 0:
            raise self.rank_deficient()
        e = self.spectrum()
        return (e + damping).log().sum() + (self.space.size - len(e)) * e.new_tensor(damping).log()

    def trace(self) -> Tensor:
        return self.scale * torch.stack([p.norms(self.bias).sum() for p in self.pieces]).sum()

    def _norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self._form_dense() if self._is_small() else self.gram())

    def _diagonal(self) -> Parts:
        return tuple(self.scale * p for p in summed(squares(*p, bias=self.bias) for p in self.pieces))

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def _form_dense(self) -> Tensor:
        F = torch.zeros(self.space.size, self.space.size, dtype=self.dtype, device=self.device)
        for some in chunks(self.pieces, max(1, MEMORY // (self.space.size * F.element_size()))):
            add_square(F, self.with_pieces(some).columns())
        return mirrored(F)

    def _scaled(self, factor: float) -> Operator:
        if factor <= 0:
            return super()._scaled(factor)
        return ExactBlock.of(self.pieces, bias=self.bias, scale=factor * self.scale)

    def rank_deficient(self) -> ValueError:
        """The error of an undamped inverse if there are fewer columns than rows. It is returned, not raised."""
        return ValueError(
            f"the exact block has {self.space.size} rows and a rank of at most {self.rank_bound}, so it is singular; "
            "pass a damping"
        )

    # The parts of the block ---------------------------------------------------------------------------

    @property
    def WW(self) -> ExactBlock:
        """`E[h hᵀ ⊗ Σ g gᵀ]`: the block of the weight with itself, on `W`.

        Raises:
            ValueError: also from `Wb` and `bW`, if the block is of a bias alone.
        """
        self._check_weight("WW")
        return ExactBlock.of(self.pieces, bias=False, scale=self.scale)

    @property
    def bb(self) -> Dense:
        """`B = E[Σ g gᵀ]`: the block of the bias with itself, on `b`."""
        g = torch.cat([p.g.sum(2).flatten(0, 1) for p in self.pieces])
        return Dense(self.scale * g.mT @ g)

    @property
    def Wb(self) -> CrossBlock:
        """`E[h ⊗ Σ g gᵀ]`, which maps `b` to the coordinates of the weight."""
        self._check_weight("Wb")
        return CrossBlock(self, to_weight=True)

    @property
    def bW(self) -> CrossBlock:
        """`E[hᵀ ⊗ Σ g gᵀ]`, the transpose of `Wb`."""
        self._check_weight("bW")
        return CrossBlock(self, to_weight=False)

    def _check_weight(self, part: str) -> None:
        if not self.d_in:
            raise ValueError(
                f"this block is of a bias alone and has no {part}; expected a layer with a weight, or use bb"
            )


class CrossBlock:
    """The block between weight and bias: `Wb @ b` has the shape of `W`, `bW @ W` that of `b`."""

    def __init__(self, block: ExactBlock, to_weight: bool):
        self._both = ExactBlock.of(block.pieces, bias=True, scale=block.scale)
        self.to_weight = to_weight

    def __matmul__(self, v: Tensor) -> Tensor:
        source = self._both.space.shapes[int(self.to_weight)]
        if tuple(v.shape[-len(source) :]) != source:
            raise ValueError(f"v has shape {tuple(v.shape)}; expected {source}, with any leading axes")
        zero = [v.new_zeros(*v.shape[: v.ndim - len(source)], *s) for s in self._both.space.shapes]
        parts = (zero[0], v) if self.to_weight else (v, zero[1])
        return self._both._matmul(parts)[0 if self.to_weight else 1]

    @property
    def mT(self) -> CrossBlock:
        return CrossBlock(self._both, not self.to_weight)

    def to_dense(self, order: str = "torch") -> Tensor:
        """`(d_out d_in, d_out)` for `Wb`, its transpose for `bW`. `order`: rows of `W` stacked (`"torch"`), or columns
        (`"vec"`)."""
        check_order(order)
        d_out = self._both.space.shapes[1][0]
        Wb = CrossBlock(self._both, True)
        W = Wb @ torch.eye(d_out, dtype=self._both.dtype, device=self._both.device)
        dense = Space((self._both.space.shapes[0],)).flatten((W,), order).mT
        return dense if self.to_weight else dense.mT


class ExactPower(Operator):
    """`(G + λI)^p = λ^p I + S Q diag(((e + λ)^p − λ^p)/e) Qᵀ Sᵀ`, from `SᵀS = Q diag(e) Qᵀ`."""

    def __init__(self, block: ExactBlock, exponent: float, damping: float):
        if damping == 0 and exponent < 0:
            raise block.rank_deficient()
        self.block, self.exponent, self.damping = block, exponent, damping
        self.space, self.dtype, self.device = block.space, block.dtype, block.device
        e, self._Q = block._eigen()
        self._rest = damping**exponent if damping > 0 else 0.0
        floor = e[-1] * torch.finfo(e.dtype).eps * len(e)
        kept = e.where(e > floor, 1.0)
        change = (kept + damping) ** exponent - self._rest
        # At rounding level, the derivative replaces the quotient. Without damping, such directions are not in the
        # range.
        limit = exponent * damping ** (exponent - 1) if damping > 0 else 0.0
        self._coefficients = torch.where(e > floor, change / kept, limit)

    def _matmul(self, parts: Parts) -> Parts:
        c = self.block._inner(parts)
        change = self.block._outer((c @ self._Q) * self._coefficients @ self._Q.mT)
        return tuple(self._rest * p + self.block.scale * q for p, q in zip(parts, change, strict=True))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        if damping != 0:
            raise self._cannot("damped inverse")
        return ExactPower(self.block, -self.exponent, self.damping)

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        if damping != 0:
            raise self._cannot("damped power")
        check_exponent(exponent)
        return ExactPower(self.block, exponent * self.exponent, self.damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        if damping != 0:
            raise self._cannot("damped logdet")
        return self.exponent * self.block.logdet(self.damping)

    def trace(self) -> Tensor:
        e = self.block.spectrum()
        return ((e + self.damping) ** self.exponent).sum() + (self.space.size - len(e)) * self._rest

    def _norm(self) -> Tensor:
        e = (self.block.spectrum() + self.damping) ** self.exponent
        return (e.square().sum() + (self.space.size - len(e)) * self._rest**2).sqrt()

    def _diagonal(self) -> Parts:
        """`λ^p + Σ_j c_j (S q_j)²`, with a chunk of the columns `S q_j` at a time."""
        total = [torch.full(s, self._rest, dtype=self.dtype, device=self.device) for s in self.space.shapes]
        for Q, c in zip(self._Q.mT.split(COLUMNS), self._coefficients.split(COLUMNS), strict=True):
            for part, Sq in zip(total, self.block._outer(Q), strict=True):
                part += self.block.scale * torch.tensordot(c, Sq.square(), 1)
        return tuple(total)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)
