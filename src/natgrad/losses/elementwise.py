"""Losses that are sums over the entries of the output, so that `D` is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from natgrad.losses.base import OutputCurvature, one_by_one


class Elementwise(OutputCurvature):
    """A loss that is a sum over the entries of the output: `D = diag(d)`."""

    def _check(self, output: Tensor, target: Tensor) -> None:
        self._same_shape(output, target)

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_tensor(output.numel())

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        return self.second_derivative(output, target) * v

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield from one_by_one(self.second_derivative(output, target).sqrt())

    def stand_in(self, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    @abstractmethod
    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        """`d`, in the shape of the output."""


class SquaredError(Elementwise):
    """`nn.MSELoss`, the negative log-likelihood of a Gaussian with variance 1/2: `D = 2 I`."""

    nonnegative = True

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if target.is_complex():
            raise self._wrong_dtype(target, "a real one, such as target.real")

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.full_like(output, 2.0)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        return noise * 2**0.5


class Bernoulli(Elementwise):
    """`nn.BCEWithLogitsLoss`: `D = diag(w (1 + (pos_weight − 1) y) p (1 − p))`, `p = σ(f)`.

    For labels in {0, 1} this is the loss's Hessian. `weight` and `pos_weight` act as case weights.
    """

    nonnegative = True

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if not target.is_floating_point():
            raise self._wrong_dtype(target, "a floating one: target.to(output.dtype)")

    def stand_in(self, output: Tensor) -> Tensor:
        if self.module.pos_weight is not None:
            raise self._needs_target("weighted by them")
        return super().stand_in(output)

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        slope = torch.ops.aten.sigmoid_backward(v, output.sigmoid())  # p (1 − p) v in one pass over the entries
        return slope if self._is_plain else self.case_weight(output, target) * slope

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        return self.product(output, target, torch.ones_like(output))

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        p = output.sigmoid()
        u = torch.rand(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        column = p - (u < p).to(p.dtype)
        return column if self._is_plain else column * self.case_weight(output, target).sqrt()

    @property
    def _is_plain(self) -> bool:
        """Whether all cases have the same weight."""
        return self.module.weight is None and self.module.pos_weight is None

    def case_weight(self, output: Tensor, target: Tensor) -> Tensor:
        weight = output.new_ones(()) if self.module.weight is None else self.module.weight.to(output)
        if self.module.pos_weight is not None:
            weight = weight * (1 + (self.module.pos_weight.to(output) - 1) * target)
        return weight


class Poisson(Elementwise):
    """`nn.PoissonNLLLoss`: `D = diag(exp f)` for log rates `f`.

    For rates (`log_input=False`) the loss is that of counts with rate `ρ = f + eps`: the Fisher information is
    `D = diag(1/ρ)`, the Hessian `diag(y/ρ²)`.
    """

    @property
    def canonical(self) -> bool:  # type: ignore[override]
        return bool(self.module.log_input)

    def _check(self, output: Tensor, target: Tensor) -> None:
        super()._check(output, target)
        if target.is_complex():
            raise self._wrong_dtype(target, "counts: a real one")
        if (target < 0).any():
            raise ValueError(f"PoissonNLLLoss: target has the entry {float(target.min()):g}; expected counts >= 0")

    def _rate(self, output: Tensor) -> Tensor:
        if self.module.log_input:
            rate = output.exp()
            if torch.isinf(rate).any():
                raise ValueError(
                    f"PoissonNLLLoss: exp of the output overflows at {float(output.max()):g}; expected log rates. If "
                    "the model returns rates, use log_input=False"
                )
            return rate
        if (output <= -self.module.eps).any():
            raise ValueError(
                f"PoissonNLLLoss(log_input=False): the output has the entry {float(output.min()):g}; expected rates "
                "> 0. End the model in softplus or exp, or use log_input=True"
            )
        return output + self.module.eps

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        rate = self._rate(output)
        if self.module.log_input:
            return rate
        return 1 / rate if self.kind == "fisher" else target / rate.square()

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = self._rate(output)
        count = torch.poisson(rate, generator)
        return rate - count if self.module.log_input else 1 - count / rate
