"""K-FAC: the natural gradient with a Kronecker-factored, centered curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature import check_choice, kfac, select_parameters
from natgrad.linalg import BlockDiagonal
from natgrad.linalg.centered import CenteredInverse
from natgrad.linalg.operator import check_damping
from natgrad.linalg.state import dump, restore
from natgrad.losses import ESTIMATORS, output_curvature
from natgrad.moments import AffineMoments
from natgrad.optim.batch import Batch, Forward, Objective
from natgrad.optim.damping import LevenbergMarquardt, calibrate
from natgrad.optim.quadratic import Minimum, minimize
from natgrad.optim.vectors import Vector, combine, copied, dot, finite, gram
from natgrad.optim.watch import Watch
from natgrad.statistics import SHARING, Layer, layer_moments, merge


class KFAC(torch.optim.Optimizer):
    """Natural-gradient descent with K-FAC's curvature, everything adaptive by default.

    For a layer `a = W h + b` with `m = E[h]`, `C = cov(h)` and output factor `B`, the centered step is

        ΔW = B⁻¹ (∇_W − ∇_b mᵀ) C⁻¹        Δb = B⁻¹ ∇_b − ΔW m        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch.

    Args:
        model: the module to train. Every trainable parameter must belong to an affine map.
        loss: an instance of `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`.
        lr: the step size `α`; None: from the quadratic model, at every step.
        momentum: `μ`; None: from the quadratic model, at every step.
        damping: `λ`, in units of the loss's mean whatever the reduction; None: calibrated on the first batch,
            then Levenberg-Marquardt.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective as the user evaluates it.
        centered: hold weight and bias apart, with the covariance of the inputs.
        bias_update: `"exact"`, or `"simple"`: `Δb = B⁻¹ ∇_b`, whatever the weights do.
        damping_style: `"factored"` (two Cholesky factorizations a layer) or `"exact"` (two eigenbases, twice the
            products). None: factored where centered; else exact, as the homogeneous factors then damp the bias
            by the weight's share and stall it.
        estimator: `"mc"` (labels drawn from the model), `"exact"` or `"empirical"`.
        sharing: `"expand"` or `"reduce"`, for layers used at several positions.
        statistics_every: steps between updates of the moments. None: 10 where centered, else 5, as the
            homogeneous input factor holds the mean of the inputs, which moves faster than their covariance.
        inverses_every: steps between updates of the inverses. None: 10 where centered, else 5.
        adapt_every: steps between updates of the damping and of the ratio of `α` and `μ`.
        damping_decay: the least factor per step by which the damping may fall.
        damping_floor: the damping falls no further than this share of the mean of the curvature's diagonal.
        decay: the weight of the past in the moving average of the moments, each time they are updated.
        generator: the source of the random labels. Default: one seeded by `torch.initial_seed()`.

    Raises:
        TypeError: if the loss is not supported.
        ValueError: if an option is out of range.
        NotImplementedError: by `loss`, if a parameter is not part of an affine map; it is named.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> opt = natgrad.KFAC(model, torch.nn.CrossEntropyLoss())
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> for _ in range(20):
        ...     loss = opt.loss(model(x), y)
        ...     opt.zero_grad(); loss.backward(); opt.step()
        >>> loss.item() < 0.1
        True

    Reference: Martens & Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        centered: bool = True,
        bias_update: str = "exact",
        damping_style: str | None = None,
        estimator: str = "mc",
        sharing: str = "expand",
        statistics_every: int | None = None,
        inverses_every: int | None = None,
        adapt_every: int = 8,
        damping_decay: float = 0.8,
        damping_floor: float = 0.03,
        decay: float = 0.8,
        generator: torch.Generator | None = None,
    ):
        self._curvature = output_curvature(loss)
        self._parameters = select_parameters(model)
        _check_number("lr", lr)
        _check_number("momentum", momentum)
        if damping is not None:
            check_damping(damping)
        damping_style = damping_style or ("factored" if centered else "exact")
        interval = 10 if centered else 5
        statistics_every = interval if statistics_every is None else statistics_every
        inverses_every = interval if inverses_every is None else inverses_every
        _check_number("weight_decay", weight_decay)
        check_choice("bias_update", bias_update, ("exact", "simple"))
        check_choice("damping_style", damping_style, ("exact", "factored"))
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("sharing", sharing, SHARING)
        for name, every in (
            ("statistics_every", statistics_every),
            ("inverses_every", inverses_every),
            ("adapt_every", adapt_every),
        ):
            if every < 1:
                raise ValueError(f"{name}={every} is not usable: expected a number of steps, at least 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not usable: expected a number in [0, 1)")
        if not 0 < damping_decay <= 1:
            raise ValueError(f"damping_decay={damping_decay} is not usable: expected a number in (0, 1]")
        _check_number("damping_floor", damping_floor)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": list(self._parameters.values())}], defaults)

        self.model = model
        self.centered, self.bias_update, self.damping_style = centered, bias_update, damping_style
        self.estimator, self.sharing, self.decay = estimator, sharing, decay
        self.statistics_every, self.inverses_every = statistics_every, inverses_every
        self.adapt_every = adapt_every
        device = next(iter(self._parameters.values())).device
        self._generator = generator or torch.Generator(device).manual_seed(torch.initial_seed())
        self._rule = LevenbergMarquardt(damping_decay**adapt_every, damping_floor)

        self.diagnostics: dict[str, Any] = {}
        self._damping, self._adaptive_damping = damping, damping is None
        self._steps = 0
        self._moments: dict[Layer, AffineMoments] = {}
        self._inverse: BlockDiagonal | None = None
        self._inverse_age = 0
        self._combination: list[float] | None = None
        self._rejections = 0  # in a row
        self._pending: list[Batch] = []
        self._watch = Watch(model, self._parameters)

    def _arm(self) -> None:
        """Sets whether the next forward is recorded."""
        self._watch.recording = self._statistics_due() or self._uses_quadratic_model()

    def _statistics_due(self) -> bool:
        return self._steps % self.statistics_every == 0 or not self._moments

    def _uses_quadratic_model(self) -> bool:
        group = self.param_groups[0]
        return self._adaptive_damping or group["lr"] is None or group["momentum"] is None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss module's value on `output`, which the last forward of the model returned.

        Backward from it, scaled or summed over microbatches as you like, then call `step`.

        Raises:
            RuntimeError: if no forward in training mode with gradients enabled came before, or it ran under autocast.
            ValueError: if output and target do not fit the loss, or the batch is empty.
            NotImplementedError: if the output depends on a parameter by anything but affine maps; it is named.
        """
        forward = self._watch.take()
        if forward is None:
            raise RuntimeError(
                "opt.loss follows a forward of the model in training mode with gradients enabled, and there was "
                "none since the last opt.loss; call model.train() and model(x) first, and for evaluation the "
                "loss module itself"
            )
        if forward.autocast:
            raise RuntimeError(
                "the forward ran under torch.autocast, whose lower precision the statistics do not support; "
                "run it outside, in one dtype"
            )
        self._curvature.check(output, target)
        if output.numel() == 0:
            raise ValueError(f"the batch is empty: the output has shape {tuple(output.shape)}; skip empty batches")
        if self._uses_quadratic_model() and not _is_returned(output, forward):
            raise ValueError(
                "opt.loss was not given the tensor that the model returned, but the adaptive step runs the model "
                "again and needs it; let the model return the loss's input, or fix lr, momentum and damping"
            )
        recorder, forward.recorder = forward.recorder, None
        if recorder is not None:
            recorder.check(output)
        loss: Tensor = self._curvature.module(output, target)
        mass = self._curvature.normalizer(output.detach(), target)
        batch = Batch(forward, target, output.shape, mass, loss.detach())
        if not torch.isfinite(loss):
            batch.fault = "the loss is not finite: look for NaN or inf in the batch"
        elif recorder is not None:
            if self._statistics_due():
                columns = self._curvature.columns(output, target, self.estimator, generator=self._generator)
                batch.moments = layer_moments(recorder.uses, output, columns, mass, sharing=self.sharing)
                if not all(m.is_finite() for m in batch.moments.values()):
                    batch.fault = "the statistics are not finite"
            if self._uses_quadratic_model():
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

        A step that cannot be computed (a loss, gradient or factor that is not finite, a loss that rises by
        half) leaves the parameters as they are, warns, and raises the damping. If the loss is not finite because
        of the step before, that step is taken back.

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
        with self._watch.suspended():
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
        self._update_moments(pending)
        self._check_covered(gradients)
        g = self._gradient(gradients, objective.scale, eta)
        if not finite(g):
            return "the gradient is not finite"
        if dot(g, g) == 0:
            return None  # nothing to do, and no direction to do it in
        loss = objective.loss + 0.5 * eta * self._square()
        self.diagnostics["loss"] = loss
        if self._damping is None:
            self._calibrate(objective, g, eta)
        return self._move(objective, g, eta, loss)

    def _gradient(self, gradients: Vector, scale: float, eta: float) -> Vector:
        """The objective's gradient per unit of the loss's mean, zero where a layer has one in part."""
        partners = [n for layer in self._moments if any(m in gradients for m in layer.names) for n in layer.names]
        names = [n for n in self._parameters if n in gradients or n in partners]
        values = [gradients[n] if n in gradients else torch.zeros_like(self._parameters[n]) for n in names]
        values = list(torch._foreach_mul(values, 1 / scale))
        if eta:
            torch._foreach_add_(values, [self._parameters[n] for n in names], alpha=eta)
        return dict(zip(names, values, strict=True))

    def _move(self, objective: Objective, g: Vector, eta: float, loss: float) -> str | None:
        damping = self._damping
        assert damping is not None
        if self._inverse is None or self._inverse_age >= self.inverses_every:
            try:
                self._inverse = self._invert(damping + eta)
            except ValueError as error:
                if not self._adaptive_damping:
                    raise
                return f"a factor could not be inverted: {error}"
            self._inverse_age = 0
        self._inverse_age += 1
        proposal = self._propose(objective, g, damping + eta)
        if proposal is None:
            return "the quadratic model has no finite minimum"
        delta, change = proposal
        measured = self._adaptive_damping and (self._adaptation_due() or self._is_doubtful(loss, change))
        before = self._snapshot() if measured else {}
        self._add(delta)
        if measured:
            after = objective.evaluate() + 0.5 * eta * self._square()
            if not after <= loss + 0.5 * abs(loss):
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

    def _propose(self, objective: Objective, g: Vector, total_damping: float) -> tuple[Vector, float] | None:
        """The step `−α Δ + μ δ` and the quadratic model's change."""
        assert self._inverse is not None
        group = self.param_groups[0]
        directions = [self._direction(self._inverse, g)]
        g = {n: g[n] for n in directions[0]}
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

    def _direction(self, inverse: BlockDiagonal, g: Vector) -> Vector:
        out: Vector = {}
        for block in inverse.layers.values():
            if not all(n in g for n in block.names):
                continue  # frozen, or not part of this loss
            op, parts = block.operator, block.parts(g)
            simple = self.bias_update == "simple" and isinstance(op, CenteredInverse)
            out |= block.named(op.apart(parts) if simple else op._matmul(parts))  # type: ignore[attr-defined]
        return {n: v for n, v in out.items() if self._parameters[n].requires_grad}

    def _reject(self, fault: str) -> None:
        self.diagnostics |= {"accepted": False, "reason": fault}
        for p in self._parameters.values():
            self.state[p].pop("delta", None)
        self._combination = None
        self._rejections += 1
        if self._adaptive_damping and self._damping is not None:
            self._damping = self._rule.after_rejection(self._damping, self._rejections)
            self.diagnostics["damping"] = self._damping
        self._inverse_age = self.inverses_every  # refreshed at the next step
        warnings.warn(f"KFAC rejected step {self._steps}: {fault}", RuntimeWarning, stacklevel=4)

    def _undo_last(self, objective: Objective) -> bool:
        """Takes the last step back if the loss is finite without it."""
        delta = {n: s["delta"] for n, p in self._parameters.items() if "delta" in (s := self.state[p])}
        if not delta:
            return False
        before = self._snapshot()
        self._add(delta, -1)
        if math.isfinite(objective.evaluate()):
            return True
        self._return_to(before)
        return False

    # Curvature -----------------------------------------------------------------------------------------

    def _update_moments(self, pending: list[Batch]) -> None:
        new = merge(b.moments for b in pending if b.moments is not None)
        self.diagnostics["statistics"] = bool(new)
        for layer, moments in new.items():
            past = self._moments.get(layer)
            self._moments[layer] = moments if past is None else self.decay * past + moments

    def _check_covered(self, gradients: Vector) -> None:
        covered = {n for layer in self._moments for n in layer.names}
        for n in gradients:
            if n not in covered:
                raise NotImplementedError(
                    f"{n!r} has a gradient but there are no statistics of it: it was not used in the last forward that "
                    "took them. If it comes and goes use statistics_every=1, else freeze it with requires_grad_(False)"
                )

    def _invert(self, damping: float) -> BlockDiagonal:
        self.diagnostics["inverses"] = True
        return self.curvature().inverse(damping, damping_style=self.damping_style)

    def curvature(self) -> BlockDiagonal:
        """The running K-FAC matrix, per unit of the loss's mean and without damping.

        Raises:
            RuntimeError: before the first step.
        """
        if not self._moments:
            raise RuntimeError("there is no curvature before the first step; take one")
        return kfac(self._moments, self._parameters, is_mean=True, centered=self.centered)

    # Saving --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on beside the parameters: they resume bit for bit.

        As in torch, tensors are not copied.
        """
        return super().state_dict() | {
            "kfac": {
                "steps": self._steps,
                "damping": self._damping,
                "combination": self._combination,
                "rejections": self._rejections,
                "generator": self._generator.get_state(),
                "moments": [(asdict(layer), vars(m)) for layer, m in self._moments.items()],
                "inverse": None if self._inverse is None else dump(self._inverse),
                "inverse_age": self._inverse_age,
            }
        }

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            "a KFAC optimizer cannot be copied or pickled; make one for the new model and load state_dict()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave, for a model of the same parameters.

        Raises:
            ValueError: if it is not of a KFAC optimizer, or of other parameters.
        """
        saved = state_dict.get("kfac")
        if saved is None:
            raise ValueError(
                f"the state has {', '.join(map(repr, state_dict))} and no 'kfac': it is not a KFAC optimizer's"
            )
        unknown = [n for layer, _ in saved["moments"] for n in (layer["weight"], layer["bias"]) if n is not None]
        unknown = [n for n in unknown if n not in self._parameters]
        if unknown:
            raise ValueError(f"the state has moments of {unknown[0]!r}, which is not a trainable parameter here")
        for layer, m in saved["moments"]:
            self._check_shape(Layer(**layer), len(m["output"]), len(m["mean"]))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "kfac"})
        device = next(iter(self._parameters.values())).device
        saved = copied(saved, device)
        self._steps, self._damping, self._combination = saved["steps"], saved["damping"], saved["combination"]
        self._rejections = saved["rejections"]
        self._generator.set_state(saved["generator"].cpu())
        self._moments = {Layer(**layer): AffineMoments(**m) for layer, m in saved["moments"]}
        self._inverse, self._inverse_age = restore(saved["inverse"]), saved["inverse_age"]
        self._pending = []
        self._arm()

    def _check_shape(self, layer: Layer, d_out: int, d_in: int) -> None:
        expected = (d_in, d_out) if layer.transposed else (d_out, d_in)
        if layer.weight is not None and tuple(self._parameters[layer.weight].shape) != expected:
            raise ValueError(
                f"the state has moments for {layer.weight!r} of shape {expected}; here it has shape "
                f"{tuple(self._parameters[layer.weight].shape)}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises NotImplementedError: the parameters are those of the model, in one group."""
        if self.param_groups:
            raise NotImplementedError(
                "KFAC trains the parameters of its model in one group; make a new optimizer for a model that has grown"
            )
        super().add_param_group(param_group)

    def _scale(self) -> float:
        """The mean of the curvature's diagonal: what a damping is large or small against."""
        matrix = self.curvature()
        return float(matrix.trace()) / matrix.space.size

    def _calibrate(self, objective: Objective, g: Vector, eta: float) -> None:
        """Chooses the first damping: the one whose step lowers the loss most."""
        matrix, scale = self.curvature(), self._scale()

        def loss_after(damping: float) -> float:
            try:
                self._inverse = matrix.inverse(damping + eta, damping_style=self.damping_style)
            except ValueError:
                return math.inf
            proposal = self._propose(objective, g, damping + eta)
            if proposal is None:
                return math.inf
            self._add(proposal[0])
            after = objective.evaluate() + 0.5 * eta * self._square()
            self._return_to(before)
            return after if math.isfinite(after) else math.inf

        before = self._snapshot()
        self._damping = calibrate(scale if scale > 0 else 1.0, loss_after)
        self._inverse = None

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


def _is_returned(output: Tensor, forward: Forward) -> bool:
    """Whether `output` is what the model returned, untouched, as it is or in another shape."""
    returned = forward.returned
    if not isinstance(returned, Tensor) or returned._version != forward.version:
        return False
    reshaped = output.numel() == returned.numel() and output.is_contiguous() and returned.is_contiguous()
    return output is returned or (reshaped and output.data_ptr() == returned.data_ptr())


def _check_number(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} is not usable: expected a number >= 0")
