"""How a `Trainer`'s batches are read: the model's own loss shows which label belongs to which logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature.problem import buffers_kept
from natgrad.losses import OutputCurvature
from natgrad.losses.elementwise import Elementwise
from natgrad.losses.own import Candidate, Compared, Own, candidates, named, plain, usual, what_else
from natgrad.losses.reading import IGNORED, NEXT, SAME, Given, Reading, loss_of, sources
from natgrad.losses.softmax import Softmax
from natgrad.optim.tracking.forward import RandomState
from natgrad.optim.tracking.own import kind_of_batch

Read = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""From what the model returned and the labels to the loss's input and target."""
BY_NAME = {"same": SAME, "next": NEXT}
"""The values of `read` that are names."""
LABELS = ("labels", "start_positions", "end_positions")
"""Arguments that models use only for their own loss."""
MEND = (
    "pass read='same' (each label at its own position), read='next' (at the position before) or a function "
    "read(returned, labels), to say that natgrad's loss is the one that is meant"
)


@dataclass(frozen=True)
class Meaning:
    """How batches of one kind are read.

    `left`: the readings that agreed with all batches so far. `with_labels`: whether the logits depend on the labels, as
    in encoder-decoders, whose decoder input is made from them. `tells_nothing`: all labels are ignored, so the loss
    shows nothing.
    """

    left: list[Reading]
    with_labels: bool
    tells_nothing: bool = False

    def arguments(self, inputs: Given) -> dict[str, Any]:
        """The arguments of the model."""
        return dict(inputs) if self.with_labels else _without_labels(inputs)

    @property
    def reading(self) -> Reading:
        """The reading that is used."""
        return self.left[0]

    def is_certain(self, inputs: Given) -> bool:
        """Whether all remaining readings read this batch in the same way."""
        first, *others = (reading.target(inputs, None) for reading in self.left)
        return all(first.shape == t.shape and torch.equal(first, t) for t in others)


class Meanings:
    """Compares the trained loss with the model's own, on the first batch of each kind.

    Args:
        curvature: the curvature of the trained loss.
        read: the user's choice of the reading; then no losses are compared.
        loss: `loss(returned, labels, num_items_in_batch=)`, to compare with in place of the model's own.
        sharded: whether parameters are sharded. A forward without a backward must then have no graph.
    """

    def __init__(
        self,
        curvature: OutputCurvature,
        read: Reading | None = None,
        loss: Callable[..., Tensor] | None = None,
        sharded: bool = False,
    ):
        self.curvature, self._read, self._loss, self._sharded = curvature, read, loss, sharded
        self._known: dict[Any, Meaning] = {}

    def of(self, model: nn.Module, inputs: Given) -> Meaning:
        """How a batch is read. The first batch of a kind takes two forward passes.

        Raises:
            ValueError: if the model's own loss is another one, or does not show how its labels are read.
        """
        key = (kind_of_batch(inputs), model.training)
        known = self._known.get(key)
        if known is None or not known.is_certain(inputs):
            found = self._found(model, inputs)
            if found.tells_nothing:
                return known or found
            left = found.left if known is None else [r for r in known.left if r.words in {f.words for f in found.left}]
            known = self._known[key] = Meaning(left or found.left, found.with_labels)
        return known

    @property
    def known(self) -> list[Meaning]:
        """How each kind of batch that has occurred is read."""
        return list(self._known.values())

    def mass(self, reading: Reading, inputs: Given) -> Tensor | None:
        """The divisor of the mean of a batch's loss, from the labels alone; None if it depends on the logits."""
        target = reading.target(inputs, None)
        if target.is_floating_point() and isinstance(self.curvature, (Elementwise, Softmax)):
            return self.curvature.normalizer(target, target)
        if isinstance(self.curvature, Softmax):
            candidate = Candidate(reading, self.curvature)
            return self.curvature.normalizer(torch.zeros((), device=target.device), candidate.ignoring(target))
        return None

    def _found(self, model: nn.Module, inputs: Given) -> Meaning:
        own, bare = self._forwards(model, inputs)
        returned = bare if own is None or (self._loss is not None and bare is not None) else own
        with_labels = bare is None or (own is not None and not _same_logits(own, bare))
        if self._read is not None:
            return Meaning([self._read], with_labels)
        loss = self._meant(own, bare, inputs)
        if not sources(returned):
            raise ValueError(
                f"the model returned {_described(returned)}, and nothing that is called logits; pass read=, a function "
                "of what the model returned and the labels that gives output and target"
            )
        if loss is None:
            return Meaning([self._only(returned, inputs)], with_labels)
        if not math.isfinite(float(loss)):
            shaped = [c.reading for c in candidates(returned, inputs, [self.curvature])]
            return Meaning(shaped[:1] or [SAME], with_labels, tells_nothing=True)
        return Meaning(
            self._fitting(model, Own(loss, returned, inputs, float(_items(inputs) or 0)), returned), with_labels
        )

    def _forwards(self, model: nn.Module, inputs: Given) -> tuple[Any, Any]:
        """What the model returns with the labels (None if it does not take them), and without them (None if it needs
        them)."""
        device = next(model.parameters()).device
        own, bare = None, None
        with buffers_kept(model), torch.set_grad_enabled(not self._sharded):
            if _takes_labels(model, inputs):
                try:
                    with RandomState(device).restored():
                        own = model(**inputs)
                except (TypeError, ValueError, RuntimeError, IndexError) as error:
                    raise ValueError(
                        f"the model does not compute its own loss of this batch ({type(error).__name__}: "
                        f"{str(error).splitlines()[0][:150]}); expected labels that fit it, or {MEND}"
                    ) from error
            try:
                with (
                    RandomState(device).restored(),
                    torch.set_grad_enabled(self._loss is not None and not self._sharded),
                ):
                    bare = model(**_without_labels(inputs))
            except Exception:
                if own is None:
                    raise
        return own, bare

    def _meant(self, own: Any, bare: Any, inputs: Given) -> Tensor | None:
        """The loss to compare with."""
        if self._loss is None:
            return loss_of(own)
        with torch.enable_grad():
            returned = own if bare is None else bare
            return self._loss(returned, inputs.get("labels"), num_items_in_batch=_items(inputs))

    def _only(self, returned: Any, inputs: Given) -> Reading:
        """The only possible reading, if there is no loss to compare with."""
        found = [c.reading for c in candidates(returned, inputs, [self.curvature])]
        if len(found) == 1 and Meaning(found, with_labels=False).is_certain(inputs):
            return found[0]
        name = type(self.curvature.module).__name__
        if not found:
            raise ValueError(
                f"labels of shape {tuple(inputs['labels'].shape)} and logits of shape "
                f"{tuple(next(iter(sources(returned).values())).shape)} are not what {name} takes; pass read=, a "
                "function of what the model returned and the labels that gives output and target"
            )
        raise ValueError(
            "the model returned no loss of its own, which would tell how its labels are read: "
            f"{' or '.join(r.words for r in found[:2])}; {MEND}"
        )

    def _fitting(self, model: nn.Module, own: Own, returned: Any) -> list[Reading]:
        """The readings with which the trained loss agrees with the loss to compare with."""
        compared = [own.compare(c, self._rules) for c in candidates(returned, own.given, plain(self.curvature))]
        fits = {c.candidate.reading.words: c.candidate.reading for c in compared if c.rule is not None}
        usable = [r for r in fits.values() if Candidate(r, self.curvature).fits_shapes(returned, own.given)]
        if not usable:
            raise ValueError(self._other(model, own, returned, compared))
        if own.slopes is None and len(usable) > 1 and not Meaning(usable, with_labels=False).is_certain(own.given):
            raise ValueError(
                f"the model's own loss is {own.value:.6g} on the first batch whichever way its labels are read, so "
                f"that it does not tell the way: {' or '.join(r.words for r in usable[:2])}; {MEND}"
            )
        return usable

    @property
    def _rules(self) -> tuple[str, ...]:
        return ("mean",) if self._loss is None else ("mean", "per item")

    def _other(self, model: nn.Module, own: Own, returned: Any, compared: list[Compared]) -> str:
        """The message that the two losses differ."""
        whose = "the model's own loss of these labels" if self._loss is None else "the loss of compute_loss_func"
        name = type(self.curvature.module).__name__
        trained = f"would train {named(compared)}" if compared else "has no form for these labels"
        others = [own.compare(c, self._rules) for c in candidates(returned, own.given, usual(model))]
        fits = next((c for c in others if c.rule is not None), None)
        text = f"{whose} is {own.value:.6g}, and the optimizer's {name} {trained}."
        if fits is not None:
            meant = fits.candidate
            return f"{text} It is {meant}: expected KFAC(model, nn.{type(meant.curvature.module).__name__}(...))"
        return f"{text}{what_else(returned, own.value, compared)} Expected one loss; {MEND}"


def _takes_labels(model: nn.Module, inputs: Given) -> bool:
    """Whether the model's forward takes the labels."""
    forward = inspect.signature(model.forward).parameters
    anything = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in forward.values())
    return anything or all(n in forward for n in LABELS if n in inputs)


def _without_labels(inputs: Given) -> dict[str, Any]:
    return {n: v for n, v in inputs.items() if n not in LABELS}


def _same_logits(one: Any, other: Any) -> bool:
    """Whether two results have the same logits, up to rounding."""
    a, b = sources(one), sources(other)
    if not a or a.keys() != b.keys() or any(a[n].shape != b[n].shape for n in a):
        return False
    tolerance = {n: max(1e-5, 8 * torch.finfo(t.dtype).eps) * float(t.detach().abs().max()) for n, t in a.items()}
    return all(float((a[n].detach() - b[n].detach()).abs().max()) <= tolerance[n] for n in a)


def _items(inputs: Given) -> Tensor | None:
    labels = inputs.get("labels")
    return labels.ne(IGNORED).sum() if isinstance(labels, Tensor) else None


def _described(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return ", ".join(map(str, returned))
    return f"a {type(returned).__name__}"
