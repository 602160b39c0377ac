"""Operators as plain dictionaries of tensors, numbers and strings: for files, sizes, and other dtypes or devices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.centered import Centered, CenteredInverse, CenteredKronecker
from natgrad.linalg.centered_power import CenteredPower, CenteredRows
from natgrad.linalg.columns import ColumnBlock
from natgrad.linalg.combination import Scaled, Sum
from natgrad.linalg.coordinates import CoordinateBlocks, CoordinateInverse
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.diagonal_plus import DiagonalPlusLowRank
from natgrad.linalg.exact import ExactBlock, ExactPower
from natgrad.linalg.kronecker import Homogeneous, InUnits, Kronecker, KroneckerEigen
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.later import later
from natgrad.linalg.layout import Layout
from natgrad.linalg.low_rank import LowRank
from natgrad.linalg.operator import Operator
from natgrad.linalg.restriction import Restriction
from natgrad.linalg.rows import Rows
from natgrad.linalg.space import Space

# For each kind of operator: its constructor's arguments, and the attributes that hold them.
_ARGUMENTS: dict[type[Operator], dict[str, str]] = {
    Kronecker: {"A": "A", "B": "B"},
    InUnits: {"A": "A", "B": "B", "units": "units"},
    KroneckerEigen: {"U_A": "U_A", "U_B": "U_B", "values": "values"},
    Homogeneous: {"stacked": "stacked"},
    CenteredKronecker: {"covariance": "C", "mean": "m", "output": "B"},
    Centered: {"weight": "weight", "bias": "bias", "mean": "m"},
    CenteredInverse: {"weight": "weight", "bias": "bias", "mean": "m"},
    CenteredPower: {"rows": "rows", "exponent": "exponent", "damping": "damping"},
    Dense: {"matrix": "matrix", "space": "space"},
    Diagonal: {"values": "values", "space": "space"},
    DiagonalPlusLowRank: {"d": "d", "U": "U", "values": "values", "space": "space"},
    ExactBlock: {"h": "h", "g": "g", "bias": "bias", "scale": "scale"},
    ExactPower: {"block": "block", "exponent": "exponent", "damping": "damping"},
    BlockDiagonal: {"layers": "layers", "space": "space"},
    ColumnBlock: {"columns": "S", "shapes": "shapes", "scale": "scale"},
    CoordinateBlocks: {"scale": "v", "mean": "m", "shift": "s", "cross": "r"},
    CoordinateInverse: {"scale": "v", "mean": "m", "shift": "s", "cross": "r"},
    Rows: {"parts": "parts"},
    IterativeInverse: {
        "matrix": "matrix",
        "damping": "damping",
        "tol": "tol",
        "max_iter": "max_iter",
        "preconditioner": "preconditioner",
    },
    LowRank: {"U": "U", "values": "values", "rest": "rest", "space": "space"},
    Restriction: {"whole": "whole", "names": "names"},
    Scaled: {"operator": "operator", "factor": "factor"},
    Sum: {"terms": "terms"},
}
_PARTS: dict[type, tuple[str, ...]] = {
    CenteredRows: ("U_A", "U_B", "d", "beta", "m"),
    Space: ("shapes", "names"),
    Layout: ("form", "groups"),
    Block: ("operator", "names", "layout", "shapes", "function"),
}
_KINDS = {kind.__name__: kind for kind in (*_ARGUMENTS, *_PARTS)}


@later
def dump(value: Any) -> Any:
    """An operator, or a part of one, as a dictionary; its tensors are not copied.

    Raises:
        TypeError: for an operator that holds more than tensors.
    """
    kind = type(value)
    if kind in _ARGUMENTS:
        own = {"kind": kind.__name__} | {a: dump(getattr(value, name)) for a, name in _ARGUMENTS[kind].items()}
        return own | ({"fingerprint": dict(value.fingerprint)} if value.fingerprint else {})
    if isinstance(value, Operator):
        raise TypeError(
            f"{value._label()} holds a model and data, not a matrix, and cannot be saved; use structure='kfac', "
            "'ekfac', 'block', 'diagonal' or 'dense'"
        )
    if kind in _PARTS:
        return {"kind": kind.__name__} | {a: dump(getattr(value, a)) for a in _PARTS[kind]}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [(k, dump(v)) for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        return kind(dump(v) for v in value)
    return value


def nbytes(operator: Operator) -> int:
    """The memory of an operator's tensors; zero for one that holds a model and data."""
    tensors: dict[tuple[int, int], int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[value.data_ptr(), value.numel()] = value.numel() * value.element_size()
        for v in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
            walk(v)

    try:
        walk(dump(operator))
    except TypeError:
        return 0
    return sum(tensors.values())


def restore(state: Any) -> Any:
    """The inverse of `dump`.

    Raises:
        ValueError: for an unknown kind, or if the parts of an operator do not match.
    """
    if isinstance(state, (tuple, list)):
        return type(state)(restore(v) for v in state)
    if not isinstance(state, dict):
        return state
    kind = state.get("kind")
    if kind == "dict":
        return {k: restore(v) for k, v in state["items"]}
    arguments = {a: restore(v) for a, v in state.items() if a not in ("kind", "fingerprint")}
    if kind not in _KINDS:
        raise ValueError(
            f"the saved operator is of kind {kind!r}, which is unknown to this version of natgrad; load it with the "
            "version that saved it"
        )
    restored = _KINDS[kind](**arguments)
    if isinstance(restored, Operator):
        restored.fingerprint = dict(state.get("fingerprint", {}))
    return restored


@later
def converted(operator: Operator, *args: Any, **kwargs: Any) -> Operator:
    """The operator with all its floating-point tensors converted."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(*args, **kwargs) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        return type(value)(map(walk, value)) if isinstance(value, (tuple, list)) else value

    found: Operator = restore(walk(dump(operator)))
    return found
