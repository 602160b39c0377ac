"""The terms of an objective, as users name them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from natgrad.losses import output_curvature
from natgrad.optim.tracking.batch import Term
from natgrad.optim.tracking.own import OWN_LOSS

Loss = nn.Module | Mapping[str, nn.Module] | str
"""A loss module, or several by name, or `"model"`: the one that the model computes itself."""


def terms_of(loss: Loss, optimizer: str) -> dict[str, Term]:
    """The objective's terms by name; under the empty name, where there is one without a name. None yet, for the model's
    own.

    Raises:
        TypeError: if a loss is not supported, or is of a model that returns two tensors for it.
        ValueError: if there are none, or a name is not usable, or a string is not `"model"`.
    """
    if isinstance(loss, str):
        if loss != OWN_LOSS:
            raise ValueError(
                f"loss={loss!r} is no loss; expected a loss module such as nn.CrossEntropyLoss(), or {OWN_LOSS!r} for "
                "the loss that the model computes of its labels itself, as Hugging Face's do"
            )
        return {}
    if isinstance(loss, Mapping):
        if not loss:
            raise ValueError("loss is an empty dictionary; expected loss modules by name, or one loss module")
        for name in loss:
            if not isinstance(name, str) or not name:
                raise ValueError(f"loss has a term called {name!r}; expected a name, a string that is not empty")
    terms = {}
    for name, module in loss.items() if isinstance(loss, Mapping) else [("", loss)]:
        terms[name] = Term(name, output_curvature(module))
        if isinstance(module, nn.GaussianNLLLoss):
            raise TypeError(
                f"{optimizer} follows models that return one tensor, and nn.GaussianNLLLoss takes two; let "
                "the model return one, with natgrad.losses.Likelihood(lambda f: Normal(f[..., 0], f[..., 1].exp()))"
            )
    return terms
