"""Which loss a model's own is, told by its value and its slope on a batch."""

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
"""By how much of itself a value may differ from another one of the same loss."""
SLOPE = 1e-3
"""By how much of its norm a gradient may."""


@dataclass(frozen=True)
class Candidate:
    """A loss with a way to read a batch."""

    reading: Reading
    curvature: OutputCurvature

    def read(self, returned: Any, given: Given) -> tuple[Tensor, Tensor]:
        """The loss's input and target."""
        return self.reading.read(returned, given, self._ignored)

    def ignoring(self, target: Tensor) -> Tensor:
        """A target whose ignored labels are those that the loss ignores."""
        return ignoring(target, self._ignored)

    @property
    def _ignored(self) -> int:
        return int(getattr(self.curvature.module, "ignore_index", IGNORED))

    def fits_shapes(self, returned: Any, given: Given) -> bool:
        """Whether output and target are of the form that the loss takes."""
        try:
            output, target = self.read(returned, given)
            self.curvature.check(output.detach(), target)
        except (TypeError, ValueError, RuntimeError):
            return False
        return True

    def mean(self, returned: Any, given: Given) -> tuple[Tensor, Tensor]:
        """The loss's mean, whatever its reduction, and what a mean divides by."""
        output, target = self.read(returned, given)
        with torch.autocast(output.device.type, enabled=False):
            value = self.curvature.loss(output, target)
            mass = self.curvature.normalizer(output.detach(), target)
        return (value if self.curvature.is_mean else value / mass), mass

    def __str__(self) -> str:
        return f"{type(self.curvature.module).__name__}, {self.reading.words}"


@dataclass(frozen=True)
class Compared:
    """What a candidate's mean is on the batch of a model's own loss. `rule`: by which of `RULES` the own loss is made
    of it; None: by none that was asked for."""

    candidate: Candidate
    value: float
    rule: str | None


RULES: dict[str, Callable[[float, int, float | None], float]] = {
    "mean": lambda mass, examples, count: 1.0,
    "per item": lambda mass, examples, count: mass / count if count else 1.0,
    "per example": lambda mass, examples, count: mass / examples,
    "sum": lambda mass, examples, count: mass,
}
"""By what a model may divide its loss, as a factor of the mean: `mass` is what the mean divides by, `count` the number
of labels in several batches."""


class Own:
    """A model's own loss on one batch.

    Its gradient in what the model returned tells more than its value: where all classes are equally probable, as with a
    head that starts at zero, the losses of all labels are one. There is no such gradient where no graph leads from one
    to the other.

    Args:
        loss: of which candidates are looked for.
        returned: what the model returned with it.
        given: the batch.
        count: by how many labels the loss is divided, where that is said.
    """

    def __init__(self, loss: Tensor, returned: Any, given: Given, count: float | None = None):
        self.value, self.given, self._loss, self._count = float(loss.detach()), given, loss, count
        self._sources = sources(returned)
        self._examples = len(next(iter(self._sources.values()), ()))
        self._eps = max(torch.finfo(t.dtype).eps for t in (loss, *self._sources.values()))

    @cached_property
    def slopes(self) -> list[Tensor] | None:
        """The loss's gradient in what the model returned; None where no graph leads there."""
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
        """Whether another number, computed of what the model returned, is this loss."""
        return self._is(float(mean.detach()), _slopes(mean, list(self._sources.values())), 1.0)

    def factor(self, rule: str, mass: Tensor) -> float:
        """The loss over a candidate's mean."""
        return float(RULES[rule](float(mass), self._examples, self._count))

    def is_near(self, value: float) -> bool:
        """Whether a value is the loss's, up to rounding."""
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
    """The gradient of a loss; None where no graph leads to all of it."""
    if not of or not loss.requires_grad or not all(t.requires_grad for t in of):
        return None
    found = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return None if any(g is None for g in found) else list(found)


def candidates(returned: Any, given: Given, curvatures: Iterable[OutputCurvature]) -> list[Candidate]:
    """Every loss of these with every reading that its shapes allow."""
    found = [Candidate(r, c) for c in curvatures for r in readings(returned, given)]
    return [c for c in found if c.fits_shapes(returned, given)]


def plain(curvature: OutputCurvature) -> list[OutputCurvature]:
    """A loss as it is; and without weights, smoothing and other ignored labels, which are not the model's to know."""
    for kind in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss):
        if isinstance(curvature.module, kind):
            return [curvature, output_curvature(kind())]
    return [curvature]


def usual(model: nn.Module) -> list[OutputCurvature]:
    """The losses that a model's own may be: those that are modules of its own, and torch's usual ones."""
    found = []
    for module in [m for m in model.modules() if isinstance(m, nn.modules.loss._Loss)]:
        try:
            found.append(output_curvature(module))
        except (TypeError, ValueError):
            continue
    usual_ones = (nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.L1Loss(), nn.SmoothL1Loss())
    return found + [output_curvature(module) for module in usual_ones]


def named(compared: Sequence[Compared], most: int = 2) -> str:
    """The values that some candidates have, in words."""
    return "; ".join(f"{c.value:.6g} ({c.candidate})" for c in compared[:most])


def what_else(returned: Any, own: float, compared: Sequence[Compared]) -> str:
    """What a model's own loss may have beside a candidate, where that can be told, in words."""
    auxiliary = part(returned, "aux_loss")
    if isinstance(auxiliary, Tensor) and auxiliary.numel() == 1 and any(c.value < own for c in compared):
        return (
            f" The model adds an auxiliary loss of its routers (aux_loss = {float(auxiliary):.4g}): "
            "output_router_logits=False in its config leaves it out."
        )
    return ""
