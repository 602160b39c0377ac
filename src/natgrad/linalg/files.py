"""Operators as safetensors files: tensors, a description of the operator, and a checksum of both. Reading runs no
code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from natgrad.checks.files import write_whole
from natgrad.checks.values import described
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Space
from natgrad.linalg.state import dump, restore

FORMAT = "1"
CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
BLANK = b"0" * 64
CHUNK = 1 << 20


@later
def save(value: Any, path: str | PathLike[str]) -> None:
    """Writes an operator, or a dictionary of operators, to a safetensors file: the tensors, and in the metadata their
    description and a checksum.

    Raises:
        TypeError: for a matrix that holds a model and data.
        OSError: if the file cannot be written; an existing file is then unchanged.
    """
    state, tensors = dump(value), dict[str, Tensor]()
    structure = json.dumps(_described(state, tensors, {}))
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file: {Path(path) / 'matrix.safetensors'}")
    write_whole(path, sealed(tensors, structure))


def load(path: str | PathLike[str], *, model: nn.Module | None = None, device: str | torch.device = "cpu") -> Operator:
    """The matrix that `save` wrote to `path`.

    The checksum is verified: a truncated or changed file is rejected. No code in a file is run, so its origin does not
    matter.

    Args:
        path: a safetensors file.
        model: the module that the matrix is for; its parameters must have the matrix's names and shapes.
        device: where the tensors go.

    Raises:
        OSError: if there is no such file (FileNotFoundError), or it cannot be read.
        ValueError: if it is not an intact matrix file of this library, or if it has a later version of the format, or
            is for another model.

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
            f"{path} holds {described(operator)}, not a matrix; expected a file written by a matrix's save(). To load "
            "a Laplace posterior, use natgrad.LaplacePosterior.load"
        )
    if model is not None:
        _check_model(operator.space, model, str(path))
    return operator


def read(path: str | PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """The value that `save` wrote to `path`."""
    if not Path(path).is_file():
        kind = IsADirectoryError if Path(path).is_dir() else FileNotFoundError
        raise kind(f"{path} is not a file; expected a safetensors file that save() wrote")
    device = torch.empty(0, device=device).device  # an unavailable device raises torch's own error
    structure, tensors = _read(Path(path), device)
    try:
        return restore(_built(structure, tensors))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an invalid argument can raise anything in a constructor
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path} is damaged, or written by another version of natgrad: its matrix cannot be restored "
            f"({type(error).__name__}: {said}); save the matrix again"
        ) from error


def sealed(tensors: dict[str, Tensor], structure: str) -> list[bytes | memoryview]:
    """The pieces of a file with the tensors, their description, and a checksum of both."""
    metadata = {"natgrad": structure, "format": FORMAT, "checksum": BLANK.decode()}
    blank = memoryview(safetensors.torch.save(tensors, metadata=metadata))
    start, end = _place_of_checksum(bytes(blank[: _end_of_header(blank)]))
    return [blank[:start], hashlib.sha256(blank).hexdigest().encode(), blank[end:]]


def _described(value: Any, tensors: dict[str, Tensor], numbers: dict[int, int]) -> Any:
    """A state for JSON. Its tensors are numbered and copied to `tensors`, each only once."""
    if isinstance(value, Tensor):
        if id(value) not in numbers:
            numbers[id(value)] = len(tensors)
            tensors[str(len(tensors))] = value.detach().contiguous().clone()
        return {"tensor": numbers[id(value)]}
    if isinstance(value, dict):
        return {"dict": [[k, _described(v, tensors, numbers)] for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_described(v, tensors, numbers) for v in value]}
    return value


def _built(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_described`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[str(content)]
    if kind == "dict":
        return {k: _built(v, tensors) for k, v in content}
    return {"tuple": tuple, "list": list}[kind](_built(v, tensors) for v in content)


def _read(path: Path, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """The description in a file, and its tensors."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, len(file.keys()))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); expected one that save() wrote") from error
    try:
        return json.loads(metadata["natgrad"]), tensors
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: the description of its tensors cannot be read; save the matrix again"
        ) from error


def _check_metadata(path: Path, metadata: dict[str, str], count: int) -> None:
    if "natgrad" not in metadata:
        raise ValueError(f"{path} holds {count} tensors but no natgrad matrix; expected a file that save() wrote")
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}, but this version of natgrad reads {FORMAT!r}; "
            "load it with the version that saved it, or compute the matrix again"
        )
    if "checksum" not in metadata:
        raise ValueError(f"{path} has no checksum; expected a file that save() wrote; save the matrix again")
    if metadata["checksum"] != _checksum(path):
        raise ValueError(f"{path} is damaged: its checksum does not match its content; save the matrix again")


def _checksum(path: Path) -> str:
    """The checksum of the whole file, with zeros in place of the checksum itself."""
    digest = hashlib.sha256()
    for piece in _with_blank(path):
        digest.update(piece)
    return digest.hexdigest()


def _with_blank(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(_end_of_header(header) - 8)
        start, end = _place_of_checksum(header)
        yield header[:start] + BLANK[: end - start] + header[end:]
        while piece := file.read(CHUNK):
            yield piece


def _end_of_header(start: bytes | memoryview) -> int:
    return 8 + int.from_bytes(start[:8], "little")


def _place_of_checksum(header: bytes) -> tuple[int, int]:
    """Start and end of the checksum in the header; equal if there is none. Quotes in metadata strings are escaped."""
    found = CHECKSUM.search(header)
    return found.span(1) if found else (0, 0)


def _check_model(space: Space, model: nn.Module, path: str) -> None:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for name, shape in zip(space.names or (), space.shapes, strict=False):
        if shapes.get(name) != shape:
            has = f"has shape {shapes[name]} in" if name in shapes else "is not a parameter of"
            raise ValueError(
                f"{path} is for another model: its {name!r} of shape {shape} {has} this one; pass the model that "
                "the matrix was computed from"
            )
    if space.names is None:
        raise ValueError(f"{path} has no parameter names; expected the matrix of a model, or leave model= out")
