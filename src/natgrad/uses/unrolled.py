"""Influence through the training itself, from checkpoints: unrolled steps, segment by segment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.capture.cases import Cases
from natgrad.checks.values import check_count, described
from natgrad.curvature.by_layers import of_layers
from natgrad.curvature.matrices import Chosen, matrix_of
from natgrad.curvature.structures import Options
from natgrad.linalg import Operator
from natgrad.linalg.subspace import eigenbasis
from natgrad.uses.objective import Objective

Checkpoint = Mapping[str, Tensor] | str | PathLike[str]


class Segment(NamedTuple):
    """A stretch of the training: the states of the model in it, and how long it was, `Σ η` over its steps."""

    states: list[dict[str, Tensor]]
    time: float


def read_segments(model: nn.Module, checkpoints: Any, times: Any, segments: Any) -> list[Segment]:
    """The segments, in the order of the training.

    Raises:
        TypeError, ValueError: if checkpoints are of another model, or numbers do not fit.
    """
    if isinstance(checkpoints, (str, PathLike, Mapping)) or not isinstance(checkpoints, Sequence) or not checkpoints:
        raise TypeError(
            f"checkpoints is {described(checkpoints)}; expected a list of state dicts, or of files that hold one, in "
            "the order of the training"
        )
    if times is None:
        raise ValueError(
            "checkpoints= needs times=; give the learning rate times the number of steps that each checkpoint stands "
            "for, such as times=[0.1 * 500, 0.01 * 500]"
        )
    count = len(checkpoints)
    each = [times] * count if isinstance(times, Real) else list(times) if isinstance(times, (list, tuple)) else None
    if each is None or len(each) != count:
        raise ValueError(
            f"times is {described(times)}; expected a number, or a list with one for each of the {count} checkpoints"
        )
    for one in each:
        if isinstance(one, bool) or not isinstance(one, Real) or not float(one) > 0:
            raise ValueError(
                f"times has {one!r}; expected numbers above zero: the learning rate times the number of steps"
            )
    of_one = 1
    if segments is not None:
        check_count("segments", segments, "segments")
        if count % segments:
            raise ValueError(
                f"{count} checkpoints cannot be divided into segments={segments} equal parts; expected a divisor of "
                f"{count}"
            )
        of_one = count // segments
    states = [_state(model, f"checkpoints[{i}]", one) for i, one in enumerate(checkpoints)]
    return [Segment(states[i : i + of_one], float(sum(each[i : i + of_one]))) for i in range(0, count, of_one)]


def _state(model: nn.Module, name: str, checkpoint: Any) -> dict[str, Tensor]:
    found = checkpoint
    if isinstance(checkpoint, (str, PathLike)):
        path = Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"{name} is {str(path)!r}, and there is no such file; expected one of a state dict")
        name = f"{name} ({path})"
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"{name} cannot be read as a state dict ({type(error).__name__}); expected a file that "
                    "torch.save(model.state_dict(), path) or safetensors wrote"
                ) from error
    if not isinstance(found, Mapping):
        raise TypeError(f"{name} is {described(found)}; expected a state dict, as model.state_dict() gives it")
    own = model.state_dict()
    wrong = next((n for n in [*own, *found] if n not in own or n not in found), None)
    if wrong is not None:
        raise ValueError(
            f"{name} is of another model: {wrong!r} is {'not in it' if wrong in own else 'no part of this one'}; "
            "expected a state dict of this model"
        )
    for n, t in own.items():
        if not isinstance(t, Tensor):
            continue
        if not isinstance(found[n], Tensor) or found[n].shape != t.shape:
            raise ValueError(
                f"{name} is of another model: {n!r} is {described(found[n])} there and has shape {tuple(t.shape)} "
                "here; expected a state dict of this model"
            )
        if found[n].is_floating_point() and not torch.isfinite(found[n]).all():
            raise ValueError(
                f"{name} has entries of {n!r} that are not finite; leave checkpoints of a diverged run out"
            )
    return {n: t.detach() if isinstance(t, Tensor) else t for n, t in found.items()}


@contextlib.contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within this context other weights may be loaded into the model; at its end it has its own again."""
    before = {n: t.clone() if isinstance(t, Tensor) else t for n, t in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)


class OverStates:
    """The cases of an objective at several states of the model: a structure sums its factors over all of them."""

    def __init__(self, objective: Objective, states: list[dict[str, Tensor]]):
        self.objective, self.states = objective, states
        problem = objective.problem
        self.world, self.parameters, self.is_mean = problem.world, problem.parameters, problem.is_mean

    def passes(self, count: int, between: Callable[[], None]) -> Iterator[Cases]:
        problems = [p for p in self.objective.terms.values() if p.estimator == "mc"]
        starts = [p.labels().get_state() for p in problems]
        for i in range(count):
            if i:
                between()
            for problem, start in zip(problems, starts, strict=True):
                problem.labels().set_state(start)
            for state in self.states:
                self.objective.model.load_state_dict(state)
                yield from self.objective.problem.passes(1, lambda: None)


def averaged(objective: Objective, states: list[dict[str, Tensor]], structure: Chosen, options: Options) -> Operator:
    """The mean of the matrix over the states; of K-FAC and EKFAC, that of the factors."""
    if structure == "dense":
        total: Operator | None = None
        for state in states:
            objective.model.load_state_dict(state)
            F = matrix_of(objective.problem, structure, options)
            total = F if total is None else total + F
        assert total is not None
        return (1 / len(states)) * total
    of_all = of_layers(OverStates(objective, states), structure, options)
    return of_all if objective.problem.is_mean else (1 / len(states)) * of_all


def unrolled_queries(
    matrices: list[tuple[Operator, float]], queries: Float[Tensor, "q size"], damping: float
) -> list[Float[Tensor, "q size"]]:
    """For each segment `φ_ℓ S_ℓ+1 ⋯ S_L ∇_q`, from the last to the first, with `S = exp(−t (F + λ I))` and

        φ = ∫₀ᵗ exp(−u (F + λ I)) du = (I − exp(−t (F + λ I))) (F + λ I)⁻¹

    Args:
        matrices: of each segment `F` and its time `t`, in the order of the training.
        queries: `∇_q`.
        damping: `λ`.
    """
    found, v = [], queries
    for F, time in reversed(matrices):
        e, multiply = eigenbasis(F)
        s = e + damping

        def times(v: Tensor, c: Tensor, F: Operator = F, multiply: Any = multiply) -> Tensor:
            return F.space.flatten(multiply(F.space.unflatten(v), c))

        found.append(times(v, _gained(s, time)))
        v = times(v, (-time * s).exp() if isfinite(time) else torch.zeros_like(s))
    return found[::-1]


def _gained(s: Float[Tensor, " size"], time: float) -> Float[Tensor, " size"]:
    """`∫₀ᵗ e^(−us) du`."""
    if time == inf:
        if not (s > s.abs().max() * torch.finfo(s.dtype).eps * len(s)).all():
            raise ValueError(
                f"after infinite time the matrix must be positive definite, and its smallest damped eigenvalue is "
                f"{float(s.min()):.3g}; pass a larger damping, or a finite time"
            )
        return 1 / s
    small = (time * s).abs() < torch.finfo(s.dtype).eps
    return torch.where(small, time, -torch.expm1(-time * s) / torch.where(small, 1.0, s))
