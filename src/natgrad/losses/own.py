"""Finds out which loss a model computes itself, from its value and its gradient on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.losses import OutputCurvature, output_curvature
from natgrad.losses.reading import IGNORED, Given, Reading, ignoring, part, readings, sources

VALUE = 1e-5
"""The largest relative difference between two values of the same loss."""
SLOPE = 1e-3
"""The largest relative difference between two gradients of the same loss."""


@dataclass(frozen=True)
class Candidate:
    """A loss, and a way to get its input and target from a batch."""

    reading: Reading
    curvature: OutputCurvature

    def read(self, returned: Any, given: Given) -> tuple[Tensor, Tensor]:
        """The loss's input and target."""
        return self.reading.read(returned, given, self._ignored)

    def ignoring(self, target: Tensor) -> Tensor:
        """The target, with ignored labels marked as this loss expects."""
        return ignoring(target, self._ignored)

    @property
    def _ignored(self) -> int:
        return int(getattr(self.curvature.module, "ignore_index", IGNORED))

    def fits_shapes(self, returned: Any, given: Given) -> bool:
        """Whether output and target have shapes that the loss accepts."""
        try:
            output, target = self.read(returned, given)
            self.curvature.check(output.detach(), target)
        except (TypeError, ValueError, RuntimeError):
            return False
        return True

    def mean(self, returned: Any, given: Given) -> tuple[Tensor, Tensor]:
        """The mean of the loss, for any reduction, and the divisor of the mean."""
        output, target = self.read(returned, given)
        with torch.autocast(output.device.type, enabled=False):
            value = self.curvature.loss(output, target)
            mass = self.curvature.normalizer(output.detach(), target)
        return (value if self.curvature.is_mean else value / mass), mass

    def __str__(self) -> str:
        return f"{type(self.curvature.module).__name__}, {self.reading.words}"


@dataclass(frozen=True)
class Compared:
    """The mean of a candidate on the batch of a model's own loss. `rule`: the one of `RULES` that gives the own loss
    from this mean; None: none of the rules tried."""

    candidate: Candidate
    value: float
    rule: str | None


RULES: dict[str, Callable[[float, int, float | None], float]] = {
    "mean": lambda mass, examples, count: 1.0,
    "per item": lambda mass, examples, count: mass / count if count else 1.0,
    "per example": lambda mass, examples, count: mass / examples,
    "sum": lambda mass, examples, count: mass,
}
"""How a model may normalize its loss, as factors of the mean. `mass` is the divisor of the mean, and `count` the number
of labels in several batches."""


class Own:
    """A model's own loss on one batch.

    Its gradient with respect to what the model returned says more than its value: if all classes are equally probable,
    as with an output layer that starts at zero, all labels have the same loss. There is no gradient if the loss is not
    connected to the returned tensors in the graph.

    Args:
        loss: the loss that is to be identified.
        returned: what the model returned with it.
        given: the batch.
        count: the number of labels by which the loss is divided, if it is known.
    """

    def __init__(self, loss: Tensor, returned: Any, given: Given, count: float | None = None):
        self.value, self.given, self._loss, self._count = float(loss.detach()), given, loss, count
        self._sources = sources(returned)
        self._examples = len(next(iter(self._sources.values()), ()))
        self._eps = max(torch.finfo(t.dtype).eps for t in (loss, *self._sources.values()))

    @cached_property
    def slopes(self) -> list[Tensor] | None:
        """The loss's gradient in what the model returned; None if they are not connected in the graph."""
        return _slopes(self._loss, list(self._sources.values()))

    def compare(self, candidate: Candidate, rules: Iterable[str] = ("mean",)) -> Compared:
        """Whether a candidate is the loss, by one of these rules."""
        with torch.enable_grad():
            leaves = {n: t.detach().requires_grad_() for n, t in self._sources.items()}
            mean, mass = candidate.mean(leaves, self.given)
        slopes = None if self.slopes is None else _slopes(mean, list(leaves.values()))
        value = float(mean.detach())
        found = (r for r in rules if self._is(value, slopes, self.factor(r, mass)))
        return Compared(candidate, value, next(found, None))

    def agrees(self, mean: Tensor) -> bool:
        """Whether another number, computed from what the model returned, equals this loss."""
        return self._is(float(mean.detach()), _slopes(mean, list(self._sources.values())), 1.0)

    def factor(self, rule: str, mass: Tensor) -> float:
        """The loss divided by a candidate's mean, by this rule."""
        return float(RULES[rule](float(mass), self._examples, self._count))

    def is_near(self, value: float) -> bool:
        """Whether a value equals the loss up to rounding."""
        tolerance = max(VALUE, 4 * self._eps)
        return abs(value - self.value) <= tolerance * max(abs(self.value), abs(value)) + 1e-7

    def _is(self, value: float, slopes: Sequence[Tensor] | None, factor: float) -> bool:
        if not self.is_near(factor * value):
            return False
        if self.slopes is None or slopes is None:
            return True
        pairs = [(a.double(), factor * b.double()) for a, b in zip(self.slopes, slopes, strict=True)]
        off, norm = (float(sum(t.square().sum() for t in each)) for each in ([a - b for a, b in pairs], self.slopes))
        return off <= max(SLOPE, 8 * self._eps) ** 2 * norm + 1e-24


def _slopes(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor] | None:
    """The gradient of a loss; None if some tensors are not connected to it in the graph."""
    if not of or not loss.requires_grad or not all(t.requires_grad for t in of):
        return None
    found = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return None if any(g is None for g in found) else list(found)


def candidates(returned: Any, given: Given, curvatures: Iterable[OutputCurvature]) -> list[Candidate]:
    """Every one of these losses, with every reading that the shapes allow."""
    found = [Candidate(r, c) for c in curvatures for r in readings(returned, given)]
    return [c for c in found if c.fits_shapes(returned, given)]


def plain(curvature: OutputCurvature) -> list[OutputCurvature]:
    """The loss itself; and the loss without weights, label smoothing and other ignored labels, which a model does not
    know of."""
    for kind in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss):
        if isinstance(curvature.module, kind):
            return [curvature, output_curvature(kind())]
    return [curvature]


def usual(model: nn.Module) -> list[OutputCurvature]:
    """Candidates for a model's own loss: loss modules in the model, and torch's common losses."""
    found = []
    for module in [m for m in model.modules() if isinstance(m, nn.modules.loss._Loss)]:
        try:
            found.append(output_curvature(module))
        except (TypeError, ValueError):
            continue
    usual_ones = (nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.L1Loss(), nn.SmoothL1Loss())
    return found + [output_curvature(module) for module in usual_ones]


def named(compared: Sequence[Compared], most: int = 2) -> str:
    """The values of some candidates, in words."""
    return "; ".join(f"{c.value:.6g} ({c.candidate})" for c in compared[:most])


def what_else(returned: Any, own: float, compared: Sequence[Compared]) -> str:
    """What a model's own loss may contain in addition to a candidate, in words, if this can be found out."""
    auxiliary = part(returned, "aux_loss")
    if isinstance(auxiliary, Tensor) and auxiliary.numel() == 1 and any(c.value < own for c in compared):
        return (
            f" The model adds an auxiliary loss of its routers (aux_loss = {float(auxiliary):.4g}): "
            "output_router_logits=False in its config leaves it out."
        )
    return ""
