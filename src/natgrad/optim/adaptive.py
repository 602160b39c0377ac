"""The step that the optimizers share: follow the forwards, find a direction, choose its length, adapt the damping."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from natgrad.capture import Recorder
from natgrad.linalg.operator import check_damping
from natgrad.losses import ESTIMATORS, output_curvature
from natgrad.optim.batch import Batch, Forward, Objective, full_precision
from natgrad.optim.damping import LevenbergMarquardt, calibrate
from natgrad.optim.output import Way
from natgrad.optim.quadratic import Minimum, minimize
from natgrad.optim.vectors import Vector, combine, copied, dot, finite, gram
from natgrad.optim.watch import Watch
from natgrad.options import check_choice, select_parameters


class Adaptive(torch.optim.Optimizer, ABC):
    """Descent along `Δ = (F + λI)⁻¹ ∇` for some curvature `F`, everything adaptive by default:

        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch, and `λ`
    follows how well that model predicts the loss. A subclass says what `F` is, and how it is inverted.
    """

    _key: ClassVar[str]
    """Under which `state_dict` has what is not torch's own."""
    _what_is_inverted: ClassVar[str]
    _tolerated_rise: ClassVar[float]
    """A step after which the loss is higher by more than this share is taken back."""
    _rule: LevenbergMarquardt

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        lr: float | None,
        momentum: float | None,
        damping: float | None,
        weight_decay: float,
        estimator: str,
        adapt_every: int,
        output: Way | None,
        generator: torch.Generator | None,
    ):
        self._curvature = output_curvature(loss)
        if isinstance(loss, nn.GaussianNLLLoss):
            raise TypeError(
                f"{type(self).__name__} follows models that return one tensor, and nn.GaussianNLLLoss takes two; let "
                "the model return one, with natgrad.losses.Likelihood(lambda f: Normal(f[..., 0], f[..., 1].exp()))"
            )
        self._parameters = select_parameters(model)
        check_number("lr", lr)
        check_number("momentum", momentum)
        check_number("weight_decay", weight_decay)
        if damping is not None:
            check_damping(damping)
        check_choice("estimator", estimator, ESTIMATORS)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": list(self._parameters.values())}], defaults)

        self.model, self._output = model, output
        self.estimator, self.adapt_every = estimator, adapt_every
        device = next(iter(self._parameters.values())).device
        self._generator = generator or torch.Generator(device).manual_seed(torch.initial_seed())

        self.diagnostics: dict[str, Any] = {}
        self._damping, self._adaptive_damping = damping, damping is None
        self._steps = 0
        self._combination: list[float] | None = None
        self._rejections = 0  # in a row
        self._loss_before: float | None = None
        self._pending: list[Batch] = []
        self._watch = Watch(model, self._parameters)

    # What a subclass supplies --------------------------------------------------------------------------

    @abstractmethod
    def _statistics_due(self) -> bool:
        """Whether the next batches' statistics are wanted."""

    @abstractmethod
    def _observe(self, batch: Batch, recorder: Recorder, output: Tensor) -> None:
        """Takes the statistics of a batch, or notes its fault."""

    @abstractmethod
    def _take_in(self, objective: Objective, gradients: Vector) -> None:
        """Makes the curvature of the pending batches, for the parameters that have gradients."""

    @abstractmethod
    def _refresh(self, damping: float) -> None:
        """Inverts the damped curvature. Raises ValueError where that cannot be done."""

    @abstractmethod
    def _direction(self, g: Vector) -> Vector:
        """`Δ`, by the inverse as it is."""

    @abstractmethod
    def _scale(self) -> float:
        """The mean of the curvature's diagonal: what a damping is large or small against."""

    def _own_state(self) -> dict[str, Any]:
        """What the next steps depend on beside the parameters and the state that is kept here."""
        return {}

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        """Takes what `_own_state` gave."""

    def _check_own_state(self, saved: dict[str, Any]) -> None:
        """Raises ValueError if it is of other parameters."""

    def _prepare(self, damping: float) -> None:
        """Sees to it that there is an inverse for the next step."""
        self._refresh(damping)

    def _expire(self) -> None:
        """The inverse is not to be used again."""

    def _names(self, gradients: Vector) -> Sequence[str]:
        """The parameters that move."""
        return list(gradients)

    def _check_recorded(self, recorder: Recorder, output: Tensor) -> None:
        """Raises NotImplementedError for a parameter that the curvature does not cover."""
        recorder.check(output)

    # Between forward and step --------------------------------------------------------------------------

    def _arm(self) -> None:
        """Sets whether the next forward is recorded."""
        self._watch.recording = self._statistics_due() or self._runs_again()

    def _runs_again(self) -> bool:
        """Whether the step runs the model again."""
        return self._uses_quadratic_model()

    def _uses_quadratic_model(self) -> bool:
        group = self.param_groups[0]
        return self._adaptive_damping or group["lr"] is None or group["momentum"] is None

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """The loss module's value on `output`: a tensor that the last forward of the model returned (also one in an
        object or a dictionary), a view of it, or all that was returned where the optimizer has an `output=`.

        Backward from it, scaled or summed over microbatches as you like, then call `step`.

        Raises:
            RuntimeError: if no forward in training mode with gradients enabled came before.
            ValueError: if output and target do not fit the loss, or the batch is empty.
            NotImplementedError: if the output depends on a parameter in a way that no layer kind covers; it is named.
        """
        forward = self._watch.take()
        if forward is None:
            raise RuntimeError(
                "opt.loss follows a forward of the model in training mode with gradients enabled, and there was "
                "none since the last opt.loss; call model.train() and model(x) first, and for evaluation the "
                "loss module itself"
            )
        output, way = self._read(output, forward)
        with torch.autocast(output.device.type, enabled=False):
            return self._loss(forward, output, way, target)

    def _read(self, output: Any, forward: Forward) -> tuple[Tensor, Way | None]:
        """The loss's input, and how it came from what the model returned."""
        returned = forward.returned
        assert returned is not None
        if self._output is not None and output is returned.value:
            return full_precision(self._output(output)), self._output
        if not isinstance(output, Tensor):
            raise ValueError(
                f"opt.loss was given a {type(output).__name__}; expected the tensor that the loss takes. Give it one "
                "of those that the model returned, or pass output= (how to make it of what the model returns) to "
                f"{type(self).__name__} and give opt.loss all that the model returned"
            )
        return full_precision(output), returned.way_to(output)

    def _loss(self, forward: Forward, output: Tensor, way: Way | None, target: Tensor) -> Tensor:
        self._curvature.check(output, target)
        if output.numel() == 0:
            raise ValueError(f"the batch is empty: the output has shape {tuple(output.shape)}; skip empty batches")
        if self._runs_again() and way is None:
            raise ValueError(
                "opt.loss was not given a tensor that the model returned, or a view of one, but the adaptive step runs "
                f"the model again and needs it; pass output= to {type(self).__name__}, say output=lambda returned: "
                "returned.logits[:, :-1].flatten(0, 1), and give opt.loss all that the model returned. Or fix lr, "
                "momentum and damping (and the solver of a NaturalGradient)"
            )
        recorder, forward.recorder = forward.recorder, None
        if recorder is not None:
            self._check_recorded(recorder, output)
        loss = self._curvature.loss(output, target)
        mass = self._curvature.normalizer(output.detach(), target)
        batch = Batch(forward, target, output.shape, way, mass, loss.detach())
        if not torch.isfinite(loss):
            batch.fault = "the loss is not finite: look for NaN or inf in the batch"
        elif recorder is not None:
            if self._statistics_due():
                self._observe(batch, recorder, output)
            if self._runs_again():
                batch.uses = recorder.uses
        forward.returned = None
        if loss.requires_grad:
            loss.register_hook(batch.observe)
        self._pending.append(batch)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them the batches whose backward is in them."""
        self._pending = [b for b in self._pending if b.scale is None]
        super().zero_grad(set_to_none)

    # The step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters from their gradients. What was done is in `diagnostics`.

        A step that cannot be computed (a loss, gradient or curvature that is not finite, a loss that would rise)
        leaves the parameters as they are, warns, and raises the damping. If the loss is not finite because of the
        step before, that step is taken back.

        Raises:
            RuntimeError: if no `opt.loss` and backward came before.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        pending, self._pending = self._pending, []
        if any(b.scale is not None for b in pending):
            pending = [b for b in pending if b.scale is not None]
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not pending or not gradients:
            raise RuntimeError(
                "step() came before any loss: expected loss = opt.loss(model(x), y); loss.backward(); opt.step()"
            )
        self.diagnostics = {"step": self._steps, "accepted": True, "reason": "", "damping": self._damping}
        with self._watch.suspended(), torch.autocast(pending[0].target.device.type, enabled=False):
            fault = self._step(pending, gradients)
        if fault is not None:
            self._reject(fault)
        self._steps += 1
        self._arm()
        return value

    def _step(self, pending: list[Batch], gradients: Vector) -> str | None:
        objective = Objective(self.model, self._curvature, pending)
        fault = next((b.fault for b in pending if b.fault), None)
        if fault is not None:
            undone = not math.isfinite(objective.loss) and self._undo_last(objective)
            return "the loss is not finite after the last step, which is undone" if undone else fault
        eta = self.param_groups[0]["weight_decay"] / objective.scale if objective.scale else math.inf
        if not (objective.scale > 0 and math.isfinite(objective.scale)):
            return f"the loss was scaled by {objective.scale} before backward"
        self._take_in(objective, gradients)
        g = self._gradient(gradients, objective.scale, eta)
        if not finite(g):
            return "the gradient is not finite"
        if dot(g, g) == 0:
            return None  # nothing to do, and no direction to do it in
        loss = objective.loss + 0.5 * eta * self._square()
        self.diagnostics["loss"] = loss
        if self._damping is None:
            self._calibrate(objective, g, eta)
        elif self._was_too_far(objective.loss) and self._undo_last(objective, objective.loss):
            return f"the loss had risen to {objective.loss:.4g} by the last step, which is undone"
        self._loss_before = objective.loss
        return self._move(objective, g, eta, loss)

    def _was_too_far(self, loss: float) -> bool:
        """Whether the loss is so much above that of the step before that it is worth a forward to know why: the
        batch, or a step that was not measured."""
        before = self._loss_before
        return self._adaptive_damping and before is not None and loss > before + self._tolerated_rise * abs(before)

    def _gradient(self, gradients: Vector, scale: float, eta: float) -> Vector:
        """The objective's gradient per unit of the loss's mean."""
        names = self._names(gradients)
        values = [gradients[n] if n in gradients else torch.zeros_like(self._parameters[n]) for n in names]
        values = list(torch._foreach_mul(values, 1 / scale))
        if eta:
            torch._foreach_add_(values, [self._parameters[n] for n in names], alpha=eta)
        return dict(zip(names, values, strict=True))

    def _move(self, objective: Objective, g: Vector, eta: float, loss: float) -> str | None:
        damping = self._damping
        assert damping is not None
        try:
            self._prepare(damping + eta)
            direction = self._direction(g)
        except ValueError as error:
            if not self._adaptive_damping:
                raise
            return f"{self._what_is_inverted} could not be inverted: {error}"
        proposal = self._propose(objective, g, direction, damping + eta)
        if proposal is None:
            return "the quadratic model has no finite minimum"
        delta, change = proposal
        measured = self._adaptive_damping and (self._adaptation_due() or self._is_doubtful(loss, change))
        before = self._snapshot() if measured else {}
        self._add(delta)
        if measured:
            after = objective.evaluate() + 0.5 * eta * self._square()
            if not after <= loss + self._tolerated_rise * abs(loss):
                self._return_to(before)
                return f"the loss would have risen from {loss:.4g} to {after:.4g}"
            ratio = (after - loss) / change if change else 0.0
            self._damping = self._rule.adapt(damping, ratio, self._scale())
            self.diagnostics |= {"reduction_ratio": ratio, "loss_after": after}
        self._rejections = 0
        self.diagnostics["damping"] = self._damping
        for n, d in delta.items():
            self.state[self._parameters[n]]["delta"] = d
        return None

    def _adaptation_due(self) -> bool:
        return (self._steps + 1) % self.adapt_every == 0

    def _is_doubtful(self, loss: float, change: float) -> bool:
        """After a rejection, and where the model promises most of the loss: it does on saturated outputs, which
        have next to no curvature."""
        return self._rejections > 0 or -change > 0.5 * abs(loss)

    def _propose(
        self, objective: Objective, g: Vector, direction: Vector, total_damping: float
    ) -> tuple[Vector, float] | None:
        """The step `−α Δ + μ δ` and the quadratic model's change."""
        group = self.param_groups[0]
        directions = [direction]
        g = {n: g[n] for n in direction}
        previous = {n: s["delta"] for n in g if "delta" in (s := self.state[self._parameters[n]])}
        if len(previous) == len(g) and group["momentum"] != 0:
            directions.append(previous)
        fixed: dict[int, float] = {}
        if group["lr"] is not None:
            fixed[0] = -group["lr"]
        if group["momentum"] is not None and len(directions) > 1:
            fixed[1] = group["momentum"]
        along = self._combination
        if not self._uses_quadratic_model():
            coefficients, change = list(fixed.values()), 0.0
        elif along is not None and len(directions) == 2 and not fixed and not self._adaptation_due():
            # Between adaptations α and μ keep their ratio: the length alone takes one forward-mode pass, not two.
            minimum = self._minimum(objective, g, [combine(along, directions)], total_damping, {})
            if minimum is None:
                return None
            coefficients, change = [minimum.coefficients[0] * c for c in along], minimum.change
        else:
            minimum = self._minimum(objective, g, directions, total_damping, fixed)
            if minimum is None:
                return None
            coefficients, change = minimum.coefficients, minimum.change
            self._combination = coefficients if len(directions) == 2 else None
        self.diagnostics |= {"lr": -coefficients[0], "momentum": (*coefficients, 0.0)[1], "predicted_change": change}
        delta = combine(coefficients, directions)
        return (delta, change) if finite(delta) else None

    def _minimum(
        self, objective: Objective, g: Vector, directions: list[Vector], total_damping: float, fixed: dict[int, float]
    ) -> Minimum | None:
        Q = objective.products(directions) + total_damping * gram(directions)
        slope = torch.tensor([dot(g, d) for d in directions], dtype=torch.float64)
        return minimize(Q, slope, fixed)

    def _reject(self, fault: str) -> None:
        self.diagnostics |= {"accepted": False, "reason": fault}
        for p in self._parameters.values():
            self.state[p].pop("delta", None)
        self._combination = None
        self._rejections += 1
        if self._adaptive_damping and self._damping is not None:
            self._damping = self._rule.after_rejection(self._damping, self._rejections)
            self.diagnostics["damping"] = self._damping
        self._expire()
        warnings.warn(f"{type(self).__name__} rejected step {self._steps}: {fault}", RuntimeWarning, stacklevel=4)

    def _undo_last(self, objective: Objective, loss: float = math.inf) -> bool:
        """Takes the last step back if it has raised this batch's loss to `loss` by more than what is tolerated."""
        delta = {n: s["delta"] for n, p in self._parameters.items() if "delta" in (s := self.state[p])}
        if not delta:
            return False
        before = self._snapshot()
        self._add(delta, -1)
        without = objective.evaluate()
        if math.isfinite(without) and loss > without + self._tolerated_rise * abs(without):
            return True
        self._return_to(before)
        return False

    def _calibrate(self, objective: Objective, g: Vector, eta: float) -> None:
        """Chooses the first damping: the one whose step lowers the loss most."""
        scale = self._scale()

        def loss_after(damping: float) -> float:
            try:
                self._refresh(damping + eta)
                direction = self._direction(g)
            except ValueError:
                return math.inf
            proposal = self._propose(objective, g, direction, damping + eta)
            if proposal is None:
                return math.inf
            self._add(proposal[0])
            after = objective.evaluate() + 0.5 * eta * self._square()
            self._return_to(before)
            return after if math.isfinite(after) else math.inf

        before = self._snapshot()
        self._damping = calibrate(scale if scale > 0 else 1.0, loss_after)
        self._expire()

    def _snapshot(self) -> Vector:
        return {n: p.clone() for n, p in self._parameters.items()}

    def _return_to(self, before: Vector) -> None:
        """The parameters as they were: adding a step and taking it away would leave rounding behind."""
        for n, p in self._parameters.items():
            p.copy_(before[n])

    def _add(self, delta: Vector, sign: int = 1) -> None:
        torch._foreach_add_([self._parameters[n] for n in delta], list(delta.values()), alpha=sign)

    def _square(self) -> float:
        if self.param_groups[0]["weight_decay"] == 0:
            return 0.0
        return sum(float(p.square().sum()) for p in self._parameters.values())

    # Saving --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on beside the parameters: they resume bit for bit.

        As in torch, tensors are not copied.
        """
        own = {
            "steps": self._steps,
            "damping": self._damping,
            "combination": self._combination,
            "rejections": self._rejections,
            "loss_before": self._loss_before,
            "generator": self._generator.get_state(),
        }
        return super().state_dict() | {self._key: own | self._own_state()}

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            f"a {type(self).__name__} optimizer cannot be copied or pickled; make one for the new model and load "
            "state_dict()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave, for a model of the same parameters.

        Raises:
            ValueError: if it is not of such an optimizer, or of other parameters.
        """
        saved = state_dict.get(self._key)
        if saved is None:
            raise ValueError(
                f"the state has {', '.join(map(repr, state_dict))} and no {self._key!r}: it is not a "
                f"{type(self).__name__} optimizer's"
            )
        self._check_own_state(saved)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != self._key})
        saved = copied(saved, next(iter(self._parameters.values())).device)
        self._steps, self._damping, self._combination = saved["steps"], saved["damping"], saved["combination"]
        self._rejections, self._loss_before = saved["rejections"], saved["loss_before"]
        self._generator.set_state(saved["generator"].cpu())
        self._load_own_state(saved)
        self._pending = []
        self._arm()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises NotImplementedError: the parameters are those of the model, in one group."""
        if self.param_groups:
            raise NotImplementedError(
                f"{type(self).__name__} trains the parameters of its model in one group; make a new optimizer for a "
                "model that has grown"
            )
        super().add_param_group(param_group)


def check_number(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} is not usable: expected a number >= 0")
