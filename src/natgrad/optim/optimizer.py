"""The base class of KFAC and NaturalGradient: a torch optimizer that follows the forward passes of its model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from natgrad.capture.eager import not_compiled
from natgrad.checks.values import check_choice, check_flag, check_function, check_generator, check_number, check_within
from natgrad.distributed.placement import placed, refuse_ranks
from natgrad.losses import ESTIMATORS
from natgrad.optim import averaging, saved, shown
from natgrad.optim.journal import Journal
from natgrad.optim.labels import Labels
from natgrad.optim.parameter_groups import Groups, as_group, check_groups, check_schedulable, parameter_groups
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.base import Preconditioner
from natgrad.optim.recipe import Recipe
from natgrad.optim.rules.damping import DampingControl, DampingRule
from natgrad.optim.rules.projected import Projected
from natgrad.optim.terms import Loss, terms_of
from natgrad.optim.tracking.batch import Batch, Penalty
from natgrad.optim.tracking.calls import Losses, Predictions
from natgrad.optim.tracking.returned import Way
from natgrad.optim.tracking.tracker import Tracker
from natgrad.optim.vectors import Vector

GROUP_DEFAULTS: dict[str, Any] = {"lr": None, "momentum": None, "weight_decay": 0.0, "decoupled_weight_decay": False}
"""What every parameter group has. None: adaptive."""
TOLERATED_RISE = 0.5
"""A step that raises the loss by more than this share is undone."""


class CurvatureOptimizer(torch.optim.Optimizer, Joinable):
    """Descent along `Δ = (F + λI)⁻¹ ∇` for some curvature `F`. By default step size, momentum and damping are adaptive.

    It puts the parts of a step together, which `recipe.py` calls one after the other, and supports what torch's
    optimizers support: groups, states, schedulers, `state_dict`. A subclass calls this `__init__`, makes its
    preconditioner from `self.parameters` (and `self.labels`, if it draws labels), and passes it to `_assemble` with a
    damping rule.

    Args:
        model: the module to train.
        loss: the loss, or a dictionary of several.
        params: which parameters to train.
        defaults: settings of the parameter groups that differ from `GROUP_DEFAULTS`, or are not in it.
        damping: `λ`; None: adaptive.
        max_kl: a bound on the predicted KL divergence of a step.
        average: decay of the average of the parameters over the steps; None: no average.
        estimator: which columns of `D` the preconditioner uses.
        adapt_every: steps between changes of the damping, and of the ratio of step size and momentum.
        matmul_precision: precision of the products of the quadratic model.
        output: a function from what the model returns to the loss's input.
        generator: the source of the random labels.

    Example:
        >>> from natgrad.optim.preconditioner.exact import ExactMatrix
        >>> from natgrad.optim.rules.damping import LevenbergMarquardt
        >>> class Dual(CurvatureOptimizer):
        ...     def __init__(self, model, loss):
        ...         super().__init__(model, loss, estimator="exact")
        ...         chosen = {"solver": "dual", "max_size": 5000, "tolerance": 1e-8, "max_iterations": 250}
        ...         F = ExactMatrix(self.parameters, self.labels, estimator="exact", **chosen)
        ...         self._assemble(F, LevenbergMarquardt(factor=0.5, floor=1e-3))
        >>> Dual(nn.Linear(2, 1), nn.MSELoss())
        Dual(solver='dual', lr=adaptive, momentum=adaptive, damping=adaptive, 3 parameters)
    """

    _key: ClassVar[str]
    """The key of the optimizer's own state in `state_dict`. Default: the name of the class."""
    _many_ranks: ClassVar[bool] = False
    """Whether the statistics of the ranks' batches are summed, so that it works on several ranks."""
    _numbers = "numbers for lr and momentum"
    """The options with which a scheduler works, for the error."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_key"):
            cls._key = cls.__name__

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        params: Groups = None,
        defaults: Mapping[str, Any] | None = None,
        damping: float | None = None,
        max_kl: float | None = None,
        average: float | None = None,
        estimator: str = "mc",
        adapt_every: int = 1,
        matmul_precision: str | None = None,
        output: Way | None = None,
        generator: torch.Generator | None = None,
    ):
        name = type(self).__name__
        settings = {**GROUP_DEFAULTS, **(defaults or {})}
        terms = terms_of(loss, name)
        check_number("damping", damping, optional=True)
        check_number("max_kl", max_kl, optional=True, positive=True)
        check_within("average", average, "[0, 1)", optional=True)
        check_flag("decoupled_weight_decay", settings["decoupled_weight_decay"])
        check_choice("estimator", estimator, ESTIMATORS)
        check_function("output", output, "from what the model returns to what the loss takes")
        if not terms and output is not None:
            raise ValueError(
                'output= cannot be used with the loss "model", which the model computes itself; leave it out'
            )
        place = placed(model)
        if not self._many_ranks:
            refuse_ranks(name, place)
        self.model, self.estimator, self.average = place.model, estimator, average
        self.adapt_every, self.max_kl, self.matmul_precision = adapt_every, max_kl, matmul_precision
        self._given_damping = damping
        torch.optim.Optimizer.__init__(self, parameter_groups(place.model, params), settings)
        Joinable.__init__(self)
        self.parameters = Parameters(self, place)
        check_generator(generator, self.parameters.device)
        self.labels = Labels(self.parameters, generator)
        self.journal = Journal(name)
        self.tracker = Tracker(
            name, model, self.parameters, terms, output=output, generator=generator, many_ranks=self._many_ranks
        )
        self._losses, self._predictions = Losses(self.tracker), Predictions(self.tracker)
        self._adapts_lr = self._has_free_lr()  # kept, because a scheduler may write to the groups

    def _assemble(
        self,
        preconditioner: Preconditioner,
        rule: DampingRule,
        tolerated: float = TOLERATED_RISE,
        tries: int = 1,
        projected: Projected | None = None,
        min_damping: float = 0.0,
    ) -> None:
        """Completes the optimizer with the parts that a subclass chooses. `Recipe` describes them."""
        self.recipe = Recipe(
            self.parameters,
            self.tracker,
            preconditioner,
            DampingControl(self._given_damping, rule, min_damping),
            self.journal,
            self.labels,
            tolerated=tolerated,
            tries=tries,
            adapt_every=self.adapt_every,
            max_kl=self.max_kl,
            average=self.average,
            precision=self.matmul_precision,
            projected=projected,
        )

    # The step ------------------------------------------------------------------------------------------

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters from their gradients. `diagnostics` describes it.

        If the step cannot be computed (a loss, gradient or curvature is not finite), or if it would raise the loss too
        much, the parameters do not change. `diagnostics` says so, and from the second such step in a row on there is a
        warning. If the loss is not finite because of the step before, that step is undone. After an exception,
        everything is as it was before the step.

        Raises:
            RuntimeError: if no `opt.loss` and backward came before, or an input of the model was changed in place.
            NotImplementedError: for a gradient that does not come from a loss of `opt.loss`.
            ValueError: if there is a scheduler although the step size is adaptive, or if the run has diverged.
        """
        check_schedulable(self.param_groups, self._adapts_lr, self._numbers)
        value = _value_of(closure)
        parts, gradients = self.tracker.collect(), self.parameters.gradients()
        Join.notify_join_context(self)
        if self._nothing_to_do(parts, gradients, closure is not None and value is None):
            return value
        self.recipe.run(parts, gradients)
        return value

    def _nothing_to_do(self, parts: list[Batch | Penalty], gradients: Vector, silent: bool) -> bool:
        """Whether a closure computed nothing, as when Lightning's `training_step` returns None.

        Raises:
            RuntimeError: if there is nothing to do and no closure.
        """
        if self.parameters.place.world.size > 1 or (parts and gradients):
            return False
        if silent and not (parts or gradients):
            return True
        early = "loss.backward()" if parts else "any loss that opt.loss gave" if gradients else "any loss"
        if self.tracker.own is not None:
            raise RuntimeError(
                "step() came before the backward of a loss that the model has computed itself: expected loss = "
                "model(**batch).loss; loss.backward(); opt.step(), in training mode, with the labels in the batch"
            )
        raise RuntimeError(
            f"step() came before {early}: expected loss = opt.loss(model(x), y); loss.backward(); opt.step()"
        )

    def _has_free_lr(self) -> bool:
        """Whether a step size is adaptive."""
        return any(group["lr"] is None for group in self.param_groups)

    # As torch's optimizers -----------------------------------------------------------------------------

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What the last step did, as a plain dictionary."""
        return self.journal.figures

    @property
    def _steps(self) -> int:
        """The number of steps."""
        return self.journal.steps

    @property
    def _damping(self) -> float | None:
        """The damping of the next step."""
        return self.recipe.damping.value

    def __setattr__(self, name: str, value: Any) -> None:
        """Notices one of torch's schedulers when it is made: it wraps `step` before it computes with `lr`."""
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched"):
            check_schedulable([{"initial_lr": None}], self._adapts_lr, self._numbers)
        super().__setattr__(name, value)

    @property
    def loss(self) -> Losses:
        """The loss of the model's output, recorded for the next step.

            loss = opt.loss(output, target)                # if the optimizer has one loss
            loss = opt.loss["box"](output, target)         # if it has several: by name

        `output` is a tensor that the model has returned in training mode since the last step (also within an object or
        a dictionary), or a view of it. If the optimizer has an `output=`, it is everything that the model returned.
        Call backward on the loss, scaled or summed as you like, and then `step`.

        Raises:
            KeyError: for an unknown term.
            RuntimeError: if there was no forward pass in training mode with gradients enabled, or if it has not
                returned.
            ValueError: if output and target do not fit the loss, or the batch is empty (on all of several ranks).
            NotImplementedError: if the output depends on a parameter in an unsupported way; the error names it.
        """
        return self._losses

    @property
    def predict(self) -> Predictions:
        """Records the curvature of a predictive distribution. The gradient comes from a loss of your own.

            logits = model(observations)
            opt.predict(logits)                            # with several terms: opt.predict["policy"](logits)
            (-advantages * logits.log_softmax(1)[range(n), actions]).mean().backward()
            opt.step()

        The distribution is that of the optimizer's loss: softmax for `nn.CrossEntropyLoss`, a Gaussian for
        `nn.MSELoss`, any other by `natgrad.losses.Likelihood`. There is no loss to measure such a step. So give the
        optimizer `lr`, or `max_kl`: the step then has the length that this bound allows (Schulman et al. 2015,
        arXiv:1502.05477).

        Raises:
            TypeError: if the loss's curvature depends on targets.
            RuntimeError, NotImplementedError: as for `loss`.
        """
        return self._predictions

    @not_compiled
    def plus(self, penalty: Callable[[], Tensor]) -> Tensor:
        """The value of a part of the objective that is treated as having no curvature. Add it to the loss.

            loss = opt.loss(model(x), y) + opt.plus(lambda: 1e-3 * model.weight.abs().sum())

        Its gradient comes from the backward pass. Its value counts when a step is measured: then the function is called
        again.

        Args:
            penalty: a function that computes one number, a Tensor, from the current parameters.

        Raises:
            TypeError: if it returns something else.
        """
        return self.tracker.plus(penalty)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters, for example layers that were frozen until now.

        Raises:
            ValueError: if a parameter is not the model's or is already in a group, or if a setting is out of range.
        """
        super().add_param_group(as_group(self.model, param_group))
        try:
            self._check_groups()
        except ValueError:
            self.param_groups.pop()
            raise
        if hasattr(self, "parameters"):
            self.parameters.refresh()
            self.tracker.follow()

    def _check_groups(self) -> None:
        check_groups(self.param_groups, self.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, and forgets the batches that they came from."""
        self.tracker.forget_arrived()
        super().zero_grad(set_to_none)

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has the averages of its parameters, to evaluate or save them.

        Statistics of batch normalization are those of the last iterate. `torch.optim.swa_utils.update_bn` computes new
        ones.

        Raises:
            RuntimeError: if the optimizer keeps no averages.
        """
        if self.average is None:
            raise RuntimeError(
                f"there are no averages; make the optimizer with {type(self).__name__}(..., average=0.98)"
            )
        return self._swapped()

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        try:
            with averaging.swapped(self.parameters.local(), self.parameters.state_of):
                self.parameters.place.settle()
                yield
        finally:
            self.parameters.place.settle()

    def state_dict(self) -> dict[str, Any]:
        """Everything except the parameters that the next steps depend on. Training resumes bit for bit.

        As in torch, tensors are not copied.
        """
        return saved.state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a `state_dict`, for a model with the same parameters. If it does not fit, nothing is changed.

        Raises:
            TypeError: if it is not a dictionary.
            ValueError: if it belongs to another kind of optimizer or to other parameters.
        """
        saved.load_state_dict(self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            f"a {type(self).__name__} optimizer cannot be copied or pickled; make one for the new model and load "
            "state_dict()"
        )

    def __repr__(self) -> str:
        return shown.line(self)

    def _repr_html_(self) -> str:
        return shown.html(self)

    # Ranks that have run out of data -------------------------------------------------------------------

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `torch.distributed.algorithms.Join([model, opt])`: a rank that has no more batches takes part in the
        steps of the others. Every rank needs at least one batch, and every backward pass must be followed by a step."""
        self.tracker.joined = True
        return _Idle(self)

    @property
    def join_device(self) -> torch.device:
        return self.parameters.device

    @property
    def join_process_group(self) -> Any:
        return self.parameters.place.world.group


def _value_of(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class _Idle(JoinHook):
    """The steps of a rank that has run out of data while other ranks have not."""

    def __init__(self, opt: CurvatureOptimizer):
        self._opt = opt

    def main_hook(self) -> None:
        self._opt.zero_grad()
        self._opt.step()
