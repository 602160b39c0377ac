"""Saving and loading an optimizer: its own state, in addition to that of torch's optimizers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.checks.values import described

if TYPE_CHECKING:
    from natgrad.optim.newton_muon import NewtonMuon
    from natgrad.optim.optimizer import CurvatureOptimizer

TORCH_CHECKPOINT = "torch.distributed.checkpoint.state_dict"
"""The module whose `get_state_dict` keeps only `state` and `param_groups`."""


def state_of(state_dict: Any, key: str, optimizer: str) -> dict[str, Any]:
    """An optimizer's own part of a state dictionary: under `key`, or in the first group.

    Raises:
        TypeError: if the state is not a dictionary.
        ValueError: if it is from another kind of optimizer.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is {described(state_dict)}; expected what state_dict() gave, as by torch.load(path)"
        )
    groups = state_dict.get("param_groups")
    first = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) else {}
    own = state_dict.get(key, first.get(key))
    if not isinstance(own, Mapping):
        has = ", ".join(map(repr, list(state_dict)[:6])) or "nothing"
        raise ValueError(f"the state has {has} and no {key!r}: it is not a {optimizer} optimizer's; load that one's")
    return dict(own)


def state_dict(opt: CurvatureOptimizer, whole: dict[str, Any]) -> dict[str, Any]:
    """Torch's state dictionary `whole`, together with the optimizer's own state."""
    return joined(opt, whole, own_state(opt))


def own_state(opt: CurvatureOptimizer) -> dict[str, Any]:
    """An optimizer's own state, without what torch's optimizers save."""
    return {
        **opt.journal.state(),
        "damping": opt.recipe.damping.value,
        **opt.recipe.adaptive.state(),
        "first_mass": json.dumps(opt.tracker.first_mass),  # a checkpoint has no empty dictionaries
        **({"derives": True} if opt.tracker.derives else {}),
        **opt.labels.state(),
        **named(opt.parameters),
        **opt.recipe.preconditioner.state(),
    }


def joined(opt: CurvatureOptimizer | NewtonMuon, whole: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Torch's state dictionary `whole`, together with the optimizer's own state under the optimizer's key. For
    `torch.distributed.checkpoint.state_dict`, which would drop this key, it is in the first group."""
    place, params = opt.parameters.place, by_index(opt)
    state = {
        i: {k: place.stored(params[i], v) if isinstance(v, Tensor) else v for k, v in its.items()}
        for i, its in whole["state"].items()
    }
    if not _asked_by_torch():
        return whole | {"state": state, opt._key: own}
    first, *others = whole["param_groups"]
    return {"state": state, "param_groups": [first | {opt._key: own}, *others]}


def _asked_by_torch() -> bool:
    """Whether torch's checkpoint module has called, directly or through wrappers of a few frames."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(30):
        if frame is not None and frame.f_globals.get("__name__") == TORCH_CHECKPOINT:
            return True
        frame = None if frame is None else frame.f_back
    return False


def named(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The parameters' names and dtypes, in order."""
    return {"names": list(parameters), "dtypes": [str(p.dtype) for p in parameters.values()]}


def by_index(opt: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters, in the order in which `state_dict` numbers them."""
    return [p for group in opt.param_groups for p in group["params"]]


def load_state_dict(
    opt: CurvatureOptimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Checks the whole state, then loads it. `load` is the method of torch's optimizers."""
    own = state_of(state_dict, opt._key, type(opt).__name__)
    whole = torchs_own(state_dict, opt._key)
    _check(opt, own, whole)
    place = opt.parameters.place
    state = {
        i: {k: place.local(v) if isinstance(v, Tensor) else v for k, v in its.items()}
        for i, its in whole["state"].items()
    }
    load(whole | {"state": state})
    opt.parameters.refresh()
    own = copied(own, opt.parameters.device)
    opt.journal.load(own)
    opt.recipe.damping.value = own["damping"]
    opt.recipe.adaptive.load(own)
    opt.tracker.first_mass = json.loads(own["first_mass"])
    opt.tracker.derives = bool(own.get("derives", False))
    opt._adapts_lr = opt._has_free_lr()
    opt.labels.load(own["generator"].cpu(), own["seed"], opt.journal.steps)
    opt.recipe.preconditioner.load(own)
    opt.tracker.end_step(accepted=True)
    opt.tracker.arm()


def torchs_own(state_dict: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A state dictionary without the optimizer's own part."""
    whole = {k: v for k, v in state_dict.items() if k != key}
    groups = [{k: v for k, v in group.items() if k != key} for group in whole["param_groups"]]
    return whole | {"param_groups": groups}


def _check(opt: CurvatureOptimizer, own: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Raises ValueError if a state is from another kind of optimizer, or for other parameters."""
    expected = own_state(opt)
    missing = [k for k in expected if k not in own]
    if missing:
        raise ValueError(
            f"the state has no {missing[0]!r} under {opt._key!r}; expected what state_dict() of this version gives"
        )
    check_parameters(opt, opt.parameters, own, whole)
    opt.recipe.preconditioner.check_state(dict(own))


def check_parameters(
    opt: torch.optim.Optimizer, parameters: Mapping[str, Tensor], own: Mapping[str, Any], whole: Mapping[str, Any]
) -> None:
    """Raises ValueError if a state is for other parameters: other names, another order, other dtypes, shapes or
    groups."""
    names, dtypes = list(parameters), [str(p.dtype) for p in parameters.values()]
    if list(own["names"]) != names:
        other = next((a, b) for a, b in zip([*own["names"], None], [*names, None], strict=False) if a != b)
        raise ValueError(
            f"the state is of {len(own['names'])} parameters and this optimizer of {len(names)}; the first that differs"
            f" is {other[0]!r} there and {other[1]!r} here: load it for the model and the groups that it was saved of"
        )
    for n, theirs, here in zip(names, own["dtypes"], dtypes, strict=True):
        if theirs != here:
            raise ValueError(
                f"the state is of a {n!r} in {theirs} and here it is in {here}; convert the model first, then load"
            )
    saved = [len(group["params"]) for group in whole["param_groups"]]
    if saved != [len(group["params"]) for group in opt.param_groups]:
        raise ValueError(
            f"the state has groups of {saved} parameters and this optimizer of "
            f"{[len(group['params']) for group in opt.param_groups]}; make it with the same groups"
        )
    index = [i for group in whole["param_groups"] for i in group["params"]]
    name_of = {id(p): n for n, p in parameters.items()}
    for i, p in zip(index, by_index(opt), strict=True):
        for key, value in whole["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != tuple(p.shape):
                raise ValueError(
                    f"the state's {key!r} of {name_of.get(id(p), i)!r} has shape {tuple(value.shape)} and the "
                    f"parameter here {tuple(p.shape)}: load it for a model of the same widths"
                )


def copied(value: Any, device: torch.device) -> Any:
    """A copy of nested dictionaries, lists and tuples, with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {k: copied(v, device) for k, v in value.items()}
    return type(value)(copied(v, device) for v in value) if isinstance(value, (list, tuple)) else value
