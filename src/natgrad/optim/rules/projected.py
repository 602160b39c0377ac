"""The step with an exact curvature: momentum by projection, and acceleration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.optim.parameters import Parameters
from natgrad.optim.rules.length import NO_STEP, Proposal, StepRule, shrink
from natgrad.optim.rules.move import Part, Step
from natgrad.optim.rules.quadratic import Minimum
from natgrad.optim.rules.stage import Directions, Figures, Rejection, Stage
from natgrad.optim.vectors import Vector, dot, dots
from natgrad.optim.whole import uninterrupted

REACH = 0.1
"""The share of a step at which the second derivative of the outputs is measured."""
KEPT = 3
"""After this many rejections a step is tried without momentum."""
BENT = 0.75
"""The largest `2 ‖a‖ / ‖δ‖`. A longer acceleration is shortened, because the second-order expansion fails there."""


@runtime_checkable
class Columns(Directions, Protocol):
    """A preconditioner that may hold the columns of its matrix, `F = S Sᵀ` with `S = Jᵀ L` and `D = L Lᵀ`."""

    @property
    def holds_columns(self) -> bool:
        """Whether it holds the columns, and `F` is exact: no labels were drawn for it."""

    def inner(self, v: Vector) -> Tensor:
        """`Sᵀ v`."""

    def inner_outputs(self, outputs: list[Tensor]) -> Tensor:
        """`Lᵀ (f − f₀)` for every batch, with the current outputs `f` and the outputs `f₀` at the start of the step."""

    def solve_columns(self, c: Tensor) -> Vector:
        """`(F + λM)⁻¹ S c`."""

    def in_units_of_damping(self, v: Vector) -> Vector:
        """`M v`, where the damping adds `λ M` to the matrix."""


class Projected(StepRule):
    """`θ ← θ + δ + a` with `δ = −α Δ`, the direction `Δ = (F + λM)⁻¹ (∇ + λ μ M Δ₋)`, and the acceleration `a`.

    `λ M` is the damping, with `M = I` or another diagonal matrix. `Δ₋` is the previous direction: `−Δ` minimizes
    `∇ᵀd + ½ dᵀFd + ½ λ (d + μ Δ₋)ᵀ M (d + μ Δ₋)`. In directions that this batch does
    not determine, the result of the last batch is kept; the rest is projected away. As `λ` rises, the direction goes to
    `μ Δ₋` and not to zero. Therefore the momentum is left out after `KEPT` rejections.

    Along the step, the outputs have the second derivative `f'' = d²f(θ + t δ)/dt²`. The acceleration `a = −½ (F + λM)⁻¹
    Jᵀ D f''` cancels its effect to second order. It costs one forward pass and one solve.

    Args:
        parameters: the parameters that the step changes. A step size `α` of None is 1.
        directions: the preconditioner.
        max_kl: a bound on `½ δᵀFδ`, to which the step is shortened.
        max_norm: a bound on `‖δ‖`, likewise.
        accelerate: whether to use the acceleration. None: if the step size is adaptive and the matrix is exact.
        line_search: whether to halve the step as long as that lowers the loss.

    Reference: Goldshlager, Abrahamsen & Lin (2024), arXiv:2401.10190 (SPRING), for the momentum; Transtrum & Sethna
    (2012), arXiv:1201.5885, for the acceleration.
    """

    def __init__(
        self,
        parameters: Parameters,
        directions: Columns,
        max_kl: float | None,
        *,
        max_norm: float | None = None,
        accelerate: bool | None = None,
        line_search: bool = False,
    ):
        super().__init__(parameters, directions, max_kl)
        self.columns, self.max_norm, self.accelerate = directions, max_norm, accelerate
        self.line_search = line_search
        self._proposed: Minimum | None = None

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """Whether the step size is given."""
        return all(group["lr"] is not None for group in self.parameters.groups)

    @property
    def runs_again(self) -> bool:
        return not self.fixed or bool(self.accelerate)

    @property
    def searches(self) -> bool:  # type: ignore[override]
        return self.line_search and not self.fixed

    def predicted(self, share: float) -> float:
        return 0.0 if self._proposed is None else self._proposed.shortened(share).change

    def propose(self, stage: Stage, damping: float, figures: Figures, *, predicts: bool, joint: bool) -> Proposal:
        past = self._past(stage.gradient) if stage.rejected < KEPT else {}
        direction = self.directions.apply(self._pulled(stage.gradient, past, damping))
        direction = {n: d for n, d in direction.items() if n in stage.gradient}
        if not self.parameters.finite(direction):
            raise Rejection(NO_STEP)
        groups = self.parameters.by_group(direction)
        figures["momentum"] = groups[0][0]["momentum"] if past else 0.0
        free = self._length(stage, direction, damping)
        lengths = [free if group["lr"] is None else group["lr"] for group, _ in groups]
        delta = {n: -length * direction[n] for (_, own), length in zip(groups, lengths, strict=True) for n in own}
        share, change = self._share_of_norm(delta), 0.0
        inner = None
        if predicts or self.runs_again or self.max_kl is not None:
            inner, model, kl = self._model(stage, delta)
            # A step at its bound shows that the damping is too small. A step whose predicted decrease is too large does
            # not.
            share = min(share, self._share_of_kl(stage, kl))
            self.share = share
            share = min(share, self._share_promised(stage, model))
            self._proposed = model.shortened(share)
            change = self._proposed.change
            if self.max_kl is not None:
                figures["kl"] = share**2 * kl
        if share != 1:
            delta = {n: share * d for n, d in delta.items()}
        if self._bends(stage, inner):
            assert inner is not None
            delta = self._bent(stage, delta, share * inner, figures)
        figures |= {"lr": share * lengths[0], "predicted_change": change}
        each = zip(groups, lengths, strict=True)
        parts = [
            Part(own, 1.0, shrink(group, share * length), float(group["lr"] or 1)) for (group, own), length in each
        ]
        return Step(delta, parts), change

    def _past(self, names: Iterable[str]) -> Vector:
        """The last step; empty if it did not have all of these parameters."""
        states = {n: self.parameters.state_of(n) for n in names}
        past = {n: s["delta"] for n, s in states.items() if "delta" in s}
        return past if len(past) == len(states) else {}

    def _pulled(self, g: Vector, past: Vector, damping: float) -> Vector:
        """`∇ + λ μ M Δ₋`, with `Δ₋ = −δ₋ / α₋` and the last step's size `α₋`."""
        pulled, past = dict(g), self.columns.in_units_of_damping(past)
        for group, own in self.parameters.by_group(past):
            for n in own if group["momentum"] else ():
                length = self.parameters.state_of(n).get("length", group["lr"] or 1.0)
                pulled[n] = torch.add(g[n], past[n], alpha=-damping * group["momentum"] / length)
        return pulled

    def _length(self, stage: Stage, direction: Vector, damping: float) -> float:
        """The step size, if it is not given. If labels were drawn, or a solve was stopped early, the exact quadratic
        model gives it."""
        if self.fixed or self.columns.holds_columns:
            return 1.0
        return -self._minimum(stage, [direction], damping, {}).coefficients[0]

    def _model(self, stage: Stage, delta: Vector) -> tuple[Tensor | None, Minimum, float]:
        """`Sᵀδ`, if `S` is known; the quadratic model `∇ᵀδ + ½ δᵀ(F + ηI)δ` along the step; and `½ δᵀFδ`."""
        inner = self.columns.inner(delta) if self.columns.holds_columns else None
        square = float(stage.objective.products([delta])[0, 0] if inner is None else inner.square().sum())
        decayed = float(stage.decay.gram([delta])[0, 0])
        slope, decayed = self.parameters.total([dot(stage.gradient, delta), decayed])
        return inner, Minimum([1.0], slope, 0.5 * (square + decayed)), 0.5 * square

    def _share_of_norm(self, delta: Vector) -> float:
        if self.max_norm is None:
            return 1.0
        (square,) = self.parameters.total([dot(delta, delta)])
        return min(1.0, self.max_norm / math.sqrt(square)) if square > 0 else 1.0

    def _share_of_kl(self, stage: Stage, kl: float) -> float:
        """The share of the step that is within the bound on the divergence. If there is no loss to measure, the bound
        gives the length."""
        if self.fixed or stage.objective.measurable:
            return self._share_within(kl)
        if self.max_kl is None:
            raise NotImplementedError(
                "opt.predict gives the curvature of a distribution and no loss to choose a step size by; give the "
                "optimizer max_kl=0.01, to whose bound the step goes then, or a number for lr"
            )
        if not (math.isfinite(kl) and kl > 0):
            raise Rejection(NO_STEP)
        return math.sqrt(self.max_kl / kl)

    def _share_promised(self, stage: Stage, model: Minimum) -> float:
        """The share of the step whose predicted decrease is at most the loss."""
        bounded = stage.objective.measurable and stage.objective.nonnegative and stage.loss > 0
        return model.share_that_promises(stage.loss) if bounded else 1.0

    def _bends(self, stage: Stage, inner: Tensor | None) -> bool:
        """Whether the step gets the acceleration. `inner` is `Sᵀδ`, if it is known."""
        if self.fixed if self.accelerate is None else not self.accelerate:
            return False
        objective = stage.objective
        if inner is not None and objective.measurable and objective.runs_again and not objective.penalties:
            return True
        if self.accelerate:
            raise NotImplementedError(
                "accelerate=True was given, but the outputs cannot be computed along this step, or the matrix is not "
                "the exact one: expected losses by opt.loss without opt.plus, and solver='dual' or 'primal' with "
                "estimator='exact'; leave accelerate out"
            )
        return False

    def _bent(self, stage: Stage, delta: Vector, inner: Tensor, figures: Figures) -> Vector:
        """`δ + a`, with `a` shortened if it is large compared with `δ`."""
        moved = self.columns.inner_outputs(self._outputs_along(stage, delta))
        if stage.objective.moved:  # since the forward, whose outputs are subtracted
            moved = moved - self.columns.inner_outputs(stage.objective.outputs())
        second = (moved - REACH * inner) * (2 / REACH**2)
        a = {n: d for n, d in self.columns.solve_columns(second).items() if n in delta}
        square, its = self.parameters.total(dots([(delta, delta), (a, a)]))
        if not (square > 0 and math.isfinite(its)):
            return delta
        bending = figures["bending"] = math.sqrt(its / square)
        share = min(1.0, BENT / bending) if bending > 0 else 0.0
        return {n: torch.add(d, a[n], alpha=-0.5 * share) for n, d in delta.items()}

    def _outputs_along(self, stage: Stage, delta: Vector) -> list[Tensor]:
        """The outputs at a small share of the step."""
        own, before = self.parameters.local(), self.parameters.snapshot()
        try:
            for n, d in delta.items():
                own[n].add_(d, alpha=REACH)
            return stage.objective.outputs()
        finally:
            with uninterrupted():
                self.parameters.return_to(before)
