"""The statistics of layers: from the forward passes of a step to moving averages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.probe import PASSES
from natgrad.capture.reading import read_cases
from natgrad.capture.recorder import Recorder
from natgrad.capture.separation import Separation, SeparationCheck, assumed_of
from natgrad.capture.use import Use
from natgrad.curvature.moments import AffineMoments
from natgrad.linalg.precision import matmul_precision
from natgrad.optim.labels import Labels
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.combination import combined
from natgrad.optim.preconditioner.options import Options
from natgrad.optim.preconditioner.ranks import Ranks
from natgrad.optim.preconditioner.running import Running
from natgrad.optim.preconditioner.sums import Statistics
from natgrad.optim.rules.stage import Figures
from natgrad.optim.tracking.batch import Batch, Term
from natgrad.optim.vectors import Vector

ENOUGH = 250
"""A sufficient number of cases for the moments of one batch: examples, or examples times positions."""
MOST_THINNED = 4
UNSEEN = (
    "{name!r} has a gradient, and no loss of opt.loss depends on it, so that it has no curvature. Give its loss as a "
    "term of the objective, {optimizer}(model, {{'one': ..., 'other': ...}}), or freeze it with requires_grad_(False), "
    "or leave it to another optimizer with params="
)


class LayerStatistics:
    """Computes the statistics of batches at the refresh intervals, and keeps the averages.

    Args:
        optimizer: its name, for messages.
        parameters: the trained parameters.
        labels: the source of random labels.
        options: which statistics are computed, and how often.
        running: the averages.
        ranks: combines the statistics of several ranks.

    `last` is the step of the last statistics. `wanted`: statistics are needed at once, because some averages were lost
    or a parameter has none. `taken_apart` are layers whose rows depend on one another, and whose squares are therefore
    approximate.
    """

    def __init__(
        self,
        optimizer: str,
        parameters: Parameters,
        labels: Labels,
        options: Options,
        running: Running,
        ranks: Ranks,
    ):
        self.optimizer, self.parameters, self.labels, self.options = optimizer, parameters, labels, options
        self.running, self.ranks = running, ranks
        self.separation = SeparationCheck()
        self.last: int | None = None
        self.wanted = False
        self.taken_apart: tuple[str, ...] = ()

    def due(self, step: int) -> bool:
        """Whether the statistics of the next batches are due."""
        if not self.running.observes:
            return False
        if self.last is None or self.wanted:
            return True
        return step - self.last >= self.options.statistics.steps(step)

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        """The uses that the output depends on."""
        if not self.running.reads_gradients:  # parameters without a layer get plain steps
            return recorder.uses
        return recorder.check(output, reached=True)

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        """Computes the statistics of a batch, the `draw`-th of the step, or records its fault."""
        curvature, draws = batch.term.curvature, self.running.reads_gradients

        def columns() -> Iterable[Tensor]:
            source = self.labels.of(step, draw)
            return curvature.columns(output, batch.target, self.options.estimator, generator=source)

        cases = read_cases(
            uses,
            output,
            columns if draws else tuple,
            batch.mass,
            self.parameters.precision,
            separation=self._rows_of(batch, uses, output),
            ignored=curvature.ignored(output.detach(), batch.target),
            sampled=self.options.estimator == "mc" or not draws,
        )
        new = [layer.label for layer in cases.mixed if self._approximates(layer)]
        self.taken_apart = tuple(dict.fromkeys([*self.taken_apart, *new]))
        every = self._thinning(cases)
        if every > 1:
            cases = cases.every(every, start=step // self.options.statistics.most % every)
        # bfloat16 would be too imprecise for the products of the moments.
        with matmul_precision("high" if self.options.matmul_precision else None):
            batch.statistics = self.running.observe(cases)
        if not batch.statistics.finite():
            batch.fault = "the statistics are not finite"

    def _rows_of(self, batch: Batch, uses: list[Use], output: Tensor) -> Separation:
        """Which rows make up a case. If labels are drawn, rows that depend on one another still count as separate
        cases: their squares are then approximate, but the single square of the whole batch would be mostly noise.

        Raises:
            ValueError: if rows depend on one another, parameters are sharded, and labels are not drawn.
        """
        mode, draws = batch.forward.mode, self.options.estimator == "mc"
        if not self.running.reads_gradients and self.options.sharing == "expand":
            return assumed_of(uses, output)  # every row of an input is a case
        if self.parameters.place.shards is None:
            found = self.separation.of(uses, output, mode)
            return found if draws else found.whole()
        found = self.separation.in_step(uses, output, mode, of=batch.term.name)
        if not draws and any(found.mixed):
            raise ValueError(
                f"estimator={self.options.estimator!r} needs independent rows where parameters are sharded, and this "
                "model's see one another, as by averages over the batch; use estimator='mc'"
            )
        return found

    def _approximates(self, layer: Layer) -> bool:
        """Whether separating the rows changes the result. For K-FAC's factors it does not, on average."""
        by_squares = self.options.sharing == "reduce" or self.running.squares_cases
        return self.options.estimator == "mc" and (layer.scale or by_squares)

    def follow_along(self, uses: list[Use], output: Tensor, target: Tensor, term: Term, draw: int, step: int) -> None:
        """Helps to gather the shards for the statistics of other ranks. This rank has no statistics."""
        if not (self.running.reads_gradients and output.requires_grad):
            return
        if self.separation.begin(term.name):
            _follow(uses, output, PASSES)
        one, its_target = output.detach().new_zeros(1, *output.shape[1:]), target.new_zeros(1, *target.shape[1:])
        source = self.labels.of(step, draw)
        for _ in term.curvature.columns(one, its_target, self.options.estimator, generator=source):
            _follow(uses, output, 1)

    def _thinning(self, cases: Cases) -> int:
        """The moments use one of this many examples."""
        if self.options.statistics_share is not None:
            return math.floor(1 / self.options.statistics_share)
        rows = cases.rows()
        count = rows if self.options.sharing == "reduce" else cases.fewest()
        return max(1, min(count // ENOUGH, MOST_THINNED, rows // 2))

    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        """Adds the statistics of the pending batches to the averages. Returns the names of parameters that have a
        gradient but no statistics yet."""
        taken = figures["statistics"] = self.running.take_in(self._new(objective, self.due(step)), self.options.decay)
        if taken:
            self.last, self.wanted = step, False
        if not self.running.reads_gradients:
            return set()
        held = self.running.total.moments
        thinned = {layer.label: m.diagonals for layer, m in held.items() if isinstance(m, AffineMoments)}
        figures["rows_taken_apart"] = list(self.taken_apart)
        figures["diagonal_factors"] = {label: factors for label, factors in thinned.items() if factors}
        return self._without_statistics(gradients, figures, taken)

    def _new(self, objective: Objective, due: bool) -> list[Statistics]:
        """The statistics of this step's batches, of all ranks."""
        if not due:
            return []
        of: dict[str, list[Batch]] = {name: [] for name, weight in objective.weights.items() if weight != 0}
        for batch in objective.batches:
            of.setdefault(batch.term.name, []).append(batch)
        parts = []
        for name, batches in of.items():
            own = reduce(Statistics.__add__, [b.statistics for b in batches if b.statistics is not None], Statistics())
            idle = bool(objective.idle)
            if len(of) > 1:
                world = self.parameters.place.world
                idle = world.numbers([float(all(b.is_empty for b in batches))], "who has a term")[0] > 0
            new = self.ranks.summed(batches, own, idle)
            parts.append((objective.weights.get(name, 1.0), new))
        if len(parts) == 1:
            return parts[0][1]
        return [combined([(weight, reduce(Statistics.__add__, new)) for weight, new in parts if new])]

    def _without_statistics(self, gradients: Vector, figures: Figures, taken: bool) -> set[str]:
        """Parameters that have a gradient but belong to no layer yet. They do not change until they have statistics,
        which are requested at once."""
        covered = {n for layer in self.running.layers for n in layer.names}
        missing = {n for n in gradients if n not in covered}
        if not missing:
            return missing
        # A parameter whose gradient is zero has not been used.
        missing_and_used = [n for n in gradients if n in missing and bool((gradients[n] != 0).any())]
        if taken and missing_and_used:
            raise NotImplementedError(UNSEEN.format(name=missing_and_used[0], optimizer=self.optimizer))
        self.wanted = self.wanted or bool(missing_and_used)
        figures["without_statistics"] = missing_and_used
        return missing

    def drop_spoiled(self) -> bool:
        """Forgets averages that are not finite, on all ranks. Returns whether there were any."""
        lost = self.ranks.union(self.running.drop_spoiled())
        self.running.forget(lost)
        self.wanted = self.wanted or bool(lost)
        return bool(lost)


def _follow(uses: list[Use], output: Tensor, passes: int) -> None:
    edges = [use.edge for use in uses]
    for _ in range(passes):
        torch.autograd.grad(output, edges, torch.zeros_like(output), retain_graph=True, allow_unused=True)
