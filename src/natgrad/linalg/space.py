"""The vectors that an operator acts on: their parts, the forms in which users write them, and their flat orders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.values import check_choice, described
from natgrad.linalg.vec import unvec, vec

Parts = tuple[Tensor, ...]
ORDERS = {"torch": "rows, as Tensor.flatten", "vec": "columns"}


@dataclass(frozen=True)
class Space:
    """The vectors that an operator acts on: tensors of the given shapes. Named tensors are written as a `dict`.

    Internally, a vector is a tuple of parts. Any form may have leading axes, the same for all parts: these hold several
    vectors.

    Args:
        shapes: of the parts.
        names: of the parts. None: a vector is a tuple of tensors, or the tensor itself if there is one part.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Space
        >>> space = Space(((2, 2), (2,)), ("weight", "bias"))
        >>> space.size, space.flatten((torch.eye(2), torch.zeros(2)), "vec").tolist()
        (6, [1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    """

    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"shapes has {shape!r}; expected tuples of whole numbers, one for each part")
        if self.names is not None:
            if not all(isinstance(name, str) for name in self.names) or len(set(self.names)) < len(self.names):
                raise ValueError(f"names is {self.names!r}; expected distinct strings, or None")
            if len(self.names) != len(self.shapes):
                raise ValueError(
                    f"there are {len(self.names)} names and {len(self.shapes)} shapes; expected the same number"
                )

    @property
    def size(self) -> int:
        """The number of entries of a vector."""
        return sum(prod(s) for s in self.shapes)

    def split(self, v: Any, context: str) -> tuple[Parts, Callable[[Parts], Any]]:
        """The parts of a vector given in any accepted form, and the function that restores that form.

        Raises:
            ValueError: if names or shapes do not match; the error begins with `context`.
        """
        if isinstance(v, Mapping) and self.names is not None:
            self._check_names(v, context)
            parts = tuple(v[n] for n in self.names)
            self._check_shapes(parts, context)
            names = self.names
            return parts, lambda out: dict(zip(names, out, strict=True))
        if isinstance(v, (tuple, list)) and self.names is None:
            self._check_shapes(tuple(v), context)
            return tuple(v), lambda out: out
        if isinstance(v, Tensor):
            if self.names is None and len(self.shapes) == 1 and ends_with(v, self.shapes[0]):
                return (v,), lambda out: out[0]
            if ends_with(v, (self.size,)):
                return self.unflatten(v), self.flatten
        raise ValueError(f"{context}: got {_describe(v)}, expected {self.describe()}")

    def flatten(self, parts: Parts, order: str = "torch") -> Tensor:
        """One vector: each part by rows (`"torch"`) or matrices by columns (`"vec"`)."""
        flat = []
        for part, shape in zip(parts, self.shapes, strict=True):
            by_columns = order == "vec" and len(shape) == 2
            flat.append(vec(part) if by_columns else part.reshape((*part.shape[: part.ndim - len(shape)], -1)))
        return torch.cat(flat, -1)

    def unflatten(self, v: Tensor, order: str = "torch") -> Parts:
        """The inverse of `flatten`; leading axes of `v` are kept."""
        parts = []
        for piece, shape in zip(v.split([prod(s) for s in self.shapes], -1), self.shapes, strict=True):
            by_columns = order == "vec" and len(shape) == 2
            parts.append(unvec(piece, (shape[0], shape[1])) if by_columns else piece.reshape((*v.shape[:-1], *shape)))
        return tuple(parts)

    def columns_index(self, device: torch.device | None = None) -> Tensor:
        """For each entry of the `"vec"` order, its index in the `"torch"` order."""
        return self.flatten(self.unflatten(torch.arange(self.size, device=device)), "vec")

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The named parts by the module that holds them: `{"fc1": ("fc1.weight", "fc1.bias")}`.

        A parameter that no submodule holds is its own group.
        """
        groups: dict[str, tuple[str, ...]] = {}
        for name in self.names or ():
            module = name.rpartition(".")[0] or name
            groups[module] = (*groups.get(module, ()), name)
        return groups

    def labels(self) -> tuple[str, ...]:
        """The names of the parts in messages."""
        return self.names or tuple(f"part {i}" for i in range(len(self.shapes)))

    def describe(self) -> str:
        """The accepted forms of a vector, in words, for errors."""
        if self.names is not None:
            return f"a dict with a tensor for each of {_few(self.names)}, or one flat tensor of {self.size}"
        if len(self.shapes) == 1:
            return f"a tensor of shape {self.shapes[0]}, or one flat tensor of {self.size}"
        return f"tensors of shapes {', '.join(map(str, self.shapes))}, or one flat tensor of {self.size}"

    def _check_names(self, v: Mapping[str, Tensor], context: str) -> None:
        assert self.names is not None
        missing = [n for n in self.names if n not in v]
        unknown = [n for n in v if n not in self.names]
        if missing or unknown:
            what = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unknown {_few(unknown)}"] * bool(unknown)
            raise ValueError(f"{context}: the dict {' and '.join(what)}; expected {self.describe()}")

    def _check_shapes(self, parts: Parts, context: str) -> None:
        labels = self.labels()
        if len(parts) != len(self.shapes):
            raise ValueError(f"{context}: got {len(parts)} tensors, expected {self.describe()}")
        lead = tuple(parts[0].shape[: max(0, parts[0].ndim - len(self.shapes[0]))])
        for label, part, shape in zip(labels, parts, self.shapes, strict=True):
            if not isinstance(part, Tensor):
                raise ValueError(f"{context}: {label} is {described(part)}; expected a Tensor of shape {shape}")
            expected = (*lead, *shape)
            if tuple(part.shape) != expected:
                raise ValueError(
                    f"{context}: {label} has shape {tuple(part.shape)}, expected {expected}, as the parameter has"
                    + (f" after the leading axes {lead} of {labels[0]}" if lead else "")
                )


def ends_with(v: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the shape of `v` is the given one after any leading axes."""
    return v.ndim >= len(shape) and tuple(v.shape[v.ndim - len(shape) :]) == shape


def check_order(order: str) -> None:
    check_choice("order", order, ORDERS, meanings=ORDERS)


def _few(names: Any, most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more


def _describe(v: Any) -> str:
    return f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else described(v)
