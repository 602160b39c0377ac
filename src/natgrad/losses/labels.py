"""Losses of labels 1 and −1 with a margin: rankings, embeddings, triplets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.checks.values import described
from natgrad.losses.base import OutputCurvature, one_by_one
from natgrad.losses.convex import Convex, ConvexCurvature


class Labels(OutputCurvature):
    """A loss `ℓ_y` of labels `y = ±1`. Its distribution over the labels is `π_y ∝ exp(−ℓ_y)`, with the Fisher
    information

        D = π₊ π₋ u uᵀ,    u = ∂(ℓ₊ − ℓ₋)/∂f.

    The Hessian of such a loss is zero or indefinite. `kind="gauss_newton"` takes its positive part, as
    `natgrad.losses.Convex` does.

    Reference: LeCun, Chopra, Hadsell, Ranzato & Huang (2006), "A Tutorial on Energy-Based Learning", for `π`.
    """

    canonical = False
    nonnegative = True

    def __init__(self, module: nn.Module, kind: str = "fisher"):
        super().__init__(module, kind)
        convex = Convex(lambda f, y: self._each(f, self._signs(f, y)).reshape(len(f), -1).sum(1), "sum")
        self._hessian = ConvexCurvature(convex)

    @abstractmethod
    def _each(self, output: Tensor, signs: Tensor) -> Tensor:
        """`ℓ_y`, in the shape of the signs `y`."""

    def _signs(self, output: Tensor, target: Any) -> Tensor:
        signs: Tensor = target
        return signs

    def _check(self, output: Tensor, target: Tensor) -> None:
        if not bool(((target == 1) | (target == -1)).all()):
            raise ValueError(
                f"{type(self.module).__name__}: target has entries other than 1 and −1; expected these alone, "
                "2 * y - 1 for labels 0 and 1"
            )

    def loss(self, output: Tensor, target: Any) -> Tensor:
        values = self._each(output, self._signs(output, target))
        return values.mean() if self.is_mean else values.sum()

    def normalizer(self, output: Tensor, target: Any) -> Tensor:
        return output.new_tensor(float(self._signs(output, target).numel()))

    def _scores(self, output: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """`π₊` for each label, in a shape that broadcasts to the output; and `u`."""
        signs = torch.ones_like(self._signs(output, target), dtype=output.dtype)
        with torch.enable_grad():
            f = output.detach().requires_grad_()
            gap = self._each(f, signs) - self._each(f, -signs)
            (u,) = torch.autograd.grad(gap.sum(), f)
        return (-gap.detach()).sigmoid().reshape(gap.shape + (1,) * (output.ndim - gap.ndim)), u

    def _root(self, output: Tensor, target: Any) -> Tensor:
        p, u = self._scores(output, target)
        return (p * (1 - p)).sqrt() * u

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.is_fisher else self._hessian.notes

    def product(self, output: Tensor, target: Any, v: Tensor) -> Tensor:
        if not self.is_fisher:
            return self._hessian.product(output, target, v)
        s = self._root(output, target)
        return s * (s * v).reshape(len(s), -1).sum(1).view(-1, *[1] * (s.ndim - 1))

    def exact_columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        if not self.is_fisher:
            yield from self._hessian.exact_columns(output, target)
            return
        yield self._root(output, target)

    def sampled_column(self, output: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        p, u = self._scores(output, target)
        drawn = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator) < p
        return torch.where(drawn, 1 - p, -p) * u

    def stand_in(self, output: Tensor) -> Tensor:
        return output.new_ones(len(output))


class HingeEmbedding(Labels):
    """`nn.HingeEmbeddingLoss` of distances `f`: `ℓ₊ = f`, `ℓ₋ = max(0, margin − f)`. Each entry has a label, so `D` is
    diagonal."""

    nonnegative = False

    def _check(self, output: Tensor, target: Tensor) -> None:
        self._same_shape(output, target)
        super()._check(output, target)

    def _each(self, output: Tensor, signs: Tensor) -> Tensor:
        return torch.where(signs > 0, output, (self.module.margin - output).relu())

    def product(self, output: Tensor, target: Any, v: Tensor) -> Tensor:
        return self._root(output, target).square() * v if self.is_fisher else torch.zeros_like(v)

    def exact_columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        yield from one_by_one(self._root(output, target)) if self.is_fisher else [torch.zeros_like(output)]

    def stand_in(self, output: Tensor) -> Tensor:
        return torch.ones_like(output)


class Compared(Labels):
    """A loss of several inputs for each example. They are joined along axis 1 of the output, and a model that returns
    them as a tuple is accepted by `fisher`."""

    inputs: tuple[str, ...]
    """Their names in torch's loss."""
    axes: int
    """The number of axes of the joined output."""

    def join(self, output: Any) -> Tensor:
        if isinstance(output, (tuple, list)):
            if len(output) != len(self.inputs) or not all(isinstance(t, Tensor) for t in output):
                raise self._wrong(described(output))
            if len({t.shape for t in output}) > 1:
                raise self._wrong(f"tensors of shapes {', '.join(str(tuple(t.shape)) for t in output)}")
            return torch.stack([t.unsqueeze(-1) if t.ndim == 0 else t for t in output], 1)
        return super().join(output)

    def _check(self, output: Tensor, target: Tensor) -> None:
        if output.ndim != self.axes or output.shape[1] != len(self.inputs):
            raise self._wrong(f"an output of shape {tuple(output.shape)}")
        if target.shape != output.shape[:1]:
            raise ValueError(
                f"{type(self.module).__name__}: output has shape {tuple(output.shape)} and target "
                f"{tuple(target.shape)}; expected one label, 1 or −1, for each example: {tuple(output.shape[:1])}"
            )
        super()._check(output, target)

    def _wrong(self, came: str) -> ValueError:
        one = "n" if self.axes == 2 else "n, d"
        joined = f"(n, {len(self.inputs)}{', d' if self.axes == 3 else ''})"
        names = ", ".join(self.inputs)
        return ValueError(
            f"{type(self.module).__name__}: the model returned {came}; expected {names} of shape ({one}) each, as one "
            f"tensor of shape {joined}: torch.stack([{names}], 1)"
        )


class Ranking(Compared):
    """`nn.MarginRankingLoss` of `f = (x₁, x₂)`: `ℓ_y = max(0, margin − y (x₁ − x₂))`."""

    inputs, axes = ("input1", "input2"), 2

    def _each(self, output: Tensor, signs: Tensor) -> Tensor:
        return (self.module.margin - signs * (output[:, 0] - output[:, 1])).relu()


class Cosine(Compared):
    """`nn.CosineEmbeddingLoss` of `f = (x₁, x₂)` with the cosine `c`: `ℓ₊ = 1 − c`, `ℓ₋ = max(0, c − margin)`."""

    inputs, axes = ("input1", "input2"), 3

    def _each(self, output: Tensor, signs: Tensor) -> Tensor:
        x, y = output.unbind(1)
        return F.cosine_embedding_loss(x, y, signs, margin=self.module.margin, reduction="none")


class Triplet(Compared):
    """`nn.TripletMarginLoss` and `nn.TripletMarginWithDistanceLoss` of `f = (anchor, positive, negative)`. The label
    says which of the two is the positive one. So `ℓ₋` is `ℓ₊` with the two exchanged. There is no target: it is
    `None`."""

    inputs, axes = ("anchor", "positive", "negative"), 3

    def check(self, output: Tensor, target: Any) -> None:
        if target is not None:
            raise TypeError(
                f"{type(self.module).__name__}: target is {described(target)}; expected None: the output has the "
                "positive and the negative example"
            )
        self._check(output, self._signs(output, None))

    def _signs(self, output: Tensor, target: Any) -> Tensor:
        return output.new_ones(len(output))

    def stand_in(self, output: Tensor) -> Any:
        return None

    def _each(self, output: Tensor, signs: Tensor) -> Tensor:
        anchor, positive, negative = output.unbind(1)
        first = signs.view(-1, 1) > 0
        pair = torch.where(first, positive, negative), torch.where(first, negative, positive)
        if isinstance(self.module, nn.TripletMarginLoss):
            options = {name: getattr(self.module, name) for name in ("margin", "p", "eps", "swap")}
            return F.triplet_margin_loss(anchor, *pair, **options, reduction="none")
        options = {name: getattr(self.module, name) for name in ("distance_function", "margin", "swap")}
        return F.triplet_margin_with_distance_loss(anchor, *pair, **options, reduction="none")
