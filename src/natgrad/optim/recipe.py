"""The step of KFAC and NaturalGradient, as a sequence of calls of parts that do not depend on one another."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.recorder import Recorder
from natgrad.capture.use import Use
from natgrad.curvature.jacobian import Jacobian
from natgrad.optim import averaging
from natgrad.optim.decay import Decay
from natgrad.optim.journal import MEND, Journal
from natgrad.optim.labels import Labels
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.base import Preconditioner
from natgrad.optim.rules.damping import DampingControl, calibrate
from natgrad.optim.rules.length import Adaptive, Fixed, StepRule
from natgrad.optim.rules.projected import Projected
from natgrad.optim.rules.stage import Rejection, Stage
from natgrad.optim.tracking.batch import Batch, Penalty, Term
from natgrad.optim.tracking.scaler import scale_taken_out
from natgrad.optim.tracking.tracker import Tracker
from natgrad.optim.trial import FAR, ON_ANOTHER_BATCH, Risen, Taken, Trials
from natgrad.optim.untold import Untold
from natgrad.optim.vectors import Vector, check_dense, dot
from natgrad.optim.whole import ONE_AT_A_TIME, restored_on_error, states_restored_on_error, uninterrupted


class Recipe:
    """Computes new parameters from the losses and their gradients.

    Args:
        parameters: the parameters to train.
        tracker: records the model's forward passes and the losses computed from them.
        preconditioner: has the curvature `F` and the inverse of `F + λI`.
        damping: `λ`, and how it adapts to the reduction ratio.
        journal: counts failures, and warns users.
        labels: the source of random labels.
        tolerated: the share of the loss by which a step may raise it on its own batch.
        tries: how often a step is tried, with more damping each time and the same curvature.
        adapt_every: steps between changes of the damping, and of the ratio of step size and momentum.
        max_kl: a bound on the predicted KL divergence of a step.
        average: decay of the average of the parameters. None: no average.
        precision: the precision of the products of the quadratic model.
        projected: another step rule for a given momentum, if there is one.
    """

    def __init__(
        self,
        parameters: Parameters,
        tracker: Tracker,
        preconditioner: Preconditioner,
        damping: DampingControl,
        journal: Journal,
        labels: Labels,
        *,
        tolerated: float,
        tries: int,
        adapt_every: int,
        max_kl: float | None,
        average: float | None,
        precision: str | None,
        projected: Projected | None = None,
    ):
        self.parameters, self.tracker, self.preconditioner = parameters, tracker, preconditioner
        self.jacobian = Jacobian()
        self.damping, self.journal, self.labels = damping, journal, labels
        self.tries, self.adapt_every, self.average, self.precision = tries, adapt_every, average, precision
        self.fixed = Fixed(parameters, preconditioner, max_kl)
        self.adaptive = Adaptive(parameters, preconditioner, max_kl)
        self.projected = projected
        self.trials = Trials(parameters, tolerated)
        self.untold = Untold(journal.optimizer, parameters)
        tracker.observer = weakref.proxy(self)
        tracker.arm()

    def run(self, parts: list[Batch | Penalty], gradients: Vector) -> None:
        """One step. `parts` are the losses and penalties whose gradients are given."""
        device = self.parameters.device
        with (
            ONE_AT_A_TIME,
            self._as_a_whole(),
            self.tracker.watch.suspended(),
            torch.autocast(device.type, enabled=False),
        ):
            self.journal.begin(self.damping.value)
            try:
                self._step(parts, gradients)
                self.journal.accept()
            except Rejection as rejection:
                self._reject(rejection)
            self.parameters.place.settle()
        with uninterrupted():
            self.preconditioner.end_step()
            self.tracker.end_step(accepted=self.journal.figures["accepted"])
            self.journal.end(self.damping.value, self.preconditioner.faults)
            self.tracker.arm()

    def _step(self, parts: list[Batch | Penalty], gradients: Vector) -> None:
        """The recipe. Raises Rejection if no step can be taken."""
        figures, now = self.journal.figures, self.journal.steps
        objective = self._objective(parts, gradients)
        if objective.left_out:
            figures["terms_left_out"] = objective.left_out
        self.untold.look(objective, gradients, now)
        waiting = self.preconditioner.take_in(objective, gradients, figures, now)
        if notes := self.tracker.notes():
            figures["notes"] = notes
        moving = [n for n in self.preconditioner.moves(gradients) if n not in waiting]
        stage = self._stage(objective, gradients, moving)
        self.preconditioner.see_gradient(stage.gradient)
        if not stage.gradient or (self._squared == 0 and not self.rule.fixed):
            return  # nothing to do, and no direction to do it in
        still = self._squared == 0 or all(group["lr"] == 0 for group in self.parameters.groups)
        if still and self.damping.adaptive and self.damping.value is None:
            return  # any damping gives the same loss: the next step calibrates it
        if objective.measurable:
            self._look_at_loss(stage)
        elif self.damping.adaptive and (self.damping.value is None or self._adaptation_due()):
            self.damping.calibrated(self.preconditioner.scale())
        for tries in range(1, self.tries + 1):
            if self.tries > 1:
                figures["tries"] = tries
            try:
                self._commit(self._try(stage))
                return
            except Rejection:
                if tries == self.tries or self.damping.given:
                    raise
                stage.rejected = tries
                self.damping.raise_(tries, self.preconditioner.scale())

    def _look_at_loss(self, stage: Stage) -> None:
        """Calibrates the damping on the first loss. Raises Rejection if the last step raised the loss too much."""
        objective = stage.objective
        self.journal.see_loss(stage.loss, given=self.rule.fixed and not self.damping.adaptive)
        if self.damping.value is None:
            self._calibrate(stage)
        elif self._was_too_far(objective):
            raise Rejection(f"the loss had risen to {objective.loss:.4g} by the last step, which is undone")
        self.journal.loss_before = objective.loss

    def _was_too_far(self, objective: Objective) -> bool:
        """Whether the last step raised this batch's loss too much. It is then undone."""
        share = ON_ANOTHER_BATCH if self.damping.adaptive else FAR
        if self.damping.given or not self.trials.too_far(objective.loss, self.journal.loss_before, share):
            return False
        return self.trials.undo_last(objective, objective.loss, share)

    def _try(self, stage: Stage) -> Taken:
        """Takes the step with the current damping. Raises Rejection if the loss would rise, or if there is none."""
        damping, figures, due = self.damping.value, self.journal.figures, self._adaptation_due()
        measures = (self._measures() or self.rule.searches) and stage.objective.measurable
        assert damping is not None
        try:
            self.preconditioner.prepare(damping, stage.decay, figures, self.journal.steps)
            step, change = self.rule.propose(stage, damping, figures, predicts=measures, joint=due)
        except ValueError as error:
            if self.journal.exploded:
                raise ValueError(f"the run has diverged, to a loss of {stage.loss:.4g} ({error}); {MEND}") from error
            if self.damping.given:
                raise
            raise Rejection(f"{self.preconditioner.inverted} could not be inverted: {error}") from error
        # If the model predicts that most of the loss vanishes, it may be wrong: saturated outputs have almost no
        # curvature.
        doubtful = self.damping.adaptive and stage.objective.measurable and -change > 0.5 * abs(stage.loss)
        if not (measures or doubtful):
            return self.trials.take(step)
        found = self.trials.measure(step, stage, shorten=self.rule.shortens, search=self.rule.searches)
        if isinstance(found, Risen):
            raise Rejection(f"the loss would have risen from {stage.loss:.4g} to {found.loss_after:.4g}")
        figures["loss_after"] = found.loss_after
        if found.share < 1:
            figures["shortened"] = found.share
        if found.share < 1 and not self.rule.searches:
            self.journal.faults["shortened"] += 1
            self.damping.raise_(1, self.preconditioner.scale())
            self.rule.forget()
            self.preconditioner.expire()
        else:
            assert found.loss_after is not None
            if found.share < 1:
                change = self.rule.predicted(found.share)
            ratio = figures["reduction_ratio"] = (found.loss_after - stage.loss) / change if change else 0.0
            if change:
                self.damping.adapt(ratio, self.preconditioner.scale(), self.rule.share * found.share)
        return found

    def _commit(self, taken: Taken) -> None:
        """Stores the step that was taken: for the momentum, for undoing it, and for the averages."""
        with uninterrupted():
            delta = taken.step.delta
            for part in taken.step.parts:
                for n in part.names:
                    state = self.parameters.state_of(n)
                    state["delta"] = delta[n]
                    state.pop("length", None)
                    if part.length is not None:
                        state["length"] = part.length
            if self.average is not None:
                own = self.parameters.local()
                averaging.take_in({n: own[n] for n in taken.step.direction}, self.parameters.state_of, self.average)

    def _reject(self, rejection: Rejection) -> None:
        self.journal.reject(str(rejection))
        self.rule.forget()
        if rejection.by_step:
            self.parameters.forget_momentum()
            self.damping.raise_(self.journal.rejections, self.preconditioner.scale())
        self.preconditioner.expire()

    # What the recipe is made of ------------------------------------------------------------------------

    def _objective(self, parts: list[Batch | Penalty], gradients: Vector) -> Objective:
        """The objective whose gradients are given. Raises Rejection if it is not finite."""
        objective = Objective(self.parameters, parts, self.tracker.terms, self.precision, self.jacobian)
        if objective.idle:
            gradients |= self._from_others(gradients)
        check_dense(gradients)
        taken_out = scale_taken_out()
        if self.tracker.factors.divided_by_hand(objective.scale, taken_out):
            objective.scale = 1.0
        else:
            objective.scale /= taken_out
        if objective.fault is not None:
            finite = math.isfinite(objective.loss)
            if not finite and self.trials.undo_last(objective):
                raise Rejection("the loss is not finite after the last step, which is undone")
            self._check_parameters(objective.fault)
            raise Rejection(objective.fault, by_step=False)
        if not (objective.scale > 0 and math.isfinite(objective.scale)):
            raise Rejection(f"the loss was scaled by {objective.scale} before backward", by_step=False)
        if objective.moved and objective.runs_again and self.runs_again():
            objective.measure_again()
        return objective

    def _stage(self, objective: Objective, gradients: Vector, moving: list[str]) -> Stage:
        """What the step starts from: the gradient per unit of the objective, and more."""
        own, decay = self.parameters.local(), self._decay(objective.scale)
        values = [gradients[n] if n in gradients else torch.zeros_like(own[n]) for n in moving]
        g = dict(zip(moving, torch._foreach_mul(values, 1 / objective.scale) if values else [], strict=True))
        decay.add_gradient(g, own)
        (self._squared,) = self.parameters.total([dot(g, g) if g else 0.0])
        if not (math.isfinite(self._squared) or self.parameters.finite(g)):
            raise Rejection("the gradient is not finite", by_step=False)
        stage = Stage(objective, g, decay, objective.loss)
        stage.loss += self.trials.penalty(stage)
        return stage

    def _calibrate(self, stage: Stage) -> None:
        """Chooses the first damping: the one whose step lowers the loss most."""

        def loss_after(damping: float) -> float:
            try:
                self.preconditioner.refresh(damping, stage.decay, self.journal.figures)
                step, _ = self.rule.propose(stage, damping, self.journal.figures, predicts=True, joint=True)
            except (ValueError, Rejection):
                return math.inf
            finally:
                self.parameters.forget_momentum()
            return self.trials.loss_after(step, stage)

        scale = self.preconditioner.scale()
        self.damping.calibrated(calibrate(scale if scale > 0 else 1.0, loss_after))
        self.preconditioner.expire()

    def _decay(self, scale: float) -> Decay:
        """Weight decay that is part of the objective."""
        eta = {
            n: group["weight_decay"] / scale
            for group, names in self.parameters.by_group(self.parameters)
            if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]
            for n in names
        }
        return Decay(eta)

    def _from_others(self, gradients: Vector) -> Vector:
        """The gradients. A rank that has run out of data has none, and gets them from the first rank that has."""
        place, own = self.parameters.place, self.parameters.local()
        if place.shards is not None:
            return gradients
        have = place.world.gather(list(gradients), "whose gradients there are")
        source = next((r for r, names in enumerate(have) if names), 0)
        if all(have):
            return gradients
        found: Vector = {}
        for n in have[source]:
            g = gradients.get(n)
            mine = torch.zeros_like(own[n]) if g is None or place.world.rank != source else g.clone()
            found[n] = place.world.sum(mine, "gradients of ranks that have data")
        return found

    def _check_parameters(self, fault: str) -> None:
        """Raises ValueError if parameters are not finite: then no further step is possible."""
        bad = [n for n, p in self.parameters.local().items() if not torch.isfinite(p).all()]
        if bad and self.journal.rejections >= 1:
            raise ValueError(
                f"{bad[0]!r} has entries that are not finite ({fault}): the run cannot go on; start again from the "
                f"last checkpoint, and {MEND}"
            )

    @contextlib.contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """Within this context, an exception restores everything that the step has not restored itself."""
        parts = (self.journal, self.damping, self.adaptive, self.preconditioner, *self.preconditioner.parts())
        before = list(self.tracker.pending)
        generator = self.labels.generator.get_state()
        try:
            with restored_on_error(parts), states_restored_on_error(self.parameters.states):
                yield
        except BaseException:
            self.tracker.pending[:] = before
            self.labels.generator.set_state(generator)
            raise

    # When ----------------------------------------------------------------------------------------------

    @property
    def rule(self) -> StepRule:
        """The step rule, which depends on whether step size and momentum are given or adaptive."""
        groups = self.parameters.groups
        if self.projected is not None and all(group["momentum"] is not None for group in groups):
            return self.projected
        for group in groups:
            if group["lr"] is None or group["momentum"] is None:
                return self.adaptive
        return self.fixed

    def _measures(self) -> bool:
        """Whether the loss after this step is measured in any case, independent of the predicted decrease."""
        if not self.damping.adaptive:
            return False
        return self._adaptation_due() or self.journal.rejections > 0 or self.damping.value is None

    def _adaptation_due(self) -> bool:
        return (self.journal.steps + 1) % self.adapt_every == 0

    # What the tracker asks -----------------------------------------------------------------------------

    @property
    def reads_derivatives(self) -> bool:
        return self.preconditioner.reads_derivatives

    def due(self) -> bool:
        return self.preconditioner.due(self.journal.steps)

    def runs_again(self) -> bool:
        return self.rule.runs_again or self._measures() or self.preconditioner.runs_again

    def may_run_again(self) -> bool:
        return self.rule.runs_again or self.damping.adaptive or self.preconditioner.runs_again

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        return self.preconditioner.check(recorder, output)

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int) -> None:
        with ONE_AT_A_TIME:
            self.preconditioner.observe(batch, uses, output, draw, self.journal.steps)

    def follow_along(self, uses: list[Use], output: Tensor, target: Any, term: Term, draw: int) -> None:
        self.preconditioner.follow_along(uses, output, target, term, draw, self.journal.steps)

    def share(self, pending: list[Batch]) -> None:
        self.preconditioner.share(pending)
