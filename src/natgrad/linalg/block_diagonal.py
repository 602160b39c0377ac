"""The matrix of a whole network, one block per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from natgrad.checks.values import ByLayer
from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.layout import PLAIN, Layout
from natgrad.linalg.operator import Operator, check_operator
from natgrad.linalg.space import Parts, Space

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """One layer of a `BlockDiagonal`: its operator, and how its parameters map to the operator's vectors.

    Args:
        operator: the layer's matrix, on `(W, b)`, on `W` or on `b`.
        names: of the parameters that it acts on, one for each part of its vectors.
        layout: how the first parameter's tensor maps to the matrix `(d_out, d_in)`.
        shapes: of the parameters' tensors. Default: the operator's own shapes, mapped through the layout.
        function: torch's name of the layer's function, such as `"linear"`.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Block, Kronecker, Layout
        >>> block = Block(Kronecker(torch.eye(3), torch.eye(2)), ("w",), Layout("transposed"))
        >>> block.shapes, [part.shape for part in block.parts({"w": torch.ones(3, 2)})]
        (((3, 2),), [torch.Size([2, 3])])
    """

    operator: Operator
    names: tuple[str, ...]
    layout: Layout = PLAIN
    shapes: tuple[tuple[int, ...], ...] = ()
    function: str = ""

    def __post_init__(self) -> None:
        check_operator("a block", "operator", self.operator)
        if not self.shapes:
            first, *rest = self.operator.space.shapes
            first = first[::-1] if self.layout.form == "transposed" else first
            object.__setattr__(self, "shapes", (first, *rest))
        own, its = self.operator.space.shapes, self.shapes
        if not len(self.names) == len(own) == len(its) or [prod(s) for s in own] != [prod(s) for s in its]:
            raise ValueError(
                f"a block has the names {self.names} and the shapes {its}; expected those of "
                f"{self.operator.space.describe()}"
            )

    def parts(self, v: Mapping[str, Tensor]) -> Parts:
        """The operator's vector, from tensors by parameter name; leading axes are kept."""
        if self._as_it_is:
            return tuple(v[n] for n in self.names)
        return tuple(layout.to_operator(v[n], own, its) for n, layout, own, its in self._ways())

    def named(self, parts: Parts) -> dict[str, Tensor]:
        """The inverse of `parts`: the tensors by name, in the parameters' shapes."""
        if self._as_it_is:
            return dict(zip(self.names, parts, strict=True))
        return {
            n: layout.to_parameter(part, own, its)
            for part, (n, layout, own, its) in zip(parts, self._ways(), strict=True)
        }

    def with_operator(self, operator: Operator) -> Block:
        """The same layer with another matrix."""
        return replace(self, operator=operator)

    @property
    def _as_it_is(self) -> bool:
        """Whether the parameters' tensors are the operator's vectors."""
        return self.layout.form == "plain" and self.shapes == self.operator.space.shapes

    def _ways(self) -> Iterator[tuple[str, Layout, tuple[int, ...], tuple[int, ...]]]:
        layouts = (self.layout, *[PLAIN] * (len(self.names) - 1))
        return zip(self.names, layouts, self.shapes, self.operator.space.shapes, strict=True)


class BlockDiagonal(Operator):
    """`blockdiag(M_1, M_2, ...)`: independent blocks, one for each layer, over the named parameters of a model.

    `natgrad.fisher` returns this for structures with one block per layer. Every operation works block by block: traces
    and log-determinants are sums over blocks, inverses and powers are block diagonal again. A vector is a `dict` of
    name to tensor, or one flat tensor of `space.size` numbers.

    Args:
        layers: the blocks by the layers' names.
        space: the parameters of all layers, named, in the model's order.

    Raises:
        ValueError: by `inverse`, `power` and `logdet`, if a block fails; the error names its layer.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Block, BlockDiagonal, Dense, Space
        >>> layers = {"a": Block(Dense(2 * torch.eye(1)), ("a.bias",)), "b": Block(Dense(torch.eye(2)), ("b.bias",))}
        >>> F = BlockDiagonal(layers, Space(((1,), (2,)), ("a.bias", "b.bias")))
        >>> F.trace().item(), F.solve(torch.ones(3)).tolist()
        (4.0, [0.5, 1.0, 1.0])
    """

    def __init__(self, layers: Mapping[str, Block], space: Space):
        self.layers, self.space = dict(layers), space
        shapes = {
            n: shape for block in self.layers.values() for n, shape in zip(block.names, block.shapes, strict=True)
        }
        if not layers or shapes != dict(zip(space.names or (), space.shapes, strict=True)):
            raise ValueError(f"the layers have the parameters {shapes}; expected those of space, {space.describe()}")
        first = next(iter(self.layers.values())).operator
        self.dtype, self.device = first.dtype, first.device

    @property
    def blocks(self) -> dict[str, Operator]:
        """Each layer's operator on its parameters, by the layer's name.

        If the matrix of a weight has another shape than its tensor (in `addmm`, a kernel), the operator acts on named
        parts.
        """
        return ByLayer({name: self._alone(name, block) for name, block in self.layers.items()})

    def _alone(self, name: str, block: Block) -> Operator:
        if block.layout == PLAIN and block.shapes == block.operator.space.shapes:
            return block.operator
        return BlockDiagonal({name: block}, Space(block.shapes, block.names))

    def __repr__(self) -> str:
        thinned = [f"{name} ({what})" for name, what in self.diagonal_factors().items()]
        more = f", diagonal factors: {', '.join(thinned)}" if thinned else ""
        return f"{super().__repr__()[:-1]}{more})"

    def diagonal_factors(self) -> dict[str, str]:
        """The layers that keep only the diagonal of a factor, and which factor: `{"head": "B 50257 (diagonal)"}`."""
        described = {name: block.operator.describe().split(", ") for name, block in self.layers.items()}
        found = {name: [part for part in parts if part.endswith("(diagonal)")] for name, parts in described.items()}
        return {name: ", ".join(parts) for name, parts in found.items() if parts}

    @property
    def operators(self) -> list[Operator]:
        """The layers' operators, each on vectors of its own form."""
        return [block.operator for block in self.layers.values()]

    def _matmul(self, parts: Parts) -> Parts:
        return self._each(parts, lambda op, p: op._matmul(p))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> BlockDiagonal:
        check_damping(damping, damping_style)
        return self._map(lambda op: op.inverse(damping, damping_style=damping_style))

    def power(self, exponent: float, damping: float = 0.0) -> BlockDiagonal:
        check_exponent(exponent)
        check_damping(damping)
        return self._map(lambda op: op.power(exponent, damping))

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        return torch.stack(list(self._by_layer(lambda block: block.operator.logdet(damping)).values())).sum()

    def trace(self) -> Tensor:
        return torch.stack([op.trace() for op in self.operators]).sum()

    def _norm(self) -> Tensor:
        return torch.stack([op.norm() for op in self.operators]).norm()

    def _diagonal(self) -> Parts:
        out: dict[str, Tensor] = {}
        for block in self.layers.values():
            out |= block.named(block.operator._diagonal())
        return self._ordered(out)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self._each(parts, lambda op, p: op._inverse_factor(p, damping))

    def _scaled(self, factor: float) -> BlockDiagonal:
        return self._map(lambda op: op._scaled(factor))

    def _plus(self, other: Operator) -> Operator | None:
        if not isinstance(other, BlockDiagonal) or _arrangement(self) != _arrangement(other):
            return None
        summed = {
            name: block.with_operator(block.operator + other.layers[name].operator)
            for name, block in self.layers.items()
        }
        return BlockDiagonal(summed, self.space)

    def _dense(self) -> Tensor:
        M = torch.zeros(self.space.size, self.space.size, dtype=self.dtype, device=self.device)
        index = self.space.unflatten(torch.arange(self.space.size, device=self.device))
        named = dict(zip(self.space.names or (), index, strict=True))
        for block in self.layers.values():
            rows = block.operator.space.flatten(block.parts(named))
            M[rows[:, None], rows] = block.operator._dense()
        return M

    def _each(self, parts: Parts, apply: Callable[[Operator, Parts], Parts]) -> Parts:
        assert self.space.names is not None
        v = dict(zip(self.space.names, parts, strict=True))
        out: dict[str, Tensor] = {}
        for named in self._by_layer(lambda block: block.named(apply(block.operator, block.parts(v)))).values():
            out |= named
        return self._ordered(out)

    def _ordered(self, named: Mapping[str, Tensor]) -> Parts:
        assert self.space.names is not None
        return tuple(named[n] for n in self.space.names)

    def _map(self, change: Callable[[Operator], Operator]) -> BlockDiagonal:
        return BlockDiagonal(self._by_layer(lambda block: block.with_operator(change(block.operator))), self.space)

    def _by_layer(self, of: Callable[[Block], T]) -> dict[str, T]:
        """Applies `of` to every block; an error names the layer."""
        found = {}
        for name, block in self.layers.items():
            try:
                found[name] = of(block)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        return found


def _arrangement(operator: BlockDiagonal) -> list[tuple[str, tuple[str, ...], str]]:
    return sorted((name, block.names, repr(block.layout)) for name, block in operator.layers.items())
