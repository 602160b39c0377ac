"""A model under `torch.distributed.fsdp.fully_shard`: each rank has a shard of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from natgrad.curvature.products import Duals
from natgrad.distributed.sharding import Shards, offsets_in
from natgrad.distributed.whole import Whole
from natgrad.distributed.world import World

Named = Mapping[str, Tensor]


class Sharded(Whole):
    """Every rank has a share of the rows of each parameter, as after `torch.distributed.fsdp.fully_shard`. Whole
    parameters exist only during a forward or backward.

    Raises:
        NotImplementedError: if a parameter is whole, or sharded in another way.
    """

    shards: Shards

    def __init__(self, model: nn.Module, world: World, shards: Shards):
        super().__init__(model, world)
        self.shards = shards
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.settle()
        names: dict[int, str] = {id(p): n for n, p in model.named_parameters()}
        # The places of each unit's parameters: in all its modules that are not in another unit.
        self._places: list[list[tuple[nn.Module, str, str]]] = []
        for unit in self._units:
            assert isinstance(unit, nn.Module)
            self._places.append(
                [
                    (m, key, names[id(p)])
                    for m in _own_modules(unit)
                    for key, p in m._parameters.items()
                    if p is not None
                ]
            )

    def local(self, t: Tensor) -> Tensor:
        return t.to_local() if isinstance(t, DTensor) else t

    def stored(self, p: Tensor, t: Tensor) -> Tensor:
        if not isinstance(p, DTensor) or t.shape != p.to_local().shape:
            return t
        return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def total(self, values: list[float]) -> list[float]:
        sums = self.world.numbers(values, "the scalars that decide about a step")
        return [v * self.shards.size / self.world.size for v in sums]

    def any(self, flag: bool) -> bool:
        return self.world.numbers([float(flag)], "the faults of shards")[0] > 0

    def settle(self) -> None:
        super().settle()
        for unit in self._units:
            unit.reshard()

    def follow(self, seen: Callable[[dict[str, Tensor]], None]) -> list[Any]:
        def hook(places: list[tuple[nn.Module, str, str]]) -> Callable[..., None]:
            def before(module: nn.Module, args: Any) -> None:
                seen({name: p for m, key, name in places if (p := m._parameters[key]) is not None})

            return before

        return [
            unit.register_forward_pre_hook(hook(places)) for unit, places in zip(self._units, self._places, strict=True)
        ]

    @contextlib.contextmanager
    def duals(self, direction: Named) -> Iterator[Duals]:
        duals = Duals(self.model, {})
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        held: dict[int, dict[tuple[nn.Module, str], Any]] = {}
        parameters = dict(self.model.named_parameters())

        def before(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                own = [(m, key, n) for m, key, n in self._places[i] if n in direction]
                whole = self.shards.whole({n: direction[n] for _, _, n in own}, parameters)
                held[i] = {}
                made: dict[str, Tensor] = {}
                for m, key, n in own:
                    p = m._parameters[key]
                    assert p is not None
                    held[i][m, key] = p
                    if n not in made:
                        made[n] = torch.autograd.forward_ad.make_dual(p.detach(), whole[n].to(p.dtype))
                        duals.names[id(made[n])] = n
                    m._parameters[key] = made[n]  # type: ignore[assignment]

            return hook

        def after(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                for (m, key), p in held.pop(i, {}).items():
                    duals.names.pop(id(m._parameters[key]), None)
                    m._parameters[key] = p

            return hook

        handles = []
        for i, unit in enumerate(self._units):
            assert isinstance(unit, nn.Module)
            handles.append(unit.register_forward_pre_hook(before(i)))
            handles.append(unit.register_forward_hook(after(i), prepend=True, always_call=True))
        try:
            yield duals
        finally:
            for handle in handles:
                handle.remove()
            for n, b in self.model.named_buffers():
                b.copy_(buffers[n])
            self.settle()


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """The unit, and its modules that are not in another unit."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def sharded(model: nn.Module, device: torch.device) -> Sharded | None:
    """The placement of parameters sharded by `fully_shard`; None if they are whole.

    Raises:
        NotImplementedError: if some are sharded in another way.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    if not isinstance(model, FSDPModule):
        name = next(n for n, p in model.named_parameters() if isinstance(p, DTensor))
        raise NotImplementedError(
            f"parameter {name!r} is sharded over ranks (a DTensor), but the model itself is not; expected "
            "torch.distributed.fsdp.fully_shard(model) on the whole model, after its parts"
        )
    model.reshard()
    mesh = None
    for n, p in model.named_parameters():
        if not isinstance(p, DTensor) or (mesh is not None and p.device_mesh != mesh):
            raise NotImplementedError(
                f"parameter {n!r} is not sharded like the others; expected all parameters to be sharded by "
                "fully_shard over one mesh"
            )
        mesh = p.device_mesh
        offsets_in(n, p)
    assert mesh is not None
    if mesh.ndim == 1:
        group = mesh.get_group()
        world, own = World(group, device), World(group, device)
        return Sharded(model, world, Shards(own, None))
    if mesh.size() != dist.get_world_size():
        raise NotImplementedError(
            f"the mesh {mesh} has two dimensions and {mesh.size()} of {dist.get_world_size()} ranks; expected all "
            "ranks: make the mesh from all ranks"
        )
    world = World(dist.group.WORLD, device)
    return Sharded(model, world, Shards(World(mesh.get_group(1), device), World(mesh.get_group(0), device)))
