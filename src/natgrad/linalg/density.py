"""The distribution of a matrix's eigenvalues: exact if the structure gives them, else by Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import check_count, check_number
from natgrad.linalg.eigenvalues import eigenvalues
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.stochastic import probes, quadrature


@dataclass(frozen=True)
class SpectralDensity:
    """The eigenvalues of a matrix as a measure: `Σ weights δ(λ − nodes)`, of total weight 1.

    Args:
        nodes: eigenvalues, or the nodes of a quadrature, ascending.
        weights: the share of the spectrum that each node represents.
        size: how many eigenvalues the matrix has.
        exact: whether the nodes are the eigenvalues themselves.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense
        >>> density = Dense(torch.diag(torch.tensor([1.0, 2.0, 6.0]))).spectral_density()
        >>> density.mean(lambda e: e).item(), density.count(above=1.5)  # the mean of the eigenvalues
        (3.0, 2.0)
        >>> density(torch.tensor([2.0, 4.0]), width=1.0).round(decimals=2)  # smoothed by a Gaussian
        tensor([0.2100, 0.0400], dtype=torch.float64)
    """

    nodes: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    size: int
    exact: bool

    def mean(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """`tr f(M) / size`."""
        return (self.weights * f(self.nodes)).sum()

    def count(self, above: float) -> float:
        """How many eigenvalues are larger than this."""
        return float(self.weights[self.nodes > above].double().sum() / self.weights.double().sum()) * self.size

    def __call__(self, points: Tensor, width: float) -> Tensor:
        """The density at some points, smoothed by a Gaussian of standard deviation `width`."""
        check_number("width", width, positive=True)
        z = (points.double()[..., None] - self.nodes.double()) / width
        bumps = torch.exp(-0.5 * z.square()) / (width * (2 * torch.pi) ** 0.5)
        return (bumps * self.weights).sum(-1)

    def plot(self, path: str | PathLike[str], bins: int = 60) -> None:
        """Draws a histogram of the eigenvalues by their size, on logarithmic axes, to an image file.

        Eigenvalues below rounding count as zero; the title gives their share.
        """
        from natgrad.report.figures import COLOURS, new_figure, save, tidy

        largest = self.nodes.abs().max()
        least = largest * torch.finfo(self.nodes.dtype).eps * 10
        figure = new_figure(6.4, 3.6)
        axes = figure.subplots()
        for sign, colour, label in ((1, COLOURS[1], "positive"), (-1, COLOURS[2], "negative")):
            kept = sign * self.nodes > least
            if not kept.any():
                continue
            edges = torch.logspace(float(least.log10()), float(largest.log10()) + 1e-6, bins + 1).double()
            counts = torch.zeros(bins, dtype=torch.float64)
            place = torch.bucketize((sign * self.nodes[kept]).double(), edges).sub(1).clamp(0, bins - 1)
            counts.scatter_add_(0, place, self.weights[kept].double() * self.size)
            axes.stairs(counts.numpy(), edges.numpy(), fill=True, alpha=0.75, color=colour, label=label)
        share = float(self.weights[self.nodes.abs() <= least].sum())
        known = "" if self.exact else ", estimated"
        shown = self.nodes.abs()[self.nodes.abs() > least]
        if len(shown):
            axes.set_xlim(left=float(shown.min()) / 3, right=float(largest) * 3)
        axes.set(xscale="log", yscale="log", xlabel="size of the eigenvalue", ylabel="how many")
        axes.set_title(f"{self.size:,} eigenvalues{known}; {share:.0%} are zero to rounding", fontsize=10)
        if bool((self.nodes < -least).any()):
            axes.legend(frameon=False)
        tidy(axes)
        save(figure, path)


@later
def spectral_density(
    operator: Operator, samples: int = 10, steps: int = 100, generator: torch.Generator | None = None
) -> SpectralDensity:
    """The exact eigenvalues, or the mean quadrature of `samples` random vectors with `steps` products each."""
    check_count("steps", steps, "products")
    try:
        e = eigenvalues(operator).sort().values
        return SpectralDensity(e, torch.full_like(e, 1 / len(e)), len(e), exact=True)
    except TypeError:
        pass
    size = operator.space.size
    found = [quadrature(operator, z, min(steps, size)) for z in probes(operator, samples, generator)]
    nodes, weights = (torch.cat(its) for its in zip(*found, strict=True))
    order = nodes.argsort()
    return SpectralDensity(nodes[order], weights[order] / len(found), size, exact=False)
