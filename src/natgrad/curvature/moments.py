"""Sums over the cases of one layer. The operator `+` merges microbatches, epochs and running averages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer, parted
from natgrad.capture.layers import Inputs, InputSums, joined, stacked
from natgrad.curvature.central_moments import CentralMoments
from natgrad.linalg.space import Parts

SHARING = ("expand", "reduce")
MAX_DIM = 8192
"""Default: for wider factors only the diagonal is kept."""


class KnownSums:
    """The sums of inputs that several layers share, such as query, key and value. Each sum is computed once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[Inputs, InputSums]] = {}

    def of(self, inputs: Inputs, diagonal: bool) -> InputSums:
        place = inputs.place()
        if place is None:
            return inputs.sums(None, diagonal)
        key = (place, diagonal)
        if key not in self._found:
            # The inputs are kept, so that their memory is not reused for other inputs.
            self._found[key] = inputs, inputs.sums(None, diagonal)
        return self._found[key][1]


@dataclass
class AffineMoments:
    """The sums that K-FAC needs of a layer's cases.

    The input side is stored as count, mean and scatter around the mean. These merge without cancellation, even
    if the inputs are far from zero (Chan, Golub & LeVeque 1979). A factor that is a diagonal has one axis.
    """

    count: Tensor
    """Number of cases n, a scalar."""
    mean: Float[Tensor, " i"]
    """`m = Σ h / n`."""
    scatter: Float[Tensor, "*inputs"]
    """`Σ (h − m)(h − m)ᵀ`."""
    output: Float[Tensor, "*outputs"]
    """`Σ g gᵀ` over cases and columns."""
    mass: Tensor
    """What the loss's mean divides by, summed over batches: a scalar."""

    @classmethod
    def empty(
        cls, d_in: int, d_out: int, mass: Tensor, *, diagonal: tuple[bool, bool] = (False, False)
    ) -> AffineMoments:
        """Moments without cases. `diagonal`: whether the input factor and the output factor are diagonals."""
        scatter, output = (mass.new_zeros([d] * (2 - alone)) for d, alone in zip((d_in, d_out), diagonal, strict=True))
        return cls(mass.new_zeros(()), mass.new_zeros(d_in), scatter, output, mass)

    def add_inputs(
        self, inputs: Inputs, kept: Bool[Tensor, "n t"] | None = None, known: KnownSums | None = None
    ) -> None:
        """Adds the inputs of all cases, or of those that are kept."""
        diagonal = self.scatter.ndim == 1
        sums = inputs.sums(kept, diagonal) if known is None or kept is not None else known.of(inputs, diagonal)
        zero = torch.zeros_like
        whole = self + AffineMoments(sums.count, sums.mean, sums.scatter, zero(self.output), zero(self.mass))
        self.count, self.mean, self.scatter = whole.count, whole.mean, whole.scatter

    def add_gradients(self, g: Float[Tensor, "n t o"]) -> None:
        """Adds one column's gradients: every position is a case."""
        g = g.to(self.output.dtype)
        if self.output.ndim == 1:
            self.output.add_(g.square().sum((0, 1)))
        elif g.shape[1] > 1 and g.stride(2) != 1 and g.device.type == "cpu":
            # Of a convolution: its features are not contiguous in memory. On a GPU this is one product per example.
            self.output.addbmm_(g.mT, g)
        else:
            rows = g.flatten(0, 1)
            self.output.addmm_(rows.mT, rows)

    def around(self, mean: Tensor) -> AffineMoments:
        """The scatter around another mean, with the same count."""
        shift = torch.where(self.count > 0, self.mean - mean, 0.0)
        apart = shift.square() if self.scatter.ndim == 1 else torch.outer(shift, shift)
        return replace(self, mean=mean, scatter=self.scatter + self.count * apart)

    def __add__(self, other: AffineMoments) -> AffineMoments:
        n = self.count + other.count
        share = torch.where(n > 0, other.count / n, 0.0)
        shift = other.mean - self.mean
        apart = self.count * share
        between = shift.square() * apart if self.scatter.ndim == 1 else torch.outer(shift, shift * apart)
        return AffineMoments(
            n,
            self.mean + share * shift,
            self.scatter + other.scatter + between,
            self.output + other.output,
            self.mass + other.mass,
        )

    def __rmul__(self, factor: float) -> AffineMoments:
        """The same averages with `factor` times the weight."""
        return AffineMoments(
            factor * self.count, self.mean, factor * self.scatter, factor * self.output, factor * self.mass
        )

    @property
    def C(self) -> Float[Tensor, "*inputs"]:
        """The covariance of the inputs, or its diagonal."""
        return torch.where(self.count > 0, self.scatter / self.count, 0.0)

    @property
    def A(self) -> Float[Tensor, "*inputs"]:
        """The second moment `E[h hᵀ]`, or its diagonal."""
        return self.C + (self.mean.square() if self.scatter.ndim == 1 else torch.outer(self.mean, self.mean))

    def B(self, is_mean: bool) -> Float[Tensor, "*outputs"]:
        """The output factor of the objective, which is a mean or a sum."""
        return self.output / self.mass if is_mean else self.output

    @property
    def diagonals(self) -> tuple[str, ...]:
        """Which of the factors, `"input"` and `"output"`, are kept as diagonals."""
        held = {"input": self.scatter, "output": self.output}
        return tuple(name for name, factor in held.items() if factor.ndim == 1)

    def is_finite(self) -> Tensor:
        """A boolean scalar: nothing in here is NaN or infinite."""
        return torch.isfinite(self.scatter.sum() + self.output.sum() + self.mass + self.mean.sum())


@dataclass
class ScaleMoments:
    """Sums over examples of squares and products of the gradients of a layer's scales `w` and shifts `c`, for each
    coordinate."""

    products: Float[Tensor, "k d"]
    """`Σ g_w²`, `Σ g_w g_c` and `Σ g_c²` over examples and columns; the one square where there is one parameter."""
    mass: Tensor
    """What the loss's mean divides by, summed over batches: a scalar."""

    def add_gradients(self, g: Float[Tensor, "n 1 o"]) -> None:
        """Adds one column's gradients in the coordinates, summed over the places of an example."""
        g = g.squeeze(1).to(self.products.dtype)
        if len(self.products) == 1:
            self.products[0] += g.square().sum(0)
        else:
            w, c = g.chunk(2, 1)
            self.products += torch.stack([w.square().sum(0), (w * c).sum(0), c.square().sum(0)])

    def __add__(self, other: ScaleMoments) -> ScaleMoments:
        return ScaleMoments(self.products + other.products, self.mass + other.mass)

    def __rmul__(self, factor: float) -> ScaleMoments:
        """The same averages with `factor` times the weight."""
        return ScaleMoments(factor * self.products, factor * self.mass)

    def means(self, is_mean: bool) -> Float[Tensor, "k d"]:
        """The products for the objective, which is a mean or a sum."""
        return self.products / self.mass if is_mean else self.products

    def is_finite(self) -> Tensor:
        """A boolean scalar: nothing in here is NaN or infinite."""
        return torch.isfinite(self.products.sum() + self.mass)


@dataclass
class DiagonalMoments:
    """Sums over examples and columns of squared gradients, in the parameters or in some basis."""

    values: Parts
    mass: Tensor
    """What the loss's mean divides by, summed over batches: a scalar."""

    def __add__(self, other: DiagonalMoments) -> DiagonalMoments:
        values = tuple(a + b for a, b in zip(self.values, other.values, strict=True))
        return DiagonalMoments(values, self.mass + other.mass)

    def __rmul__(self, factor: float) -> DiagonalMoments:
        """The same averages with `factor` times the weight."""
        return DiagonalMoments(tuple(factor * v for v in self.values), factor * self.mass)

    def means(self) -> Parts:
        return tuple(v / self.mass for v in self.values)

    def is_finite(self) -> Tensor:
        """A boolean scalar: nothing in here is NaN or infinite."""
        return torch.isfinite(torch.stack([v.sum() for v in self.values]).sum() + self.mass)


KINDS = AffineMoments, ScaleMoments, DiagonalMoments, CentralMoments
Moments = AffineMoments | ScaleMoments | DiagonalMoments
Sums = Moments | CentralMoments
S = TypeVar("S", bound=Sums)


def layer_moments(cases: Cases, sharing: str = "expand", max_dim: int = MAX_DIM) -> dict[Layer, Moments]:
    """The moments of every layer on one batch, in one pass over its columns.

    A position with an ignored target does not count as a case, unless other targets depend on it.
    """
    with torch.no_grad():
        moments: dict[Layer, AffineMoments | ScaleMoments] = {layer: _empty(cases, layer, max_dim) for layer in cases.h}
        used: dict[Layer, list[Tensor]] = {}
        for g in cases.columns:
            for layer, uses in g.items():
                m = moments[layer]
                for summed in shared(uses, "reduce" if _one_by_one(layer, uses) else sharing):
                    m.add_gradients(summed)
                if layer in cases.ignored:
                    used[layer] = _used(uses, used.get(layer))
            del g, uses  # before the next ones are made
        known = KnownSums()
        for layer, m in moments.items():
            if isinstance(m, AffineMoments):
                _add_inputs(m, cases.h[layer], _kept(cases, layer, used.get(layer), sharing), sharing, known)
    return dict(moments)


def input_moments(cases: Cases, layers: Iterable[Layer], sharing: str, max_dim: int) -> dict[Layer, Moments]:
    """Only the input moments of some affine layers. The output factors are zero diagonals."""
    moments: dict[Layer, Moments] = {}
    known = KnownSums()
    with torch.no_grad():
        for layer in layers:
            d_in = cases.h[layer][0].shape[2]
            m = AffineMoments.empty(d_in, cases.d_out[layer], cases.mass, diagonal=(d_in > max_dim, True))
            _add_inputs(m, cases.h[layer], _kept(cases, layer, None, sharing), sharing, known)
            moments[layer] = m
    return moments


def _one_by_one(layer: Layer, uses: Sequence[Tensor]) -> bool:
    """Whether the uses of a scale are summed for each example, as in the exact block."""
    return layer.scale and len({len(use) for use in uses}) == 1


def _empty(cases: Cases, layer: Layer, max_dim: int) -> AffineMoments | ScaleMoments:
    d_out = cases.d_out[layer]
    if layer.scale:
        both = len(layer.names) == 2
        return ScaleMoments(cases.mass.new_zeros(3 if both else 1, d_out // len(layer.names)), cases.mass)
    d_in = cases.h[layer][0].shape[2]
    diagonal = d_in > max_dim or any(i.diagonal for i in cases.h[layer]), d_out > max_dim
    return AffineMoments.empty(d_in, d_out, cases.mass, diagonal=diagonal)


def kept_positions(cases: Cases, layer: Layer) -> list[Bool[Tensor, "n t"]] | None:
    """Which positions of each use of a layer are cases; None: all. The columns must be kept in memory."""
    used: list[Tensor] | None = None
    for g in cases.columns if layer in cases.ignored else ():
        if layer in g:
            used = _used(g[layer], used)
    return _kept(cases, layer, used)


def _used(uses: Sequence[Tensor], before: Sequence[Tensor] | None) -> list[Bool[Tensor, "n t"]]:
    """The positions that have a gradient, in this column or one before."""
    now = [(use != 0).any(-1) for use in uses]
    return now if before is None else [a | b for a, b in zip(before, now, strict=True)]


def _kept(
    cases: Cases, layer: Layer, used: Sequence[Tensor] | None, sharing: str = "expand"
) -> list[Bool[Tensor, "n t"]] | None:
    """Which positions of each use are cases, or are averaged over; None: all."""
    kept = cases.present_in(layer, reduced=sharing == "reduce")
    without = cases.without_target(layer)
    if without is None:
        return kept
    with_target = [~t if used is None else ~t | used[i] for i, t in enumerate(without)]
    return with_target if kept is None else [a & b for a, b in zip(kept, with_target, strict=True)]


def _add_inputs(
    m: AffineMoments, uses: Sequence[Inputs], kept: Sequence[Tensor] | None, sharing: str, known: KnownSums
) -> None:
    if sharing == "reduce":
        averaged = joined(uses).averaged(None if kept is None else torch.cat(list(kept), 1))
        some = None if kept is None else torch.cat(list(kept), 1).any(1, keepdim=True)
        m.add_inputs(averaged, some)
    elif kept is None:
        for use in stacked(uses):
            m.add_inputs(use, None, known)
    else:
        for use, its_kept in zip(uses, kept, strict=True):
            m.add_inputs(use, its_kept)


def merge(parts: Iterable[Mapping[Layer, S]]) -> dict[Layer, S]:
    """The moments of all cases, from those of the parts."""
    total: dict[Layer, S] = {}
    for part in parts:
        for layer, moments in part.items():
            total[layer] = total[layer] + moments if layer in total else moments  # type: ignore[operator, assignment]
    return total


def reconciled(moments: Mapping[Layer, Moments], apart: Collection[Layer] | None = None) -> dict[Layer, Moments]:
    """The moments of layers. They are split by parameter if different batches used a parameter together with different
    others. `apart`: the layers to split, if the moments are not those of all batches."""
    apart = parted(moments) if apart is None else apart
    found: dict[Layer, Moments] = {}
    for layer, m in moments.items():
        parts = zip(layer.apart(), _apart(m), strict=True) if layer in apart else [(layer, m)]
        found = merge([found, dict(parts)])
    return found


def _apart(m: Moments) -> tuple[Moments, Moments]:
    """The moments of a weight and those of its bias, separately."""
    if isinstance(m, ScaleMoments):
        return ScaleMoments(m.products[:1], m.mass), ScaleMoments(m.products[2:], m.mass)
    if isinstance(m, DiagonalMoments):
        return DiagonalMoments(m.values[:1], m.mass), DiagonalMoments(m.values[1:], m.mass)
    assert isinstance(m, AffineMoments)
    return m, replace(m, mean=m.mean[:0], scatter=m.scatter.new_zeros(0, 0))


def state_of_moments(moments: Mapping[Layer, Sums]) -> dict[str, dict[str, Any]]:
    """Plain dictionaries of tensors by layer, which `moments_of_state` reads; tensors are not copied."""
    return {layer.key(): vars(m) for layer, m in moments.items()}


def moments_of_state(state: Mapping[str, dict[str, Any]]) -> dict[Layer, Any]:
    """Undoes `state_of_moments`."""
    moments: dict[Layer, Any] = {}
    for key, its_moments in state.items():
        kind = next(k for k in KINDS if its_moments.keys() == _names(k))
        moments[Layer.of_key(key)] = kind(**its_moments)
    return moments


def _names(kind: type[Sums]) -> set[str]:
    return {field.name for field in fields(kind)}


def shared(uses: Sequence[Tensor], sharing: str) -> list[Tensor]:
    """The gradients of all uses, `(n, t, o)`: unchanged (`expand`), or summed over positions and uses (`reduce`)."""
    return list(uses) if sharing == "expand" else [torch.cat(list(uses), 1).sum(1, keepdim=True)]
