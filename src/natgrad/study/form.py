"""The form of a run's result, as in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_KINDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "optimizer": str,
    "setting": dict,
    "seed": int,
    "figure": str,
    "status": str,
    "error": str,
    "rejected": int,
    "curve": list,
    "measured": list,
}
_STATUSES = ("finished", "diverged", "raised", "died")
_MEASURED = ("relative", "cka", "p_value", "A", "C")


def is_run(result: Mapping[str, Any]) -> bool:
    """Whether a result has everything that is read, with the right types. A saved file may be damaged."""
    if not all(isinstance(result.get(name), kind) for name, kind in _KINDS.items()):
        return False
    machine = result.get("machine", "")
    if not isinstance(machine, (dict, str)) or (
        isinstance(machine, dict) and not _is_count(machine.get("processes", 1))
    ):
        return False
    curve, figure = result["curve"], result["figure"]
    return (
        result["status"] in _STATUSES
        and all(_is_point(p, figure) for p in curve)
        and all(map(_is_measured, result["measured"]))
    )


def _is_point(point: Any, figure: str) -> bool:
    """A moment of the curve: a step, seconds, and figures; None represents a figure that is not finite."""
    return _is_moment(point) and figure in point and all(v is None or _is_number(v) for v in point.values())


def _is_measured(moment: Any) -> bool:
    return (
        _is_moment(moment)
        and isinstance(moment.get("layers"), dict)
        and all(
            isinstance(layer, dict) and all(name in layer for name in _MEASURED) and all(map(_is_value, layer.values()))
            for layer in moment["layers"].values()
        )
    )


def _is_moment(point: Any) -> bool:
    return isinstance(point, dict) and all(_is_number(point.get(n)) and point[n] >= 0 for n in ("step", "seconds"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
