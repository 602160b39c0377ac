"""The length of a step: from the quadratic model, or given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from natgrad.optim.parameters import Parameters
from natgrad.optim.rules.momentum import heavy_ball, nesterov
from natgrad.optim.rules.move import Part, Step
from natgrad.optim.rules.quadratic import Minimum, minimize
from natgrad.optim.rules.stage import Directions, Figures, Rejection, Stage
from natgrad.optim.vectors import Vector, combine, dots

NO_STEP = "the direction is not finite, or the quadratic model has no finite minimum"


class StepRule(ABC):
    """How a direction becomes a step.

    Args:
        parameters: the parameters that the step changes.
        directions: the preconditioner.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step. A longer step is shortened to it.
    """

    fixed: bool
    """Whether step size and momentum are given."""

    @property
    def runs_again(self) -> bool:
        """Whether it may run the model again to find the step."""
        return not self.fixed

    shortens = False
    """Whether a step that would raise the loss is tried again at a part of its length."""
    searches = False
    """Whether the length with the lowest loss is looked for."""

    def __init__(self, parameters: Parameters, directions: Directions, max_kl: float | None):
        self.parameters, self.directions, self.max_kl = parameters, directions, max_kl
        self.share = 1.0

    @abstractmethod
    def propose(self, stage: Stage, damping: float, figures: Figures, *, predicts: bool, joint: bool) -> Proposal:
        """The step, and the change of the objective that the quadratic model predicts for it.

        Args:
            stage: what the step starts from.
            damping: `λ`.
            figures: receives `lr`, `momentum` and `predicted_change`.
            predicts: whether the prediction is needed, if it has a cost.
            joint: whether step size and momentum are chosen jointly; otherwise they keep their ratio.

        Raises:
            Rejection: if there is no finite step.
            ValueError: if the damped curvature has no inverse.
        """

    def predicted(self, share: float) -> float:
        """The change of the objective that the quadratic model predicts for a share of the proposed step. A rule that
        searches must have it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method predicted; expected one that predicts the change for a share of the "
            "step, or the class attribute searches = False"
        )

    def forget(self) -> None:  # noqa: B027
        """Forgets the last step, because it was not taken."""

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Loads the result of `state`."""

    def _minimum(self, stage: Stage, directions: list[Vector], damping: float, fixed: dict[int, float]) -> Minimum:
        """The minimum of the quadratic model `½ dᵀ(F + λI)d + gᵀd` in the span of some directions, with some
        coefficients given."""
        F = stage.objective.products(directions)
        Q = self.directions.damped_gram(directions, damping) + stage.decay.gram(directions)
        gradient = {n: stage.gradient[n] for n in directions[0]}  # not of what has no direction yet
        slope = torch.tensor(dots((gradient, d) for d in directions), dtype=torch.float64)
        numbers = torch.tensor(self.parameters.total([*Q.flatten().tolist(), *slope.tolist()]), dtype=Q.dtype)
        Q, slope = F + numbers[: Q.numel()].view_as(F), numbers[Q.numel() :]
        minimum = minimize(Q, slope, fixed)
        if minimum is None:
            raise Rejection(NO_STEP)
        return self._bounded(minimum, F, stage)

    def _bounded(self, minimum: Minimum, F: torch.Tensor, stage: Stage) -> Minimum:
        return minimum

    def _share_within(self, kl: float) -> float:
        """The share of a step that is within `max_kl`."""
        if self.max_kl is None or not kl > self.max_kl:
            return 1.0
        return math.sqrt(self.max_kl / kl)


Proposal = tuple[Step, float]


class Fixed(StepRule):
    """The step of `torch.optim.SGD` on a preconditioned gradient: `v ← μ v + ∇`, `θ ← θ − α (F + λI)⁻¹ v`."""

    fixed = True

    def propose(self, stage: Stage, damping: float, figures: Figures, *, predicts: bool, joint: bool) -> Proposal:
        g, parameters = stage.gradient, self.parameters
        past = any("momentum_buffer" in parameters.state_of(n) for n in g)
        v = heavy_ball(g, parameters)
        direction = self.directions.apply(nesterov(v, g, parameters) if self.directions.nesterov else v)
        direction = {n: d for n, d in direction.items() if n in g}
        if not parameters.finite(direction):
            raise Rejection(NO_STEP)
        steps = parameters.by_group(direction)
        share = 1.0
        if self.max_kl is not None:
            # (F + λI) Δ = v, so the step's ½ δᵀFδ is at most this.
            products = dots(({n: v[n] for n in own}, {n: direction[n] for n in own}) for _, own in steps)
            kl = sum(0.5 * group["lr"] ** 2 * p for (group, _), p in zip(steps, products, strict=True))
            share = self._share_within(parameters.total([kl])[0])
        self.share = share
        parts = [Part(own, -group["lr"] * share, shrink(group, group["lr"])) for group, own in steps]
        step, first = Step(direction, parts), parameters.groups[0]
        figures |= {"lr": first["lr"] * share, "momentum": first["momentum"] if past else 0.0, "predicted_change": 0.0}
        if not predicts:
            return step, 0.0
        minimum = self._minimum(stage, [step.delta], damping, {0: 1.0})
        figures["predicted_change"] = minimum.change
        return step, minimum.change


class Adaptive(StepRule):
    """`−α Δ + μ δ` with `Δ = (F + λI)⁻¹ ∇` and the previous step `δ`. Those of `α` and `μ` that are not given minimize
    the quadratic model with the exact curvature of the batch.

    Reference: Martens & Grosse (2015), sections 6.4 and 7.
    """

    fixed = False
    shortens = True

    def __init__(self, parameters: Parameters, directions: Directions, max_kl: float | None):
        super().__init__(parameters, directions, max_kl)
        self.combination: list[float] | None = None

    def propose(self, stage: Stage, damping: float, figures: Figures, *, predicts: bool, joint: bool) -> Proposal:
        if not stage.objective.measurable:
            return self._to_the_bound(stage, figures)
        group, direction = self.parameters.groups[0], self.directions.apply(stage.gradient)
        stage = Stage(stage.objective, {n: stage.gradient[n] for n in direction}, stage.decay, stage.loss)
        directions = [direction]
        previous = {n: s["delta"] for n in direction if "delta" in (s := self.parameters.state_of(n))}
        if len(previous) == len(direction) and group["momentum"] != 0:
            directions.append(previous)
        fixed: dict[int, float] = {}
        if group["lr"] is not None:
            fixed[0] = -group["lr"]
        if group["momentum"] is not None and len(directions) > 1:
            fixed[1] = group["momentum"]
        along = self.combination
        if along is not None and len(directions) == 2 and not fixed and not joint:
            # Between adaptations α and μ keep their ratio: the length needs only one forward-mode pass, not two.
            delta = combine(along, directions)
            minimum = self._minimum(stage, [delta], damping, {})
            (length,) = minimum.coefficients
            coefficients = [length * c for c in along]
            torch._foreach_mul_(list(delta.values()), length)
        else:
            minimum = self._minimum(stage, directions, damping, fixed)
            coefficients = minimum.coefficients
            self.combination = coefficients if len(directions) == 2 else None
            delta = combine(coefficients, directions)
        change = minimum.change
        figures |= {"lr": -coefficients[0], "momentum": (*coefficients, 0.0)[1], "predicted_change": change}
        if not self.parameters.finite(delta):
            raise Rejection(NO_STEP)
        parts = [Part(own, 1.0, shrink(group, -coefficients[0])) for group, own in self.parameters.by_group(delta)]
        return Step(delta, parts), change

    def _to_the_bound(self, stage: Stage, figures: Figures) -> Proposal:
        """`−α Δ` with `½ α² ΔᵀFΔ` equal to `max_kl`. If gradient and curvature belong to different objectives, the
        quadratic model cannot give the length.

        Reference: Kakade (2001), "A Natural Policy Gradient"; Schulman et al. (2015), arXiv:1502.05477.
        """
        if self.max_kl is None:
            raise NotImplementedError(
                "opt.predict gives the curvature of a distribution and no loss to choose a step size by; give the "
                "optimizer max_kl=0.01, to whose bound the step goes then, or numbers for lr and momentum"
            )
        direction = self.directions.apply(stage.gradient)
        kl = 0.5 * float(stage.objective.products([direction])[0, 0])
        if not (math.isfinite(kl) and kl > 0 and self.parameters.finite(direction)):
            raise Rejection(NO_STEP)
        length = math.sqrt(self.max_kl / kl)
        figures |= {"lr": length, "momentum": 0.0, "kl": self.max_kl}
        parts = [Part(own, -length, shrink(group, length)) for group, own in self.parameters.by_group(direction)]
        return Step(direction, parts), 0.0

    def forget(self) -> None:
        self.combination = None

    def state(self) -> dict[str, Any]:
        return {"combination": self.combination}

    def load(self, state: dict[str, Any]) -> None:
        self.combination = state["combination"]

    def _bounded(self, minimum: Minimum, F: torch.Tensor, stage: Stage) -> Minimum:
        """The minimum, shortened to the bound on the divergence, and so that the predicted decrease is at most the
        loss."""
        if self.max_kl is not None:
            c = torch.tensor(minimum.coefficients, dtype=torch.float64)
            minimum = minimum.shortened(self._share_within(0.5 * float(c @ F @ c)))
        if stage.objective.nonnegative and stage.loss > 0:  # a target out of range makes it negative
            minimum = minimum.shortened(minimum.share_that_promises(stage.loss))
        return minimum


def shrink(group: dict[str, Any], length: float) -> float:
    """The factor of the parameters from decoupled weight decay, for a step of this length."""
    return 1 - length * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
