"""What a task is: a model, its batches, its loss, and what counts in the end."""

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
    """`objective(loss, model, x, y) / share(x)` is what is differentiated. Less of `figure` is better; it is the first
    of what `evaluate` returns."""

    name: str
    figure: str
    batch: int
    """The size of a batch, where an optimizer has none of its own."""
    loss: nn.Module
    make_model: Callable[[int], nn.Module]
    """From a seed."""
    batches: Callable[[int, int], Iterator[Batch]]
    """From a seed and a size, for ever."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    sample: Callable[[int], Batch]
    """The same examples of the training data each time, at most so many."""
    weight_decay: float = 0.0
    images: Tensor | None = None
    """Of an autoencoder."""
    widths: tuple[int, ...] = ()
    """Of an autoencoder, from the image to the code."""
    objective: Callable[[Loss, nn.Module, Any, Any], Tensor] = _mean
    """From the loss, or what stands for it, the model and a batch: `loss(model(x), y)` where there is one forward."""

    def share(self, x: Any) -> int:
        """What the objective divides the loss by: the examples, where the loss is a sum."""
        return len(x) if getattr(self.loss, "reduction", "mean") == "sum" else 1
