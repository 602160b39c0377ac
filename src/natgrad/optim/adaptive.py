"""The step that the optimizers share: find a direction, choose its length, adapt the damping."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

from natgrad.checks.values import check_flag, check_number, check_within
from natgrad.checks.warning import warn
from natgrad.curvature.jacobian import Jacobian
from natgrad.linalg.precision import check_precision
from natgrad.optim import averaging, shown
from natgrad.optim.batch import Batch, Objective
from natgrad.optim.damping import LevenbergMarquardt, calibrate
from natgrad.optim.decay import Decay
from natgrad.optim.move import Part, Step
from natgrad.optim.output import Way
from natgrad.optim.parameter_groups import Groups
from natgrad.optim.quadratic import Minimum, minimize
from natgrad.optim.resuming import Resuming
from natgrad.optim.scaler import scale_taken_out
from natgrad.optim.vectors import Vector, check_dense, combine, dot, dots, finite, gram

BACKTRACKING = (0.25, 0.0625, 0.015625)
"""The shares of a step that are tried where the whole of it would raise the loss."""

DIVERGED = 9.0
"""How many times the first loss a loss has risen by in a run that is said to diverge."""
HOPELESS = 8
"""How many steps in a row are rejected in a run that has diverged before it ends."""
MEND = "give max_kl=0.01, which bounds a step, a larger damping, or a smaller lr; or leave all three out"
NO_SCHEDULER = (
    "a scheduler of torch.optim.lr_scheduler is to change lr, which is None here: it is adapted at every step. Give "
    "numbers for lr and momentum, or leave the scheduler out"
)


class Adaptive(Resuming):
    """Descent along `Δ = (F + λI)⁻¹ ∇` for some curvature `F`, everything adaptive by default:

        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch, and `λ`
    follows how well that model predicts the loss. Where both are numbers, the step is that of `torch.optim.SGD` on a
    preconditioned gradient:

        v ← μ v + ∇        θ ← θ − α (F + λI)⁻¹ v

    A subclass says what `F` is, and how it is inverted.
    """

    _what_is_inverted: ClassVar[str]
    _tolerated_rise: ClassVar[float]
    """A step after which the loss is higher by more than this share is taken back."""
    _rule: LevenbergMarquardt

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        params: Groups,
        lr: float | None,
        momentum: float | None,
        damping: float | None,
        weight_decay: float,
        decoupled_weight_decay: bool,
        max_kl: float | None,
        average: float | None,
        estimator: str,
        adapt_every: int,
        matmul_precision: str | None,
        output: Way | None,
        generator: torch.Generator | None,
        more: dict[str, Any] | None = None,
    ):
        check_number("damping", damping, optional=True)
        check_precision(matmul_precision)
        check_number("max_kl", max_kl, optional=True, positive=True)
        check_within("average", average, "[0, 1)", optional=True)
        check_flag("decoupled_weight_decay", decoupled_weight_decay)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            **(more or {}),
        }
        super().__init__(model, loss, params, defaults, estimator=estimator, output=output, generator=generator)
        self.adapt_every, self.max_kl, self.matmul_precision = adapt_every, max_kl, matmul_precision
        self.average = average
        self._jacobian = Jacobian()
        self.diagnostics: dict[str, Any] = {}
        self._damping, self._adaptive_damping = damping, damping is None
        self._diverged = False

    # What a subclass supplies --------------------------------------------------------------------------

    @abstractmethod
    def _take_in(self, objective: Objective, gradients: Vector) -> None:
        """Makes the curvature of the pending batches, for the parameters that have gradients."""

    @abstractmethod
    def _refresh(self, damping: float, decay: Decay) -> None:
        """Inverts the damped curvature. Raises ValueError where that cannot be done."""

    @abstractmethod
    def _direction(self, v: Vector) -> Vector:
        """`(F + λI)⁻¹ v`, by the inverse as it is."""

    @abstractmethod
    def _scale(self) -> float:
        """The mean of the curvature's diagonal: what a damping is large or small against."""

    def _prepare(self, damping: float, decay: Decay) -> None:
        """Sees to it that there is an inverse for the next step."""
        self._refresh(damping, decay)

    def _expire(self) -> None:
        """The inverse is not to be used again."""

    def _names(self, gradients: Vector) -> Sequence[str]:
        """The parameters that move."""
        return list(gradients)

    def _see_gradient(self, g: Vector) -> None:
        """Takes note of the step's gradient."""

    def _with_momentum(self, g: Vector) -> Vector:
        """`v ← μ v + ∇`, as `torch.optim.SGD` has it."""
        v = dict(g)
        for group, names in self._by_group(g):
            if group["momentum"] == 0:
                continue
            states = {n: self._state_of(n) for n in names}
            begun = [n for n in names if "momentum_buffer" in states[n]]
            if begun:
                buffers = [states[n]["momentum_buffer"] for n in begun]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, [g[n] for n in begun])
            for n, state in states.items():
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = g[n].clone()
                v[n] = state["momentum_buffer"]
        return v

    def _damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        """What the damping adds to the quadratic model: this rank's share of `λ d_iᵀ d_j`."""
        return damping * gram(directions)

    # How it is shown -----------------------------------------------------------------------------------

    def _chosen(self) -> dict[str, Any]:
        """What kind of curvature was chosen."""
        return {}

    def _layers_known(self) -> list[str]:
        """The layers that the curvature has blocks of, as far as they are known."""
        return []

    def __repr__(self) -> str:
        return shown.line(self)

    def _repr_html_(self) -> str:
        return shown.html(self)

    # When ----------------------------------------------------------------------------------------------

    def _is_fixed(self) -> bool:
        """Whether step size and momentum are given."""
        return all(group["lr"] is not None and group["momentum"] is not None for group in self.param_groups)

    def _runs_again(self) -> bool:
        return not self._is_fixed() or self._measures()

    def _may_run_again(self) -> bool:
        return not self._is_fixed() or self._adaptive_damping

    def _measures(self) -> bool:
        """Whether this step's loss is measured, whatever the model promises."""
        return self._adaptive_damping and (self._adaptation_due() or self._rejections > 0 or self._damping is None)

    def _adaptation_due(self) -> bool:
        return (self._steps + 1) % self.adapt_every == 0

    # The step ------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """One of torch's schedulers, when it is made, wraps `step` before it computes with `lr`."""
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched") and self._adapts_lr:
            raise ValueError(NO_SCHEDULER)
        super().__setattr__(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters from their gradients. What was done is in `diagnostics`.

        A step that cannot be computed (a loss, gradient or curvature that is not finite, a loss that would rise)
        leaves the parameters as they are, warns, and raises the damping. If the loss is not finite because of the
        step before, that step is taken back.

        Raises:
            RuntimeError: if no `opt.loss` and backward came before.
            ValueError: if one of torch's schedulers is to change a step size that is adapted; if a run with numbers of
                the user's own has diverged beyond return.
        """
        if self._adapts_lr and any("initial_lr" in group for group in self.param_groups):
            raise ValueError(NO_SCHEDULER)
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        pending, self._pending = self._pending, []
        if any(b.scale is not None for b in pending):
            pending = [b for b in pending if b.scale is not None]
        gradients = {n: self._place.local(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        Join.notify_join_context(self)
        if closure is not None and value is None and self._world.size == 1 and not (pending or gradients):
            return None  # a closure that found nothing to do, as where Lightning's training_step returns None
        check_dense(gradients)
        if self._world.size == 1 and not (pending and gradients):
            early = "loss.backward()" if pending else "any loss that opt.loss gave" if gradients else "any loss"
            raise RuntimeError(
                f"step() came before {early}: expected loss = opt.loss(model(x), y); loss.backward(); opt.step()"
            )
        self.diagnostics = {"step": self._steps, "accepted": True, "reason": "", "damping": self._damping}
        self.diagnostics |= {"loss": None, "lr": None, "momentum": None, "predicted_change": None}
        assert self._watch is not None
        with self._watch.suspended(), torch.autocast(self._device.type, enabled=False):
            fault = self._step(pending, gradients)
        self._place.settle()
        self._watch.buffers.end_step(accepted=fault is None)
        if fault is not None:
            self._reject(fault)
        self.diagnostics["faults"] = dict(self._faults)
        self._steps += 1
        self._arm()
        if fault is not None and self._diverged and self._rejections >= HOPELESS:
            raise ValueError(
                f"the run has diverged, and the last {self._rejections} steps were rejected ({fault}); {MEND}"
            )
        return value

    def _step(self, pending: list[Batch], gradients: Vector) -> str | None:
        objective = Objective(self._place, self._curvature, pending, self.matmul_precision, self._jacobian)
        if objective.idle:
            gradients = self._from_others(gradients)
        objective.scale /= scale_taken_out()
        fault = objective.fault
        if fault is not None:
            undone = not math.isfinite(objective.loss) and self._undo_last(objective)
            return "the loss is not finite after the last step, which is undone" if undone else fault
        if not (objective.scale > 0 and math.isfinite(objective.scale)):
            return f"the loss was scaled by {objective.scale} before backward"
        self._take_in(objective, gradients)
        decay = self._decay(objective.scale)
        g = self._gradient(gradients, objective.scale, decay)
        (square,) = self._total([dot(g, g)])
        if not (math.isfinite(square) or self._finite(g)):
            return "the gradient is not finite"
        if square == 0 and not self._is_fixed():
            return None  # nothing to do, and no direction to do it in
        self._see_gradient(g)
        loss = objective.loss + self._penalty(decay)
        self.diagnostics["loss"] = loss
        self._look_for_divergence(loss)
        if self._damping is None:
            self._calibrate(objective, g, decay)
        elif self._was_too_far(objective.loss) and self._undo_last(objective, objective.loss):
            return f"the loss had risen to {objective.loss:.4g} by the last step, which is undone"
        self._loss_before = objective.loss
        return self._move(objective, g, decay, loss)

    def _look_for_divergence(self, loss: float) -> None:
        """Says it, once, where a run with numbers of the user's own goes astray: there nothing is undone."""
        if self._first_loss is None:
            self._first_loss = loss
        if not self._is_fixed() or self._adaptive_damping or self._diverged:
            return
        if loss - self._first_loss > DIVERGED * abs(self._first_loss):
            self._diverged = True
            warn(
                f"{type(self).__name__} diverges: the loss is {loss:.4g} at step {self._steps}, and was "
                f"{self._first_loss:.4g} at the first. With numbers for lr, momentum and damping nothing is undone: "
                f"{MEND}"
            )

    def _from_others(self, gradients: Vector) -> Vector:
        """The gradients, for a rank that has none as it has run out of data, from the first that has."""
        if self._place.shards is not None:
            return gradients
        have = self._world.gather(list(gradients), "whose gradients there are")
        source = next((r for r, names in enumerate(have) if names), 0)
        if all(have):
            return gradients
        own = self._values
        for n in have[source]:
            g = gradients.get(n)
            mine = torch.zeros_like(own[n]) if g is None or self._world.rank != source else g.clone()
            gradients[n] = self._world.sum(mine, "gradients of ranks that have data")
        return gradients

    def _was_too_far(self, loss: float) -> bool:
        """Whether the loss is so much above that of the step before that it is worth a forward to know why: the
        batch, or a step that was not measured."""
        before = self._loss_before
        return self._adaptive_damping and before is not None and loss > before + self._tolerated_rise * abs(before)

    def _decay(self, scale: float) -> Decay:
        """Weight decay that is part of the objective."""
        eta = {
            n: group["weight_decay"] / scale
            for group, names in self._by_group(self._parameters)
            if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]
            for n in names
        }
        return Decay(eta)

    def _penalty(self, decay: Decay) -> float:
        """The objective's share of weight decay."""
        return self._total([decay.value(self._values)])[0] if decay.eta else 0.0

    def _total(self, values: list[float]) -> list[float]:
        """Sums over the entries of what this rank has of the parameters, over all of them: the same on all ranks."""
        return self._place.total(values)

    def _finite(self, v: Vector) -> bool:
        return not self._place.any(not finite(v))

    def _gradient(self, gradients: Vector, scale: float, decay: Decay) -> Vector:
        """The objective's gradient per unit of the loss's mean."""
        names = self._names(gradients)
        own = self._values
        values = [gradients[n] if n in gradients else torch.zeros_like(own[n]) for n in names]
        g = dict(zip(names, torch._foreach_mul(values, 1 / scale), strict=True))
        decay.add_gradient(g, own)
        return g

    def _move(self, objective: Objective, g: Vector, decay: Decay, loss: float) -> str | None:
        damping = self._damping
        assert damping is not None
        try:
            self._prepare(damping, decay)
            step, change = self._propose(objective, g, damping, decay)
        except ValueError as error:
            if self._diverged:
                raise ValueError(f"the run has diverged, to a loss of {loss:.4g} ({error}); {MEND}") from error
            if not self._adaptive_damping:
                raise
            return f"{self._what_is_inverted} could not be inverted: {error}"
        if step is None:
            return "the direction is not finite, or the quadratic model has no finite minimum"
        measured = self._measures() or (self._adaptive_damping and self._is_doubtful(loss, change))
        before = self._snapshot() if measured else {}
        step.take(self._values)
        if measured:
            after = self._loss_now(objective, decay)
            if not after <= loss + self._tolerated_rise * abs(loss):
                self._return_to(before)
                shorter = None if self._is_fixed() else self._backtrack(objective, step, decay, loss, before)
                if shorter is None:
                    return f"the loss would have risen from {loss:.4g} to {after:.4g}"
                step = shorter
            else:
                ratio = (after - loss) / change if change else 0.0
                self._damping = self._rule.adapt(damping, ratio, self._scale())
                self.diagnostics |= {"reduction_ratio": ratio, "loss_after": after}
        self._rejections = 0
        self.diagnostics["damping"] = self._damping
        for n, d in step.delta.items():
            self._state_of(n)["delta"] = d
        if self.average is not None:
            own = self._values
            averaging.take_in({n: own[n] for n in step.direction}, self._state_of, self.average)
        return None

    def _backtrack(self, objective: Objective, step: Step, decay: Decay, loss: float, before: Vector) -> Step | None:
        """The step at the first of some shorter lengths at which the loss does not rise, taken; None: at none of them.

        Where few outputs have any curvature left, as those of one example that is wrong and sure of it among many that
        are right, the direction is good and the length of the quadratic model is not. Damping alone falls again before
        the example comes back, would leave it as it is for ever.
        """
        for share in BACKTRACKING:
            shorter = step.shortened(share)
            shorter.take(self._values)
            after = self._loss_now(objective, decay)
            if after <= loss:
                self._faults["shortened"] += 1
                self._damping = self._rule.after_rejection(self._damping or 0.0, 1)
                self.diagnostics |= {"shortened": share, "loss_after": after}
                self._combination = None
                self._expire()
                return shorter
            self._return_to(before)
        return None

    def _loss_now(self, objective: Objective, decay: Decay) -> float:
        """The objective on the pending batches at the parameters as they are."""
        return objective.evaluate() + self._penalty(decay)

    def averaged(self) -> AbstractContextManager[None]:
        """A context within which the model has the averages of its parameters: for evaluation, and to save them.

        Statistics of batch normalization are those of the last iterate; `torch.optim.swa_utils.update_bn` takes new
        ones.

        Raises:
            RuntimeError: if the optimizer keeps none.
        """
        if self.average is None:
            raise RuntimeError(
                f"there are no averages; make the optimizer with {type(self).__name__}(..., average=0.98)"
            )
        return self._swapped()

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        try:
            with averaging.swapped(self._values, self._state_of):
                self._place.settle()
                yield
        finally:
            self._place.settle()

    def _state_of(self, name: str) -> dict[str, Any]:
        return self.state[self._parameters[name]]

    def _is_doubtful(self, loss: float, change: float) -> bool:
        """Where the model promises most of the loss: it does on saturated outputs, which have next to no curvature."""
        return -change > 0.5 * abs(loss)

    def _propose(self, objective: Objective, g: Vector, damping: float, decay: Decay) -> tuple[Step | None, float]:
        """The step and the quadratic model's change, zero where that is not asked for."""
        if self._is_fixed():
            return self._fixed_step(objective, g, damping, decay)
        return self._adaptive_step(objective, g, damping, decay)

    def _fixed_step(self, objective: Objective, g: Vector, damping: float, decay: Decay) -> tuple[Step | None, float]:
        past = any("momentum_buffer" in self.state[self._parameters[n]] for n in g)
        v = self._with_momentum(g)
        direction = self._direction(v)
        names = {n: d for n, d in direction.items() if n in g}
        if not self._finite(names):
            return None, 0.0
        steps = [(group, own) for group, own in self._by_group(names)]
        share = 1.0
        if self.max_kl is not None:
            # (F + λI) Δ = v, so that the step's ½ δᵀFδ is at most this.
            lengths = [(group["lr"], own) for group, own in steps]
            products = dots(({n: v[n] for n in own}, {n: names[n] for n in own}) for _, own in lengths)
            kl = sum(0.5 * lr**2 * product for (lr, _), product in zip(lengths, products, strict=True))
            share = self._share_within(self._total([kl])[0])
        parts = [Part(own, -group["lr"] * share, _shrink(group, group["lr"])) for group, own in steps]
        step = Step(names, parts)
        first = self.param_groups[0]
        self.diagnostics |= {
            "lr": first["lr"] * share,
            "momentum": first["momentum"] if past else 0.0,
            "predicted_change": 0.0,
        }
        if not (self._measures() or self._damping is None):
            return step, 0.0
        minimum = self._minimum(objective, g, [step.delta], damping, decay, {0: 1.0})
        if minimum is None:
            return None, 0.0
        self.diagnostics["predicted_change"] = minimum.change
        return step, minimum.change

    def _adaptive_step(
        self, objective: Objective, g: Vector, damping: float, decay: Decay
    ) -> tuple[Step | None, float]:
        """`−α Δ + μ δ`, with what is free of `α` and `μ` from the quadratic model."""
        group, direction = self.param_groups[0], self._direction(g)
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
        if along is not None and len(directions) == 2 and not fixed and not self._adaptation_due():
            # Between adaptations α and μ keep their ratio: the length alone takes one forward-mode pass, not two.
            delta = combine(along, directions)
            minimum = self._minimum(objective, g, [delta], damping, decay, {})
            if minimum is None:
                return None, 0.0
            (length,) = minimum.coefficients
            coefficients = [length * c for c in along]
            torch._foreach_mul_(list(delta.values()), length)
        else:
            minimum = self._minimum(objective, g, directions, damping, decay, fixed)
            if minimum is None:
                return None, 0.0
            coefficients = minimum.coefficients
            self._combination = coefficients if len(directions) == 2 else None
            delta = combine(coefficients, directions)
        change = minimum.change
        self.diagnostics |= {"lr": -coefficients[0], "momentum": (*coefficients, 0.0)[1], "predicted_change": change}
        if not self._finite(delta):
            return None, 0.0
        parts = [Part(own, 1.0, _shrink(group, -coefficients[0])) for group, own in self._by_group(delta)]
        return Step(delta, parts), change

    def _share_within(self, kl: float) -> float:
        """How much of a step keeps it within `max_kl`."""
        if self.max_kl is None or not kl > self.max_kl:
            return 1.0
        return math.sqrt(self.max_kl / kl)

    def _minimum(
        self,
        objective: Objective,
        g: Vector,
        directions: list[Vector],
        damping: float,
        decay: Decay,
        fixed: dict[int, float],
    ) -> Minimum | None:
        F = objective.products(directions)
        Q = self._damped_gram(directions, damping) + decay.gram(directions)
        slope = torch.tensor(dots((g, d) for d in directions), dtype=torch.float64)
        numbers = torch.tensor(self._total([*Q.flatten().tolist(), *slope.tolist()]), dtype=Q.dtype)
        Q, slope = F + numbers[: Q.numel()].view_as(F), numbers[Q.numel() :]
        minimum = minimize(Q, slope, fixed)
        if minimum is not None and not self._is_fixed():
            c = torch.tensor(minimum.coefficients, dtype=torch.float64)
            minimum = minimum.shortened(self._share_within(0.5 * float(c @ F @ c)))
            if self._curvature.nonnegative and self.diagnostics["loss"] > 0:  # a target out of range makes it negative
                minimum = minimum.shortened(minimum.share_that_promises(self.diagnostics["loss"]))
        return minimum

    def _reject(self, fault: str) -> None:
        self.diagnostics |= {"accepted": False, "reason": fault}
        self._faults["rejected"] += 1
        self._forget_momentum()
        self._combination = None
        self._rejections += 1
        if self._adaptive_damping and self._damping is not None:
            self._damping = self._rule.after_rejection(self._damping, self._rejections)
            self.diagnostics["damping"] = self._damping
        self._expire()
        if self._rejections & (self._rejections - 1) == 0:  # the first, second, fourth, eighth in a row, ...
            again = f" ({self._rejections} in a row)" if self._rejections > 1 else ""
            warn(f"{type(self).__name__} rejected step {self._steps}{again}: {fault}")

    def _undo_last(self, objective: Objective, loss: float = math.inf) -> bool:
        """Takes the last step back if it has raised this batch's loss to `loss` by more than what is tolerated."""
        delta = {n: s["delta"] for n, p in self._parameters.items() if "delta" in (s := self.state[p])}
        if not delta or not objective.runs_again:
            return False
        before = self._snapshot()
        own = self._values
        torch._foreach_sub_([own[n] for n in delta], list(delta.values()))
        without = objective.evaluate()
        if math.isfinite(without) and loss > without + self._tolerated_rise * abs(without):
            return True
        self._return_to(before)
        return False

    def _calibrate(self, objective: Objective, g: Vector, decay: Decay) -> None:
        """Chooses the first damping: the one whose step lowers the loss most."""
        scale = self._scale()

        def loss_after(damping: float) -> float:
            try:
                self._refresh(damping, decay)
                step, _ = self._propose(objective, g, damping, decay)
            except ValueError:
                return math.inf
            self._forget_momentum()
            if step is None:
                return math.inf
            step.take(self._values)
            after = self._loss_now(objective, decay)
            self._return_to(before)
            return after if math.isfinite(after) else math.inf

        before = self._snapshot()
        self._damping = calibrate(scale if scale > 0 else 1.0, loss_after)
        self._expire()

    def _forget_momentum(self) -> None:
        for p in self._parameters.values():
            for past in ("delta", "momentum_buffer", "momentum_weight"):
                self.state[p].pop(past, None)

    def _snapshot(self) -> Vector:
        return {n: p.clone() for n, p in self._values.items()}

    def _return_to(self, before: Vector) -> None:
        """The parameters as they were: adding a step and taking it away would leave rounding behind."""
        for n, p in self._values.items():
            p.copy_(before[n])


def _shrink(group: dict[str, Any], length: float) -> float:
    """What decoupled weight decay multiplies the parameters by, for a step of this length."""
    return 1 - length * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
