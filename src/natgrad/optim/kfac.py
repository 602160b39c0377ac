"""K-FAC: the natural gradient with a Kronecker-factored, centered curvature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks import assemble, kfac_blocks
from natgrad.capture import Recorder
from natgrad.cases import Layer, read_cases
from natgrad.linalg import BlockDiagonal
from natgrad.linalg.state import dump, restore
from natgrad.moments import (
    MAX_DIM,
    SHARING,
    AffineMoments,
    Moments,
    layer_moments,
    merge,
    moments_of_state,
    state_of_moments,
)
from natgrad.optim.adaptive import Adaptive, check_number
from natgrad.optim.batch import Batch, Objective
from natgrad.optim.damping import LevenbergMarquardt
from natgrad.optim.output import Way
from natgrad.optim.vectors import Vector
from natgrad.options import check_choice, check_max_dim


class KFAC(Adaptive):
    """Natural-gradient descent with K-FAC's curvature, everything adaptive by default.

    For a layer `a = W h + b` with `m = E[h]`, `C = cov(h)` and output factor `B`, the centered step is

        ΔW = B⁻¹ (∇_W − ∇_b mᵀ) C⁻¹        Δb = B⁻¹ ∇_b − ΔW m        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch.

    Args:
        model: the module to train. Every trainable parameter must belong to an affine map.
        loss: an instance of `nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`, `nn.PoissonNLLLoss` or
            `natgrad.losses.Likelihood`.
        lr: the step size `α`; None: from the quadratic model, at every step.
        momentum: `μ`; None: from the quadratic model, at every step.
        damping: `λ`, in units of the loss's mean whatever the reduction; None: calibrated on the first batch,
            then Levenberg-Marquardt.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective as the user evaluates it.
        centered: hold weight and bias apart, with the covariance of the inputs.
        bias_update: `"exact"`, or `"simple"`: `Δb = B⁻¹ ∇_b`, whatever the weights do.
        damping_style: `"factored"` (two Cholesky factorizations a layer) or `"exact"` (two eigenbases, twice the
            products). None: factored where centered; else exact, as the homogeneous factors then damp the bias
            by the weight's share and stall it.
        estimator: `"mc"` (labels drawn from the model), `"exact"` or `"empirical"`.
        sharing: `"expand"` or `"reduce"`, for layers used at several positions.
        statistics_every: steps between updates of the moments. None: 10 where centered, else 5, as the
            homogeneous input factor holds the mean of the inputs, which moves faster than their covariance.
        inverses_every: steps between updates of the inverses. None: 10 where centered, else 5.
        adapt_every: steps between updates of the damping and of the ratio of `α` and `μ`.
        damping_decay: the least factor per step by which the damping may fall.
        damping_floor: the damping falls no further than this share of the mean of the curvature's diagonal.
        decay: the weight of the past in the moving average of the moments, each time they are updated.
        max_dim: factors of more rows than this are kept as their diagonals.
        output: how the loss's input is made of what the model returns, say `lambda r: r.logits.transpose(1, 2)`;
            needed where that is neither one of the tensors returned nor a view of one.
        generator: the source of the random labels. Default: one seeded by `torch.initial_seed()`.

    Raises:
        TypeError: if the loss is not supported, or is of a model that returns two tensors (`nn.GaussianNLLLoss`).
        ValueError: if an option is out of range.
        NotImplementedError: by `loss`, if a parameter is not part of an affine map; it is named.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> opt = natgrad.KFAC(model, torch.nn.CrossEntropyLoss())
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> for _ in range(20):
        ...     loss = opt.loss(model(x), y)
        ...     opt.zero_grad(); loss.backward(); opt.step()
        >>> loss.item() < 0.1
        True

    Reference: Martens & Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671.
    """

    _key = "kfac"
    _what_is_inverted = "a factor"
    _tolerated_rise = 0.5

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        centered: bool = True,
        bias_update: str = "exact",
        damping_style: str | None = None,
        estimator: str = "mc",
        sharing: str = "expand",
        statistics_every: int | None = None,
        inverses_every: int | None = None,
        adapt_every: int = 8,
        damping_decay: float = 0.8,
        damping_floor: float = 0.03,
        decay: float = 0.8,
        max_dim: int = MAX_DIM,
        output: Way | None = None,
        generator: torch.Generator | None = None,
    ):
        damping_style = damping_style or ("factored" if centered else "exact")
        interval = 10 if centered else 5
        statistics_every = interval if statistics_every is None else statistics_every
        inverses_every = interval if inverses_every is None else inverses_every
        check_choice("bias_update", bias_update, ("exact", "simple"))
        check_choice("damping_style", damping_style, ("exact", "factored"))
        check_choice("sharing", sharing, SHARING)
        for name, every in (
            ("statistics_every", statistics_every),
            ("inverses_every", inverses_every),
            ("adapt_every", adapt_every),
        ):
            if every < 1:
                raise ValueError(f"{name}={every} is not usable: expected a number of steps, at least 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not usable: expected a number in [0, 1)")
        if not 0 < damping_decay <= 1:
            raise ValueError(f"damping_decay={damping_decay} is not usable: expected a number in (0, 1]")
        check_number("damping_floor", damping_floor)
        check_max_dim(max_dim)
        super().__init__(
            model,
            loss,
            lr=lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            estimator=estimator,
            output=output,
            adapt_every=adapt_every,
            generator=generator,
        )
        self._rule = LevenbergMarquardt(damping_decay**adapt_every, damping_floor)
        self.centered, self.bias_update, self.damping_style = centered, bias_update, damping_style
        self.sharing, self.decay, self.max_dim = sharing, decay, max_dim
        self.statistics_every, self.inverses_every = statistics_every, inverses_every
        self._moments: dict[Layer, Moments] = {}
        self._inverse: BlockDiagonal | None = None
        self._inverse_age = 0

    def _statistics_due(self) -> bool:
        return self._steps % self.statistics_every == 0 or not self._moments

    def _observe(self, batch: Batch, recorder: Recorder, output: Tensor) -> None:
        columns = self._curvature.columns(output, batch.target, self.estimator, generator=self._generator)
        cases = read_cases(
            recorder.uses,
            output,
            columns,
            batch.mass,
            next(iter(self._parameters.values())).dtype,
            ignored=self._curvature.ignored(output.detach(), batch.target),
            sampled=self.estimator == "mc",
        )
        batch.statistics = layer_moments(cases, self.sharing, self.max_dim)
        if not all(m.is_finite() for m in batch.statistics.values()):
            batch.fault = "the statistics are not finite"

    def _take_in(self, objective: Objective, gradients: Vector) -> None:
        new = merge(b.statistics for b in objective.batches if b.statistics is not None)
        self.diagnostics["statistics"] = bool(new)
        for layer, moments in new.items():
            past = self._moments.get(layer)
            self._moments[layer] = moments if past is None else self.decay * past + moments  # type: ignore[operator]
        thinned = {layer.label: m.diagonals for layer, m in self._moments.items() if isinstance(m, AffineMoments)}
        self.diagnostics["diagonal_factors"] = {label: factors for label, factors in thinned.items() if factors}
        covered = {n for layer in self._moments for n in layer.names}
        for n in gradients:
            if n not in covered:
                raise NotImplementedError(
                    f"{n!r} has a gradient but there are no statistics of it: it was not used in the last forward that "
                    "took them. If it comes and goes use statistics_every=1, else freeze it with requires_grad_(False)"
                )

    def _names(self, gradients: Vector) -> Sequence[str]:
        """Those that have a gradient, and the others of their layers: a layer moves as a whole, or not at all."""
        partners = {n for layer in self._moments if any(m in gradients for m in layer.names) for n in layer.names}
        return [n for n in self._parameters if n in gradients or n in partners]

    def _prepare(self, damping: float) -> None:
        if self._inverse is None or self._inverse_age >= self.inverses_every:
            self._refresh(damping)
        self._inverse_age += 1

    def _refresh(self, damping: float) -> None:
        self.diagnostics["inverses"] = True
        self._inverse = self.curvature().inverse(damping, damping_style=self.damping_style)
        self._inverse_age = 0

    def _expire(self) -> None:
        self._inverse_age = self.inverses_every

    def _direction(self, g: Vector) -> Vector:
        assert self._inverse is not None
        out: Vector = {}
        for block in self._inverse.layers.values():
            if not all(n in g for n in block.names):
                continue  # frozen, or not part of this loss
            op, parts = block.operator, block.parts(g)
            simple = self.bias_update == "simple" and hasattr(op, "apart")
            out |= block.named(op.apart(parts) if simple else op._matmul(parts))  # type: ignore[attr-defined]
        return {n: v for n, v in out.items() if self._parameters[n].requires_grad}

    def curvature(self) -> BlockDiagonal:
        """The running K-FAC matrix, per unit of the loss's mean and without damping.

        Raises:
            RuntimeError: before the first step.
        """
        if not self._moments:
            raise RuntimeError("there is no curvature before the first step; take one")
        return assemble(kfac_blocks(self._moments, True, self.centered), self._parameters)

    def _scale(self) -> float:
        matrix = self.curvature()
        return float(matrix.trace()) / matrix.space.size

    # Saving --------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {
            "moments": state_of_moments(self._moments),
            "inverse": None if self._inverse is None else dump(self._inverse),
            "inverse_age": self._inverse_age,
        }

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        self._moments = moments_of_state(saved["moments"])
        self._inverse, self._inverse_age = restore(saved["inverse"]), saved["inverse_age"]

    def _check_own_state(self, saved: dict[str, Any]) -> None:
        unknown = [n for layer, _ in saved["moments"] for n in (layer["weight"], layer["bias"]) if n is not None]
        unknown = [n for n in unknown if n not in self._parameters]
        if unknown:
            raise ValueError(f"the state has moments of {unknown[0]!r}, which is not a trainable parameter here")
        for layer, op in kfac_blocks(moments_of_state(saved["moments"]), True, True).items():
            shapes = [tuple(self._parameters[n].shape) for n in layer.names]
            if sum(map(prod, shapes)) != op.space.size:
                raise ValueError(
                    f"the state has moments for {layer.names[0]!r} with matrices of {op.space.shapes}; here it has "
                    f"shape {shapes[0]}"
                )
