"""Losses of log-probabilities and of probabilities, the outputs of `log_softmax` and `sigmoid`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from natgrad.losses.base import one_by_one
from natgrad.losses.elementwise import Elementwise
from natgrad.losses.softmax import Softmax


class LogProbabilities(Softmax):
    """`nn.NLLLoss`: log-probabilities `f = log q` on axis 1. The loss is linear in them, and its Fisher information is

        D = w diag(q).

    Propagated back through `log_softmax`, whose Jacobian is `I − 1 qᵀ`, it becomes `w (diag q − q qᵀ)`. This is `D` of
    `nn.CrossEntropyLoss` on the logits, for Fisher and for Gauss-Newton.
    """

    nonnegative = False

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        return self.case_weight(output, target) * output.exp() * v

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield from one_by_one((self.case_weight(output, target) * output.exp()).sqrt())

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        return signed_labels(output, 1, generator) * self.case_weight(output, target).sqrt()

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if target.is_floating_point():
            raise self._wrong_dtype(target, "class indices of dtype torch.int64")
        check_logarithms(type(self.module).__name__, output, "nn.CrossEntropyLoss")


class Divergence(Elementwise):
    """`nn.KLDivLoss`: `Σ t (log t − f)` for log-probabilities `f = log q` and a distribution `t` on the classes' axis.

    `D = diag(q)`, times the mass of the targets. For distributions over classes it equals that of `nn.NLLLoss`.
    """

    reductions = ("mean", "batchmean", "sum")

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if not target.is_floating_point():
            raise self._wrong_dtype(target, "probabilities of the output's dtype")
        check_logarithms("KLDivLoss", output, "nn.CrossEntropyLoss, which takes probabilities as targets")

    @property
    def is_mean(self) -> bool:
        return self.module.reduction in ("mean", "batchmean")

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_tensor(len(output) if self.module.reduction == "batchmean" else output.numel())

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        return output.exp()

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator, device=output.device).to(output.dtype)
        return (2 * signs - 1) * (0.5 * output).exp()

    def stand_in(self, output: Tensor) -> Tensor:
        return output.exp().log() if self.module.log_target else output.exp()


class Probabilities(Elementwise):
    """`nn.BCELoss` on probabilities `p`: `D = diag(w / (p (1 − p)))`. Propagated back through `sigmoid` it becomes `w p
    (1 − p)`, as for `nn.BCEWithLogitsLoss`, for Fisher and for Gauss-Newton."""

    nonnegative = True

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if not target.is_floating_point():
            raise self._wrong_dtype(target, "a floating one: target.to(output.dtype)")
        if not bool(((output >= 0) & (output <= 1)).all()):
            raise ValueError(
                "BCELoss: output has entries outside of [0, 1]; expected probabilities, or nn.BCEWithLogitsLoss for "
                "logits"
            )

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        weight = self.module.weight
        return output.new_ones(()) if weight is None else weight.to(output)

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        eps = torch.finfo(output.dtype).eps
        p = output.clamp(eps, 1 - eps)  # at exactly 0 and 1 the gradient of sigmoid is zero
        return (self.case_weight(output, target) / (p * (1 - p))).expand_as(output)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator, device=output.device).to(output.dtype)
        return (2 * signs - 1) * self.second_derivative(output, target).sqrt()


def signed_labels(f: Tensor, axis: int, generator: torch.Generator | None) -> Tensor:
    """`±1` at a class drawn from log-probabilities, and zero elsewhere. The score of a label, −1 at its index, has a
    nonzero mean. Random signs keep positions and examples separate."""
    u = torch.rand(f.shape, dtype=f.dtype, device=f.device, generator=generator)
    noise = -(-u.clamp_min(torch.finfo(f.dtype).tiny).log()).log()
    label = (f + noise).argmax(axis, keepdim=True)
    signs = 2 * torch.randint(2, label.shape, generator=generator, device=f.device).to(f.dtype) - 1
    return torch.zeros_like(f).scatter_(axis, label, signs)


def check_logarithms(name: str, output: Tensor, otherwise: str) -> None:
    """Raises ValueError if the output cannot be logarithms of probabilities."""
    if bool((output > 1e-3).any()):
        raise ValueError(
            f"{name}: output has entries above zero; expected log-probabilities, as by log_softmax, or {otherwise}"
        )
