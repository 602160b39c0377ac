"""Ways to get a loss's input and target from what a model returned and the labels that it received."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
"""The label that is ignored, as in `nn.CrossEntropyLoss`."""
IGNORED_PIXEL = 255
"""The label of ignored pixels."""

Given = Mapping[str, Any]
"""A batch: the arguments of a forward pass by name, including labels."""


@dataclass(frozen=True)
class Reading:
    """One way to read a batch. `words` describe it.

    `output(returned, given)` makes the loss's input from what the model returned. `target(given, shape)` makes the
    target from the batch, for logits of this shape; for None, a target with the same number of labels that are not
    ignored.
    """

    words: str
    output: Callable[[Any, Given], Tensor]
    target: Callable[[Given, torch.Size | None], Tensor]

    def read(self, returned: Any, given: Given, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
        """The loss's input, at least in float32, and its target, for a loss that ignores the label `ignored`."""
        output = self.output(returned, given)
        output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
        shape = next(iter(sources(returned).values())).shape
        target = self.target(given, shape)
        if target.is_floating_point():
            return output, target.to(output)
        return output, ignoring(target.to(output.device), ignored)


def ignoring(target: Tensor, ignored: int) -> Tensor:
    """A target of class indices, with another number for ignored labels."""
    return target if ignored == IGNORED else torch.where(target == IGNORED, ignored, target)


def part(returned: Any, name: str) -> Any:
    """The entry or attribute of this name in a dictionary or an object; None if there is none."""
    return returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)


def logits_of(returned: Any) -> Tensor | None:
    """The logits in what a model returned: the part of this name; the tensor itself; or the first tensor of a tuple
    that is not a scalar, because a loss may come first."""
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, (tuple, list)) and not hasattr(returned, "logits"):
        return next((t for t in returned if isinstance(t, Tensor) and t.ndim > 0), None)
    found = part(returned, "logits")
    return found if isinstance(found, Tensor) else None


def loss_of(returned: Any) -> Tensor | None:
    """A model's own loss in what it returned: the part named loss, or the first scalar of a tuple."""
    if isinstance(returned, (tuple, list)) and not hasattr(returned, "loss"):
        found = returned[0] if returned and getattr(returned[0], "ndim", 1) == 0 else None
    else:
        found = None if isinstance(returned, Tensor) else part(returned, "loss")
    return found if isinstance(found, Tensor) and found.numel() == 1 and found.is_floating_point() else None


def sources(returned: Any) -> dict[str, Tensor]:
    """The tensors that the readings use, by name."""
    logits = logits_of(returned)
    if logits is not None:
        return {"logits": logits}
    ends = {name: part(returned, name) for name in ("start_logits", "end_logits")}
    return {n: t for n, t in ends.items() if isinstance(t, Tensor)} if not isinstance(returned, tuple) else {}


def readings(returned: Any, given: Given) -> Iterator[Reading]:
    """Every way to read a batch that the shapes allow, the most common first."""
    found = sources(returned)
    if "start_logits" in found and isinstance(given.get("start_positions"), Tensor):
        yield Reading("start and end positions together", _ends, _positions)
    labels, logits = given.get("labels"), found.get("logits")
    if not isinstance(labels, Tensor) or logits is None:
        return
    if not labels.is_floating_point() and logits.ndim > 1:
        yield from _classes(labels, logits, given)
    if labels.numel() == logits.numel():
        yield Reading("entry by entry", _like_labels, _as_floats)
    if labels.is_floating_point() and labels.shape == logits.shape and logits.ndim > 1:
        yield Reading("the labels as probabilities of classes", _classes_first, _probabilities)


def _classes(labels: Tensor, logits: Tensor, given: Given) -> Iterator[Reading]:
    """Readings for labels that are class indices."""
    shape = logits.shape
    shifted = given.get("shift_labels")
    if isinstance(shifted, Tensor) and shifted.shape == shape[:-1]:
        yield Reading("shift_labels as they are", _classes_first, lambda given, _: given["shift_labels"])
    if labels.shape == shape[:-1]:
        yield SAME
        if labels.ndim > 1:
            yield NEXT
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and mask.shape == labels.shape:
                yield Reading(f"{NEXT.words}, where attention_mask is not 0", _classes_first, _next_masked)
                yield Reading(f"{SAME.words}, where attention_mask is not 0", _classes_first, _masked)
    elif labels.numel() == shape[:-1].numel():
        yield Reading(SAME.words, _classes_first, lambda given, shape: _reshaped(given["labels"], shape))
    if labels.ndim == 2 and len(shape) == 3 and shape[0] == labels.shape[0] and shape[1] > labels.shape[1]:
        yield Reading(f"{NEXT.words}, of the last ones", _classes_first, _next_of_last)
        yield Reading(f"{NEXT.words}, of the last ones without the first", _classes_first, _next_within_last)
        yield Reading(f"{SAME.words}, of the last ones", _classes_first, _last)
    if labels.ndim > 1 and labels.shape == (shape[0], *shape[2:]):
        yield Reading("classes on axis 1", lambda returned, given: _logits(returned), lambda given, _: given["labels"])
    if len(shape) == 4 and labels.ndim == 3 and labels.shape[0] == shape[0]:
        yield Reading("logits interpolated to the labels' pixels", _interpolated, _pixels)


def _logits(returned: Any) -> Tensor:
    found = logits_of(returned)
    assert found is not None
    return found


def _classes_first(returned: Any, given: Given) -> Tensor:
    return _logits(returned).movedim(-1, 1)


def _labels(given: Given, shape: torch.Size | None) -> Tensor:
    labels: Tensor = given["labels"]
    return labels


def _next(given: Given, shape: torch.Size | None = None) -> Tensor:
    return _shifted(given["labels"])


def _shifted(labels: Tensor) -> Tensor:
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _masked(given: Given, shape: torch.Size | None) -> Tensor:
    labels, mask = given["labels"], given["attention_mask"]
    return torch.where(mask.to(labels.device) != 0, labels, IGNORED)


def _next_masked(given: Given, shape: torch.Size | None) -> Tensor:
    return _shifted(_masked(given, shape))


def _last(given: Given, shape: torch.Size | None) -> Tensor:
    """Labels of the last positions, if a prompt or an image of at least one position came before."""
    labels = given["labels"]
    before = 1 if shape is None else shape[1] - labels.shape[1]
    return nn.functional.pad(labels, (before, 0), value=IGNORED)


def _next_of_last(given: Given, shape: torch.Size | None) -> Tensor:
    return _shifted(_last(given, shape))


def _next_within_last(given: Given, shape: torch.Size | None) -> Tensor:
    labels = given["labels"].clone()
    labels[:, 0] = IGNORED
    return _next_of_last({"labels": labels}, shape)


def _reshaped(labels: Tensor, shape: torch.Size | None) -> Tensor:
    return labels.reshape(-1 if shape is None else shape[:-1])


def _probabilities(given: Given, shape: torch.Size | None) -> Tensor:
    return _labels(given, shape).movedim(-1, 1)


def _like_labels(returned: Any, given: Given) -> Tensor:
    return _logits(returned).reshape(given["labels"].shape)


def _as_floats(given: Given, shape: torch.Size | None) -> Tensor:
    labels = _labels(given, shape)
    return labels if labels.is_floating_point() else labels.to(torch.get_default_dtype())


def _interpolated(returned: Any, given: Given) -> Tensor:
    size = given["labels"].shape[-2:]
    return nn.functional.interpolate(_logits(returned), size=size, mode="bilinear", align_corners=False)


def _pixels(given: Given, shape: torch.Size | None) -> Tensor:
    labels = _labels(given, shape)
    return torch.where(labels == IGNORED_PIXEL, IGNORED, labels)


def _ends(returned: Any, given: Given) -> Tensor:
    return torch.stack([part(returned, "start_logits"), part(returned, "end_logits")], -1)


def _positions(given: Given, shape: torch.Size | None) -> Tensor:
    """The positions where the answers begin and end. Positions outside the model's input are ignored."""
    both = torch.stack([given[name].reshape(-1) for name in ("start_positions", "end_positions")], -1).clamp_min(0)
    ids = given.get("input_ids")
    length = shape[1] if shape is not None else ids.shape[1] if isinstance(ids, Tensor) else None
    return both if length is None else torch.where(both >= length, IGNORED, both)


SAME = Reading("each label at its own position", _classes_first, _labels)
NEXT = Reading("each label at the position before", _classes_first, _next)
