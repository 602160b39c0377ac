"""Checks that the loss being trained agrees with the loss that the model computed itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.warning import warn
from natgrad.losses.own import Own, candidates, plain
from natgrad.optim.tracking.batch import Term
from natgrad.optim.tracking.forward import Forward
from natgrad.optim.tracking.own import arguments, kind_of_batch


class Meant:
    """Compares `opt.loss` with the loss that the model computed from its labels, on the first batch of each kind. Such
    a model may shift the labels: it may compare each label with the logits of the position before."""

    def __init__(self, optimizer: str):
        self._optimizer = optimizer
        self._seen: set[Any] = set()

    def check(self, model: nn.Module, forward: Forward, output: Tensor, target: Any, term: Term) -> None:
        """Raises ValueError if the two losses read the labels differently. Warns if they differ in another way."""
        assert forward.returned is not None
        loss = forward.returned.loss
        if loss is None or not loss.requires_grad:
            return
        logits, given = forward.returned.logits, arguments(model, forward.args, forward.kwargs)
        key = kind_of_batch(given)
        if "labels" not in given or key in self._seen:
            return
        if not torch.is_grad_enabled() or not math.isfinite(float(loss.detach())):
            return
        term.curvature.check(output, target)
        returned = {"logits": output.movedim(1, -1) if logits is None and output.ndim > 1 else logits}
        if returned["logits"] is None:
            return
        own = Own(loss, returned, given)
        values = []
        for curvature in plain(term.curvature):
            value = curvature.loss(output, target)
            values.append(value if curvature.is_mean else value / curvature.normalizer(output.detach(), target))
            if own.agrees(values[-1]):
                self._seen.add(key)
                return
        compared = (own.compare(c) for c in candidates(returned, given, plain(term.curvature)))
        other = next((c for c in compared if c.rule is not None), None)
        text = (
            f"opt.loss(output, target) is {float(values[0].detach()):.6g}, but the loss that the model computed from "
            f"its labels is {own.value:.6g}"
        )
        if other is not None:
            raise ValueError(
                f"{text} ({other.candidate}): the two read the labels differently. Pass the target that the model "
                f'uses, or {self._optimizer}(model, "model") with loss = model(**batch).loss, which trains the '
                "model's own loss; if you want opt.loss's, leave the labels out of the forward"
            )
        self._seen.add(key)
        warn(
            f"{text}. These are different losses; opt.loss's is the one that is trained. If you want it, leave the "
            f'labels out of the forward; to train the model\'s own, use {self._optimizer}(model, "model") with loss = '
            "model(**batch).loss"
        )
