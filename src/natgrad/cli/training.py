"""Training an autoencoder with one optimizer, and recording the progress."""

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from natgrad.study.tasks import SUBSET, WEIGHT_COST, reconstruction, shuffled_batches
from natgrad.study.training import Budget, moments

EVALUATIONS = 50


@dataclass(frozen=True)
class Point:
    """A model's state after some steps and seconds of training.

    `seconds` are of processor time, without the first step. `loss` is the cross-entropy and `squared_error` the squared
    error of the reconstruction, both summed over pixels and averaged over images, without the weight cost.
    """

    step: int
    seconds: float
    loss: float
    squared_error: float


@dataclass
class Run:
    """One optimizer's training: its settings, and the results.

    `kind` is "adam" or "kfac", and `settings` are keyword arguments of that optimizer. `train` sets the other fields:
    `curve` is on a fixed subset of the images, `final` on all of them. `first_step` is the processor time of the first
    step, in which K-FAC calibrates its damping and torch loads its libraries; `seconds` is that of all other steps.
    """

    optimizer: str
    kind: str
    batch: int
    settings: dict[str, Any] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    final: Point | None = None
    model: nn.Sequential | None = None
    step: int = 0
    seconds: float = 0.0
    first_step: float = 0.0
    batch_loss: float = math.nan
    damping: float | None = None
    rejected: int = 0
    diverged: bool = False


def demo_runs() -> list[Run]:
    """The three optimizers that the demo compares, not yet run."""
    return [
        Run("Adam", "adam", 250, {"lr": 2e-3, "weight_decay": WEIGHT_COST}),
        Run("K-FAC", "kfac", 1000, {"weight_decay": WEIGHT_COST, "centered": False}),
        Run("K-FAC, centered", "kfac", 1000, {"weight_decay": WEIGHT_COST, "centered": True}),
    ]


def train(
    run: Run,
    initial: nn.Sequential,
    images: Float[Tensor, "images pixels"],
    seconds: float,
    *,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
    on_step: Callable[[Run], None] = lambda run: None,
) -> None:
    """Train a copy of `initial` for some seconds of processor time, or until `stopped()`, and record it in `run`.

    Neither evaluation nor the first step counts. `on_step` is called after each step and each evaluation.
    """
    model = run.model = copy.deepcopy(initial)
    take_step = make_step(run, model)
    clock = ProcessorClock()

    def step(batch: Tensor) -> None:
        if run.step == 0:
            run.first_step = clock.leave_out(lambda: take_step(batch))
        else:
            take_step(batch)
        run.step += 1

    batches = shuffled_batches(images, run.batch, seed)
    subset = images[:SUBSET]
    for moment in moments(step, batches, Budget(seconds=seconds), EVALUATIONS, stopped, clock):
        run.seconds = moment.seconds
        on_step(run)
        if moment.due:
            point = Point(run.step, run.seconds, *reconstruction(model, subset))
            run.curve.append(point)
            run.diverged = not math.isfinite(point.loss)
            on_step(run)
        if run.diverged:
            break
    run.final = Point(run.step, run.seconds, *reconstruction(model, images))


class ProcessorClock:
    """Seconds of computation by this process: the sum over its threads, divided by torch's number of threads. On an
    idle machine this is about the wall-clock time; on a busy one it excludes the time of other programs."""

    def __init__(self) -> None:
        self._left_out = 0.0

    def __call__(self) -> float:
        return time.process_time() / torch.get_num_threads() - self._left_out

    def leave_out(self, work: Callable[[], None]) -> float:
        """Do the work while the clock is stopped; return the work's duration."""
        start = self()
        work()
        took = self() - start
        self._left_out += took
        return took


def make_step(run: Run, model: nn.Sequential) -> Callable[[Tensor], None]:
    """Build the run's optimizer; return the function that takes one step on a batch and records its loss."""
    if run.kind == "adam":
        adam = torch.optim.Adam(model.parameters(), **run.settings)

        def adam_step(batch: Tensor) -> None:
            logits = model(batch)
            loss = functional.binary_cross_entropy_with_logits(logits, batch, reduction="sum") / len(batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
            run.batch_loss = loss.item()

        return adam_step

    from natgrad import KFAC

    kfac = KFAC(model, nn.BCEWithLogitsLoss(reduction="sum"), **run.settings)

    def kfac_step(batch: Tensor) -> None:
        loss = kfac.loss(model(batch), batch) / len(batch)
        kfac.zero_grad()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from a rejected step, which is counted instead
            kfac.step()
        run.batch_loss = loss.item()
        run.damping = float(kfac.diagnostics["damping"])
        run.rejected += not kfac.diagnostics["accepted"]

    return kfac_step
