"""The precisions of the prior, and the noise, at which the marginal likelihood is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

from natgrad.uses.precision import Matrix, Precision
from natgrad.uses.prior import Precisions, groups_of

STEPS = 300
TOLERANCE = {torch.float64: 1e-4}
"""The largest relative slope at which the search counts as converged, else 1e-2."""


@dataclass(frozen=True)
class Evidence:
    """`log p(data) ≈ log p(data | θ) − ½ Σ δ θ² + ½ Σ log δ − ½ log det P`, with `P = M / (σ² T) + diag(δ)`.

    Args:
        matrix: the curvature `M` of the loss, summed over the data; of a squared error, of half of it.
        weights: `θ`, by name.
        loss: the summed loss at `θ`; of a squared error, half of it.
        entries: of a squared error, how many entries the targets have; else 0.
        temperature: `T`.
    """

    matrix: Matrix
    weights: Mapping[str, Tensor]
    loss: float
    entries: int = 0
    temperature: float = 1.0

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
        return -self.scale(sigma) * self.loss - self.entries * log(sigma * (2 * pi) ** 0.5)

    def maximized(self, precisions: Precisions, sigma: float, per: str, noise: bool) -> tuple[Precisions, float]:
        """The precisions, one for each group, and the noise, at the maximum that a search from the given ones finds.

        The slope in `log δ` of a group is `½ (γ − δ Σ θ²)`, with `γ` the number of its weights that the data determine
        (MacKay 1992); in `log 1/σ²` it is `½ (entries − 2 loss/(σ² T) − γ)`.

        Raises:
            ValueError: if there is no maximum.
            RuntimeError: if the search does not come to one.
        """
        groups = groups_of("parameter" if per == "entry" else per, self.matrix.M)
        self._check_maximum(groups, noise)
        spread = {g: tuple(self.weights[names[0]].shape) if per == "entry" else () for g, names in groups.items()}
        start = [_mean_log(precisions, names, spread[g]) for g, names in groups.items()]
        x = torch.cat([s.flatten() for s in start] + [torch.tensor([-2 * log(sigma)], dtype=torch.float64)])
        x.requires_grad_()

        def read() -> tuple[Precisions, float]:
            pieces = x.detach()[:-1].split([s.numel() for s in start])
            like = next(iter(precisions.values()))
            found: Precisions = {}
            for piece, (g, names) in zip(pieces, groups.items(), strict=True):
                found |= dict.fromkeys(names, piece.exp().reshape(spread[g]).to(like))
            return found, float(x.detach()[-1].mul(-0.5).exp())

        slope = torch.full_like(x, torch.inf)

        def closure() -> Tensor:
            deltas, s = read()
            P = self.precision(deltas, s)
            gamma, pull = self._slopes(P, deltas, groups, per == "entry")
            rest = self.entries - 2 * self.scale(s) * self.loss - sum(float(v.sum()) for v in gamma)
            own = [0.5 * (a - b).double().flatten().cpu() for a, b in zip(gamma, pull, strict=True)]
            x.grad = -torch.cat([*own, torch.tensor([0.5 * rest if noise else 0.0], dtype=torch.float64)])
            size = torch.cat([b.double().flatten().cpu() for b in pull] + [torch.tensor([float(self.entries or 1)])])
            slope.copy_(x.grad.abs() / size.clamp_min(1e-12))
            return -self.value(deltas, s, P).double().cpu()

        opt = torch.optim.LBFGS(
            [x], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )
        opt.step(closure)
        closure()
        tolerance = TOLERANCE.get(self.matrix.M.dtype, 1e-2)
        if not slope.detach().max() < tolerance:
            raise RuntimeError(
                f"the search for the best marginal likelihood stopped at a relative slope of {float(slope.max()):.2g}"
                f", expected {tolerance:g}; use a coarser prior, such as per='one', or a float64 model"
            )
        return read()

    def _slopes(
        self, P: Precision, deltas: Precisions, groups: Mapping[str, tuple[str, ...]], entries: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`γ` and `δ Σ θ²` of every group, or of its single weights."""
        group_of = {n: g for g, names in groups.items() for n in names}

        def together(names: tuple[str, ...]) -> bool:
            return not entries and len({group_of[n] for n in names}) == 1

        gamma: dict[str, Tensor] = {}
        for names, found in P.determined(together).items():
            each = {names[0]: found} if isinstance(found, Tensor) else found
            for n, its in each.items():
                g = group_of[n]
                gamma[g] = gamma.get(g, 0) + (its if entries else its.sum())
        pull = {}
        for g, names in groups.items():
            terms = [deltas[n] * self.weights[n].square() for n in names]
            pull[g] = terms[0] if entries else torch.stack([t.sum() for t in terms]).sum()
        return [gamma[g] for g in groups], [pull[g] for g in groups]

    def _check_maximum(self, groups: Mapping[str, tuple[str, ...]], noise: bool) -> None:
        trace = self._traces()
        for g, names in groups.items():
            what = f"{g!r}" if g != "all" else "all weights"
            if not any(self.weights[n].any() for n in names):
                raise ValueError(
                    f"the weights of {what} are all zero, and the marginal likelihood grows with their precision "
                    "without bound; give their prior_precision, or use per='one'"
                )
            if not sum(trace[n] for n in names) > 0:
                raise ValueError(
                    f"the data do not depend on the weights of {what}: their curvature is zero, and the marginal "
                    "likelihood has no maximum in their precision; use per='one', or leave them out with subset="
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


def _mean_log(precisions: Precisions, names: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    if shape:
        return precisions[names[0]].double().log().expand(shape).cpu()
    return torch.stack([precisions[n].double().log().mean() for n in names]).mean().cpu()
