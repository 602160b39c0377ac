"""Rounding weights to few bits: each weight compensates for the errors of those that were rounded before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from natgrad.capture.entry import entry
from natgrad.checks.parameters import Selection, select_parameters
from natgrad.checks.values import check_choice, check_count, check_number
from natgrad.linalg import Block, BlockDiagonal, Centered, CenteredKronecker, Homogeneous, Kronecker, Operator, factor
from natgrad.uses.weights import parameters_of

Factors = tuple[Tensor, Tensor, Tensor | None]
"""`C`, `B` and the mean `m` of the inputs, where there is a bias."""
SIDES = {"both": "the errors of inputs and of outputs", "input": "of inputs alone, row by row"}


@dataclass(frozen=True)
class Grid:
    """The values that the entries of a weight matrix can have: `scale (code − zero)` in each row, with integer codes.

    Args:
        scale: the distance between adjacent values, `(d_out, 1)`.
        zero: the code of zero, `(d_out, 1)`.
        largest: the largest code.

    Example:
        >>> import torch
        >>> from natgrad.uses.quantize import Grid
        >>> grid = Grid.of(torch.tensor([[-1.0, 0.4, 2.0]]), bits=2)
        >>> grid.values(grid.codes(torch.tensor([[-0.9, 0.4, 5.0]]))).tolist()
        [[-1.0, 0.0, 2.0]]
    """

    scale: Tensor
    zero: Tensor
    largest: int

    @classmethod
    def of(cls, W: Float[Tensor, "o i"], bits: int) -> Grid:
        """From the least to the largest entry of each row, with zero among the values."""
        low, high = W.amin(1, keepdim=True).clamp_max(0), W.amax(1, keepdim=True).clamp_min(0)
        largest = 2**bits - 1
        scale = (high - low) / largest
        scale = torch.where(scale > 0, scale, 1.0)
        return cls(scale, (-low / scale).round(), largest)

    def rows(self, index: Tensor) -> Grid:
        """The grid of some rows."""
        return Grid(self.scale[index], self.zero[index], self.largest)

    def codes(self, W: Tensor) -> Tensor:
        """The codes of the nearest values."""
        return ((W / self.scale).round() + self.zero).clamp(0, self.largest)

    def values(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.zero)


@dataclass(frozen=True)
class Quantized:
    """What `natgrad.quantize` returns.

    Args:
        codes: for every rounded parameter, by name: integers from 0 to `2^bits − 1`, in the parameter's shape.
        grids: the values that the codes stand for: a row of a weight matrix is `scale (code − zero)`.
        increase: the increase of the objective that the quadratic model predicts, `½ δᵀ F δ`.
        nearest: the predicted increase if each weight were rounded to the nearest value, without a change of the bias.

    Example:
        >>> import torch, natgrad
        >>> model, data = torch.nn.Linear(4, 2), (torch.randn(30, 4), torch.randn(30, 2))
        >>> found = natgrad.quantize(model, natgrad.fisher(model, torch.nn.MSELoss(), data), bits=3)
        >>> found.codes["weight"].max() <= 7, found.increase <= found.nearest
        (tensor(True), True)
        >>> torch.equal(found.grids["weight"].values(found.codes["weight"]), model.weight)
        True
    """

    codes: dict[str, Tensor]
    grids: dict[str, Grid]
    increase: float
    nearest: float


@entry
def quantize(
    model: nn.Module,
    F: Operator,
    bits: int = 4,
    *,
    sides: str = "both",
    damping: float = 0.01,
    params: Selection = None,
) -> Quantized:
    """Rounds weight matrices to few bits. K-FAC's factors are used to keep the increase of the loss small.

    Each row of a weight matrix has `2^bits` equidistant values, from its smallest entry to its largest. Nearest
    rounding treats every weight separately. Here the error `E = Ŵ − W` of a layer is chosen to make this small:

        tr(B E C Eᵀ)  =  Σ_oi d_o c_i ((L_Bᵀ E L_C)_oi)²      with C = L_C diag(c) L_Cᵀ and B = L_B diag(d) L_Bᵀ

    `L_B` and `L_C` are unit lower triangular. The weights are rounded from the last entry to the first. Before a weight
    is rounded, the errors of the later weights in its term of the sum are subtracted. Rows and columns with the largest
    curvature come first. The bias then compensates for the errors' effect on the mean output, `b ← b − E m`, which is
    why `C` is the inputs' covariance. Without a bias, `C` is their second moment. If nearest rounding is better for a
    layer, it is used there.

    The model is changed in place. Its weights are still floating-point numbers, with at most `2^bits` different values
    in a row.

    Args:
        model: a trained model.
        F: its curvature on the training data or on a sample of them, with `structure="kfac"` or `"kfoc"`.
        bits: the number of bits, from 1 to 16.
        sides: `"both"` uses both factors. `"input"` treats `B` as the identity, so rows do not compensate for one
            another's errors.
        damping: the number that is added to each factor's diagonal, as a share of the mean diagonal.
        params: names of the weights to round, or a predicate on names. None: those of every `nn.Linear`.

    Returns:
        The codes, the values that they stand for, and the predicted increase of the loss.

    Raises:
        TypeError: if `F` is not a matrix of named parameters, or if a layer's block is not a Kronecker product.
        ValueError: if `F` belongs to another model, or if a number is out of range.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(100, 6) @ torch.randn(6, 6)  # correlated inputs
        >>> model, loss = torch.nn.Linear(6, 3), torch.nn.MSELoss()
        >>> y = model(x).detach()
        >>> found = natgrad.quantize(model, natgrad.fisher(model, loss, (x, y)), bits=3)
        >>> abs(loss(model(x), y).item() / found.increase - 1) < 1e-3, found.increase < 0.5 * found.nearest
        (True, True)

    Reference: Frantar et al. (2022), arXiv:2210.17323 (GPTQ, inputs); Tseng, Sun & De Sa (2025), arXiv:2505.22988
    (YAQA, both sides); Babai (1986), "On Lovász' lattice reduction and the nearest lattice point problem".
    """
    check_count("bits", bits, "bits")
    if bits > 16:
        raise ValueError(f"bits={bits} is not usable: expected at most 16 bits")
    check_choice("sides", sides, SIDES, meanings=SIDES)
    check_number("damping", damping)
    own = parameters_of(model, F)
    chosen = _chosen(model, own, params)
    blocks = {n: block for block in (F.layers.values() if isinstance(F, BlockDiagonal) else ()) for n in block.names}
    codes, grids, new, increase, nearest = {}, {}, dict[str, Tensor](), 0.0, 0.0
    for name in chosen:
        block = blocks.get(name)
        factors = _factors(name, block)
        assert block is not None
        W, *b = block.parts({n: own[n].detach().to(F.dtype) for n in block.names})
        grid = Grid.of(W, bits)
        layer = _layer(name, block.operator, W, grid, factors, sides, damping)
        increase, nearest = increase + layer.increase, nearest + layer.nearest
        moved = tuple(p + layer.shift for p in b)
        new |= block.named((grid.values(layer.codes), *moved))
        codes[name] = block.named((layer.codes, *b))[name].to(torch.int32)
        grids[name] = grid
    with torch.no_grad():
        for n, value in new.items():
            own[n].copy_(value)
    return Quantized(codes, grids, increase, nearest)


class Layer(NamedTuple):
    """One layer's codes, the move of its bias, and both predicted increases."""

    codes: Tensor
    shift: Tensor
    increase: float
    nearest: float


def _layer(name: str, M: Operator, W: Tensor, grid: Grid, factors: Factors, sides: str, damping: float) -> Layer:
    """The better of the nearest plane and nearest rounding, with the bias that belongs to it."""
    C, B, m = factors
    B = B if sides == "both" else torch.ones_like(B[0]).expand(len(B))
    with_bias = len(M.space.shapes) == 2

    def increase(E: Tensor, shift: Tensor) -> float:
        return float(0.5 * M.quadratic((E, shift) if with_bias else E))

    found = []
    for codes in (grid.codes(W), _codes(name, W, C, B, grid, damping)):
        E = grid.values(codes) - W
        shift = -(E @ m) if m is not None else torch.zeros_like(E[:, 0])
        found.append(Layer(codes, shift, increase(E, shift), increase(E, torch.zeros_like(shift))))
    plain, plane = found
    best = plane if plane.increase < plain.increase else plain
    return best._replace(nearest=plain.nearest)


def _chosen(model: nn.Module, own: dict[str, nn.Parameter], params: Selection) -> list[str]:
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    if params is None:
        chosen = [n for n, p in own.items() if id(p) in linear]
    else:
        chosen = [n for n in select_parameters(model, params) if n in own and own[n].ndim > 1]
    if not chosen:
        raise ValueError("no weight is to be rounded; expected params= to have weights that F has, too")
    return chosen


def _factors(name: str, block: Block | None) -> Factors:
    """`C` and `B` of a weight's curvature, the bias following it, and the mean `m` of the inputs."""
    op = None if block is None else block.operator
    if isinstance(op, CenteredKronecker):
        return op.C, op.B, op.m
    if isinstance(op, Centered) and isinstance(op.weight, Kronecker):
        return op.weight.A, op.weight.B, op.m
    if isinstance(op, Homogeneous) and isinstance(op.stacked, Kronecker):
        A = factor.full(op.stacked.A)
        m = A[:-1, -1] / A[-1, -1]
        return A[:-1, :-1] - torch.outer(A[:-1, -1], m), op.stacked.B, m
    if isinstance(op, Kronecker):
        return op.A, op.B, None
    what = "in no block of its own" if op is None else f"held as {op.describe()}"
    raise TypeError(
        f"{name!r} is {what}, which is no Kronecker product; use structure='kfac' or 'kfoc', or leave it out by params="
    )


def _codes(name: str, W: Tensor, C: Tensor, B: Tensor, grid: Grid, damping: float) -> Float[Tensor, "o i"]:
    """The codes of the nearest plane. Entries on one antidiagonal do not see one another, and are rounded at once."""
    (L_C, by_input), (L_B, by_output) = _unit_factor(name, C, damping), _unit_factor(name, B, damping)
    W, grid = W[by_output][:, by_input], grid.rows(by_output)
    d_out, d_in = W.shape
    codes = torch.zeros_like(W)
    EL = torch.zeros_like(W)  # E L_C
    for s in range(d_out + d_in - 2, -1, -1):
        o = torch.arange(max(0, s - d_in + 1), min(d_out - 1, s) + 1, device=W.device)
        i = s - o
        target = W[o, i] - (L_B[:, o] * EL[:, i]).sum(0)
        own = grid.rows(o)
        code = own.codes(target.unsqueeze(1))
        codes[o, i] = code[:, 0]
        EL[o] += (own.values(code) - W[o, i].unsqueeze(1)) * L_C[i]
    found = torch.empty_like(W)
    found[by_output.unsqueeze(1), by_input] = codes
    return found


def _unit_factor(name: str, M: Tensor, damping: float) -> tuple[Float[Tensor, "d d"], Int[Tensor, " d"]]:
    """`L` of `M + λ I = L diag(d) Lᵀ` with rows and columns in an order in which the diagonal grows, and the order."""
    diagonal = factor.diagonal(M)
    order = diagonal.argsort(stable=True)
    if M.ndim == 1 or not diagonal.any():
        return torch.eye(len(M), dtype=M.dtype, device=M.device), order
    damped = factor.add_to_diagonal(M, damping * diagonal.mean())[order][:, order]
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"a factor of {name!r} with damping={damping:g} is singular or indefinite; pass a larger damping, say "
            "damping=0.01"
        )
    return root / root.diagonal(), order
