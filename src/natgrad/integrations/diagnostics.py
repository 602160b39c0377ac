"""`opt.diagnostics` for loggers: numbers and texts by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def scalars(diagnostics: Mapping[str, Any], prefix: str = "natgrad") -> dict[str, float]:
    """The numbers in `opt.diagnostics` by flat names, for `wandb.log` and other functions that take a dictionary.

    Truth values become 0 and 1, and nested dictionaries give names with slashes. Texts and None are left out: `texts`
    returns the texts. `step` is left out too, because loggers count steps themselves.

    Args:
        diagnostics: those of a step.
        prefix: the start of every name.

    Example:
        >>> scalars({"step": 3, "accepted": True, "reason": "", "damping": 0.5, "faults": {"rejected": 2}})
        {'natgrad/accepted': 1.0, 'natgrad/damping': 0.5, 'natgrad/faults/rejected': 2.0}
    """
    return {name: float(value) for name, value in _flat(diagnostics, prefix) if _is_number(value)}


def texts(diagnostics: Mapping[str, Any], prefix: str = "natgrad") -> dict[str, str]:
    """The texts in `opt.diagnostics` by flat names: why a step was rejected, which layers have diagonal factors.

    Args:
        diagnostics: those of a step.
        prefix: the start of every name.

    Example:
        >>> texts({"reason": "the loss is not finite", "diagonal_factors": {"head": ("output",)}})
        {'natgrad/reason': 'the loss is not finite', 'natgrad/diagonal_factors/head': 'output'}
    """
    words = {name: ", ".join(v) if _is_list(v) else v for name, v in _flat(diagnostics, prefix)}
    return {name: value for name, value in words.items() if isinstance(value, str) and value}


class DiagnosticsWriter:
    """Writes `opt.diagnostics` to TensorBoard, or to any writer that has `add_scalar(name, value, step)`.

    Texts go to the writer's `add_text`, if it has this method, whenever they have changed.

    Args:
        writer: for example a `torch.utils.tensorboard.SummaryWriter`.
        prefix: what the names begin with.

    Raises:
        TypeError: if the writer has no `add_scalar`.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, name, value, step):
        ...         print(step, name, value)
        >>> DiagnosticsWriter(Printer()).write({"step": 3, "loss": 0.25})
        3 natgrad/loss 0.25
    """

    def __init__(self, writer: Any, prefix: str = "natgrad"):
        if not hasattr(writer, "add_scalar"):
            raise TypeError(
                f"writer is a {type(writer).__name__} without add_scalar; expected a SummaryWriter, or log "
                "natgrad.integrations.scalars(opt.diagnostics), a dictionary, in your logger's own way"
            )
        self.writer, self.prefix = writer, prefix
        self._said: dict[str, str] = {}

    def write(self, diagnostics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes the diagnostics of one step. Without `step`, the optimizer's own count is used."""
        step = diagnostics.get("step") if step is None else step
        for name, value in scalars(diagnostics, self.prefix).items():
            self.writer.add_scalar(name, value, step)
        said = texts(diagnostics, self.prefix)
        if hasattr(self.writer, "add_text"):
            for name, text in said.items():
                if self._said.get(name) != text:
                    self.writer.add_text(name, text, step)
        self._said = said


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}/{key}")
        elif key != "step":
            yield f"{prefix}/{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
