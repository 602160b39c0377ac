"""Sums over cases of one layer. Microbatches, epochs and running averages merge by the same `+`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.cases import Cases, Layer

SHARING = ("expand", "reduce")


@dataclass
class AffineMoments:
    """What K-FAC keeps of a layer's cases.

    The input side is held as count, mean and scatter around the mean, which merge without cancellation
    however far the inputs are from zero (Chan, Golub & LeVeque 1979).
    """

    count: Tensor
    """Number of cases n, a scalar."""
    mean: Float[Tensor, " i"]
    """`m = Σ h / n`."""
    scatter: Float[Tensor, "i i"]
    """`Σ (h − m)(h − m)ᵀ`."""
    output: Float[Tensor, "o o"]
    """`Σ g gᵀ` over cases and columns."""
    mass: Tensor
    """What the loss's mean divides by, summed over batches: a scalar."""

    @classmethod
    def of_inputs(cls, h: Float[Tensor, "n i"], d_out: int, mass: Tensor) -> AffineMoments:
        mean = h.mean(0)
        d = h - mean
        return cls(h.new_tensor(float(len(h))), mean, d.mT @ d, h.new_zeros(d_out, d_out), mass)

    def add_gradients(self, g: Float[Tensor, "n o"]) -> None:
        g = g.to(self.output.dtype)
        self.output.addmm_(g.mT, g)

    def __add__(self, other: AffineMoments) -> AffineMoments:
        n = self.count + other.count
        share = torch.where(n > 0, other.count / n, 0.0)
        shift = other.mean - self.mean
        return AffineMoments(
            n,
            self.mean + share * shift,
            self.scatter + other.scatter + torch.outer(shift, shift * (self.count * share)),
            self.output + other.output,
            self.mass + other.mass,
        )

    def __rmul__(self, factor: float) -> AffineMoments:
        """The same averages with `factor` times the weight."""
        return AffineMoments(
            factor * self.count, self.mean, factor * self.scatter, factor * self.output, factor * self.mass
        )

    @property
    def C(self) -> Float[Tensor, "i i"]:
        """The covariance of the inputs."""
        return self.scatter / self.count

    @property
    def A(self) -> Float[Tensor, "i i"]:
        """The second moment `E[h hᵀ]`."""
        return self.C + torch.outer(self.mean, self.mean)

    def B(self, is_mean: bool) -> Float[Tensor, "o o"]:
        """The output factor of the objective: of its mean, or of its sum."""
        return self.output / self.mass if is_mean else self.output

    def is_finite(self) -> Tensor:
        """A boolean scalar: nothing in here is NaN or infinite."""
        return torch.isfinite(self.scatter.sum() + self.output.sum() + self.mass + self.mean.sum())


def layer_moments(cases: Cases, sharing: str = "expand") -> dict[Layer, AffineMoments]:
    """The moments of every layer on one batch, in one pass over its columns."""
    with torch.no_grad():
        moments = {
            layer: AffineMoments.of_inputs(shared(h, sharing, "mean"), cases.d_out[layer], cases.mass)
            for layer, h in cases.h.items()
        }
        for g in cases.columns:
            for layer, m in moments.items():
                m.add_gradients(shared(g[layer], sharing, "sum"))
    return moments


def merge(parts: Iterable[Mapping[Layer, AffineMoments]]) -> dict[Layer, AffineMoments]:
    """The moments of all cases, from those of the parts."""
    total: dict[Layer, AffineMoments] = {}
    for part in parts:
        for layer, moments in part.items():
            total[layer] = total[layer] + moments if layer in total else moments
    return total


def shared(uses: Sequence[Tensor], sharing: str, over: str) -> Float[Tensor, "n d"]:
    """Rows of all uses: each position a case (`expand`), or positions and uses averaged or summed (`reduce`)."""
    if sharing == "expand":
        return torch.cat([u.flatten(0, 1) for u in uses])
    positions = torch.cat(list(uses), 1)
    return positions.mean(1) if over == "mean" else positions.sum(1)
