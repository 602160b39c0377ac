"""The Gaussian likelihood for models that return both mean and variance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.values import described
from natgrad.losses.base import OutputCurvature, one_by_one


class Gaussian(OutputCurvature):
    """`nn.GaussianNLLLoss` of a model that returns `(mean, var)`. They are joined to `f = (μ, v)` along a last axis of
    two.

    The Fisher information is `D = diag(1/v, 1/(2v²))`. The Hessian, with `r = y − μ`, is indefinite at every target:

        D = [[1/v, r/v²], [r/v², r²/v³ − 1/(2v²)]] = c cᵀ − e eᵀ,    c = (1, r/v)/√v,    e = (0, 1)/(√2 v)

    `v` is the larger of the variance and the loss's `eps`. As in torch, this limit does not change gradients.
    """

    canonical = False

    def join(self, output: Any) -> Tensor:
        if not (isinstance(output, (tuple, list)) and [isinstance(t, Tensor) for t in output] == [True, True]):
            raise ValueError(
                f"GaussianNLLLoss: the model returned {described(output)}; expected two tensors (mean, var)"
            )
        mean, var = output
        spread = var.unsqueeze(-1) if var.shape == mean.shape[:-1] else var  # as torch reads it
        if spread.ndim != mean.ndim or any(a not in (b, 1) for a, b in zip(spread.shape, mean.shape, strict=True)):
            raise ValueError(
                f"GaussianNLLLoss: mean has shape {tuple(mean.shape)} and var {tuple(var.shape)}; expected the same "
                "shape, or 1 in place of an axis that shares one variance"
            )
        return torch.stack([mean, spread.expand_as(mean)], -1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        mean, var = output.unbind(-1)
        value: Tensor = self.module(mean, target, var)
        return value

    def _check(self, output: Tensor, target: Tensor) -> None:
        mean, var = output.unbind(-1)
        self._same_shape(mean, target)
        if (var < 0).any():
            raise ValueError(
                f"GaussianNLLLoss: var has the entry {float(var.min()):g}; expected variances >= 0. End that output of "
                "the model in softplus or exp"
            )

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_tensor(output.numel() // 2)

    def _variance(self, output: Tensor) -> Tensor:
        return output[..., 1].clamp_min(self.module.eps)

    def _roots(self, output: Tensor) -> Tensor:
        v = self._variance(output)
        return torch.stack([v.rsqrt(), 1 / (2**0.5 * v)], -1)

    def _hessian_factors(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """`c` and `e`."""
        v, root = self._variance(output), self._roots(output)
        ratio = (target - output[..., 0]) / v
        return root[..., :1] * torch.stack([torch.ones_like(v), ratio], -1), root * root.new_tensor([0.0, 1.0])

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        if self.is_fisher:
            return self._roots(output).square() * v
        c, e = self._hessian_factors(output, target)
        return c * (c * v).sum(-1, keepdim=True) - e.square() * v

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        if not self.is_fisher:
            raise self.indefinite()
        yield from one_by_one(self._roots(output))

    def signed_columns(self, output: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor]]:
        if self.is_fisher:
            yield from super().signed_columns(output, target)
            return
        for sign, factor in zip((1, -1), self._hessian_factors(output, target), strict=True):
            for s in one_by_one(factor, axes=1):
                yield sign, s

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        # At y = μ + √v n the gradient is (−n/√v, (1 − n²)/(2v)).
        shape, root = output.shape[:-1], self._roots(output)
        n = torch.randn(shape, dtype=output.dtype, device=output.device, generator=generator)
        return root * torch.stack([-n, (1 - n.square()) / 2**0.5], -1)
