"""Which parameters of a model an optimizer trains, in groups with settings of their own, as torch's optimizers have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from natgrad.checks.parameters import check_parameters, select_parameters, some_of
from natgrad.checks.values import check_number, described, did_you_mean

Groups = Iterable[Any] | Callable[[str], bool] | None
"""All trainable parameters (None), names, a predicate on names, tensors, or dictionaries with such `"params"`."""


def parameter_groups(model: nn.Module, params: Groups) -> list[dict[str, Any]]:
    """The groups, with their `"params"` as tensors.

    Raises:
        ValueError: if there is none, or something in it is not a parameter of the model.
    """
    if params is None or callable(params) or isinstance(params, str):
        return [{"params": list(select_parameters(model, params).values())}]
    if not isinstance(params, Iterable):
        raise TypeError(
            f"params is {described(params)}; expected parameters of the model, their names, a predicate on names, or "
            "groups of them"
        )
    entries = list(params)
    if not entries:
        raise ValueError("params is empty; expected parameters of the model, or groups of them")
    if all(isinstance(e, Mapping) for e in entries):
        return [as_group(model, e) for e in entries]
    return [as_group(model, {"params": entries})]


def as_group(model: nn.Module, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its parameters as tensors of the model."""
    if "params" not in group:
        raise ValueError(
            f"a group has {', '.join(map(repr, group)) or 'nothing'} and no 'params'; expected its parameters under "
            "that key"
        )
    params = group["params"]
    if isinstance(params, (Tensor, str)):
        params = [params]
    if not callable(params):
        params = list(params)
    if callable(params) or (params and all(isinstance(e, str) for e in params)):
        return {**group, "params": list(select_parameters(model, params).values())}
    names = {id(p): n for n, p in model.named_parameters()}
    for p in params:
        if not isinstance(p, Tensor):
            raise ValueError(f"params has {described(p)}; expected parameters of the model, or their names")
        if id(p) not in names:
            raise ValueError(
                f"params has a tensor of shape {tuple(p.shape)} that is not a parameter of the model; expected some "
                f"of {some_of(names.values())}"
            )
    check_parameters({names[id(p)]: p for p in params})
    return {**group, "params": params}


def check_alike(groups: Iterable[Mapping[str, Any]], name: str) -> None:
    """Raises ValueError if a setting is adaptive in one group and a number in another: there is one quadratic model."""
    if len({group[name] is None for group in groups}) > 1:
        raise ValueError(
            f"{name} is None, which means adaptive, in one group and a number in another; expected a number in all "
            "groups, or None in all"
        )


def check_groups(groups: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting of a group is out of range, or misspelt."""
    groups = list(groups)
    for group in groups:
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, group[name], optional=name != "weight_decay")
        for key in group.keys() - {"params", *defaults}:
            near = did_you_mean(key, defaults)
            if near and key != "initial_lr":  # other keys are the user's own, as in torch
                raise ValueError(f"a group has {key!r}; expected settings among {', '.join(defaults)}{near}")
    for name in ("lr", "momentum"):
        check_alike(groups, name)


def check_schedulable(groups: Iterable[Mapping[str, Any]], adapts_lr: bool, numbers: str) -> None:
    """Raises ValueError if one of torch's schedulers has been made for a step size that is adapted. `numbers`: the
    options to give instead."""
    if adapts_lr and any("initial_lr" in group for group in groups):
        raise ValueError(
            "a scheduler of torch.optim.lr_scheduler cannot change lr, because lr is None: it is adapted at every "
            f"step. Give {numbers}, or leave the scheduler out"
        )


def check_one_decay(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError if groups have several weight decays that are part of the objective."""
    shares = {0.0 if group["decoupled_weight_decay"] else group["weight_decay"] for group in groups}
    if len(shares) > 1:
        raise ValueError(
            f"weight_decay is {' and '.join(f'{eta:g}' for eta in sorted(shares))} in several groups, but "
            "the matrix of all parameters has only one damping; expected the same in all groups, or "
            "decoupled_weight_decay=True"
        )
