"""The objective of one step: the losses whose gradients have arrived, with the weights that the user's backward
used."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.replaced import call_with, is_replaceable
from natgrad.curvature.jacobian import Jacobian, graph, through_graph
from natgrad.curvature.problem import buffers_kept
from natgrad.curvature.products import gauss_newton_product, tangents
from natgrad.curvature.replay import Replay
from natgrad.linalg.precision import matmul_precision
from natgrad.optim.parameters import Parameters
from natgrad.optim.tracking.batch import (
    LOSS_NOT_FINITE,
    Batch,
    Penalty,
    by_forward,
    in_order,
    run_again,
)
from natgrad.optim.vectors import Vector, symmetric


class Objective:
    """`Σ_t ω_t L_t`: the mean of each term over its pending batches, times the weight of the term.

    The units are those of the heaviest term's mean, `max |ω_t| = 1`. With one term, they are those of the loss's mean.
    So nothing depends on the reduction, the batch size or the number of microbatches. `scale` is the user's gradient
    divided by this objective's gradient, `idle` the number of ranks without examples, and `moved` whether the
    parameters were written to after a forward on some rank, so that its loss has changed.
    """

    def __init__(
        self,
        parameters: Parameters,
        parts: Sequence[Batch | Penalty],
        terms: Iterable[str],
        precision: str | None = None,
        jacobian: Jacobian | None = None,
    ):
        self._jacobian = jacobian or Jacobian()
        self._parameters, self._place, self._precision = parameters, parameters.place, precision
        self._model, self._world = self._place.model, self._place.world
        self.batches = [b for b in parts if isinstance(b, Batch)]
        self.penalties = [p for p in parts if isinstance(p, Penalty)]
        self._parts: list[Batch | Penalty] = [*self.batches, *self.penalties]
        factors, masses, losses = self._numbers()
        self._masses, n = masses[: len(self.batches)], len(self.batches)
        for b, its_loss in zip(self.batches, losses, strict=False):
            if not math.isfinite(its_loss):
                b.fault = b.fault or LOSS_NOT_FINITE
        # Each batch's factor, in units of its term's mean.
        means = [self._in_means(b, f, m) for b, f, m in zip(self.batches, factors, masses, strict=False)]
        own = dict.fromkeys(terms, 0.0)
        for b, mean in zip(self.batches, means, strict=True):
            own[b.term.name] += mean
        each = zip([*self._per_loss(means), *factors[n:]], losses, strict=True)
        empty = all(b.is_empty for b in self.batches)
        numbers = [float(sum(f * its for f, its in each)), float(empty), float(self._moved()), *own.values()]
        loss, idle, moved, *rest = self._world.numbers([*numbers, *self._faults()], "the loss")
        self.idle, self.moved = int(idle), moved > 0
        totals = dict(zip(own, rest, strict=False))
        heaviest = max((abs(v) for v in totals.values()), default=0.0)
        only = math.copysign(heaviest, next(iter(totals.values()))) if len(totals) == 1 else heaviest
        self.scale = only / self._world.size  # gradients are averaged over the ranks
        self.loss = loss / only if only else loss
        self.fault = self._fault(rest[len(own) :])
        self.weights = {n: v / only if only else 0.0 for n, v in totals.items()}
        self._weights = [mean / only if only else 0.0 for mean in means]
        self._penalty_weights = [f / only if only else 0.0 for f in factors[n:]]

    def _numbers(self) -> tuple[list[float], list[float], list[float]]:
        """The factors, masses and values of batches and penalties, with a single wait for the GPU."""
        sizes = self._parameters.sizes()
        by_hand: Counter[str] = Counter(b.kind for b in self.batches)
        rows = []
        for part in self._parts:
            factor = part.factor(sizes)
            if factor is None:  # gradients that were set by hand
                factor = part.loss.new_tensor(1 / by_hand[part.kind] if part.is_mean else 1.0)
            rows.append([factor, part.mass, part.loss])
        if self._parameters.device.type == "cpu":
            table = [[float(t) for t in row] for row in rows]
        else:
            table = torch.stack([torch.stack(row) for row in rows]).tolist() if rows else []
        factors, masses, losses = ([row[i] for row in table] for i in range(3))
        return factors, masses, losses

    @staticmethod
    def _in_means(batch: Batch, factor: float, mass: float) -> float:
        if batch.is_empty:
            return 0.0
        return factor * (batch.weight if batch.is_mean else mass)

    def _per_loss(self, means: Sequence[float]) -> list[float]:
        """The factor of each batch's loss (a mean or a sum), from the factor of its mean."""
        each = zip(means, self._masses, self.batches, strict=False)
        return [mean if b.is_mean or not mass else mean / mass for mean, mass, b in each]

    def _faults(self) -> list[float]:
        """Whether this rank's batches have a fault: a list with one entry for each rank, in which this rank fills its
        own."""
        here = self._world.rank if any(b.fault for b in self.batches) else None
        return [float(rank == here) for rank in range(self._world.size)]

    def _fault(self, faults: list[float]) -> str | None:
        """What is wrong with a batch on this rank or on another."""
        own = next((b.fault for b in self.batches if b.fault), None)
        others = [str(rank) for rank, faulty in enumerate(faults) if faulty and rank != self._world.rank]
        return own or (f"a batch has a fault on rank {', '.join(others)}" if others else None)

    @property
    def shares(self) -> list[float]:
        """The factor of the sum over cases, for each batch."""
        each = zip(self._weights, self._masses, self.batches, strict=False)
        return [0.0 if b.is_empty or not mass else w / mass for w, mass, b in each]

    def _moved(self) -> bool:
        """Whether the parameters were written to after a forward, so that its loss has changed."""
        now = self._parameters.versions()
        return self._place.shards is None and any(part.versions != now for part in self._parts)

    def measure_again(self) -> None:
        """Marks the loss and the recorded layers as outdated."""
        self.loss = self.evaluate()
        for batch in self.batches:
            batch.uses, batch.replay = [], None

    @property
    def left_out(self) -> list[str]:
        """The terms that have no batch, on any rank."""
        asked = {b.term.name for b in self.batches}
        return [name for name, weight in self.weights.items() if name and weight == 0 and name not in asked]

    @property
    def runs_again(self) -> bool:
        """Whether all batches can be run again, from the model to the loss."""
        return all(batch.way is not None for batch in self.batches)

    @property
    def measurable(self) -> bool:
        """Whether the objective has a value. Predictions without a loss have none."""
        return all(b.is_measured for b in self.batches)

    @property
    def nonnegative(self) -> bool:
        """Whether the objective is at least zero, for any outputs."""
        return not self.penalties and all(b.term.curvature.nonnegative for b in self.batches)

    @property
    def repeatable(self) -> bool:
        """Whether the gradients belong to these losses at the current parameters and inputs."""
        whole = self.runs_again and self.measurable and not self.moved
        return whole and bool(self._parts) and all(part.seen and part.unchanged for part in self._parts)

    @property
    def lowered(self) -> bool:
        """Whether any part was computed in low precision."""
        return any(b.forward.autocast is not None for b in self.batches) or self._parameters.lowered

    def gradient(self, names: Sequence[str]) -> Vector | None:
        """The gradient for the named parameters, computed again, with one run of the model for each of its forwards.
        None if the losses differ the second time, as for a model with internal state, or if this backward is not
        possible."""
        weights = dict(zip(map(id, self._parts), [*self._per_loss(self._weights), *self._penalty_weights], strict=True))
        leaves = [self._parameters[n] for n in names]
        groups: list[Sequence[Batch | Penalty]] = [*by_forward(self.batches), *([p] for p in self.penalties)]
        total: Vector = {}
        for parts in groups:
            try:
                with torch.enable_grad(), buffers_kept(self._model):
                    each = list(zip(self._losses_again(parts), parts, strict=True))
                    if not all(torch.allclose(loss.detach(), part.loss, rtol=1e-3) for loss, part in each):
                        return None
                    whole = torch.stack([weights[id(part)] * loss for loss, part in each]).sum()
                    gradients = torch.autograd.grad(whole, leaves, allow_unused=True)
            except RuntimeError:
                return None
            for n, g in zip(names, gradients, strict=True):
                if g is not None:
                    total[n] = total[n] + g if n in total else g
        return total

    def _losses_again(self, parts: Sequence[Batch | Penalty]) -> list[Tensor]:
        """The losses of batches of one forward, or a penalty, computed again."""
        batches = [part for part in parts if isinstance(part, Batch)]
        outputs = run_again(batches, self._model) if batches else []
        losses = [batch.loss_of(output) for batch, output in zip(batches, outputs, strict=True)]
        return [*losses, *(part.again() for part in parts if isinstance(part, Penalty))]

    def evaluate(self) -> float:
        """The objective at the current parameters; buffers and random generators keep their state."""
        total = 0.0
        with self._as_it_was():
            outputs = self._outputs(self._model)
            for weight, batch, output in zip(self._per_loss(self._weights), self.batches, outputs, strict=True):
                total += weight * batch.value(output)
            for weight, penalty in zip(self._penalty_weights, self.penalties, strict=True):
                total += weight * penalty.value()
        self._place.settle()
        return self._world.numbers([total], "the loss after a step")[0]

    def outputs(self) -> list[Tensor]:
        """The loss's input for every batch, at the current parameters; buffers and random generators keep their
        state."""
        with self._as_it_was():
            outputs = self._outputs(self._model)
        self._place.settle()
        return outputs

    def _outputs(self, forward: Callable[..., Any]) -> list[Tensor]:
        """The loss's input for every batch, with one run of `forward` for each forward of the model."""
        found: dict[int, Tensor] = {}
        for batches in by_forward(self.batches):
            found |= dict(zip(map(id, batches), run_again(batches, forward), strict=True))
        return [found[id(batch)] for batch in self.batches]

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Within the context, the model runs without gradients. At the end, its buffers are restored."""
        buffers = {n: b.clone() for n, b in self._model.named_buffers()}
        try:
            with torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for n, b in self._model.named_buffers():
                    b.copy_(buffers[n])

    def products(self, directions: list[Vector]) -> Tensor:
        """The matrix of `d_iᵀ F d_j`, in float64, by forward mode on the batches."""
        n = len(directions)
        lower = [0.0] * (n * (n + 1) // 2)
        for share, batch, pushed in self._all_pushed(directions):
            if batch.is_empty:
                continue
            curved = [batch.term.curvature.product(output, batch.target, Jd) for output, Jd in pushed]
            pairs = ((DJd, pushed[j][1]) for i, DJd in enumerate(curved) for j in range(i + 1))
            own = torch.stack([torch.dot(u.flatten(), v.flatten()) for u, v in pairs]).tolist()
            lower = [total + share * value for total, value in zip(lower, own, strict=True)]
        return symmetric(self._world.numbers(lower, "the quadratic model"), n)

    def _all_pushed(self, directions: list[Vector]) -> Iterator[tuple[float, Batch, list[tuple[Tensor, Tensor]]]]:
        """Every batch's share, and its output with `J d` for every direction. Batches of one forward share one
        forward-mode pass."""
        shares = dict(zip(map(id, self.batches), self.shares, strict=True))
        for batches in by_forward(self.batches):
            by_reverse = [bool(directions) and self._by_reverse(batch, directions[0]) for batch in batches]
            together = [batch for batch, its in zip(batches, by_reverse, strict=True) if not its]
            pushed: dict[int, list[tuple[Tensor, Tensor]]] = {id(batch): [] for batch in batches}
            with matmul_precision(self._precision if self._is_heavy(batches) else None):
                for d in directions:
                    if together:
                        for batch, pair in zip(together, self._forward_mode(together, d), strict=True):
                            pushed[id(batch)].append(pair)
                    for batch, its in zip(batches, by_reverse, strict=True):
                        if its:
                            pushed[id(batch)].append(self._pushed_by_reverse(batch, d))
            yield from ((shares[id(batch)], batch, pushed[id(batch)]) for batch in batches)

    def _forward_mode(self, batches: list[Batch], d: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Outputs and `J d` for batches of one forward."""
        if (replay := self._replay(batches)) is not None:
            output, Jd = replay.push((self._parameters[n], d[n]) for n in d)
            return [(way(output), way(Jd)) for batch in batches if (way := batch.way) is not None]
        return tangents(self._model, partial(run_again, batches), d, in_order(batches), self._place.duals)

    def _is_heavy(self, batches: list[Batch]) -> bool:
        """Whether products are large enough for a lower precision to save time."""
        replay = self._replay(batches)
        return replay is None or replay.is_heavy

    def _replay(self, batches: list[Batch]) -> Replay | None:
        """What differentiates the forward of these batches without running the model, if there is such."""
        replay = batches[0].replay
        if replay is None or any(batch.replay is not replay for batch in batches) or not replay.intact:
            return None
        batches[0].forward.check_inputs()
        return replay

    def _by_reverse(self, batch: Batch, d: Vector) -> bool:
        """Whether to compute `J d` by two backward passes, because forward mode and backward see different
        functions."""
        if self._place.shards is not None or batch.is_empty:
            return False
        key = batch.term.name, batch.shape, batch.forward.mode, batch.replay is not None
        run = partial(self._run, batch)
        return self._jacobian.by_reverse(key, self._model, run, d, lambda v: self._forward_mode([batch], v)[0])

    def _run(self, batch: Batch, model: Any) -> Tensor:
        """The loss's input; what the model writes to its buffers is discarded."""
        with buffers_kept(self._model):
            return batch.run(model)

    def _pushed_by_reverse(self, batch: Batch, d: Vector) -> tuple[Tensor, Tensor]:
        """The output and `J d`."""
        output, leaves = graph(self._model, partial(self._run, batch), d)
        return output.detach(), through_graph(output, leaves, d)

    def _product_by_reverse(self, batch: Batch, d: Vector) -> Vector:
        def curve(output: Tensor, v: Tensor) -> Tensor:
            return batch.term.curvature.product(output, batch.target, v)

        return gauss_newton_product(self._model, partial(self._run, batch), d, curve, by_reverse=True)

    def product(self, names: Sequence[str]) -> Callable[[Vector], Vector]:
        """The map `d ↦ F d` on the named parameters, at their current values. The graph of one forward is kept, and
        each product takes one forward-mode and one reverse-mode pass."""
        # Copies, because a trial step writes to the parameters themselves, which would invalidate the graph.
        values = {n: p.detach().clone().requires_grad_(n in names) for n, p in self._model.named_parameters()}
        values |= {n: b.clone() for n, b in self._model.named_buffers()}
        leaves = [values[n] for n in names]

        def forward(*args: object, **kwargs: object) -> object:
            return call_with(self._model, values, args, kwargs)

        own = {n: values[n].detach() for n in names}
        outputs: list[Tensor | None] = []
        for batch in self.batches:
            by_reverse = not is_replaceable(self._model) or self._by_reverse(batch, own)
            with torch.enable_grad():
                outputs.append(None if by_reverse else batch.run(forward))

        def product(d: Vector) -> Vector:
            total = {n: torch.zeros_like(d[n]) for n in names}
            for share, batch, output in zip(self.shares, self.batches, outputs, strict=True):
                if output is None:  # each product builds its own graph
                    for n, g in self._product_by_reverse(batch, d).items():
                        total[n] += share * g
                    continue
                ((_, Jd),) = self._forward_mode([batch], d)
                DJd = share * batch.term.curvature.product(output.detach(), batch.target, Jd)
                gradients = torch.autograd.grad(output, leaves, DJd, retain_graph=True, allow_unused=True)
                for n, g in zip(names, gradients, strict=True):
                    if g is not None:
                        total[n] += g
            for n in names:
                self._world.sum(total[n], "a product with the curvature")
            return total

        return product
