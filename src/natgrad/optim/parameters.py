"""The parameters that an optimizer trains: by name, with their groups and states."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.distributed.whole import Whole
from natgrad.optim.vectors import Vector, finite


class Parameters(Mapping[str, Tensor]):
    """A mapping from names to tensors of the model, with torch's groups and states of these tensors.

    Args:
        opt: the optimizer with these `param_groups` and `state`.
        place: where the parameters are: whole on every rank, or in shards.
    """

    def __init__(self, opt: torch.optim.Optimizer, place: Whole):
        self._opt, self.place = weakref.ref(opt), place
        self._named: dict[str, Tensor] = {}
        self.refresh()

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @property
    def states(self) -> defaultdict[Any, dict[str, Any]]:
        return self._optimizer.state

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        opt = self._opt()
        assert opt is not None
        return opt

    def refresh(self) -> None:
        """Reads the groups again, after parameters were added."""
        own = {id(p) for group in self.groups for p in group["params"]}
        self._named = {n: p for n, p in self.place.model.named_parameters() if id(p) in own}
        self._group_of = {id(p): i for i, group in enumerate(self.groups) for p in group["params"]}
        for p in self._named.values():
            self.states[p]

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def __iter__(self) -> Any:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @property
    def device(self) -> torch.device:
        return next(iter(self._named.values())).device

    @property
    def lowered(self) -> bool:
        """Whether some parameters have a lower precision than float32."""
        return any(torch.finfo(p.dtype).eps > torch.finfo(torch.float32).eps for p in self._named.values())

    @property
    def precision(self) -> torch.dtype:
        """The precision of factors and directions: at least float32, which averages and inverses need."""
        return torch.promote_types(next(iter(self._named.values())).dtype, torch.float32)

    def local(self) -> dict[str, Tensor]:
        """The tensors, or this rank's shards of them. Writing to them changes the parameters."""
        return {n: self.place.local(p) for n, p in self._named.items()}

    def gradients(self) -> Vector:
        """The gradients of the trainable parameters that have one."""
        return {n: self.place.local(p.grad) for n, p in self._named.items() if p.grad is not None and p.requires_grad}

    def state_of(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self.states[self._named[name]]
        return state

    def by_group(self, names: Iterable[str]) -> list[tuple[dict[str, Any], list[str]]]:
        """The named parameters by group. Groups without any of them are left out."""
        found: list[list[str]] = [[] for _ in self.groups]
        for n in names:
            found[self._group_of[id(self._named[n])]].append(n)
        return [(group, own) for group, own in zip(self.groups, found, strict=True) if own]

    def sizes(self) -> dict[str, int]:
        return {n: p.numel() for n, p in self._named.items()}

    def versions(self) -> list[int]:
        """Numbers that change when a parameter is written to."""
        return [p._version for p in self._named.values()]

    def snapshot(self) -> Vector:
        """A copy of the parameters."""
        return {n: p.clone() for n, p in self.local().items()}

    def return_to(self, before: Vector) -> None:
        """Restores a copy. Subtracting a step that was added would leave rounding errors."""
        for n, p in self.local().items():
            p.copy_(before[n])

    def total(self, values: list[float]) -> list[float]:
        """Sums over all parameters, from sums over this rank's parts of them. The same on all ranks."""
        return self.place.total(values)

    def finite(self, v: Vector) -> bool:
        """Whether no entry is NaN or infinite, here or in another shard."""
        return not self.place.any(not finite(v))

    def forget_momentum(self) -> None:
        """Forgets the last step and all momentum."""
        for p in self._named.values():
            for past in ("delta", "length", "momentum_buffer", "momentum_weight"):
                self.states[p].pop(past, None)
