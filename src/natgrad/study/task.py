"""A task: a model, its batches, its loss, and the figure that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = tuple[Any, Any]
Loss = Callable[[Tensor, Tensor], Tensor]


def _mean(loss: Loss, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss(model(x), y)


@dataclass(frozen=True)
class Task:
    """`objective(loss, model, x, y) / share(x)` is what is differentiated. Lower values of `figure` are better; it is
    the first result of `evaluate`."""

    name: str
    figure: str
    batch: int
    """The batch size, for optimizers that do not set one."""
    loss: nn.Module
    make_model: Callable[[int], nn.Module]
    """Creates the model, from a seed."""
    batches: Callable[[int, int], Iterator[Batch]]
    """Endless batches, from a seed and a size."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    sample: Callable[[int], Batch]
    """Examples of the training data: always the same, at most this many."""
    weight_decay: float = 0.0
    images: Tensor | None = None
    """For an autoencoder."""
    widths: tuple[int, ...] = ()
    """For an autoencoder: from the image to the code."""
    objective: Callable[[Loss, nn.Module, Any, Any], Tensor] = _mean
    """The objective, from the loss (or its replacement), the model and a batch: `loss(model(x), y)` for a single
    forward."""

    def share(self, x: Any) -> int:
        """The divisor of the loss in the objective: the number of examples, if the loss is a sum."""
        return len(x) if getattr(self.loss, "reduction", "mean") == "sum" else 1
