"""An optimizer that follows its model's forwards, and knows what each loss was made of."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from natgrad.capture.recorder import Recorder
from natgrad.checks.values import check_choice, check_function, check_generator, check_number, described, did_you_mean
from natgrad.distributed.placement import placed, placed_within, refuse_ranks
from natgrad.losses import ESTIMATORS, output_curvature
from natgrad.optim.batch import LOSS_NOT_FINITE, Batch, Forward, full_precision
from natgrad.optim.output import Way
from natgrad.optim.parameter_groups import Groups, as_group, check_alike, parameter_groups
from natgrad.optim.unchanged import Unchanged
from natgrad.optim.watch import Watch


class Following(torch.optim.Optimizer, Joinable, ABC):
    """Between a forward of the model and the step: `loss` takes what the model returned, keeps what the step will need,
    and notes by which factor the user's backward weighs it.

    What is noted is changed in place: Lightning's wrapper has the optimizer's class for one of its own, so that these
    methods may have the wrapper for `self`, where what is assigned would stay.
    """

    _for_many_ranks = False
    """Whether what is taken from a rank's batches is summed over the ranks."""

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        params: Groups,
        defaults: dict[str, Any],
        *,
        estimator: str,
        output: Way | None,
        generator: torch.Generator | None,
    ):
        self._curvature = output_curvature(loss)
        if isinstance(loss, nn.GaussianNLLLoss):
            raise TypeError(
                f"{type(self).__name__} follows models that return one tensor, and nn.GaussianNLLLoss takes two; let "
                "the model return one, with natgrad.losses.Likelihood(lambda f: Normal(f[..., 0], f[..., 1].exp()))"
            )
        check_choice("estimator", estimator, ESTIMATORS)
        self._place = placed(model)
        self.model, self._world = self._place.model, self._place.world
        self._around = _weakly(model)
        if not self._for_many_ranks:
            refuse_ranks(type(self).__name__, self._place)
        check_function("output", output, "from what the model returns to what the loss takes")
        self._output, self.estimator = output, estimator
        self._parameters: dict[str, Tensor] = {}
        self._watch: Watch | None = None
        torch.optim.Optimizer.__init__(self, parameter_groups(self.model, params), defaults)
        Joinable.__init__(self)
        check_generator(generator, self._device)
        self._given_generator = generator
        self._own_generator = torch.Generator(self._device).manual_seed(torch.initial_seed())
        self._unchanged = Unchanged(generator)
        self._pending: list[Batch] = []
        wrapper = None if model is self.model else model
        self._watch = Watch(self.model, self._parameters, wrapper=wrapper, within=self._see_ranks)
        self._watch.see_more(self._place.follow)
        self._first_mass: list[float] = []  # of the first batch, on all ranks; empty before
        self._joined: list[bool] = []  # once there is a Join, and not empty then

    def _see_ranks(self, around: DistributedDataParallel) -> None:
        """Joins the ranks of a `DistributedDataParallel` that the model turns out to be in: one made after the
        optimizer, or of a module that the model is a part of."""
        if around is self._around() or self._place.shards is not None:
            return
        place = placed_within(around, self.model)
        if not self._for_many_ranks:
            refuse_ranks(type(self).__name__, place)
        self._place, self._world, self._around = place, place.world, weakref.ref(around)
        if around.module is self.model and self._watch is not None:
            self._watch.see_wrapper(around)

    # What a subclass supplies --------------------------------------------------------------------------

    @abstractmethod
    def _statistics_due(self) -> bool:
        """Whether the next batches' statistics are wanted."""

    @abstractmethod
    def _runs_again(self) -> bool:
        """Whether the next step runs the model again."""

    @abstractmethod
    def _may_run_again(self) -> bool:
        """Whether some step to come does."""

    @abstractmethod
    def _observe(self, batch: Batch, recorder: Recorder, output: Tensor) -> None:
        """Takes the statistics of a batch, or notes its fault."""

    def _check_recorded(self, recorder: Recorder, output: Tensor) -> None:
        """Raises NotImplementedError for a parameter that the curvature does not cover."""
        recorder.check(output)

    # Groups --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters, say of layers that were frozen until now.

        Raises:
            ValueError: if one is not the model's, is in a group already, or a setting is out of range.
        """
        super().add_param_group(as_group(self.model, param_group))
        try:
            self._check_groups()
        except ValueError:
            self.param_groups.pop()
            raise
        own = {id(p) for group in self.param_groups for p in group["params"]}
        self._parameters.clear()
        self._parameters.update((n, p) for n, p in self.model.named_parameters() if id(p) in own)
        if self._watch is not None:
            self._watch.follow(self._parameters)

    def _check_groups(self) -> None:
        for group in self.param_groups:
            for name in ("lr", "momentum", "weight_decay"):
                check_number(name, group[name], optional=name != "weight_decay")
            for key in group.keys() - {"params", *self.defaults}:
                near = did_you_mean(key, self.defaults)
                if near and key != "initial_lr":  # other keys are the user's own, as in torch
                    raise ValueError(f"a group has {key!r}; expected settings among {', '.join(self.defaults)}{near}")
        for name in ("lr", "momentum"):
            check_alike(self.param_groups, name)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def _generator(self) -> torch.Generator:
        """The source of random labels: the user's, or one on the device to which the model may have been moved."""
        if self._given_generator is not None:
            return self._given_generator
        if self._own_generator.device != self._device:
            self._own_generator = torch.Generator(self._device).manual_seed(self._own_generator.initial_seed())
        return self._own_generator

    @property
    def _values(self) -> dict[str, Tensor]:
        """The parameters, or this rank's shards of them: writing to these changes those."""
        return {n: self._place.local(p) for n, p in self._parameters.items()}

    def _by_group(self, names: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
        """Every group with those of its parameters that are named."""
        group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        found: list[list[str]] = [[] for _ in self.param_groups]
        for n in names:
            found[group_of[id(self._parameters[n])]].append(n)
        return [(group, own) for group, own in zip(self.param_groups, found, strict=True) if own]

    # Between forward and step --------------------------------------------------------------------------

    def _arm(self) -> None:
        """Sets whether the next forward is recorded."""
        assert self._watch is not None
        self._watch.recording = self._statistics_due() or self._runs_again()

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """The loss module's value on `output`: a tensor that the last forward of the model returned (also one in an
        object or a dictionary), a view of it, or all that was returned where the optimizer has an `output=`.

        Backward from it, scaled or summed over microbatches as you like, then call `step`.

        Raises:
            RuntimeError: if no forward in training mode with gradients enabled came before, or it has not returned.
            ValueError: if output and target do not fit the loss, or the batch is empty (on all of several ranks).
            NotImplementedError: if the output depends on a parameter in a way that no layer kind covers; it is named.
        """
        assert self._watch is not None
        forward = self._watch.take()
        self._forget_dropped()
        if forward is None:
            raise RuntimeError(
                "opt.loss follows a forward of the model in training mode with gradients enabled, and there was "
                "none since the last opt.loss; call model.train() and model(x) first, and for evaluation the "
                "loss module itself"
            )
        if forward.returned is None:
            raise RuntimeError(
                "opt.loss was called before the model's forward had returned; where a training step is a part of that, "
                "as Lightning's is under DistributedDataParallel, make the optimizer for the module that the output is "
                f"of: {type(self).__name__}(self.net, ...)"
            )
        if self._statistics_due() and self._place.shards is None:  # shards stand aside during a forward
            self._unchanged.check(self.model, self._parameters)
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
                f"opt.loss was given {described(output)}; expected the tensor that the loss takes. Give it one "
                "of those that the model returned, or pass output= (how to make it of what the model returns) to "
                f"{type(self).__name__} and give opt.loss all that the model returned"
            )
        return full_precision(output), returned.way_to(output)

    def _loss(self, forward: Forward, output: Tensor, way: Way | None, target: Tensor) -> Tensor:
        if output.numel() == 0:
            return self._no_loss(forward, output, way, target)
        self._curvature.check(output, target)
        if self._may_run_again() and way is None:
            raise ValueError(
                "opt.loss was not given a tensor that the model returned, or a view of one, but the adaptive step runs "
                f"the model again and needs it; pass output= to {type(self).__name__}, say output=lambda returned: "
                "returned.logits[:, :-1].flatten(0, 1), and give opt.loss all that the model returned. Or fix lr, "
                "momentum and damping (and the solver of a NaturalGradient)"
            )
        if torch.is_grad_enabled() and not output.requires_grad:
            raise ValueError(
                "opt.loss was given a tensor without a graph; expected the model's output as it is: leave detach() out"
            )
        recorder, forward.recorder = forward.recorder, None
        if recorder is not None:
            self._check_recorded(recorder, output)
        loss = self._curvature.loss(output, target)
        mass = self._curvature.normalizer(output.detach(), target)
        batch = Batch(forward, target, output.shape, way, mass, loss.detach())
        if self._world.size > 1 and self._curvature.is_mean:
            batch.weight = self._weight(float(mass))
            loss = loss.detach() + batch.weight * (loss - loss.detach())
        if recorder is not None:
            if self._statistics_due():
                if torch.isfinite(loss):
                    self._observe(batch, recorder, output)
                else:
                    batch.fault = LOSS_NOT_FINITE
            if self._runs_again():
                batch.uses = recorder.uses
        forward.returned = None
        return self._noted(batch, loss)

    def _noted(self, batch: Batch, loss: Tensor) -> Tensor:
        if loss.requires_grad:
            loss.register_hook(batch.observe)
        self._pending.append(batch)
        if self._statistics_due() and self._brings_together():
            self._share(self._pending)
        return loss

    def _brings_together(self) -> bool:
        """Whether the backward to come is one in which the ranks' gradients are brought together: not within
        `no_sync()`, and not where ranks may run out of batches."""
        around = self._around()
        return around is not None and bool(around.require_backward_grad_sync) and not self._joined

    def _share(self, pending: list[Batch]) -> None:
        """Begins to bring the ranks' statistics of these batches together."""

    def _no_loss(self, forward: Forward, output: Tensor, way: Way | None, target: Tensor) -> Tensor:
        """The loss of a rank that has no examples where others have: zero, with gradients that are zero."""
        if self._world.size == 1:
            raise ValueError(f"the batch is empty: the output has shape {tuple(output.shape)}; skip empty batches")
        recorder, forward.recorder, forward.returned = forward.recorder, None, None
        if self._place.shards is not None and recorder is not None and self._statistics_due():
            self._follow_along(recorder, output, target)
        loss = output.sum()
        batch = Batch(forward, target, output.shape, way, loss.new_zeros(()), loss.detach())
        if self._curvature.is_mean:
            batch.weight = self._weight(0.0)
        return self._noted(batch, loss)

    def _follow_along(self, recorder: Recorder, output: Tensor, target: Tensor) -> None:
        """Takes part in bringing together the shards for other ranks' statistics, of which this rank has none."""

    def _weight(self, mass: float) -> float:
        """What the gradient of a rank's mean is multiplied by, so that the average over the ranks is in proportion to
        the mean over all cases: the rank's cases over what a rank had in the first batch."""
        if not self._first_mass:
            (first,) = self._world.numbers([mass], "the size of the first batch")
            if not first > 0:
                raise ValueError("the first batch has no cases on any rank; skip empty batches")
            self._first_mass.append(first)
        return mass * self._world.size / self._first_mass[0]

    def _forget_dropped(self) -> None:
        """Forgets batches whose gradients are gone without `zero_grad`: by `model.zero_grad()`, after a step that a
        `GradScaler` skipped. Shards keep those of microbatches elsewhere."""
        if self._pending and not self._place.shards and all(p.grad is None for p in self._parameters.values()):
            self._forget_seen()

    def _forget_seen(self) -> None:
        """Forgets batches that a backward has come through."""
        self._pending[:] = [b for b in self._pending if b.scale is None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them the batches whose backward is in them."""
        self._forget_seen()
        super().zero_grad(set_to_none)

    # Ranks that have run out of data ---------------------------------------------------------------------

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `torch.distributed.algorithms.Join([model, opt])`: a rank without further batches takes the others' steps
        with them. Every rank needs one batch at least, and a step follows every backward."""
        self._joined.append(True)
        return _Idle(self)

    @property
    def join_device(self) -> torch.device:
        return self._device

    @property
    def join_process_group(self) -> Any:
        return self._world.group

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            f"a {type(self).__name__} optimizer cannot be copied or pickled; make one for the new model and load "
            "state_dict()"
        )


def _weakly(model: nn.Module) -> Callable[[], DistributedDataParallel | None]:
    """A reference that does not keep it: where its reducer is the last to let go of the ranks' group, at the end of a
    process, torch's gloo may wait for ever."""
    return weakref.ref(model) if isinstance(model, DistributedDataParallel) else lambda: None


class _Idle(JoinHook):
    """What a rank does that has run out of data while others have not."""

    def __init__(self, opt: Following):
        self._opt = opt

    def main_hook(self) -> None:
        self._opt.zero_grad()
        self._opt.step()
