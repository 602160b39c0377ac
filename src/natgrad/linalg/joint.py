"""The exact matrix of a whole network, stored as the cases of all its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.arguments import check_damping, check_plain, singular
from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.eigen import positive
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.gram import MEMORY, add_square, costs, mirrored
from natgrad.linalg.operator import Operator
from natgrad.linalg.pieces import Piece, chunks
from natgrad.linalg.space import Parts


class Joint(Operator):
    """`F = S Sᵀ` over all layers, where a column `s_ik` of `S` stacks those of every layer.

    So the diagonal blocks of `F` are the layers' exact blocks, and the sum of their Gram matrices is the Gram matrix
    `SᵀS`. A solve uses the Cholesky factor of the smaller of the two.

    Args:
        layers: the layers' exact blocks (`ExactBlock`), with the same examples and columns in all of them.
        memory: the number of bytes for the columns of `S` that are formed at a time.

    Raises:
        ValueError: if the layers differ in their examples or columns.

    Example:
        >>> import torch
        >>> from natgrad.linalg.block_diagonal import Block, BlockDiagonal
        >>> from natgrad.linalg.space import Space
        >>> def layer(h, g, name):                      # one case, h g = 2 and 3
        ...     block = ExactBlock(torch.tensor([[[h]]]), torch.tensor([[[[g]]]]), bias=False)
        ...     return Block(block, (name,))
        >>> layers = {"one": layer(1.0, 2.0, "u"), "two": layer(3.0, 1.0, "v")}
        >>> Joint(BlockDiagonal(layers, Space(((1, 1), (1, 1)), ("u", "v")))).to_dense().tolist()
        [[4.0, 6.0], [6.0, 9.0]]
    """

    def __init__(self, layers: BlockDiagonal, memory: int = MEMORY):
        self.layers, self.space, self.memory = layers, layers.space, memory
        self.dtype, self.device = layers.dtype, layers.device
        self._blocks: list[tuple[Block, ExactBlock]] = []
        for name, block in layers.layers.items():
            op = block.operator
            if not isinstance(op, ExactBlock) or op.counts != self._first(op).counts:
                raise ValueError(f"layer {name!r} is {op}; expected exact blocks of the same examples and columns")
            self._blocks.append((block, op))
        self._gram: Tensor | None = None
        self._formed: Tensor | None = None

    def _first(self, otherwise: ExactBlock) -> ExactBlock:
        return self._blocks[0][1] if self._blocks else otherwise

    @property
    def rank_bound(self) -> int:
        """The number of columns `s_ik`: the rank is at most this."""
        return self._blocks[0][1].rank_bound

    def _matmul(self, parts: Parts) -> Parts:
        return self.outer(self.inner(parts))

    def inner(self, parts: Parts) -> Float[Tensor, "*batch nk"]:
        """`Sᵀ v`."""
        v = self._named(parts)
        return torch.stack([op.scale**0.5 * op._inner(block.parts(v)) for block, op in self._blocks]).sum(0)

    def outer(self, c: Float[Tensor, "*batch nk"]) -> Parts:
        """`S c`."""
        out: dict[str, Tensor] = {}
        for block, op in self._blocks:
            out |= block.named(op._outer(op.scale**0.5 * c))
        return self.layers._ordered(out)

    def gram(self) -> Float[Tensor, "nk nk"]:
        """`SᵀS`."""
        if self._gram is None:
            gram = torch.zeros(self.rank_bound, self.rank_bound, dtype=self.dtype, device=self.device)
            for block, op in self._blocks:
                op.add_gram(gram, self.memory, self._factors(block))
            self._gram = mirrored(gram)
        return self._gram

    def _factors(self, block: Block) -> Parts | None:
        """The factors of a layer's rows of `S` in the Gram matrix, if there are any."""
        return None

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact", form: str | None = None) -> Operator:
        """`(F + λI)⁻¹`, from the Cholesky factor of `SᵀS + λI` (`form="dual"`) or of `F + λI` (`"primal"`).

        None: the one that takes fewer multiplications.
        """
        check_damping(damping, damping_style)
        check_plain("an exact matrix", damping_style)
        if (form or self.cheaper_form()) == "primal":
            return PrimalInverse(self, damping)
        return DualInverse(self, damping)

    def cheaper_form(self, *, by_columns: bool = False) -> str:
        """`"dual"` or `"primal"`: the one whose matrix takes fewer multiplications to form and factorize."""
        return min(("primal", "dual"), key=lambda form: self.cost(form, by_columns=by_columns))

    def cost(self, form: str, *, by_columns: bool = False) -> float:
        """The number of multiplications to form and factorize the matrix of `form`, `"dual"` or `"primal"`.

        by_columns: whether the Gram matrix is computed from columns, even if pairs of positions are cheaper.
        """
        size, columns = self.space.size, self.rank_bound
        if form == "primal":
            return columns * size**2 / 2 + size**3 / 6
        each = (costs(op.pieces, op.bias) for _, op in self._blocks)
        return sum(own if by_columns else min(pairs, own) for pairs, own in each) + columns**3 / 6

    def trace(self) -> Tensor:
        """`tr F`, from the formed matrix or from the layers' blocks."""
        formed = self._formed if self._gram is None else self._gram
        return self.layers.trace() if formed is None else formed.diagonal().sum()

    def _diagonal(self) -> Parts:
        if self._formed is not None:
            return self.space.unflatten(self._formed.diagonal())
        return self.layers._diagonal()

    def _dense(self) -> Tensor:
        return self.formed().clone()

    def formed(self) -> Float[Tensor, "size size"]:
        """`F` itself, from the columns of some examples at a time."""
        if self._formed is None:
            F = torch.zeros(self.space.size, self.space.size, dtype=self.dtype, device=self.device)
            columns = max(1, self.memory // (2 * self.space.size * F.element_size()))
            every = [list(chunks(op.pieces, columns)) for _, op in self._blocks]
            for some in zip(*every, strict=True):
                add_square(F, self._columns(some))
            self._formed = mirrored(F)
        return self._formed

    def _columns(self, some: Sequence[Sequence[Piece]]) -> Float[Tensor, "size columns"]:
        """The columns `s_ik` of some cases of every layer."""
        out: dict[str, Tensor] = {}
        for (block, op), pieces in zip(self._blocks, some, strict=True):
            its = op.with_pieces(pieces)
            out |= block.named(its.space.unflatten(its.columns().mT))
        return self.space.flatten(self.layers._ordered(out)).mT

    def _named(self, parts: Parts) -> dict[str, Tensor]:
        assert self.space.names is not None
        return dict(zip(self.space.names, parts, strict=True))


class DualInverse(Operator):
    """`(F + λI)⁻¹ v = (v − S (SᵀS + λI)⁻¹ Sᵀ v) / λ`."""

    def __init__(self, matrix: Joint, damping: float):
        if damping == 0:
            raise ValueError("without damping, the exact matrix has no inverse through its Gram matrix; pass a damping")
        self.matrix, self.damping = matrix, damping
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device
        self._L = _damped_cholesky(matrix.gram(), damping)

    def _matmul(self, parts: Parts) -> Parts:
        c = self.matrix.inner(parts)
        solved = torch.cholesky_solve(c.reshape(-1, len(self._L)).mT, self._L).mT
        within = self.matrix.outer(solved.reshape(c.shape))
        return tuple((p - q) / self.damping for p, q in zip(parts, within, strict=True))

    def solve_columns(self, c: Float[Tensor, " nk"]) -> Parts:
        """`(F + λI)⁻¹ S c = S (SᵀS + λI)⁻¹ c`, without the cancellation of the general formula for small `λ`."""
        return self.matrix.outer(torch.cholesky_solve(c.unsqueeze(1), self._L).squeeze(1))


class PrimalInverse(Operator):
    """`(F + λI)⁻¹` by the Cholesky factor of `F + λI` itself."""

    def __init__(self, matrix: Joint, damping: float):
        self.matrix, self.damping = matrix, damping
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device
        self._L = _damped_cholesky(matrix.formed(), damping)

    def _matmul(self, parts: Parts) -> Parts:
        v = self.space.flatten(parts)
        solved = torch.cholesky_solve(v.reshape(-1, self.space.size).mT, self._L).mT
        return self.space.unflatten(solved.reshape(v.shape))

    def solve_columns(self, c: Float[Tensor, " nk"]) -> Parts:
        """`(F + λI)⁻¹ S c`."""
        return self._matmul(self.matrix.outer(c))


def _damped_cholesky(M: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """The Cholesky factor of `M + λI`. Raises ValueError if that is not (numerically) positive definite."""
    damped = M.clone()
    damped.diagonal().add_(damping)
    L, info = torch.linalg.cholesky_ex(damped)
    if info.item():
        raise singular("the exact matrix", damping, float(torch.linalg.eigvalsh(damped)[0]))
    positive(L.diagonal().square(), "the exact matrix", damping)
    return L
