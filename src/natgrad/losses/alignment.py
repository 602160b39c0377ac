"""The loss of label sequences without an alignment: connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.values import described
from natgrad.losses.base import OutputCurvature, one_by_one
from natgrad.losses.logarithms import check_logarithms, signed_labels


class Alignment(OutputCurvature):
    """`nn.CTCLoss` of log-probabilities `f = log q`, `(examples, frames, classes)`. The target is a tuple `(labels,
    input_lengths, target_lengths)`, as torch's loss takes them.

    The loss is `−log Σ_a Π_t q_t(a_t)` over the alignments `a` of the labels. The Fisher information here is that of
    the alignments themselves, as if they were observed: one categorical distribution for each frame,

        D = w diag(q),    w = 1 / length of the labels (`reduction="mean"`) or 1,

    and zero for frames after the example's last. Through `log_softmax` it becomes `w (diag q − q qᵀ)`. It is at least
    the Fisher information of the label sequences, which has no closed form: labels say less than their alignment.

    Reference: Graves, Fernández, Gomez & Schmidhuber (2006), "Connectionist Temporal Classification".
    """

    canonical = False
    nonnegative = True
    differentiable_twice = False

    def __init__(self, module: nn.Module, kind: str = "fisher"):
        super().__init__(module, kind)
        if kind != "fisher":
            self.check_hessian()

    def check(self, output: Tensor, target: Any) -> None:
        if not (isinstance(target, (tuple, list)) and len(target) == 3 and isinstance(target[0], Tensor)):
            raise TypeError(
                f"CTCLoss: target is {described(target)}; expected a tuple (labels, input_lengths, target_lengths), as "
                "torch's loss takes them"
            )
        self._check(output, target)

    def _check(self, output: Tensor, target: Any) -> None:
        if output.ndim != 3:
            raise ValueError(
                f"CTCLoss: output has shape {tuple(output.shape)}; expected (examples, frames, classes), with the "
                "examples first: log_probs.transpose(0, 1) of torch's order"
            )
        for name, lengths in zip(("input_lengths", "target_lengths"), target[1:], strict=True):
            its = torch.as_tensor(lengths)
            if its.shape != output.shape[:1]:
                raise ValueError(
                    f"CTCLoss: output has shape {tuple(output.shape)} and {name} {tuple(its.shape)}; expected one "
                    f"length for each example, {tuple(output.shape[:1])}. The output has the examples first: "
                    "log_probs.transpose(0, 1) of torch's order"
                )
        check_logarithms("CTCLoss", output, "log_softmax(-1) of the logits")

    def loss(self, output: Tensor, target: Any) -> Tensor:
        value: Tensor = self.module(output.transpose(0, 1), *target)
        return value

    def normalizer(self, output: Tensor, target: Any) -> Tensor:
        return output.new_tensor(float(len(output)))

    def case_weight(self, output: Tensor, target: Any) -> Tensor:
        labels, frames, lengths = target
        device = output.device
        there = torch.arange(output.shape[1], device=device) < torch.as_tensor(frames, device=device).unsqueeze(1)
        sizes = torch.as_tensor(lengths, device=device).clamp_min(1)
        w = 1 / sizes.to(output.dtype) if self.is_mean else output.new_ones(len(output))
        if self.module.zero_infinity:  # examples with fewer frames than their labels need have no gradient
            log_q = output.detach().transpose(0, 1)
            each = nn.functional.ctc_loss(log_q, labels, frames, lengths, self.module.blank, "none")
            w = torch.where(each.isfinite(), w, 0.0)
        return (w.unsqueeze(1) * there).unsqueeze(2)

    def product(self, output: Tensor, target: Any, v: Tensor) -> Tensor:
        return self.case_weight(output, target) * output.exp() * v

    def exact_columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        yield from one_by_one((self.case_weight(output, target) * output.exp()).sqrt())

    def sampled_column(self, output: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        return signed_labels(output, -1, generator) * self.case_weight(output, target).sqrt()
