"""Checks a model, selects parameters by name, and checks that they are supported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from natgrad.checks.values import described, did_you_mean

Selection = Iterable[str] | str | Callable[[str], bool] | None
"""All trainable parameters (None), one name, names, or a predicate on names."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_model(model: Any) -> None:
    """Raises TypeError unless it is an `nn.Module`."""
    if isinstance(model, nn.Module):
        return
    mend = "write its parentheses" if isinstance(model, type) else "give the model itself"
    if callable(model) and not isinstance(model, type):
        mend += ", or of a function f(params, x) natgrad.Function(f, params)"
    if not callable(model) and isinstance(model, Iterable):
        mend += ", not its parameters, and select some of them with params="
    raise TypeError(f"model is {described(model)}; expected an instance of torch.nn.Module: {mend}")


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, Tensor]:
    """The trainable parameters that `params` names.

    Raises:
        TypeError: if `params` contains something other than names.
        ValueError: if a name is unknown, no parameter is selected, or a parameter is not supported.
    """
    trainable: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if params is None:
        selected = trainable
    elif callable(params):
        selected = {n: p for n, p in trainable.items() if params(n)}
    else:
        wanted = _names(params)
        for n in wanted:
            if n not in trainable:
                raise _unknown(n, model, trainable)
        selected = {n: p for n, p in trainable.items() if n in set(wanted)}
    if not selected:
        raise _nothing(model, trainable)
    check_parameters(selected)
    return selected


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a parameter is not a dense tensor of real numbers, or if they are on several devices."""
    first: tuple[str, torch.device] | None = None
    for n, p in parameters.items():
        if is_lazy(p):
            raise ValueError(
                f"parameter {n!r} has no shape yet, as its layer is lazy; expected one that is initialized: run the "
                "model on a batch first"
            )
        if p.is_complex():
            raise ValueError(f"parameter {n!r} is complex ({p.dtype}); expected a real one")
        if p.dtype not in DTYPES:
            raise ValueError(
                f"parameter {n!r} has dtype {p.dtype}; expected float32, float64, bfloat16 or float16: model.float()"
            )
        if p.layout != torch.strided:
            raise ValueError(f"parameter {n!r} is sparse ({p.layout}); expected a dense one: .to_dense()")
        if p.is_meta:
            raise ValueError(
                f"parameter {n!r} is on the meta device and has no values; expected a model with values: "
                "model.to_empty(device=...), and load its weights"
            )
        if first is None:
            first = n, p.device
        elif p.device != first[1]:
            raise ValueError(
                f"parameter {first[0]!r} is on {first[1]} and {n!r} on {p.device}; expected one device: "
                "model.to(device), or select those on one of them with params="
            )


def _names(params: Any) -> list[str]:
    if isinstance(params, str):
        return [params]
    if not isinstance(params, Iterable):
        raise TypeError(f"params is {described(params)}; expected names of parameters, or a predicate on names")
    names = list(params)
    for n in names:
        if not isinstance(n, str):
            raise TypeError(
                f"params holds {described(n)}; expected names of parameters, as model.named_parameters() has"
            )
    return names


def _unknown(name: str, model: nn.Module, trainable: Mapping[str, Tensor]) -> ValueError:
    if any(n == name for n, _ in model.named_parameters()):
        return ValueError(f"params names {name!r}, which is frozen; call requires_grad_(True) on it, or leave it out")
    near = did_you_mean(name, trainable)
    if any(n.startswith(f"{name}.") for n in trainable):
        near = f"; for all of that module: params=lambda name: name.startswith('{name}.')"
    return ValueError(
        f"params names {name!r}, which is not a trainable parameter of the model; expected some of "
        f"{some_of(trainable)}{near}"
    )


def _nothing(model: nn.Module, trainable: Mapping[str, Tensor]) -> ValueError:
    if trainable:
        return ValueError(f"params selects no trainable parameter of the model; expected some of {some_of(trainable)}")
    frozen = len(list(model.parameters()))
    came = f"all of its {frozen} are frozen" if frozen else "it has none, trainable or not"
    return ValueError(
        f"no trainable parameter is selected; expected a model with some, and {came}: "
        f"{'call model.requires_grad_(True)' if frozen else 'give another model (a quantized one has none)'}"
    )


def some_of(names: Iterable[str], most: int = 6) -> str:
    """The first of the names, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
