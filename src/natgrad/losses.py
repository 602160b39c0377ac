"""The output-space curvature `D` of torch's losses: its products, its factors `S Sᵀ = D`, its samples.

Everything here is per batch and belongs to the *sum* over cases; `normalizer` is what the loss's mean divides by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ESTIMATORS = ("exact", "mc", "empirical")


class OutputCurvature(ABC):
    """`D(f, y)` of one loss module, on outputs of the module's own shapes. Axis 0 of the output is the example."""

    def __init__(self, module: nn.Module):
        self.module: Any = module
        if module.reduction not in ("mean", "sum"):
            raise ValueError(
                f"{type(module).__name__} has reduction={module.reduction!r}; the matrix of an objective needs "
                "'mean' or 'sum'"
            )

    @property
    def is_mean(self) -> bool:
        return bool(self.module.reduction == "mean")

    @abstractmethod
    def check(self, output: Tensor, target: Tensor) -> None:
        """Raises ValueError if the two do not fit this loss: their shapes, the target's dtype and classes."""

    @abstractmethod
    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        """What `reduction="mean"` divides the sum by: a scalar."""

    @abstractmethod
    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        """`D v`, in the shape of the output."""

    @abstractmethod
    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Columns `s_k` in the shape of the output, with `Σ_k s_k s_kᵀ = D` for every example."""

    @abstractmethod
    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        """One random column `s` with `E[s sᵀ] = D`: the loss's gradient at a label drawn from the model."""

    @abstractmethod
    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        """The weight of each case, broadcastable to the output."""

    def columns(
        self,
        output: Tensor,
        target: Tensor,
        estimator: str = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The columns `S` of the chosen estimator.

        Monte Carlo columns carry `1/√samples`, so that any number of them has the same expectation `D`.
        The empirical column is the loss's own gradient, its case weight counted once.
        """
        output = output.detach()
        if estimator == "exact":
            yield from self.exact_columns(output, target)
        elif estimator == "mc":
            for _ in range(samples):
                yield self.sampled_column(output, target, generator) / samples**0.5
        elif estimator == "empirical":
            with torch.enable_grad():
                f = output.requires_grad_()
                total = self.module(f, target) * (self.normalizer(output, target) if self.is_mean else 1)
                (gradient,) = torch.autograd.grad(total, f)
            weight = self.case_weight(output.detach(), target).expand_as(output)
            yield torch.where(weight > 0, gradient / weight.sqrt(), 0.0)
        else:
            raise ValueError(f"estimator={estimator!r} is unknown: expected one of {ESTIMATORS}")

    def _same_shape(self, output: Tensor, target: Tensor) -> None:
        if output.shape != target.shape:
            raise ValueError(
                f"{type(self.module).__name__}: output has shape {tuple(output.shape)} and target "
                f"{tuple(target.shape)}; expected the same shape (reshape the target; nothing is broadcast)"
            )
        if output.ndim == 0:
            raise ValueError(f"{type(self.module).__name__}: expected outputs with an example axis, got a scalar")

    def _wrong_dtype(self, target: Tensor, expected: str) -> ValueError:
        return ValueError(f"{type(self.module).__name__}: target has dtype {target.dtype}; expected {expected}")


class _Elementwise(OutputCurvature):
    """A loss that sums over the output's entries: `D = diag(d)`."""

    def check(self, output: Tensor, target: Tensor) -> None:
        self._same_shape(output, target)

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_tensor(output.numel())

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        return self.second_derivative(output, target) * v

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        root = self.second_derivative(output, target).sqrt().flatten(1) if output.ndim > 1 else None
        if root is None:
            yield self.second_derivative(output, target).sqrt()
            return
        for j in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, j] = root[:, j]
            yield column.view_as(output)

    @abstractmethod
    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        """`d`, in the shape of the output."""


class SquaredError(_Elementwise):
    """`nn.MSELoss`, the negative log-likelihood of a Gaussian with variance 1/2: `D = 2 I`."""

    def check(self, output: Tensor, target: Tensor) -> None:
        super().check(output, target)
        if target.is_complex():
            raise self._wrong_dtype(target, "a real one, such as target.real")

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.full_like(output, 2.0)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        return noise * 2**0.5

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_ones(())


class Bernoulli(_Elementwise):
    """`nn.BCEWithLogitsLoss`: `D = diag(w (1 + (pos_weight − 1) y) p (1 − p))`, `p = σ(f)`.

    For labels in {0, 1} this is the loss's Hessian; `weight` and `pos_weight` enter as case weights.
    """

    def check(self, output: Tensor, target: Tensor) -> None:
        super().check(output, target)
        if not target.is_floating_point():
            raise self._wrong_dtype(target, "a floating one: target.to(output.dtype)")

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        p = output.sigmoid()
        return (self.case_weight(output, target) * (p * (1 - p))).expand_as(output)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        p = output.sigmoid()
        u = torch.rand(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        return (p - (u < p).to(p.dtype)) * self.case_weight(output, target).sqrt()

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        weight = output.new_ones(()) if self.module.weight is None else self.module.weight.to(output)
        if self.module.pos_weight is not None:
            weight = weight * (1 + (self.module.pos_weight.to(output) - 1) * target)
        return weight


class Softmax(OutputCurvature):
    """`nn.CrossEntropyLoss`: `D = w (diag p − p pᵀ)`, `p = softmax(f)`, classes on axis 1.

    The case weight is `w = Σ_c t_c weight_c` for the (smoothed) target distribution `t`, and zero where the
    target is `ignore_index`. Label smoothing alone leaves `D` as it is.
    """

    def check(self, output: Tensor, target: Tensor) -> None:
        name = type(self.module).__name__
        if output.ndim < 2:
            raise ValueError(f"{name}: output has shape {tuple(output.shape)}; expected (examples, classes, ...)")
        C, weight = output.shape[1], self.module.weight
        if weight is not None and weight.shape != (C,):
            raise ValueError(
                f"{name}: weight has shape {tuple(weight.shape)} and output {tuple(output.shape)}; expected one "
                f"weight for each of the {C} classes on axis 1"
            )
        if target.is_floating_point():
            self._same_shape(output, target)
            return
        # torch takes bytes too, but not at positions.
        if target.dtype not in (torch.int64, torch.uint8) or (target.dtype == torch.uint8 and output.ndim > 2):
            raise self._wrong_dtype(target, "class indices of dtype torch.int64 (target.long()), or probabilities")
        if target.shape != (output.shape[0], *output.shape[2:]):
            raise ValueError(
                f"{name}: output has shape {tuple(output.shape)} and target {tuple(target.shape)}; expected "
                f"class indices of shape {(output.shape[0], *output.shape[2:])}, or probabilities of the output's shape"
            )
        _, index = self._classes(target)
        outside = index[(index < 0) | (index >= C)]
        if len(outside):
            raise ValueError(
                f"{name}: target has the class index {int(outside[0])}; expected 0 to {C - 1}, as the output "
                f"has {C} classes, or ignore_index={self.module.ignore_index}"
            )

    def _classes(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are not ignored, and the class of each: 0 for those that are."""
        target = target.long()  # bytes would index as a mask
        kept = target != self.module.ignore_index
        return kept, torch.where(kept, target, 0)

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return output.new_tensor(output.numel() // output.shape[1])
        kept, index = self._classes(target)
        if self.module.weight is None:
            return kept.sum().to(output.dtype)
        return (self.module.weight.to(output)[index] * kept).sum()

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        p = output.softmax(1)
        pv = p * v
        return self.case_weight(output, target) * (pv - p * pv.sum(1, keepdim=True))

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        p = output.softmax(1)
        by_position = (*output.shape[:2], -1)
        scale = (self.case_weight(output, target) * p).sqrt().reshape(by_position)
        p = p.reshape(by_position)
        for position in range(p.shape[2]):
            for c in range(p.shape[1]):
                column = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
                flat = column.view(by_position)
                flat[:, :, position] = -p[:, :, position]
                flat[:, c, position] += 1
                flat[:, :, position] *= scale[:, c, position].unsqueeze(1)
                yield column

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        p = output.softmax(1)
        # The largest of log p + Gumbel noise is a draw from p.
        u = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        noise = -(-u.clamp_min(torch.finfo(p.dtype).tiny).log()).log()
        label = (output.log_softmax(1) + noise).argmax(1, keepdim=True)
        return (p - torch.zeros_like(p).scatter_(1, label, 1.0)) * self.case_weight(output, target).sqrt()

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        C = output.shape[1]
        weight = output.new_ones(C) if self.module.weight is None else self.module.weight.to(output)
        smoothing = self.module.label_smoothing
        if target.is_floating_point():
            t = target * (1 - smoothing) + smoothing / C
            return (t * weight.view(-1, *[1] * (output.ndim - 2))).sum(1, keepdim=True)
        kept, index = self._classes(target)
        return (((1 - smoothing) * weight[index] + smoothing * weight.mean()) * kept).unsqueeze(1)


_KNOWN: dict[type[nn.Module], type[OutputCurvature]] = {
    nn.CrossEntropyLoss: Softmax,
    nn.MSELoss: SquaredError,
    nn.BCEWithLogitsLoss: Bernoulli,
}


def output_curvature(loss: nn.Module) -> OutputCurvature:
    """The output-space curvature of a loss module.

    Raises:
        TypeError: if the loss is not an instance of a supported class, or has a forward of its own.
    """
    for known, curvature in _KNOWN.items():
        if isinstance(loss, known) and type(loss).forward is known.forward:
            return curvature(loss)
    came = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
    if isinstance(loss, tuple(_KNOWN)):
        came += ", which computes another loss in a forward of its own"
    names = ", ".join(f"nn.{k.__name__}()" for k in _KNOWN)
    raise TypeError(f"loss is {came}; expected an instance of one of {names}")
