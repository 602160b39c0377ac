"""The terms of an objective, from the `loss` argument of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from natgrad.losses import output_curvature
from natgrad.optim.tracking.batch import Term
from natgrad.optim.tracking.own import OWN_LOSS

Loss = nn.Module | Mapping[str, nn.Module] | str
"""A loss module, or several by name, or `"model"`: the loss that the model computes itself."""


def terms_of(loss: Loss, optimizer: str) -> dict[str, Term]:
    """The objective's terms by name. A single loss has the empty name. Empty for the model's own loss, which is found
    later.

    Raises:
        TypeError: if a loss is not supported, or needs a model that returns two tensors.
        ValueError: if there are no terms, or a name is not usable, or a string is not `"model"`.
    """
    if isinstance(loss, str):
        if loss != OWN_LOSS:
            raise ValueError(
                f"loss={loss!r} is not a loss; expected a loss module such as nn.CrossEntropyLoss(), or {OWN_LOSS!r} "
                "if the model computes its loss from its labels itself, as Hugging Face models do"
            )
        return {}
    if isinstance(loss, Mapping):
        if not loss:
            raise ValueError("loss is an empty dictionary; expected loss modules by name, or one loss module")
        for name in loss:
            if not isinstance(name, str) or not name:
                raise ValueError(f"loss has a term with the name {name!r}; expected a non-empty string")
    terms = {}
    for name, module in loss.items() if isinstance(loss, Mapping) else [("", loss)]:
        terms[name] = Term(name, output_curvature(module))
        if isinstance(module, nn.GaussianNLLLoss):
            raise TypeError(
                f"{optimizer} expects a model that returns one tensor, but nn.GaussianNLLLoss takes two; let "
                "the model return one, with natgrad.losses.Likelihood(lambda f: Normal(f[..., 0], f[..., 1].exp()))"
            )
    return terms
