"""Operators as plain dictionaries of tensors, numbers and strings, and back."""

from __future__ import annotations

from typing import Any

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.centered import Centered, CenteredInverse, CenteredKronecker
from natgrad.linalg.dense import Dense
from natgrad.linalg.kronecker import Homogeneous, Kronecker, KroneckerEigen
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Space

# What makes each kind of operator: its constructor's arguments, and the attributes that hold them.
_ARGUMENTS: dict[type[Operator], dict[str, str]] = {
    Kronecker: {"A": "A", "B": "B"},
    KroneckerEigen: {"U_A": "U_A", "U_B": "U_B", "values": "values"},
    Homogeneous: {"stacked": "stacked"},
    CenteredKronecker: {"covariance": "C", "mean": "m", "output": "B"},
    Centered: {"weight": "weight", "bias": "bias", "mean": "m"},
    CenteredInverse: {"weight": "weight", "bias": "bias", "mean": "m"},
    Dense: {"matrix": "matrix", "space": "space"},
    BlockDiagonal: {"layers": "layers", "space": "space"},
}
_PARTS: dict[type, tuple[str, ...]] = {Space: ("shapes", "names"), Block: ("operator", "names", "transposed")}
_KINDS = {kind.__name__: kind for kind in (*_ARGUMENTS, *_PARTS)}


def dump(value: Any) -> Any:
    """An operator, or what it is made of, as a dictionary; its tensors are not copied."""
    kind = type(value)
    if kind in _ARGUMENTS:
        return {"kind": kind.__name__} | {a: dump(getattr(value, name)) for a, name in _ARGUMENTS[kind].items()}
    if kind in _PARTS:
        return {"kind": kind.__name__} | {a: dump(getattr(value, a)) for a in _PARTS[kind]}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [(k, dump(v)) for k, v in value.items()]}
    return value


def restore(state: Any) -> Any:
    """What `dump` was given. Raises ValueError for a kind that is not known."""
    if not isinstance(state, dict):
        return state
    kind = state.get("kind")
    if kind == "dict":
        return {k: restore(v) for k, v in state["items"]}
    arguments = {a: restore(v) for a, v in state.items() if a != "kind"}
    if kind not in _KINDS:
        raise ValueError(f"the saved operator is of kind {kind!r}; expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](**arguments)
