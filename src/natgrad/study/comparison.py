"""Several optimizers on a user's own model, from the same weights, for equal processor time; and advice."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.checks.errors import UserError
from natgrad.losses import output_curvature
from natgrad.study.split import Split
from natgrad.study.training import CONSTANT, Budget, Schedule, moments

DECAYING = Schedule(warmup=0.05, cooldown=0.95)
"""The schedule of the learning rates, for all optimizers that have one."""
SMALL = 5_000
"""The exact natural gradient is tried for models with at most this many parameters."""
DECAY = 0.5
"""A weight decay of NewtonMuon for little data, which it overfits with its default."""
EVALUATIONS = 20
MARGIN = 0.02
"""An optimizer is recommended if it is better than AdamW by this share."""

Read = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""A function from the model and a batch to the loss's input and the target."""


@dataclass(frozen=True)
class Problem:
    """A user's model, loss and data. Figures are losses of all examples, as if they were one batch."""

    model: nn.Module
    loss: nn.Module
    data: Split
    read: Read
    seed: int = 0

    @torch.no_grad()
    def figure(self, model: nn.Module, batches: Any) -> float:
        """The loss on batches, in evaluation mode: a mean over what the loss's own mean is over, such as class weights
        or targets that are not ignored; for a sum, over examples."""
        training, loss = model.training, copy.deepcopy(self.loss)
        model.eval()
        total, count = 0.0, 0.0
        try:
            for batch in batches:
                output, target = self.read(model, batch)
                size = self._size(output, target)
                summed = getattr(loss, "reduction", "mean") == "sum"
                value = loss(output, target).item() if size else 0.0
                total += value * (1 if summed else size)
                count += len(output) if summed else size
        finally:
            model.train(training)
        return total / count if count else math.nan

    def _size(self, output: Tensor, target: Tensor) -> float:
        """What the loss's mean divides by; for losses of the user's own, the number of examples."""
        try:
            return float(output_curvature(self.loss).normalizer(output, target))
        except (TypeError, ValueError, NotImplementedError):
            return float(len(output))


@dataclass(frozen=True)
class Contestant:
    """`make(model, loss)` is an optimizer of the model's parameters; `line` is the code that a user would write."""

    name: str
    line: str
    make: Callable[[nn.Module, nn.Module], Any]
    follows_loss: bool = False
    schedule: Schedule = DECAYING


@dataclass
class Outcome:
    """The result of a contestant. `status` is finished, diverged or refused; `curve` has step, seconds, training and
    held-out figure for every evaluation."""

    contestant: Contestant
    status: str = "finished"
    error: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    costs: list[float] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Seconds for a step: the median over all steps."""
        return statistics.median(self.costs) if self.costs else math.nan

    def last(self, which: str) -> float:
        """The last figure, `"training"` or `"held-out"`; infinite if the run did not finish."""
        value = self.curve[-1][which] if self.curve and self.status == "finished" else math.inf
        return value if math.isfinite(value) or not self.curve else math.inf


def contestants(model: nn.Module) -> list[Contestant]:
    """AdamW at three rates, Muon, NewtonMuon as it is, with both sides and with a weight decay for little data, KFAC,
    and for small models the exact natural gradient."""
    found = [_adamw(lr) for lr in (3e-4, 1e-3, 3e-3)]
    found += [
        _newton_muon("Muon", sides="none"),
        _newton_muon("NewtonMuon"),
        _newton_muon("NewtonMuon, both sides", sides="both"),
        _newton_muon(f"NewtonMuon, decay {DECAY:g}", weight_decay=DECAY),
        Contestant("KFAC", "natgrad.KFAC(model, loss)", natgrad.KFAC, True, CONSTANT),
    ]
    if sum(p.numel() for p in model.parameters() if p.requires_grad) <= SMALL:
        line = "natgrad.NaturalGradient(model, loss)"
        found.append(Contestant("NaturalGradient", line, natgrad.NaturalGradient, True, CONSTANT))
    return found


def _newton_muon(name: str, **settings: Any) -> Contestant:
    given = "".join(f", {key}={json.dumps(value)}" for key, value in settings.items())
    return Contestant(
        name,
        f"natgrad.NewtonMuon(model{given})",
        lambda model, loss: natgrad.NewtonMuon(model, **settings),
    )


def _adamw(lr: float) -> Contestant:
    return Contestant(
        f"AdamW {lr:g}",
        f"torch.optim.AdamW(model.parameters(), lr={lr:g})",
        lambda model, loss: torch.optim.AdamW(model.parameters(), lr=lr),
    )


def run(
    contestant: Contestant,
    problem: Problem,
    budget: Budget,
    stopped: Callable[[], bool] = lambda: False,
    on_step: Callable[[Outcome], None] = lambda outcome: None,
    evaluations: int = EVALUATIONS,
) -> Outcome:
    """Trains a copy of the model. Seconds are processor time. They exclude evaluation, fetching batches, and a first
    step on another copy, in which libraries are loaded."""
    outcome = Outcome(contestant)
    try:
        for _ in _train(Outcome(contestant), problem, Budget(steps=1), stopped, 1):
            pass
        for _ in _train(outcome, problem, budget, stopped, evaluations):
            on_step(outcome)
            if outcome.status == "diverged":
                break
    except UserError:
        raise
    except Exception as error:
        outcome.status, outcome.error = "refused", " ".join(f"{type(error).__name__}: {error}".split())
    return outcome


def _train(
    outcome: Outcome, problem: Problem, budget: Budget, stopped: Callable[[], bool], evaluations: int
) -> Iterator[None]:
    model, loss_fn = copy.deepcopy((problem.model, problem.loss))
    model.train()
    torch.manual_seed(problem.seed)
    contestant = outcome.contestant
    opt = contestant.make(model, loss_fn)
    loss_of = opt.loss if contestant.follows_loss else loss_fn
    rates = [(group, group["lr"]) for group in opt.param_groups]

    def take(batch: Any) -> None:
        output, target = problem.read(model, batch)
        loss = loss_of(output, target)
        if getattr(problem.loss, "reduction", "mean") == "sum":
            loss = loss / len(output)
        opt.zero_grad()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from rejected steps
            opt.step()

    before = 0.0
    clock = clock_of(model)
    for moment in moments(take, problem.data.training(problem.seed), budget, evaluations, stopped, clock):
        outcome.steps, outcome.seconds = moment.step, moment.seconds
        if moment.step:
            outcome.costs.append(moment.seconds - before)
        before = moment.seconds
        if moment.due:
            training, held_out = (problem.figure(model, part) for part in (problem.data.sample, problem.data.held_out))
            outcome.curve.append(
                {"step": moment.step, "seconds": moment.seconds, "training": training, "held-out": held_out}
            )
            if not math.isfinite(training):
                outcome.status = "diverged"
        if contestant.schedule != CONSTANT:
            for group, rate in rates:
                group["lr"] = rate * contestant.schedule.factor(budget, moment.step, moment.share)
        yield


def clock_of(model: nn.Module) -> Callable[[], float]:
    """On a CPU, the processor time of all threads; on other devices, the wall-clock time after synchronization."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        getattr(torch, device.type).synchronize()
        return time.perf_counter()

    return wall


def advice(outcomes: list[Outcome], held_out: bool) -> str:
    """One sentence: which optimizer to use and why, or that none is better than AdamW."""
    which, words = ("held-out", "held-out loss") if held_out else ("training", "training loss")
    good = [o for o in outcomes if math.isfinite(o.last(which))]
    adamw = min((o for o in good if o.contestant.name.startswith("AdamW")), key=lambda o: o.last(which), default=None)
    best = min(good, key=lambda o: o.last(which), default=None)
    if best is None:
        if held_out and any(math.isfinite(o.last("training")) for o in outcomes):
            return "The held-out loss is not finite, and the training loss is: look for NaN in the held-out data."
        return "No optimizer reached a finite loss: check the data (NaN?), the loss and the learning rates."
    if adamw is None:
        return f"Use {best.contestant.line}: its {words} is the lowest, {best.last(which):.4g}; AdamW's is not finite."
    value, other = best.last(which), adamw.last(which)
    if best is adamw or value > other - MARGIN * abs(other):
        return (
            f"Keep {adamw.contestant.line}: no other optimizer has a final {words} lower than its {other:.4g} by more "
            f"than {100 * MARGIN:g}%."
        )
    pace = best.cost / adamw.cost if adamw.cost else math.nan
    return (
        f"Use {best.contestant.line}: in the same time its {words} reaches {value:.4g}, against {other:.4g} with "
        f"{adamw.contestant.name.replace(' ', ' at ')}, and a step takes {pace:.1f} times as long as AdamW's."
    )
