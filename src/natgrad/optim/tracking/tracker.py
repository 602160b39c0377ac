"""Records what `opt.loss` needs between a forward of the model and the step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.capture.derivatives import DerivativeRecorder
from natgrad.capture.recorder import Recorder
from natgrad.capture.use import Use
from natgrad.checks.values import described
from natgrad.curvature.problem import buffers_kept
from natgrad.distributed.placement import placed_within, refuse_ranks
from natgrad.distributed.whole import Whole
from natgrad.optim.parameters import Parameters
from natgrad.optim.tracking.batch import LOSS_NOT_FINITE, Batch, Penalty, Prediction, Term
from natgrad.optim.tracking.factors import Factors, Observed, of_gradients
from natgrad.optim.tracking.forward import Forward, RandomState
from natgrad.optim.tracking.meant import Meant
from natgrad.optim.tracking.origin import forward_of, read
from natgrad.optim.tracking.own import Found, OwnLoss
from natgrad.optim.tracking.returned import Part, Way
from natgrad.optim.tracking.unchanged import Unchanged
from natgrad.optim.tracking.watch import Watch


@runtime_checkable
class Observer(Protocol):
    """An object that is told about each batch."""

    @property
    def reads_derivatives(self) -> bool:
        """Whether it wants the uses of layers within derivatives that the forward takes itself."""

    def due(self) -> bool:
        """Whether the statistics of the next batches are needed."""

    def runs_again(self) -> bool:
        """Whether the next step runs the model again."""

    def may_run_again(self) -> bool:
        """Whether any later step may run the model again."""

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        """The uses that the output depends on. Raises NotImplementedError for a parameter that the curvature does not
        cover."""

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int) -> None:
        """Takes the statistics of a batch, or records its fault; `draw` is the batch's number in the step."""

    def follow_along(self, uses: list[Use], output: Tensor, target: Any, term: Term, draw: int) -> None:
        """Gathers shards together with the other ranks, for their statistics; this rank has no cases."""

    def share(self, pending: list[Batch]) -> None:
        """Starts the all-reduce of the ranks' statistics of these batches."""


class Tracker:
    """Follows a model's forwards, records the losses that are computed from them, and the factor of each loss in the
    gradients.

    Args:
        optimizer: its name, for messages.
        model: as the user gave it, wrapped or not.
        parameters: the trained parameters.
        terms: the objective's terms by name; a single term has the empty name. Without any term, the loss is the
            model's own.
        output: a function from what the model returns to the loss's input.
        generator: for the random labels, if the user gave one.
        many_ranks: whether the optimizer combines the statistics of several ranks.
    """

    def __init__(
        self,
        optimizer: str,
        model: nn.Module,
        parameters: Parameters,
        terms: Mapping[str, Term],
        *,
        output: Way | None,
        generator: torch.Generator | None,
        many_ranks: bool,
    ):
        self.optimizer, self.parameters, self.terms = optimizer, parameters, dict(terms)
        self.place: Whole = parameters.place
        self.pending: list[Batch | Penalty] = []
        self._zeroed = weakref.WeakSet[Batch | Penalty]()  # their gradients were zeroed in this step
        self.joined = False  # true after the first torch.distributed.algorithms.Join
        self.derives = False  # whether uses of layers are looked for in derivatives that the forward takes itself
        self.first_mass: dict[str, float] = {}  # by term: the mass of its first batch, on all ranks
        self._output, self._many_ranks = output, many_ranks
        self._around = _weakly(model)
        self._meant = Meant(optimizer)
        self._unchanged = Unchanged(self.place.model, generator)
        wrapper = None if model is self.place.model else model
        self.watch = Watch(self.place.model, parameters, wrapper=wrapper, within=self.see_ranks)
        self.watch.see_more(self.place.follow)
        self.own = None if terms else OwnLoss(self.place.model, optimizer)
        if self.own is not None:
            self.watch.tell(self._see_own)
        self.factors = Factors(parameters, sharded=self.place.shards is not None, starts=self._starts)
        self.factors.witnessed &= self.place.world.size == 1

    observer: Observer

    def see_ranks(self, around: DistributedDataParallel) -> None:
        """Called when the model turns out to be in a `DistributedDataParallel`, which was made after the optimizer or
        around a larger module. From then on the optimizer works on its ranks."""
        if around is self._around() or self.place.shards is not None:
            return
        place = placed_within(around, self.place.model)
        if not self._many_ranks:
            refuse_ranks(self.optimizer, place)
        self.place.world = place.world  # assigned in place: all parts of the optimizer share this object
        self._around = weakref.ref(around)
        self.factors.witnessed = False
        if around.module is self.place.model:
            self.watch.see_wrapper(around)

    def follow(self) -> None:
        """Follows the current parameters."""
        self.watch.follow(self.parameters)
        self.factors.follow(self.parameters)

    def arm(self) -> None:
        """Sets whether the next forward is recorded."""
        due, runs_again = self.observer.due(), self.observer.runs_again()
        self.watch.recording, self.watch.observes = due or runs_again, due
        self.watch.replays = runs_again and self.place.shards is None and not self.derives
        self.watch.kind = DerivativeRecorder if due and self.derives else None

    # Between forward and step --------------------------------------------------------------------------

    def loss(self, term: Term, output: Any, target: Any, way: Way | None = None) -> Tensor:
        """Computes and records the loss of one batch. `way`: how the output follows from what the model returned."""
        self._forget_gone()
        forward = forward_of(output, self.watch, self.optimizer)
        self._check_unchanged()
        compares = way is None and len(self.terms) == 1
        if way is None:
            output, way = read(output, forward, self._output, self.optimizer)
        with torch.autocast(output.device.type, enabled=False):
            if compares and output.numel() > 0:
                self._meant.check(self.place.model, forward, output, target, term)
            if output.numel() == 0:
                return self._no_loss(term, forward, output, way, target)
            return self._loss(term, forward, output, way, target)

    def _check_unchanged(self) -> None:
        if self.observer.due() and self.place.shards is None:  # with shards, a forward swaps the parameters
            self._unchanged.check(self.place.model, self.parameters)

    def _see_own(self, forward: Forward, returned: Any) -> None:
        """Records the loss that the model computed itself."""
        assert self.own is not None
        found = self.own.find(forward.args, forward.kwargs, returned)
        if found is None:
            return
        self._forget_gone()
        self.pending[:] = [b for b in self.pending if not (isinstance(b, Batch) and b.lost)]
        self._check_unchanged()
        self.terms[found.term.name] = found.term
        with torch.autocast(found.output.device.type, enabled=False):
            self._loss(found.term, forward, found.output, found.way, found.target, found)

    def predict(self, term: Term, output: Any) -> None:
        """Records the curvature of the distribution that the outputs of a batch define."""
        forward = forward_of(output, self.watch, self.optimizer)
        output, way = read(output, forward, self._output, self.optimizer)
        target = term.curvature.stand_in(output.detach())
        term.curvature.check(output, target)
        self._check_way(way)
        recorder, recorded = self._recorded(forward, output, way)
        mass, zero = term.curvature.normalizer(output.detach(), target), output.detach().new_zeros(())
        batch = Prediction(term, forward, target, output.shape, way, mass, zero, self.parameters.versions())
        batch.arrivals = self.factors.arrivals
        if recorder is not None:
            uses = self.observer.check(recorder, recorded)
            if self.observer.due():
                with self.watch.suspended():
                    self.observer.observe(batch, uses, recorded, len(self._batches()))
            if self.observer.runs_again() and recorded is output and not self.derives:
                batch.uses = uses
        self.pending.append(batch)

    def plus(self, penalty: Callable[[], Tensor]) -> Tensor:
        """Records a part of the objective that is not a loss of outputs."""
        self._forget_gone()
        rng = RandomState(self.parameters.device)
        value = penalty()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(
                f"opt.plus was given a function that returned {described(value)}; expected one number, a Tensor, "
                "computed from the parameters: opt.plus(lambda: 1e-3 * model.weight.square().sum())"
            )
        value = value.reshape(())
        self._noted(Penalty(penalty, value.detach(), self.parameters.versions(), rng), value)
        return value

    def _loss(
        self, term: Term, forward: Forward, output: Tensor, way: Way | None, target: Any, own: Found | None = None
    ) -> Tensor:
        term.check(output, target)
        if torch.is_grad_enabled() and not output.requires_grad:
            raise ValueError(
                "opt.loss was given a tensor without a graph; expected the model's output: do not call detach() on it"
            )
        self._check_way(way)
        recorder, recorded = self._recorded(forward, output, way)
        uses = None if recorder is None else self.observer.check(recorder, recorded)
        loss = term.curvature.loss(output, target) if own is None else own.value
        mass = term.curvature.normalizer(output.detach(), target)
        batch = self._batch(term, forward, output, way, target, mass, loss)
        if self.place.world.size > 1 and term.curvature.is_mean and own is None:
            batch.weight = self._weight(term, float(mass))
            loss = loss.detach() + batch.weight * (loss - loss.detach())
        if uses is not None:
            if self.observer.due():
                if torch.isfinite(loss):
                    with self.watch.suspended():
                        self.observer.observe(batch, uses, recorded, len(self._batches()))
                else:
                    batch.fault = LOSS_NOT_FINITE
            if self.observer.runs_again() and recorded is output and not self.derives:
                batch.uses = uses
        if isinstance(way, Part) and not way.path:  # linear in what the model returned
            batch.replay = forward.replay
        if own is None:
            return self._noted(batch, loss)
        batch.scalar = weakref.ref(own.scalar)
        return self._noted(batch, own.scalar, own.factor)

    def _check_way(self, way: Way | None) -> None:
        if self.observer.may_run_again() and way is None:
            raise ValueError(
                "opt.loss was not given a tensor that the model returned, or a view of one, but the adaptive step runs "
                f"the model again and needs it; pass output= to {self.optimizer}, say output=lambda returned: "
                "returned.logits[:, :-1].flatten(0, 1), and give opt.loss all that the model returned. Or fix lr, "
                "momentum and damping (and the solver of a NaturalGradient)"
            )

    def _recorded(self, forward: Forward, output: Tensor, way: Way | None) -> tuple[Recorder | None, Tensor]:
        """The recorded uses that lead to the output. For compiled code, and for a forward that takes derivatives, they
        come from a second forward, if they are needed."""
        seen = forward.recorder
        if seen is not None:
            seen.has_shards = self.place.shards is not None
        missed = seen is not None and self._missed(seen)
        if seen is not None and not (missed and way is not None):
            return seen, output
        if not (self.observer.due() and self.watch.recording):
            return None, output
        if way is None:
            raise ValueError(
                "opt.loss was not given a tensor that the model returned, or a view of one, and the forward ran in "
                f"compiled code, where uses of parameters cannot be seen; pass output= to {self.optimizer}, a "
                "function from what the model returns to the loss's input, and give opt.loss all that the model "
                "returned"
            )
        recorder = self.watch.recorder(DerivativeRecorder if missed else None)
        with self.watch.suspended(), torch.enable_grad(), buffers_kept(self.place.model):
            with recorder:
                again = forward.again(self.place.model, way)
            if self._missed(recorder):
                recorder = self.watch.recorder(DerivativeRecorder)
                with recorder:
                    again = forward.again(self.place.model, way)
        return recorder, again

    def _missed(self, recorder: Recorder) -> bool:
        """Whether uses of layers in derivatives that the forward takes itself were not seen, and are wanted."""
        if not (recorder.takes_derivatives and self.observer.reads_derivatives and self.place.shards is None):
            return False
        self.derives = True
        return not isinstance(recorder, DerivativeRecorder)

    def _batch(
        self, term: Term, forward: Forward, output: Tensor, way: Way | None, target: Any, mass: Tensor, loss: Tensor
    ) -> Batch:
        return Batch(term, forward, target, output.shape, way, mass, loss.detach(), self.parameters.versions())

    def _noted(self, observed: Batch | Penalty, scalar: Tensor, times: float = 1.0) -> Tensor:
        self.factors.settle()
        if scalar.requires_grad:
            self.factors.observe(scalar, observed, times)
        self.pending.append(observed)
        if isinstance(observed, Batch) and self.observer.due() and self._brings_together():
            self.observer.share(self._batches())
        return scalar

    def _batches(self) -> list[Batch]:
        return [b for b in self.pending if isinstance(b, Batch)]

    def _brings_together(self) -> bool:
        """Whether the next backward reduces the gradients over the ranks: not within `no_sync()`, and not if ranks may
        run out of batches."""
        around = self._around()
        return around is not None and bool(around.require_backward_grad_sync) and not self.joined

    def _no_loss(self, term: Term, forward: Forward, output: Tensor, way: Way | None, target: Any) -> Tensor:
        """The loss of a rank without examples when other ranks have some: zero, with zero gradients."""
        if self.place.world.size == 1:
            raise ValueError(f"the batch is empty: the output has shape {tuple(output.shape)}; skip empty batches")
        if self.place.shards is not None and forward.recorder is not None and self.observer.due():
            uses = self.observer.check(forward.recorder, output)
            self.observer.follow_along(uses, output, target, term, len(self._batches()))
        loss = output.sum()
        batch = self._batch(term, forward, output, way, target, loss.detach().new_zeros(()), loss)
        if term.curvature.is_mean:
            batch.weight = self._weight(term, 0.0)
        return self._noted(batch, loss)

    def _weight(self, term: Term, mass: float) -> float:
        """The factor for the gradient of a rank's mean. With it, the average over ranks is proportional to the mean
        over all cases. It is the rank's number of cases over the average number per rank in the term's first batch."""
        if term.name not in self.first_mass:
            (first,) = self.place.world.numbers([mass], "the size of the first batch")
            if not first > 0:
                raise ValueError("the first batch has no cases on any rank; skip empty batches")
            self.first_mass[term.name] = first
        return mass * self.place.world.size / self.first_mass[term.name]

    # Gradients that come and go ------------------------------------------------------------------------

    def _forget_gone(self) -> None:
        """Drops batches whose gradients were removed without `opt.zero_grad()`: by `model.zero_grad()`, or by zeroing
        them in place. With shards, gradients of microbatches are kept elsewhere."""
        if not any(b.arrived for b in self.pending) or self.place.shards:
            return
        if all(p.grad is None for p in self.parameters.values()) or self.factors.zeroed:
            self.forget_arrived()

    def notes(self) -> list[str]:
        """Notes for the user about the curvature of the terms, from what has been seen so far."""
        return [f"{name!r}: {note}" if name else note for name, t in self.terms.items() for note in t.curvature.notes]

    def forget_arrived(self) -> None:
        """Drops batches whose gradients are part of the parameters' gradients, which are being zeroed."""
        gone = [b for b in self.pending if b.arrived or self._is_used(b)]
        self.pending[:] = [b for b in self.pending if b not in gone]
        self._zeroed.update(gone)
        for b in self.pending:
            b.outdated = b.seen
        self.factors.forget()

    def _starts(self, of: Observed, first: bool) -> None:
        """Called when autograd starts from a loss. Gradients may have been zeroed after the loss was computed. A loss
        whose gradient was zeroed may also be used again."""
        if first:
            self._forget_gone()
        if of in self._zeroed:
            assert isinstance(of, (Batch, Penalty))
            self._zeroed.discard(of)
            of.passes.clear()
            of.outdated = False
            self.pending.append(of)

    def _is_used(self, part: Batch | Penalty) -> bool:
        """Whether gradients have arrived since a prediction was recorded."""
        return isinstance(part, Prediction) and self.factors.arrivals > part.arrivals

    def collect(self) -> list[Batch | Penalty]:
        """The losses and penalties that this step's gradients come from."""
        self.factors.settle()
        self._unchanged.tell_of_thawed(self.place.model, self.parameters, self.optimizer)
        predictions = [b for b in self.pending if isinstance(b, Prediction)]
        losses = [b for b in self.pending if not isinstance(b, Prediction)]
        return [*of_gradients(losses), *predictions]

    def end_step(self, *, accepted: bool) -> None:
        """Drops the parts of the step."""
        self.watch.buffers.end_step(accepted=accepted)
        self.pending.clear()
        self._zeroed.clear()
        self.factors.forget()
        self.watch.end_step()


def _weakly(model: nn.Module) -> Callable[[], DistributedDataParallel | None]:
    """A weak reference. If its reducer were the last to release the ranks' process group, at the end of a process,
    torch's gloo could hang."""
    return weakref.ref(model) if isinstance(model, DistributedDataParallel) else lambda: None
