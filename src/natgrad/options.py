"""What users may choose: strings, each checked, and parameters, selected by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

Selection = Sequence[str] | Callable[[str], bool] | None


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of those known."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(map(repr, known))}")


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, Tensor]:
    """The trainable parameters that `params` names. Raises ValueError for unknown names, or for none."""
    trainable: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if params is not None and not callable(params):
        unknown = [n for n in params if n not in trainable]
        if unknown:
            raise ValueError(
                f"params names {unknown[0]!r}, which is not a trainable parameter of the model; "
                f"expected some of {', '.join(list(trainable)[:6])}"
            )
        wanted = set(params)
        trainable = {n: p for n, p in trainable.items() if n in wanted}
    elif callable(params):
        trainable = {n: p for n, p in trainable.items() if params(n)}
    if not trainable:
        raise ValueError("no trainable parameter is selected; expected at least one with requires_grad=True")
    for n, p in trainable.items():
        if p.is_complex():
            raise ValueError(f"parameter {n!r} is complex ({p.dtype}); expected a real one")
    return trainable


def check_max_dim(max_dim: int) -> None:
    """Raises ValueError unless it is a number of rows."""
    if max_dim < 1:
        raise ValueError(f"max_dim={max_dim} is not usable: expected a number of rows, at least 1")


def check_number(name: str, value: float | None) -> None:
    """Raises ValueError unless it is a finite number that is not negative, or None."""
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} is not usable: expected a number >= 0")
