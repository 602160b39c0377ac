"""Moments over the examples of all ranks, from the moments of each rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.curvature.central_moments import CentralMoments
from natgrad.curvature.moments import AffineMoments, DiagonalMoments, S, ScaleMoments, Sums
from natgrad.distributed.packing import Form, filled, form_of, leaves, packed, unpacked
from natgrad.distributed.world import World

HASH = 2**16


@dataclass(frozen=True)
class Keep:
    """Which rank of `world` keeps the moments of which layers, by the names of their parameters. `copies` are the ranks
    that keep the same moments."""

    world: World
    owners: Mapping[tuple[str, ...], int]
    copies: World | None = None


def reduced(moments: Mapping[Layer, S], world: World, what: str, keep: Keep | None = None) -> dict[Layer, S]:
    """The moments over the cases of all ranks: for all layers or, with `keep`, for the layers that this rank keeps.

    Counts and means are reduced first, then the sums around the common means. So nothing cancels, however far the
    inputs are from zero. For symmetric sums, only the triangles are sent: for each layer `d_in + 1` numbers in double
    precision and `d_in (d_in + 1)/2 + d_out (d_out + 1)/2 + 1` other numbers.

    Raises:
        ValueError: if the ranks have used different layers.
    """
    if world.size == 1 or not moments:
        return dict(moments)
    if keep is not None:
        return _kept(_around_common_means(moments, world, what), keep, what)
    return Reduction(moments, world, what).result()


class Reduction:
    """`reduced` for all layers, asynchronously: counts and means are reduced at construction, the sums around them
    until the result is requested.

    Raises:
        ValueError: if the ranks have used different layers.
    """

    def __init__(self, moments: Mapping[Layer, Sums], world: World, what: str):
        self._moments = _around_common_means(moments, world, what)
        tensors = list(chain.from_iterable(_sums(m) for m in self._moments.values()))
        self._forms = list(chain.from_iterable(_forms(m) for m in self._moments.values()))
        buffers = packed(tensors, self._forms)
        self._arriving = {dtype: world.begin_sum(buffer, what) for dtype, buffer in buffers.items()}

    def result(self) -> dict[Layer, Any]:
        buffers = {dtype: arrived() for dtype, arrived in self._arriving.items()}
        whole = iter(unpacked(buffers, self._forms))
        return {layer: _with_sums(m, [next(whole) for _ in _sums(m)]) for layer, m in self._moments.items()}


def completed(moments: Mapping[Layer, S], world: World) -> dict[Layer, S]:
    """The moments, with zeros for the layers that only other ranks have moments of."""
    if world.size == 1:
        return dict(moments)
    every = chain.from_iterable(world.gather(_layouts(moments), "the layers of ranks that have data"))
    return _zeros({layer: (layer, *form) for layer, *form in every}.values(), world.device) | dict(moments)


def summed(moments: Mapping[Layer, S], world: World, what: str) -> dict[Layer, S]:
    """Like `reduced`, if a rank may have no cases."""
    return reduced(completed(moments, world), world, what) if world.size > 1 else dict(moments)


def _kept(moments: Mapping[Layer, Any], keep: Keep, what: str) -> dict[Layer, Any]:
    buffers: list[Tensor] = []
    mine: dict[Layer, list[Form]] = {}
    dtype = next(iter(moments.values())).mass.dtype
    device = next(iter(moments.values())).mass.device
    for rank in range(keep.world.size):
        own = {layer: m for layer, m in moments.items() if keep.owners[layer.names] == rank}
        forms = {layer: _forms(m) for layer, m in own.items()}
        tensors = list(chain.from_iterable(_sums(m) for m in own.values()))
        buffer = packed(tensors, list(chain.from_iterable(forms.values())))
        buffers.append(buffer.get(dtype, torch.empty(0, dtype=dtype, device=device)))
        if rank == keep.world.rank:
            mine = forms
    total = keep.world.sum_at(buffers, what)
    if keep.copies is not None:
        total = keep.copies.sum(total, what)
    whole = iter(unpacked({dtype: total}, list(chain.from_iterable(mine.values()))))
    return {layer: _with_sums(moments[layer], [next(whole) for _ in forms]) for layer, forms in mine.items()}


def _around_common_means(moments: Mapping[Layer, Any], world: World, what: str) -> dict[Layer, Any]:
    central = {layer: m for layer, m in moments.items() if isinstance(m, (AffineMoments, CentralMoments))}
    label = "; ".join(f"{layer.label} {[tuple(t.shape) for t in _sums(m)]}" for layer, m in moments.items())
    hashed = zlib.crc32(label.encode()) % HASH
    parts = []
    for m in central.values():
        n = m.count.double().reshape(1)
        parts += [n, torch.where(n > 0, m.mean.double() * n, 0.0)]
    # Different layers would mean buffers of different lengths, which must not be reduced together.
    own = [float(hashed), float(hashed**2)]
    if world.numbers(own, what) != [world.size * v for v in own]:
        raise ValueError(
            f"the ranks used different layers in a forward that took statistics: rank {world.rank} used "
            f"{', '.join(layer.label for layer in moments)}. Expected the same layers on all ranks"
        )
    if not parts:
        return dict(moments)
    totals = world.sum(torch.cat(parts), what).split([len(p) for p in parts])
    found: dict[Layer, Any] = dict(moments)
    for (layer, m), n, total in zip(central.items(), totals[::2], totals[1::2], strict=True):
        mean = torch.where(n > 0, total / n, 0.0).to(m.mean.dtype)
        found[layer] = replace(m.around(mean), count=n.squeeze().to(m.count.dtype))
    return found


def _sums(m: Sums) -> list[Tensor]:
    """The sums that remain to be reduced."""
    if isinstance(m, AffineMoments):
        return [m.scatter, m.output, m.mass]
    if isinstance(m, CentralMoments):
        return [m.second, m.third, m.fourth]
    return [m.products, m.mass] if isinstance(m, ScaleMoments) else [*m.values, m.mass]


def _forms(m: Sums) -> list[Form]:
    """The forms of these sums, which tell the symmetric matrices."""
    return [Form(tuple(t.shape), t.dtype, isinstance(m, AffineMoments) and t.ndim == 2) for t in _sums(m)]


def _with_sums(m: Sums, sums: list[Tensor]) -> Any:
    if isinstance(m, AffineMoments):
        return replace(m, scatter=sums[0], output=sums[1], mass=sums[2])
    if isinstance(m, CentralMoments):
        return replace(m, second=sums[0], third=sums[1], fourth=sums[2])
    if isinstance(m, ScaleMoments):
        return replace(m, products=sums[0], mass=sums[1])
    return DiagonalMoments(tuple(sums[:-1]), sums[-1])


def _layouts(moments: Mapping[Layer, Any]) -> list[Any]:
    """The moments without their values."""
    return [(layer, type(m), form_of(vars(m))) for layer, m in moments.items()]


def _zeros(layouts: Iterable[Any], device: torch.device) -> dict[Layer, Any]:
    """Moments without cases."""
    found: dict[Layer, Any] = {}
    for layer, kind, forms in layouts:
        tensors = (torch.zeros(f.shape, dtype=f.dtype, device=device) for f in leaves(forms, Form))
        found[layer] = kind(**filled(forms, tensors))
    return found
