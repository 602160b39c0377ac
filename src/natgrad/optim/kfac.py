"""K-FAC: the natural gradient with a Kronecker-factored, centered curvature, and its relatives."""

from __future__ import annotations

import torch
from torch import nn

from natgrad.checks.values import check_choice, check_count, check_flag, check_max_dim, check_number, check_within
from natgrad.curvature.moments import MAX_DIM, SHARING
from natgrad.linalg import Block, BlockDiagonal
from natgrad.linalg.precision import check_precision
from natgrad.optim.optimizer import CurvatureOptimizer
from natgrad.optim.options import Damping, Intervals
from natgrad.optim.parameter_groups import Groups
from natgrad.optim.preconditioner.interval import Interval
from natgrad.optim.preconditioner.layers import LayerBlocks
from natgrad.optim.preconditioner.options import Options
from natgrad.optim.preconditioner.orthogonalized import Orthogonalized
from natgrad.optim.preconditioner.running import RUNNING, Running
from natgrad.optim.rules.damping import DampingControl, LevenbergMarquardt
from natgrad.optim.terms import Loss
from natgrad.optim.tracking.returned import Way

RELATIVE_DAMPING = 0.3
"""`ε` of the one-sided structure, in units of the mean eigenvalue of a layer's input factor."""
TOLERATED_RISE = 0.5
"""A step after which the loss is higher by more than this share is taken back."""


class KFAC(CurvatureOptimizer):
    """Natural-gradient descent with K-FAC's curvature, everything adaptive by default.

    For a layer `a = W h + b` with `m = E[h]`, `C = cov(h)` and output factor `B`, the centered step is

        ΔW = B⁻¹ (∇_W − ∇_b mᵀ) C⁻¹        Δb = B⁻¹ ∇_b − ΔW m        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch.

    Args:
        model: the module to train. Every trainable parameter must belong to a layer of some kind (`docs/layers.md`).
        loss: an instance of `nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`, `nn.PoissonNLLLoss` or
            `natgrad.losses.Likelihood`. Or `"model"`: the loss that the model computes of its labels itself and
            returns as `loss`, beside `logits`, as Hugging Face's do. It takes the place of `opt.loss`:
            `model(**batch).loss.backward()`, then `opt.step()`. Its value and its gradient tell which loss it is.
        params: which parameters to train: None for all that are trainable, names, a predicate on names, tensors, or a
            list of groups, `{"params": ..., "lr": ..., "momentum": ..., "weight_decay": ...}`.
        lr: the step size `α`; None: from the quadratic model, at every step.
        momentum: `μ`; None: from the quadratic model, at every step. Where `lr` and `momentum` are both numbers, the
            step is that of `torch.optim.SGD` on a preconditioned gradient, `v ← μ v + ∇`, `θ ← θ − α F⁻¹ v`.
        damping: `λ`, in units of the loss's mean whatever the reduction; None: calibrated on the first batch,
            then Levenberg-Marquardt. With `structure="input"` it is `ε`, in units of the inputs' second moment; None:
            in units of its mean eigenvalue, 0.3 where `lr` and `momentum` are numbers, else adapted likewise. Or
            `natgrad.Damping(value, decay=, floor=, style=)`, in place of the options `damping_...` below.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective as the user evaluates it.
        decoupled_weight_decay: multiply by `1 − α η` at each step instead, as AdamW does.
        structure: `"kfac"`; `"ekfac"`: K-FAC's eigenbases, every `bases_every` steps, with the second moments of the
            gradients in them; `"diagonal"`; `"input"`: `C ⊗ I`, which needs no backward pass of its own,
            `ΔW = (∇_W − ∇_b mᵀ)(C + εI)⁻¹`, and plain gradients for parameters of no such layer; `"identity"`: no
            preconditioning.
        orthogonalize: of `structure="input"`, replace every `ΔW` by the nearest orthogonal matrix, times
            `0.2 √max(d_out, d_in)`, which makes it as long as AdamW's; all that has no input factor, biases and
            embeddings, takes Adam's step. A group may have its own `"orthogonalize"`. `natgrad.NewtonMuon` takes
            such steps without a loss, and finds out by itself which parameters are for them.
        centered: hold weight and bias apart, with the covariance of the inputs.
        bias_update: `"exact"`, or `"simple"`: `Δb = B⁻¹ ∇_b`, whatever the weights do.
        damping_style: `"factored"` (two Cholesky factorizations a layer) or `"exact"` (two eigenbases, twice the
            products). None: factored where centered; else exact, as the homogeneous factors then damp the bias
            by the weight's share and stall it.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step, which is shortened to keep it.
        average: keep averages of the parameters, whose weights fall by this factor a step (and faster at first), for
            evaluation within `with opt.averaged():`; None: none.
        estimator: `"mc"` (labels drawn from the model), `"exact"` or `"empirical"`.
        sharing: `"expand"` or `"reduce"`, for layers used at several positions.
        intervals: `natgrad.Intervals(statistics=, inverses=, bases=, adapt=)`, in place of the options
            `..._every` below.
        statistics_every: steps between updates of the moments. None: 10 where centered or for `"input"`, else 5, as the
            homogeneous input factor holds the mean of the inputs, which moves faster than their covariance; and where
            `lr` or `momentum` is adaptive, at first fewer, a tenth of the steps so far.
        statistics_share: the share of a batch's examples that the moments are of, as one of every two, three, and so
            on, in turn. None: a quarter, or more where that would be fewer than 250 cases of some layer, examples times
            positions, or fewer than two examples.
        inverses_every: steps between updates of the inverses. None: 20 where centered or for `"input"`, else 5; at
            first fewer, likewise.
        bases_every: steps between new bases of `"ekfac"`. None: 100.
        adapt_every: steps between updates of the damping and of the ratio of `α` and `μ`. None: 8.
        damping_decay: the least factor per step by which the damping may fall. None: 0.8.
        damping_floor: the damping falls no further than this times a typical curvature: the mean of a layer's diagonal,
            in centered coordinates where it is centered, and the median of that over the parameters. None: 1 where
            centered, else 0.03, as the means of the inputs count in it.
        decay: the weight of the past in the moving average of the moments, each time they are updated.
        max_dim: factors of more rows than this are kept as their diagonals.
        matmul_precision: of the float32 products of the direction and of the quadratic model, as in
            `torch.set_float32_matmul_precision`: a direction from sampled factors, and the length of a step, need few
            digits. `"medium"` is bfloat16 on CPUs that multiply it, TF32 on GPUs. The moments' own are `"high"` then.
            None: as torch is set.
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
    _many_ranks = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        params: Groups = None,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | Damping | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        structure: str = "kfac",
        orthogonalize: bool = False,
        centered: bool = True,
        bias_update: str = "exact",
        damping_style: str | None = None,
        max_kl: float | None = None,
        average: float | None = None,
        estimator: str = "mc",
        sharing: str = "expand",
        intervals: Intervals | None = None,
        statistics_every: int | None = None,
        statistics_share: float | None = None,
        inverses_every: int | None = None,
        bases_every: int | None = None,
        adapt_every: int | None = None,
        damping_decay: float | None = None,
        damping_floor: float | None = None,
        decay: float = 0.8,
        max_dim: int = MAX_DIM,
        matmul_precision: str | None = "medium",
        output: Way | None = None,
        generator: torch.Generator | None = None,
    ):
        damped = Damping.of(damping, decay=damping_decay, floor=damping_floor, style=damping_style)
        every = Intervals.of(
            intervals, statistics=statistics_every, inverses=inverses_every, bases=bases_every, adapt=adapt_every
        )
        check_choice("structure", structure, tuple(RUNNING))
        for name, flag in (("centered", centered), ("orthogonalize", orthogonalize)):
            check_flag(name, flag)
        one_sided, given = structure == "input", None not in (lr, momentum)
        if orthogonalize and not one_sided:
            raise ValueError(
                f"orthogonalize=True needs structure='input'; got structure={structure!r}: use that, or leave it out"
            )
        if max_kl is not None and orthogonalize and given:
            raise ValueError("max_kl needs the quadratic model where orthogonalize=True; leave out lr, or max_kl")
        seldom = one_sided or centered
        options = Options(
            structure=structure,
            centered=centered,
            bias_update=bias_update,
            damping_style=damped.style or ("factored" if centered else "exact"),
            relative=damped.value is None and one_sided,
            estimator=estimator,
            sharing=sharing,
            statistics=_interval("statistics_every", every.statistics, 10 if seldom else 5),
            statistics_share=statistics_share,
            inverses=_interval("inverses_every", every.inverses, 20 if seldom else 5),
            bases_every=100 if every.bases is None else every.bases,
            decay=decay,
            max_dim=max_dim,
            matmul_precision=matmul_precision,
        )
        _check(options)
        adapt_every = 8 if every.adapt is None else every.adapt
        check_count("adapt_every", adapt_every, "steps")
        damping_decay = 0.8 if damped.decay is None else damped.decay
        check_within("damping_decay", damping_decay, "(0, 1]")
        floor = damped.floor
        if floor is None:
            floor = 1.0 if centered and structure in ("kfac", "ekfac") else 0.03
        check_number("damping_floor", floor)
        value = damped.value
        if value is None and structure in ("input", "identity") and given:
            value = RELATIVE_DAMPING
        super().__init__(
            model,
            loss,
            params=params,
            defaults={
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "orthogonalize": orthogonalize,
            },
            damping=value,
            max_kl=max_kl,
            average=average,
            estimator=estimator,
            adapt_every=adapt_every,
            matmul_precision=matmul_precision,
            output=output,
            generator=generator,
        )
        blocks = (Orthogonalized if orthogonalize else LayerBlocks)("KFAC", self.parameters, self.labels, options)
        rule = LevenbergMarquardt(damping_decay**adapt_every, floor)
        self._assemble(blocks, DampingControl(value, rule), TOLERATED_RISE, tries=1)
        self._blocks = blocks

    @property
    def _running(self) -> Running:
        """The moving averages."""
        return self._blocks.running

    @property
    def _inverse(self) -> dict[str, Block] | None:
        """The layers' inverses, as they are applied."""
        return self._blocks.inverse

    def curvature(self) -> BlockDiagonal:
        """The running matrix, per unit of the loss's mean and without damping.

        Raises:
            RuntimeError: before the first step.
            TypeError: with `structure="identity"`, which has none.
        """
        return self._blocks.curvature()


def _interval(name: str, every: int | None, default: int) -> Interval:
    """So many steps, at the user's word; or so many by default, and fewer at the start."""
    check_count(name, default if every is None else every, "steps")
    return Interval(default, True) if every is None else Interval(every, False)


def _check(options: Options) -> None:
    """Raises ValueError for one that is out of range."""
    check_choice("bias_update", options.bias_update, ("exact", "simple"))
    check_choice("sharing", options.sharing, SHARING)
    check_choice("damping_style", options.damping_style, ("exact", "factored"))
    check_count("bases_every", options.bases_every, "steps")
    check_within("statistics_share", options.statistics_share, "(0, 1]", optional=True)
    check_within("decay", options.decay, "[0, 1)")
    check_max_dim(options.max_dim)
    check_precision(options.matmul_precision)
