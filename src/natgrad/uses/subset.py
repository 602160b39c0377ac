"""Which weights a posterior is over, and whether the others are still what they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isclose
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from natgrad.capture.layers.scale import Scale
from natgrad.checks.parameters import Selection
from natgrad.checks.values import did_you_mean
from natgrad.checks.warning import warn
from natgrad.curvature.matrices import problem_of
from natgrad.curvature.problem import Forward, Problem
from natgrad.curvature.terms import Losses, Terms
from natgrad.linalg import Operator

WHOLE = ("all", "last_layer")
"""Subsets that have a name."""


def chosen(model: nn.Module, loss: Losses, data: Any, subset: Selection, forward: Forward | None) -> Selection:
    """The parameters that a subset means: `"all"`, the `"last_layer"`, names of parameters or modules, a predicate."""
    if subset is None or subset == "all":
        return None
    if isinstance(subset, str) and subset == "last_layer":
        problem = problem_of(model, loss, data, forward, None)
        problems = problem.problems.values() if isinstance(problem, Terms) else [problem]
        return list(dict.fromkeys(n for one in problems for n in last_layer(one)))
    if callable(subset):
        return subset
    wanted = [subset] if isinstance(subset, str) else subset
    if not isinstance(wanted, Iterable):
        return wanted  # whose error is that of params
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    known = [*trainable, *(n for n, _ in model.named_modules())]
    if isinstance(subset, str) and subset not in known and (near := did_you_mean(subset, WHOLE, alike=0.5)):
        raise ValueError(
            f"subset={subset!r} is unknown; expected 'all', 'last_layer', or names of parameters or modules{near}"
        )
    return [n for w in wanted for n in ([t for t in trainable if t.startswith(f"{w}.")] or [w])]


def last_layer(problem: Problem) -> list[str]:
    """The weight and bias of the affine map that a forward uses last; of several outputs, the last that this output
    depends on."""
    for recorder, output, _ in problem.recorded(problem.parameters):
        for use in reversed(recorder.check(output, reached=True) if problem.reached else recorder.uses):
            if use.weight and not isinstance(use.kind, Scale):
                return [n for n in (use.weight, use.bias) if n]
        break
    raise ValueError("the forward uses no weight of a linear layer, so there is no last layer; use subset= with names")


def moved(F: Operator, parameters: Mapping[str, Tensor]) -> str | None:
    """A parameter that has changed since the matrix was computed, if that is known of any."""
    norms = {n: float(parameters[n].detach().double().norm()) for n in F.fingerprint if n in parameters}
    return next((n for n, size in norms.items() if not isclose(F.fingerprint[n], size, rel_tol=1e-9)), None)


def warn_in_training(model: nn.Module) -> None:
    """Warns of layers whose output is random, or depends on the rest of the batch, in training mode."""
    for name, m in model.named_modules():
        if m.training and ((isinstance(m, _DropoutNd) and m.p > 0) or isinstance(m, _BatchNorm)):
            warn(
                f"{name!r} ({type(m).__name__}) is in training mode, so the model is not one function of its input; "
                "call model.eval() first"
            )
            return


@dataclass(frozen=True)
class Fingerprint:
    """The norm of every tensor of a model that a posterior is not over."""

    sizes: dict[str, float]

    @classmethod
    def of(cls, model: nn.Module, without: Iterable[str]) -> Fingerprint:
        without = set(without)
        own = [*model.named_parameters(), *model.named_buffers()]
        return cls({n: float(t.detach().double().norm()) for n, t in own if n not in without and t.is_floating_point()})

    def changes(self, model: nn.Module) -> list[str]:
        """Those that are other ones now, or not there."""
        own = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in self.sizes}
        found = {n: float(t.detach().double().norm()) for n, t in own.items()}
        return [n for n, size in self.sizes.items() if not isclose(found.get(n, inf), size, rel_tol=1e-12)]
