"""A model that computes its own loss: finds which loss it is, and on which output and target."""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.losses.own import RULES, Candidate, Own, candidates, named, usual, what_else
from natgrad.losses.reading import Given, loss_of, part, sources
from natgrad.optim.tracking.batch import Term
from natgrad.optim.tracking.returned import Way

OWN_LOSS = "model"
"""Given instead of a loss module: the loss that the model computes itself."""


@dataclass(frozen=True)
class Found:
    """A model's own loss on a batch: `factor` times the mean `value` of the term's loss on `output` and `target`."""

    scalar: Tensor
    term: Term
    output: Tensor
    way: Way
    target: Tensor
    value: Tensor
    factor: float


@dataclass(frozen=True)
class Match:
    """A loss that has agreed with the model's own on all batches so far."""

    candidate: Candidate
    rule: str
    term: Term


@dataclass(frozen=True)
class Measured:
    """The mean of a loss on a batch, and its divisor."""

    match: Match
    mean: Tensor
    mass: Tensor


class OwnLoss:
    """Finds the loss that a model computes from its arguments.

    The first batch of each kind is compared with every candidate loss, by value and by gradient. Later batches are
    compared by value.
    """

    def __init__(self, model: nn.Module, optimizer: str):
        self._model, self._optimizer = weakref.ref(model), optimizer
        self._matches: dict[Any, list[Match]] = {}

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Found | None:
        """The loss among what a forward returned; None if there is none.

        Raises:
            ValueError: if its curvature is not known, or if it is another loss than on the batch before.
        """
        loss, model = loss_of(returned), self._model()
        if loss is None or not loss.requires_grad or model is None:
            return None
        given = arguments(model, args, kwargs)
        if not sources(returned):
            raise ValueError(
                f"the model returned a loss but no logits (it returned {', '.join(_names(returned))}), so its "
                "curvature is not known. Let the model return logits, without a fused loss, or pass the loss itself: "
                f"{self._optimizer}(model, nn.CrossEntropyLoss(), output=...)"
            )
        own = Own(loss, returned, given, _count(given))
        key = kind_of_batch(given)
        if not math.isfinite(own.value) and key not in self._matches:
            raise ValueError(
                f"the model's own loss is {own.value} on its first batch, so it is impossible to tell which loss it "
                "is; check for labels that are all ignored, and for NaN or inf in the batch and in the parameters"
            )
        if key in self._matches and not math.isfinite(own.value):
            return self._found(self._measure(self._matches[key][0], own, returned), own, loss, returned)
        measured = [self._measure(m, own, returned) for m in self._matches.get(key, [])]
        if measured and all(float(m.mass) == 0 for m in measured):
            return None  # all labels are ignored, and the loss, which is this rank's share of a sum, is zero
        still = [m for m in measured if own.is_near(own.factor(m.match.rule, m.mass) * float(m.mean))]
        if not still:
            still = [self._measure(m, own, returned) for m in self._all(own, returned)]
        self._matches[key] = [m.match for m in still]
        return self._found(still[0], own, loss, returned)

    def _all(self, own: Own, returned: Any) -> list[Match]:
        """Every candidate loss that agrees with the model's own on this batch."""
        model = self._model()
        assert model is not None
        compared = [own.compare(c, RULES) for c in candidates(returned, own.given, usual(model))]
        fits = [Match(c.candidate, c.rule, Term("", c.candidate.curvature)) for c in compared if c.rule is not None]
        if fits:
            return fits
        known = f" It is not {named(compared)}." if compared else ""
        raise ValueError(
            f"the model's own loss is {own.value:.6g}, which is not a loss that natgrad recognizes.{known}"
            f"{what_else(returned, own.value, compared)} Pass the loss instead, and call it: "
            f"{self._optimizer}(model, nn.CrossEntropyLoss()), opt.loss(output, target)"
        )

    def _measure(self, match: Match, own: Own, returned: Any) -> Measured:
        with torch.no_grad():
            return Measured(match, *match.candidate.mean(returned, own.given))

    def _found(self, measured: Measured, own: Own, loss: Tensor, returned: Any) -> Found:
        match, mean, mass = measured.match, measured.mean, measured.mass
        output, target = match.candidate.read(returned, own.given)
        reading, given, is_mean = match.candidate.reading, own.given, match.term.curvature.is_mean
        factor = own.factor(match.rule, mass) / (1.0 if is_mean else float(mass))
        value = mean if is_mean else mean * mass
        return Found(loss, match.term, output, lambda again: reading.output(again, given), target, value, factor)


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The arguments of a forward by name, without those that are None."""
    given = dict(kwargs)
    if args:
        with contextlib.suppress(TypeError):  # of wrappers that take anything
            given |= inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {}) if isinstance(given.get("kwargs"), dict) else {}
    return {n: v for n, v in given.items() if v is not None}


def kind_of_batch(given: Given) -> tuple[tuple[str, Any, int], ...]:
    """What batches of one kind share: names, dtypes, numbers of axes."""
    tensors = ((n, v) for n, v in given.items() if isinstance(v, Tensor))
    return tuple(sorted(((n, str(v.dtype), v.ndim) for n, v in tensors)))


def _count(given: Given) -> float | None:
    count = given.get("num_items_in_batch")
    return None if count is None else float(count)


def _names(returned: Any) -> list[str]:
    if isinstance(returned, (tuple, list)):
        return [f"a tuple of {len(returned)}"]
    return [n for n in getattr(returned, "keys", lambda: vars(returned))() if part(returned, n) is not None]
