"""The multi-class hinge loss: by how much other classes come closer to the target's than a margin."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from natgrad.losses.base import OutputCurvature


class MultiMargin(OutputCurvature):
    """`nn.MultiMarginLoss`: `w_y ℓ_y / C` with `ℓ_y = Σ_{j≠y} max(0, margin − f_y + f_j)^p`, for `p` 1 or 2.

    Its distribution over the classes is `π_y ∝ exp(−ℓ_y)`. With `g_y` the gradient of `ℓ_y` in the output, the Fisher
    information of `π` is the covariance of `g_y`,

        D = (w_y / C) Σ_k π_k (g_k − ḡ)(g_k − ḡ)ᵀ,    ḡ = Σ_k π_k g_k.

    The case weight is `w_y / C`. `kind="gauss_newton"` is the Hessian. For `p = 2` it is
    `(w_y / C) 2 Σ_j (e_j − e_y)(e_j − e_y)ᵀ` over the classes `j` within the margin, for `p = 1` it is zero. Both kinds
    take the memory of `(examples, C, C)` numbers.

    Reference: Crammer & Singer (2001), "On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines".
    """

    canonical = False
    nonnegative = True

    def _check(self, output: Tensor, target: Tensor) -> None:
        if output.ndim != 2:
            raise ValueError(
                f"MultiMarginLoss: output has shape {tuple(output.shape)}; expected (examples, classes): flatten "
                "positions into axis 0, in the target too"
            )
        examples, C = output.shape
        weight = self.module.weight
        if weight is not None and weight.shape != (C,):
            raise ValueError(
                f"MultiMarginLoss: weight has shape {tuple(weight.shape)} and output {tuple(output.shape)}; expected "
                f"one weight for each of the {C} classes on axis 1"
            )
        if target.dtype != torch.int64:
            raise self._wrong_dtype(target, "class indices of dtype torch.int64 (target.long())")
        if target.shape != (examples,):
            raise ValueError(
                f"MultiMarginLoss: output has shape {tuple(output.shape)} and target {tuple(target.shape)}; expected "
                f"class indices of shape {(examples,)}"
            )
        outside = target[(target < 0) | (target >= C)]
        if len(outside):
            raise ValueError(
                f"MultiMarginLoss: target has the class index {int(outside[0])}; expected 0 to {C - 1}, as the output "
                f"has {C} classes"
            )

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_tensor(len(output))

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        C, weight = output.shape[1], self.module.weight
        w = output.new_ones(C) if weight is None else weight.to(output)
        return w[target].unsqueeze(1) / C

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss by functions that torch differentiates twice, which its own is not."""
        z = self.module.margin - output.gather(1, target.unsqueeze(1)) + output
        others = torch.ones_like(output).scatter_(1, target.unsqueeze(1), 0.0)
        values = self.case_weight(output, target) * others * z.relu() ** self.module.p
        return values.sum() / (len(output) if self.is_mean else 1)

    def _slack(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """`max(0, margin − f_y + f_j)^p` for labels `y` on axis 1 and classes `j` on axis 2, and its slope in `f_j`."""
        z = (self.module.margin - output.unsqueeze(2) + output.unsqueeze(1)).relu()
        z = z * (1 - torch.eye(output.shape[1], dtype=z.dtype, device=z.device))
        return (z, (z > 0).to(z.dtype)) if self.module.p == 1 else (z.square(), 2 * z)

    def _scores(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """`log π`, and `g_y − ḡ` for every label `y` on axis 1."""
        values, slopes = self._slack(output)
        log_pi = (-values.sum(2)).log_softmax(1)
        g = slopes - torch.diag_embed(slopes.sum(2))
        return log_pi, g - (log_pi.exp().unsqueeze(2) * g).sum(1, keepdim=True)

    def _factor(self, output: Tensor, target: Tensor) -> Tensor:
        """Columns `s_k` with `Σ_k s_k s_kᵀ = D`: `k` on axis 1."""
        root = self.case_weight(output, target).sqrt().unsqueeze(2)
        if self.kind == "fisher":
            log_pi, scores = self._scores(output)
            return root * (log_pi / 2).exp().unsqueeze(2) * scores
        if self.module.p == 1:
            return torch.zeros_like(output).unsqueeze(1)
        within = self.module.margin - output.gather(1, target.unsqueeze(1)) + output > 0
        unit = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        return root * 2**0.5 * within.unsqueeze(2) * (unit - unit[target].unsqueeze(1))

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        S = self._factor(output, target)
        return torch.einsum("nkc,nk->nc", S, torch.einsum("nkc,nc->nk", S, v))

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield from self._factor(output, target).unbind(1)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        log_pi, scores = self._scores(output)
        label = torch.multinomial(log_pi.exp(), 1, generator=generator)[:, 0]
        drawn = scores[torch.arange(len(output), device=output.device), label]
        return drawn * self.case_weight(output, target).sqrt()

    def stand_in(self, output: Tensor) -> Tensor:
        if self.module.weight is not None:
            raise self._needs_target("weighted by them")
        return torch.zeros(len(output), dtype=torch.int64, device=output.device)
