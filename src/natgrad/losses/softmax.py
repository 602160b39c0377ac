"""The softmax over classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from natgrad.losses.base import OutputCurvature


class Softmax(OutputCurvature):
    """`nn.CrossEntropyLoss`: `D = w (diag p − p pᵀ)`, `p = softmax(f)`, classes on axis 1.

    The case weight is `w = Σ_c t_c weight_c` for the (smoothed) target distribution `t`, and zero where the
    target is `ignore_index`. Label smoothing alone does not change `D`.
    """

    nonnegative = True

    def _check(self, output: Tensor, target: Tensor) -> None:
        name = type(self.module).__name__
        if output.ndim < 2:
            raise ValueError(
                f"{name}: output has shape {tuple(output.shape)}; expected (examples, classes, ...), as the model "
                "returns logits and not classes"
            )
        C, weight = output.shape[1], self.module.weight
        if weight is not None and weight.shape != (C,):
            raise ValueError(
                f"{name}: weight has shape {tuple(weight.shape)} and output {tuple(output.shape)}; expected one "
                f"weight for each of the {C} classes on axis 1"
            )
        if target.is_floating_point():
            if target.shape == (output.shape[0], *output.shape[2:]):
                raise self._wrong_dtype(target, "class indices of dtype torch.int64 (target.long()) for this shape")
            self._same_shape(output, target)
            return
        # torch also accepts bytes, but not for positions.
        if target.dtype not in (torch.int64, torch.uint8) or (target.dtype == torch.uint8 and output.ndim > 2):
            raise self._wrong_dtype(target, "class indices of dtype torch.int64 (target.long()), or probabilities")
        if target.shape != (output.shape[0], *output.shape[2:]):
            last = output.ndim > 2 and target.shape == output.shape[:-1]
            raise ValueError(
                f"{name}: output has shape {tuple(output.shape)} and target {tuple(target.shape)}; expected "
                f"class indices of shape {(output.shape[0], *output.shape[2:])}, or probabilities of the output's shape"
                + ("; classes are on axis 1, as torch has them: give output.movedim(-1, 1)" if last else "")
            )
        _, index = self._classes(target)
        outside = index[(index < 0) | (index >= C)]
        if len(outside):
            raise ValueError(
                f"{name}: target has the class index {int(outside[0])}; expected 0 to {C - 1}, as the output "
                f"has {C} classes, or ignore_index={self.module.ignore_index}"
            )

    def _classes(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are not ignored, and the class of each target: 0 for ignored targets."""
        target = target.long()  # bytes would index like a mask
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
        """The `C − 1` columns of the Cholesky factor of `D`, for each position (Tanabe & Sagae 1992).

        With the tails `q_j = Σ_{i>j} p_i`, column `j` has `√(p_j q_j / q_{j−1})` at `j` and `−p_i/q_j` times that
        at every `i > j`. The tails are summed directly, because `1 − Σ_{i≤j} p_i` would cancel for small tails.
        """
        examples, C = output.shape[:2]
        p = output.softmax(1).reshape(examples, C, -1)
        q = torch.cat([p.flip(1).cumsum(1).flip(1)[:, 1:], torch.zeros_like(p[:, :1])], 1)
        weight = self.case_weight(output, target).reshape(examples, 1, -1)
        before = p + q
        # If a tail underflows to zero, so do its probabilities, and the column is zero.
        pivot = (weight * p).sqrt() * torch.where(before > 0, q / before, 0.0).sqrt()
        if C == 1:
            yield torch.zeros_like(output)
        for position in range(p.shape[2]):
            for j in range(C - 1):
                column = torch.zeros_like(p)
                tail = q[:, j : j + 1, position]
                share = torch.where(tail > 0, p[:, j + 1 :, position] / tail, 0.0)
                column[:, j, position] = pivot[:, j, position]
                column[:, j + 1 :, position] = -share * pivot[:, j : j + 1, position]
                yield column.view(output.shape)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        p = output.softmax(1)
        # The largest of log p + Gumbel noise is a draw from p.
        u = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        noise = -(-u.clamp_min(torch.finfo(p.dtype).tiny).log()).log()
        label = (output.log_softmax(1) + noise).argmax(1, keepdim=True)
        return (p - torch.zeros_like(p).scatter_(1, label, 1.0)) * self.case_weight(output, target).sqrt()

    def ignored(self, output: Tensor, target: Tensor) -> Tensor | None:
        if target.is_floating_point():
            return None
        kept, _ = self._classes(target)
        return None if kept.all() else ~kept

    def stand_in(self, output: Tensor) -> Tensor:
        if self.module.weight is not None:
            raise self._needs_target("weighted by them")
        index = 0 if self.module.ignore_index != 0 or output.shape[1] == 1 else 1
        return torch.full((output.shape[0], *output.shape[2:]), index, device=output.device)

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        C = output.shape[1]
        weight = output.new_ones(C) if self.module.weight is None else self.module.weight.to(output)
        smoothing = getattr(self.module, "label_smoothing", 0.0)
        if target.is_floating_point():
            t = target * (1 - smoothing) + smoothing / C
            return (t * weight.view(-1, *[1] * (output.ndim - 2))).sum(1, keepdim=True)
        kept, index = self._classes(target)
        return (((1 - smoothing) * weight[index] + smoothing * weight.mean()) * kept).unsqueeze(1)
