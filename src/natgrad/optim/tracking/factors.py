"""The factor that multiplies each loss in the gradients that have arrived at the parameters."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

EXACT = 1e-3
"""How far a factor may be from a round number, for gradients that were divided by hand."""


@dataclass(eq=False)
class Pass:
    """One run of autograd. `reached`: the parameters whose `grad` it added to; empty for `torch.autograd.grad`."""

    reached: set[str] = field(default_factory=set)


O = TypeVar("O", bound="Observed")


@dataclass(eq=False)
class Observed:
    """A scalar of the objective, and the gradient that each run of autograd sent to it."""

    passes: list[tuple[Pass, Tensor]] = field(default_factory=list, init=False)
    outdated: bool = field(default=False, init=False)
    """Whether gradients were zeroed since, and none of them came from this scalar."""

    @property
    def seen(self) -> bool:
        """Whether autograd has run a backward pass through it."""
        return bool(self.passes)

    @property
    def arrived(self) -> bool:
        """Whether its gradient was added to the gradient of a parameter."""
        return any(run.reached for run, _ in self.passes)

    def factor(self, sizes: Mapping[str, int]) -> Tensor | None:
        """The factor of this scalar in the parameters' gradients: the one that holds for most entries. `sizes` are the
        parameters' numbers of entries. If no gradient has arrived, the factor of the last run; None if there was no
        run."""
        runs = [(run, f) for run, f in self.passes if run.reached]
        if len(runs) <= 1:
            last = runs or self.passes
            return last[-1][1] if last else None
        counts: Counter[tuple[int, ...]] = Counter()
        for name in set().union(*(run.reached for run, _ in runs)):
            counts[tuple(i for i, (run, _) in enumerate(runs) if name in run.reached)] += sizes.get(name, 0)
        (most, _), *_ = counts.most_common(1)
        return torch.stack([runs[i][1] for i in most]).sum()


@dataclass(frozen=True)
class Witness:
    """The gradient of a small parameter, as the last run of autograd left it."""

    parameter: Tensor
    held: weakref.ref[Tensor]
    version: int
    gradient: Tensor

    @classmethod
    def of(cls, p: Tensor) -> Witness | None:
        """The current gradient; None if there is no gradient, or if it is sparse."""
        g = p.grad
        if g is None or g.layout != torch.strided:
            return None
        return cls(p, weakref.ref(g), g._version, g.detach().clone())

    @property
    def written_to(self) -> bool:
        """Whether the gradient was replaced or changed in place since."""
        g = self.parameter.grad
        return g is None or g is not self.held() or g._version != self.version

    @property
    def zeroed(self) -> bool:
        g = self.parameter.grad
        return self.written_to and (g is None or (not g.any() and bool(self.gradient.any())))

    def multiplied_by(self) -> float:
        """The factor that the gradient was multiplied by since; 1 if it cannot be determined."""
        g, before = self.parameter.grad, self.gradient
        if not self.written_to or g is None or g.shape != before.shape or g.layout != torch.strided:
            return 1.0
        square = float(before.double().square().sum())
        factor = float((g.double() * before.double()).sum()) / square if square > 0 else 1.0
        off = float((g.double() - factor * before.double()).square().sum())
        return factor if off <= EXACT**2 * factor**2 * square else 1.0


class Factors:
    """Hooks on losses and parameters that record what each run of autograd brings them.

    Args:
        parameters: by name.
        sharded: gradients do not arrive at these tensors themselves. So every run of autograd counts.
        starts: a method that is called for each scalar that autograd starts from, with whether it is the run's first.

    `witnessed`: after autograd, nothing but the user changes the gradients, so later changes by hand can be detected.
    This is not so if ranks reduce the gradients.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        sharded: bool = False,
        starts: Callable[[Observed, bool], None] | None = None,
    ):
        self._starts = None if starts is None else weakref.WeakMethod(starts)
        self._handles: list[weakref.finalize[..., Factors]] = []
        self._running: dict[int, Pass] = {}
        self._smallest: Tensor | None = None
        self._witness: Witness | None = None
        self._sharded, self.witnessed = sharded, not sharded
        self.arrivals = 0  # how many times gradients were added to parameters
        self.follow(parameters)

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Watches the gradients of these parameters from now on."""
        self.remove()
        self._names = frozenset(parameters)
        if self._sharded:
            return
        me = weakref.ref(self)
        for name, p in parameters.items():
            if p.requires_grad and p.is_leaf:
                handle = p.register_post_accumulate_grad_hook(_hook(me, name))
                self._handles.append(weakref.finalize(self, handle.remove))

    def remove(self) -> None:
        """Removes the hooks from the parameters."""
        for remove in self._handles:
            remove()
        self._handles.clear()

    def observe(self, scalar: Tensor, of: Observed, times: float = 1.0) -> None:
        """Records from now on the gradients that autograd brings to a scalar. The scalar is `times` the observed
        loss."""
        me = weakref.ref(self)

        def hook(gradient: Tensor) -> None:
            factors = me()
            if factors is not None:
                factors._tell(of)
                of.passes.append((factors._run(), times * gradient.detach().reshape(())))

        scalar.register_hook(hook)

    def _tell(self, of: Observed) -> None:
        starts = None if self._starts is None else self._starts()
        if starts is not None:
            starts(of, torch._C._current_graph_task_id() not in self._running)

    def _run(self) -> Pass:
        """The run of autograd that is in progress."""
        key = torch._C._current_graph_task_id()
        if key not in self._running:
            self._running[key] = Pass(set(self._names if self._sharded else ()))
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._end(key))
        return self._running[key]

    def _arrive(self, name: str, p: Tensor) -> None:
        self.arrivals += 1
        for run in self._running.values():  # a checkpoint's own run within another counts for both
            run.reached.add(name)
        if self.witnessed and p.grad is not None and (self._smallest is None or p.numel() < self._smallest.numel()):
            self._smallest = p

    def _end(self, key: int) -> None:
        self._running.pop(key, None)
        p, self._smallest = self._smallest, None
        if p is not None:
            self._witness = Witness.of(p)

    def settle(self) -> None:
        """Called between runs of autograd: drops the runs that an exception ended."""
        self._running.clear()

    @property
    def zeroed(self) -> bool:
        """Whether the gradients were zeroed after the last run of autograd."""
        return self._witness is not None and self._witness.zeroed

    def forget(self) -> None:
        """Called when the gradients are zeroed or used."""
        self._witness = self._smallest = None

    def divided_by_hand(self, scale: float, taken_out: float) -> bool:
        """Whether the gradients were divided by `scale` by hand, after the last run of autograd. `scale` is the factor
        of all losses in them; `taken_out` is the factor that a `GradScaler` divided them by."""
        if self._witness is None or abs(scale / taken_out - 1) <= EXACT:
            return False
        by_hand = self._witness.multiplied_by() * taken_out
        return abs(by_hand * scale / taken_out - 1) <= EXACT


def of_gradients(observed: Sequence[O]) -> list[O]:
    """The scalars that the current gradients come from: those whose gradients have arrived. If there are none, the
    gradients were set by hand: then those that autograd has run through since gradients were zeroed, or at all."""
    for kind in (lambda o: o.arrived, lambda o: o.seen and not o.outdated, lambda o: o.seen):
        found = [o for o in observed if kind(o)]
        if found:
            return found
    return list(observed)


def _hook(me: weakref.ref[Factors], name: str) -> Callable[[Tensor], None]:
    def arrived(p: Tensor) -> None:
        factors = me()
        if factors is not None:
            factors._arrive(name, p)

    return arrived
