"""The input side of the whitening: averages over steps of the second moments of inputs, and their inverses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.curvature.moments import AffineMoments
from natgrad.linalg import factor
from natgrad.optim.muon.moments import added

SMALLEST = 1e-4
"""The least mean square of an input that the ridge takes into account, in units of the mean over all inputs: units that
are never active have a ridge, too."""
EXPONENT = 0.5
"""The ridge of an input grows as this power of its mean square."""


class InputSide:
    """For every matrix the average `A` of `h hᵀ` over its inputs, whose weights fall by `decay` at each update, and the
    inverse of `A / ā + ridge D^½`, with `ā` the mean of `A`'s eigenvalues and `D` the diagonal of `A / ā`.

    The ridge of an input follows its scale: a ridge of one size for all would be nothing beside a large feature and
    everything beside a small one."""

    def __init__(self, ridge: float, decay: float):
        self.ridge, self.decay = ridge, decay
        self.moments: dict[Layer, AffineMoments] = {}
        self._inverses: dict[Layer, Tensor] = {}

    def take_in(self, new: Mapping[Layer, AffineMoments]) -> list[Layer]:
        """Adds moments to the averages, and inverts these. Gives the matrices whose inputs were not finite: they keep
        what they had."""
        finite = dict(zip(new, _finite(list(new.values())), strict=True))
        self.moments = added(self.moments, {unit: m for unit, m in new.items() if finite[unit]}, self.decay)
        self._invert(unit for unit in new if finite[unit])
        return [unit for unit, good in finite.items() if not good]

    def _invert(self, units: Iterable[Layer]) -> None:
        units = list(units)
        own = {id(self.moments[unit]): self.moments[unit] for unit in units}
        found = dict(zip(own, damped_inverses([m.A for m in own.values()], self.ridge), strict=True))
        self._inverses |= {unit: found[id(self.moments[unit])] for unit in units}

    def has(self, unit: Layer) -> bool:
        return unit in self._inverses

    def whitened(self, unit: Layer, V: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """`V (A / ā + ridge D^½)⁻¹`; `V` itself where nothing is known of the inputs."""
        inverse = self._inverses.get(unit)
        return V if inverse is None else factor.from_right(V, inverse.to(V.dtype))

    def load(self, moments: Mapping[Layer, AffineMoments]) -> None:
        self.moments = {}
        for unit, m in moments.items():
            twin = (o for o in self.moments.values() if o.scatter.shape == m.scatter.shape and _equal(o, m))
            self.moments[unit] = next(twin, m)
        self._inverses = {}
        self._invert(self.moments)


def _finite(moments: Sequence[AffineMoments]) -> list[bool]:
    return torch.stack([m.is_finite() for m in moments]).tolist() if moments else []


def _equal(one: AffineMoments, other: AffineMoments) -> bool:
    return torch.equal(one.scatter, other.scatter) and torch.equal(one.mean, other.mean)


def mean_of_eigenvalues(A: Tensor, *, batched: bool = False) -> Tensor:
    """Of a factor, a matrix or a diagonal, or of each of a batch. It is not zero where all of a factor is."""
    diagonal = A if A.ndim == 1 + batched else A.diagonal(dim1=-2, dim2=-1)
    return diagonal.mean(-1).clamp_min(torch.finfo(A.dtype).tiny)


def damped_inverses(factors: Sequence[Tensor], ridge: float, exponent: float = EXPONENT) -> list[Tensor]:
    """`(A / ā + ridge D^exponent)⁻¹` of each factor, a matrix or a diagonal, where `ā` is the mean of its eigenvalues
    and `D` the diagonal of `A / ā`. Those of one size are inverted together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, A in enumerate(factors):
        by_shape.setdefault(A.shape, []).append(i)
    out = list(factors)
    for shape, places in by_shape.items():
        A = torch.stack([factors[i] for i in places])
        scaled = A / mean_of_eigenvalues(A, batched=True).view(-1, *[1] * len(shape))
        for i, inverse in zip(places, _inverses(scaled, ridge, exponent), strict=True):
            out[i] = inverse
    return out


def _inverses(scaled: Tensor, ridge: float, exponent: float) -> Tensor:
    diagonals = scaled if scaled.ndim == 2 else scaled.diagonal(dim1=-2, dim2=-1)
    ridges = ridge * diagonals.clamp_min(SMALLEST).pow(exponent)
    if scaled.ndim == 2:
        return 1 / (scaled + ridges)
    damped = scaled + ridges.diag_embed()
    L, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():
        what = "the second moment of a layer's inputs or gradients"
        return torch.stack([factor.inverse(A, what, ridge) for A in damped])
    return torch.cholesky_inverse(L)
