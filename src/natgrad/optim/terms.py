"""The terms of an objective, as users name them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from natgrad.losses import output_curvature
from natgrad.optim.tracking.batch import Term

Loss = nn.Module | Mapping[str, nn.Module]
"""A loss module, or several by name."""


def terms_of(loss: Loss, optimizer: str) -> dict[str, Term]:
    """The objective's terms by name; under the empty name, where there is one without a name.

    Raises:
        TypeError: if a loss is not supported, or is of a model that returns two tensors for it.
        ValueError: if there are none, or a name is not usable.
    """
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
