"""Matrices that are made layer by layer, from passes over the cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.blocks import assemble
from natgrad.curvature.mixed import MixedStructure
from natgrad.curvature.problem import check_mass
from natgrad.curvature.structure import Structure
from natgrad.curvature.structures import STRUCTURES, Options
from natgrad.distributed.gathering import jointly
from natgrad.distributed.world import World
from natgrad.linalg import BlockDiagonal, Operator


@runtime_checkable
class InPasses(Protocol):
    """What a matrix that is made layer by layer is summed over."""

    @property
    def world(self) -> World: ...

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def is_mean(self) -> bool: ...

    def passes(self, count: int, between: Callable[[], None]) -> Iterator[Cases]: ...


def of_layers(problem: InPasses, structure: str | Mapping[str, str], options: Options) -> BlockDiagonal:
    """The matrix of a structure that is made layer by layer."""

    def make(name: str) -> Structure:
        return STRUCTURES[name](options)

    parts = make(structure) if isinstance(structure, str) else MixedStructure(structure, make, STRUCTURES)
    with jointly(problem.world, "the cases") as agree:

        def next_pass() -> None:
            agree()
            parts.merge_ranks(problem.world)
            parts.next_pass()

        for cases in problem.passes(parts.passes, between=next_pass):
            parts.add(cases)
    parts.merge_ranks(problem.world)
    assert parts.mass is not None
    check_mass(parts.mass, problem.is_mean)
    layers = parts.build(problem.is_mean)
    check_covered(problem.parameters, layers)
    check_finite(layers)
    return assemble(layers, problem.parameters)


def check_covered(parameters: Mapping[str, Tensor], layers: Mapping[Layer, Operator]) -> None:
    covered = {n for layer in layers for n in layer.names}
    missing = [n for n in parameters if n not in covered]
    if missing:
        raise NotImplementedError(
            f"{missing[0]!r} was not used in the forward pass, or the output does not depend on it"
            + (f" (nor were {len(missing) - 1} others)" if len(missing) > 1 else "")
            + ", so no layer kind covers it. Freeze it with requires_grad_(False), or leave it out with params="
        )


def check_finite(layers: Mapping[Layer, Operator]) -> None:
    for layer, op in layers.items():
        if not torch.isfinite(op.trace()):
            raise ValueError(
                f"the matrix of layer {layer.name!r} is not finite; look for NaN or inf in the batch, the targets or "
                "the loss weights, and for a batch whose targets are all ignored"
            )
