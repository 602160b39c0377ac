"""A module's forward pass with other tensors in place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def is_replaceable(model: nn.Module) -> bool:
    """Whether `call_with` takes this model. torch replaces no tensors of `nn.DataParallel` and of scripted modules."""
    return not isinstance(model, (nn.DataParallel, torch.jit.ScriptModule))


def call_with(model: nn.Module, values: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`model(*args, **kwargs)` with `values` in place of the tensors with these names.

    A tensor that is registered in several places is replaced in all of them. Each place gets one name. (torch gives a
    module that is registered twice, as in `nn.ModuleList([block] * 2)`, both names, and then does not restore it.)
    """
    owned = {id(t): n for n, t in chain(model.named_parameters(), model.named_buffers())}
    places = {}
    for prefix, module in model.named_modules():
        own = chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, t in own:
            value = values.get(owned.get(id(t), ""))
            if value is not None:
                places[f"{prefix}.{name}" if prefix else name] = value
    return functional_call(model, places, tuple(args), dict(kwargs), tie_weights=False)
