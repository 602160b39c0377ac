"""Operators as plain dictionaries of tensors, numbers and strings, and as safetensors files."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.centered import Centered, CenteredInverse, CenteredKronecker
from natgrad.linalg.columns import ColumnBlock
from natgrad.linalg.combination import Scaled, Sum
from natgrad.linalg.coordinates import CoordinateBlocks, CoordinateInverse
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.exact import ExactBlock, ExactPower
from natgrad.linalg.kronecker import Homogeneous, Kronecker, KroneckerEigen
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.layout import Layout
from natgrad.linalg.operator import Operator
from natgrad.linalg.restriction import Restriction
from natgrad.linalg.rows import Rows
from natgrad.linalg.space import Space

FORMAT = "1"

# What makes each kind of operator: its constructor's arguments, and the attributes that hold them.
_ARGUMENTS: dict[type[Operator], dict[str, str]] = {
    Kronecker: {"A": "A", "B": "B"},
    KroneckerEigen: {"U_A": "U_A", "U_B": "U_B", "values": "values"},
    Homogeneous: {"stacked": "stacked"},
    CenteredKronecker: {"covariance": "C", "mean": "m", "output": "B"},
    Centered: {"weight": "weight", "bias": "bias", "mean": "m"},
    CenteredInverse: {"weight": "weight", "bias": "bias", "mean": "m"},
    Dense: {"matrix": "matrix", "space": "space"},
    Diagonal: {"values": "values", "space": "space"},
    ExactBlock: {"h": "h", "g": "g", "bias": "bias", "scale": "scale"},
    ExactPower: {"block": "block", "exponent": "exponent", "damping": "damping"},
    BlockDiagonal: {"layers": "layers", "space": "space"},
    ColumnBlock: {"columns": "S", "shapes": "shapes", "scale": "scale"},
    CoordinateBlocks: {"scale": "v", "mean": "m", "shift": "s"},
    CoordinateInverse: {"scale": "v", "mean": "m", "shift": "s"},
    Rows: {"parts": "parts"},
    IterativeInverse: {"matrix": "matrix", "damping": "damping", "tol": "tol", "max_iter": "max_iter"},
    Restriction: {"whole": "whole", "names": "names"},
    Scaled: {"operator": "operator", "factor": "factor"},
    Sum: {"terms": "terms"},
}
_PARTS: dict[type, tuple[str, ...]] = {
    Space: ("shapes", "names"),
    Layout: ("form", "groups"),
    Block: ("operator", "names", "layout", "shapes", "function"),
}
_KINDS = {kind.__name__: kind for kind in (*_ARGUMENTS, *_PARTS)}


def dump(value: Any) -> Any:
    """An operator, or what it is made of, as a dictionary; its tensors are not copied.

    Raises:
        TypeError: for an operator that is more than its tensors.
    """
    kind = type(value)
    if kind in _ARGUMENTS:
        return {"kind": kind.__name__} | {a: dump(getattr(value, name)) for a, name in _ARGUMENTS[kind].items()}
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
    """The memory of an operator's tensors; none for one that holds a model and data."""
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
    """What `dump` was given. Raises ValueError for a kind that is not known."""
    if isinstance(state, (tuple, list)):
        return type(state)(restore(v) for v in state)
    if not isinstance(state, dict):
        return state
    kind = state.get("kind")
    if kind == "dict":
        return {k: restore(v) for k, v in state["items"]}
    arguments = {a: restore(v) for a, v in state.items() if a != "kind"}
    if kind not in _KINDS:
        raise ValueError(
            f"the saved operator is of kind {kind!r}, which this version of natgrad does not know; load it with the "
            "version that saved it"
        )
    return _KINDS[kind](**arguments)


def save(value: Any, path: str | PathLike[str]) -> None:
    """Writes an operator, or a dictionary that holds some, to a safetensors file: the tensors, and in the metadata what
    they are."""
    tensors: dict[str, Tensor] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().contiguous().clone()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": [[k, describe(v)] for k, v in value.items()]}
        if isinstance(value, (tuple, list)):
            return {type(value).__name__: [describe(v) for v in value]}
        return value

    structure = json.dumps(describe(dump(value)))
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written, as there is no folder {Path(path).parent}; make it first")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file: {Path(path) / 'matrix.safetensors'}")
    save_file(tensors, path, metadata={"natgrad": structure, "format": FORMAT})


def load(path: str | PathLike[str], *, model: nn.Module | None = None, device: str | torch.device = "cpu") -> Operator:
    """The matrix that `save` wrote to `path`.

    Args:
        path: a safetensors file.
        model: the module it is to be used with; its parameters are checked against the matrix's names and shapes.
        device: where the tensors go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no matrix of this library, of a later version of the format, or of another model.

    Example:
        >>> import tempfile, torch, natgrad
        >>> path = tempfile.mkdtemp() + "/factor.safetensors"
        >>> natgrad.linalg.Kronecker(torch.eye(2), 3 * torch.eye(1)).save(path)
        >>> natgrad.load(path).trace().item()
        6.0
    """
    operator = read(path, device=device)
    if not isinstance(operator, Operator):
        raise ValueError(
            f"{path} holds more than a matrix: a Laplace posterior or the like; load it by what saved it, such as "
            "natgrad.LaplacePosterior.load"
        )
    if model is not None:
        _check_model(operator.space, model, str(path))
    return operator


def _check_model(space: Space, model: nn.Module, path: str) -> None:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for name, shape in zip(space.names or (), space.shapes, strict=False):
        if shapes.get(name) != shape:
            has = f"has shape {shapes[name]} in" if name in shapes else "is not a parameter of"
            raise ValueError(
                f"{path} is of another model: {name!r}, of shape {shape} there, {has} this one; give the model that "
                "the matrix was computed of"
            )
    if space.names is None:
        raise ValueError(f"{path} has no parameter names; expected the matrix of a model, or leave model= out")


def read(path: str | PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """What `save` wrote to `path`."""
    if not Path(path).is_file():
        kind = IsADirectoryError if Path(path).is_dir() else FileNotFoundError
        raise kind(f"{path} is no file; expected a safetensors file that save() wrote")
    device = torch.empty(0, device=device).device  # torch's own error for one that is not there
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); expected one that save() wrote") from error
    if "natgrad" not in metadata:
        raise ValueError(
            f"{path} holds {len(tensors)} tensors and no natgrad matrix; expected a file that save() wrote"
        )
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {metadata.get('format')!r} and this version of natgrad reads {FORMAT!r}; "
            "load it with the version that saved it, or compute the matrix again"
        )

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[str(content)]
        if kind == "dict":
            return {k: build(v) for k, v in content}
        return (tuple if kind == "tuple" else list)(build(v) for v in content)

    try:
        structure = json.loads(metadata["natgrad"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: what its tensors are cannot be read; save the matrix again") from error
    return restore(build(structure))
