"""The precisions of the prior, and the noise, at which the marginal likelihood is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

from natgrad.uses.precision import Matrix, Precision
from natgrad.uses.prior import Precisions, groups_of

STEPS = 500
TOLERANCE = {torch.float64: 1e-7}
"""The largest relative change of a precision at which they count as converged, else 1e-3."""
EPS = 1e-15
NOISE = "sigma²"
"""What the noise is called beside the groups."""


@dataclass(frozen=True)
class Evidence:
    """`log p(data) ≈ log p(data | θ) − ½ Σ δ θ² + ½ Σ log δ − ½ log det P`, with `P = M / (σ² T) + diag(δ)`.

    Args:
        matrix: the curvature `M` of the loss, summed over the data; of a squared error, of half of it.
        weights: `θ`, by name.
        loss: the summed loss at `θ`; of a squared error, half of it.
        entries: of a squared error, how many entries the targets have; else 0.
        temperature: `T`.
        constant: of several terms, the logarithm of what their noises normalize by, `Σ ω entries log(σ √2π)`. The
            noises are then part of the matrix and of the loss, and `entries` is 0.
    """

    matrix: Matrix
    weights: Mapping[str, Tensor]
    loss: float
    entries: int = 0
    temperature: float = 1.0
    constant: float = 0.0

    def scale(self, sigma: float) -> float:
        return 1 / (sigma**2 * self.temperature)

    def precision(self, precisions: Precisions, sigma: float) -> Precision:
        return Precision(self.matrix, precisions, self.scale(sigma))

    def value(self, precisions: Precisions, sigma: float, posterior: Precision | None = None) -> Tensor:
        """The logarithm of the marginal likelihood."""
        P = posterior or self.precision(precisions, sigma)
        scatter = torch.stack([(precisions[n] * w.square()).sum().double() for n, w in self.weights.items()]).sum()
        return self.log_likelihood(sigma) - 0.5 * (scatter - P.log_prior() + P.logdet())

    def log_likelihood(self, sigma: float) -> float:
        return -self.scale(sigma) * self.loss - self.entries * log(sigma * (2 * pi) ** 0.5) - self.constant

    def maximized(self, precisions: Precisions, sigma: float, per: str, noise: bool) -> tuple[Precisions, float]:
        """The precisions, one for each group, and the noise, at the maximum of the marginal likelihood.

        There `δ Σ θ² = γ`, the number of the group's weights that the data determine (MacKay 1992), and
        `σ² = (2 loss + σ² γ) / entries` over all of them, the update of expectation maximization. Each step goes half
        of the way in `log δ`: `γ` falls with `δ`, less than in proportion, so that the distance at least halves.

        Single weights that are zero, or that the data do not depend on, keep the precision they have.

        Raises:
            ValueError: if there is no maximum.
            RuntimeError: if the iteration does not come to it.
        """
        entries = per == "entry"
        groups = groups_of("parameter" if entries else per, self.matrix.M)
        self._check_maximum(groups, noise)
        kept = self._kept() if entries else {}
        x = _by_group(precisions, groups, entries)
        x[NOISE] = torch.tensor(2 * log(sigma), dtype=torch.float64)
        before: dict[str, Tensor] = {}
        for step in range(STEPS):
            deltas = {n: x[g].exp().to(precisions[n]) for g, names in groups.items() for n in names}
            sigma = float(x[NOISE].div(2).exp())
            move = self._step(deltas, sigma, groups, kept)
            move[NOISE] = move[NOISE] if noise else torch.zeros(())
            distance = max(float(m.abs().max()) for m in move.values())
            if distance < TOLERANCE.get(self.matrix.M.dtype, 1e-3):
                return deltas, sigma
            rate = _rate(move, before)
            ahead = 1.0
            if step % 4 == 3 and 0 < rate < 1:  # to the end of a geometric series, no further than e² away
                ahead = max(1.0, min(1 / (1 - rate), 2 / distance))
            x = {k: x[k] + ahead * move[k].to(x[k].device) for k in x}
            before = {} if ahead > 1 else move
        raise RuntimeError(
            f"after {STEPS} steps the prior's precision still changes by {distance:.1%} a step; use a coarser prior, "
            "such as per='one', or give sigma_noise="
        )

    def _step(
        self, deltas: Precisions, sigma: float, groups: Mapping[str, tuple[str, ...]], kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The step in `log δ` of every group, and in `log σ²`."""
        P = self.precision(deltas, sigma)
        gamma, pull = self._slopes(P, deltas, groups, bool(kept))
        move = {}
        for g in groups:
            ratio = gamma[g].clamp_min(EPS) / pull[g]  # what is below rounding is not known
            ratio = torch.where(kept[g], 1.0, ratio) if kept else ratio
            move[g] = 0.5 * ratio.log()
        determined = torch.stack([v.sum() for v in gamma.values()]).sum().cpu()
        explained = (2 * self.loss / self.temperature / sigma**2 + determined) / max(self.entries, 1)
        move[NOISE] = explained.log()
        return move

    def _slopes(
        self, P: Precision, deltas: Precisions, groups: Mapping[str, tuple[str, ...]], entries: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`γ` and `δ Σ θ²` of every group, or of its single weights."""
        group_of = {n: g for g, names in groups.items() for n in names}

        def together(names: tuple[str, ...]) -> bool:
            return not entries and len({group_of[n] for n in names}) == 1

        gamma: dict[str, Tensor] = {}
        for names, found in P.determined(together).items():
            each = {names[0]: found} if isinstance(found, Tensor) else found
            for n, its in each.items():
                g = group_of[n]
                gamma[g] = gamma.get(g, 0) + (its if entries else its.sum()).double()
        pull = {}
        for g, names in groups.items():
            terms = [deltas[n].double() * self.weights[n].double().square() for n in names]
            pull[g] = terms[0] if entries else torch.stack([t.sum() for t in terms]).sum()
        return gamma, pull

    def _kept(self) -> dict[str, Tensor]:
        """The single weights whose precision the marginal likelihood does not determine."""
        curvature = self.matrix.M.diagonal()
        return {n: (w == 0) | ~(curvature[n] > 0) for n, w in self.weights.items()}

    def _check_maximum(self, groups: Mapping[str, tuple[str, ...]], noise: bool) -> None:
        trace = self._traces()
        or_one = ", or use per='one'"
        for g, names in groups.items():
            what, coarser = (f"the weights of {g!r}", True) if g != "all" else ("the weights", False)
            if not any(self.weights[n].any() for n in names):
                raise ValueError(
                    f"{what} are all zero, and the marginal likelihood grows with their precision without bound; give "
                    f"their prior_precision{coarser * or_one}"
                )
            if not sum(trace[n] for n in names) > 0:
                raise ValueError(
                    f"the data do not depend on {what}: their curvature is zero, and the marginal likelihood has no "
                    "maximum in their precision; "
                    + (
                        "use per='one', or leave them out with subset="
                        if coarser
                        else "look for targets that are all ignored"
                    )
                )
        if noise and not self.loss > 0:
            raise ValueError("the model fits all targets exactly, so the noise has no estimate; give sigma_noise=")

    def _traces(self) -> dict[str, float]:
        """The curvature of every parameter, where the structure knows it."""
        try:
            diagonal = self.matrix.M.diagonal()
        except TypeError:
            return dict.fromkeys(self.weights, 1.0)
        return {n: float(d.sum()) for n, d in diagonal.items()}


def _by_group(precisions: Precisions, groups: Mapping[str, tuple[str, ...]], entries: bool) -> dict[str, Tensor]:
    """The logarithm of one precision for each group, the mean of those that there are; or of each single weight's."""
    if entries:
        return {g: precisions[g].double().log() for g in groups}
    logs = {g: torch.stack([precisions[n].double().log().mean() for n in names]) for g, names in groups.items()}
    return {g: its.mean() for g, its in logs.items()}


def _rate(move: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """By how much steps shrink from one to the next, in the direction of the last."""
    if not before:
        return 0.0
    dots = [(float((move[k] * m).sum()), float(m.square().sum())) for k, m in before.items()]
    return sum(d for d, _ in dots) / max(sum(s for _, s in dots), 1e-300)
