"""Objectives of several terms: losses of several outputs, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from natgrad.capture.cases import Cases
from natgrad.checks.values import described, did_you_mean
from natgrad.curvature.problem import Forward, Problem, check_mass

Losses = nn.Module | Mapping[str, nn.Module]


class Terms:
    """`Σ_t ω_t L_t` of a model on data: a separate problem for every term, with the term's output and target.

    Args:
        model: the module that returns a mapping of outputs.
        losses: the terms' losses, by name.
        data: `(input, targets)` pairs, `targets` a mapping of the same names; or batches for `forward`.
        forward: `forward(model, batch)` returns `(outputs, targets)`, two mappings of the same names.
        weights: the terms' `ω_t`; 1 for those that are not given.
        options: of `Problem`.

    Raises:
        ValueError: if there is no term, or if a weight is for an unknown term, negative or not finite.
        TypeError: for losses that are not supported.
    """

    is_mean = False  # the divisor is part of the weights

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, nn.Module],
        data: Any,
        forward: Forward | None,
        weights: Mapping[str, float] | None,
        **options: Any,
    ):
        if not losses:
            raise ValueError("loss is an empty dictionary; expected a loss for every term of the objective, by name")
        self.weights = _checked(weights or {}, losses)
        data = list(data) if isinstance(data, Iterator) else data  # every term reads it once
        self.problems = {
            name: Problem(model, loss, data, forward=_of_term(name, tuple(losses), forward), reached=True, **options)
            for name, loss in losses.items()
        }
        first = next(iter(self.problems.values()))
        self.world, self.parameters, self.estimator, self.device = (
            first.world,
            first.parameters,
            first.estimator,
            first.device,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the matrix, from the data seen so far."""
        return tuple(f"{name!r}: {note}" for name, its in self.problems.items() for note in its.notes)

    def passes(self, count: int, between: Callable[[], None]) -> Iterator[Cases]:
        """The cases of all terms in `count` passes, with the same random labels in each, in units of the objective. If
        a term is a mean, its divisor takes an extra pass over the data at the start."""
        factors = {}
        for name, problem in self.problems.items():
            mass = problem.mass() if problem.is_mean else None
            if mass is not None:
                check_mass(mass, True)
            factors[name] = self.weights[name] if mass is None else self.weights[name] / float(mass)
        states = {}
        if count > 1:
            states = {name: problem.labels().get_state() for name, problem in self.problems.items()}
        for i in range(count):
            if i:
                between()
            for name, state in states.items():
                self.problems[name].labels().set_state(state)
            for name, problem in self.problems.items():
                for cases in problem.cases():
                    yield cases.scaled(factors[name], name)


def _checked(weights: Mapping[str, float], losses: Mapping[str, nn.Module]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in losses:
            known = ", ".join(map(repr, losses))
            raise ValueError(
                f"weights has {name!r}, which is no term; expected one of {known}{did_you_mean(name, losses)}"
            )
        if isinstance(weight, Tensor) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name!r} is {described(weight)}; expected a finite number, 0 or more")
    return {name: float(weights.get(name, 1.0)) for name in losses}


def _of_term(name: str, names: tuple[str, ...], forward: Forward | None) -> Forward:
    """The forward that gives one term's output and target."""

    def of_term(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        if forward is not None:
            result = forward(model, batch)
            what = "forward returned"
        else:
            what = "a batch is"
            result = (model(batch[0]), batch[1]) if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(f"{what} {described(result)}; expected a pair (outputs, targets) of two dictionaries")
        return entry(result[0], name, names, "outputs"), entry(result[1], name, names, "targets")

    return of_term


def entry(values: Any, name: str, names: tuple[str, ...], what: str) -> Any:
    """One term's part of a dictionary; ValueError if there is none."""
    known = ", ".join(map(repr, names))
    if not isinstance(values, Mapping):
        raise ValueError(
            f"the {what} are {described(values)}; with several losses expected a dictionary with an entry for each of "
            f"{known}. Pass forward=lambda model, batch: (outputs, targets) to make them"
        )
    if name not in values:
        raise ValueError(
            f"the {what} have no {name!r}, only {', '.join(map(repr, values))}; expected an entry for each of {known}"
        )
    return values[name]
