"""Losses for labels ±1 and for several labels: logistic losses under other names."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.losses.elementwise import Elementwise


class SoftMargin(Elementwise):
    """`nn.SoftMarginLoss`: `log(1 + exp(−y f))` for `y = ±1`, the logistic loss: `D = diag(p (1 − p))`, `p = σ(f)`."""

    nonnegative = True

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if not bool(((target == 1) | (target == -1)).all()):
            raise ValueError(
                f"{type(self.module).__name__}: target has entries other than 1 and −1; expected these alone, "
                "2 * y - 1 for labels 0 and 1"
            )

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        p = output.sigmoid()
        return p * (1 - p)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        p = output.sigmoid()
        u = torch.rand(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        return p - (u < p).to(p.dtype)

    def stand_in(self, output: Tensor) -> Tensor:
        return torch.ones_like(output)


class MultiLabelSoftMargin(SoftMargin):
    """`nn.MultiLabelSoftMarginLoss`: the mean of the weighted logistic losses of all classes, which are on the last
    axis. `D = diag(w p (1 − p))`, divided by the number of classes."""

    def _check(self, output: Tensor, target: Tensor) -> None:
        self._same_shape(output, target)
        weight = self.module.weight
        if weight is not None and weight.shape != output.shape[-1:]:
            raise ValueError(
                f"MultiLabelSoftMarginLoss: weight has shape {tuple(weight.shape)} and output {tuple(output.shape)}; "
                "expected one weight for each class on the last axis"
            )

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_tensor(output.numel() // output.shape[-1])

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        weight = output.new_ones(()) if self.module.weight is None else self.module.weight.to(output)
        return weight / output.shape[-1]

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        return self.case_weight(output, target) * super().second_derivative(output, target)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.case_weight(output, target).sqrt() * super().sampled_column(output, target, generator)

    def stand_in(self, output: Tensor) -> Tensor:
        return torch.zeros_like(output)
