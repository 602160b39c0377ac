"""The matrix of a whole network, one block per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


@dataclass(frozen=True)
class Block:
    """One layer's operator, and the parameters it acts on: their names, and whether the weight is stored
    as `(d_in, d_out)` (as `addmm` takes it) where the operator takes `(d_out, d_in)`."""

    operator: Operator
    names: tuple[str, ...]
    transposed: bool = False

    def parts(self, v: Mapping[str, Tensor]) -> Parts:
        first, *rest = (v[n] for n in self.names)
        return (first.mT if self.transposed else first, *rest)

    def named(self, parts: Parts) -> dict[str, Tensor]:
        first, *rest = parts
        return dict(zip(self.names, (first.mT if self.transposed else first, *rest), strict=True))


class BlockDiagonal(Operator):
    """Independent blocks, one per layer, over the named parameters of a model."""

    def __init__(self, layers: Mapping[str, Block], space: Space):
        self.layers, self.space = dict(layers), space
        first = next(iter(self.layers.values())).operator
        self.dtype, self.device = first.dtype, first.device
        self.damps_parameters = all(block.operator.damps_parameters for block in self.layers.values())

    @property
    def blocks(self) -> dict[str, Operator]:
        """Each layer's operator by the layer's name; a weight stored as `(d_in, d_out)` acts transposed."""
        return {name: block.operator for name, block in self.layers.items()}

    def _matmul(self, parts: Parts) -> Parts:
        return self._each(parts, lambda op, p: op._matmul(p))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> BlockDiagonal:
        return self._map(lambda op: op.inverse(damping, damping_style=damping_style))

    def power(self, exponent: float, damping: float = 0.0) -> BlockDiagonal:
        return self._map(lambda op: op.power(exponent, damping))

    def logdet(self, damping: float = 0.0) -> Tensor:
        return torch.stack([op.logdet(damping) for op in self.blocks.values()]).sum()

    def trace(self) -> Tensor:
        return torch.stack([op.trace() for op in self.blocks.values()]).sum()

    def norm(self) -> Tensor:
        return torch.stack([op.norm() for op in self.blocks.values()]).norm()

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
            name: Block(block.operator + other.layers[name].operator, block.names, block.transposed)
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
        for block in self.layers.values():
            out |= block.named(apply(block.operator, block.parts(v)))
        return self._ordered(out)

    def _ordered(self, named: Mapping[str, Tensor]) -> Parts:
        assert self.space.names is not None
        return tuple(named[n] for n in self.space.names)

    def _map(self, change: Callable[[Operator], Operator]) -> BlockDiagonal:
        changed = {}
        for name, block in self.layers.items():
            try:
                changed[name] = Block(change(block.operator), block.names, block.transposed)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        return BlockDiagonal(changed, self.space)


def _arrangement(operator: BlockDiagonal) -> list[tuple[str, tuple[str, ...], bool]]:
    return sorted((name, block.names, block.transposed) for name, block in operator.layers.items())
