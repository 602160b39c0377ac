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
from natgrad.optim.rules.damping import LevenbergMarquardt
from natgrad.optim.terms import Loss
from natgrad.optim.tracking.returned import Way

RELATIVE_DAMPING = 0.3
"""`ε` of the one-sided structure, in units of the mean eigenvalue of a layer's input factor."""


class KFAC(CurvatureOptimizer):
    """Natural-gradient descent with K-FAC's curvature. Step size, momentum and damping are adaptive by default.

    For a layer `a = W h + b` with `m = E[h]`, `C = cov(h)` and output factor `B`, the centered step is

        ΔW = B⁻¹ (∇_W − ∇_b mᵀ) C⁻¹        Δb = B⁻¹ ∇_b − ΔW m        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch.

    Args:
        model: the module to train. Every trainable parameter must be used in a supported way (`docs/layers.md`).
        loss: an instance of `nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`, `nn.PoissonNLLLoss` or
            `natgrad.losses.Likelihood`. Or `"model"`, for models that compute a loss from labels and return it as
            `loss`, with `logits`, as Hugging Face's models do. This loss replaces `opt.loss`:
            `model(**batch).loss.backward()`, then `opt.step()`. The optimizer identifies the loss by its value and its
            gradient.
        params: the parameters to train: None for all that are trainable, names, a predicate on names, tensors, or a
            list of groups, `{"params": ..., "lr": ..., "momentum": ..., "weight_decay": ...}`.
        lr: the step size `α`. None: the quadratic model gives it at every step.
        momentum: `μ`. None: the quadratic model gives it at every step. If `lr` and `momentum` are both numbers, the
            step is that of `torch.optim.SGD` on a preconditioned gradient, `v ← μ v + ∇`, `θ ← θ − α F⁻¹ v`.
        damping: `λ`, in units of the mean loss, also for `reduction="sum"`. None: it is calibrated on the first batch
            and then adapted by Levenberg-Marquardt. With `structure="input"` it is `ε`, in units of the inputs' second
            moment. None then means: in units of the mean eigenvalue of the input factor, 0.3 if `lr` and `momentum` are
            numbers, else adapted as above. Or `natgrad.Damping(value, decay=, floor=, style=)`, instead of the options
            `damping_...` below.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective, for both reductions.
        decoupled_weight_decay: multiply the parameters by `1 − α η` at each step instead, as AdamW does.
        structure: the preconditioner. `"kfac"`. `"ekfac"`: K-FAC's eigenbases, updated every `bases_every` steps, with
            the second moments of the gradients in them. `"diagonal"`. `"input"`: `C ⊗ I`, with the step `ΔW = (∇_W −
            ∇_b mᵀ)(C + εI)⁻¹`; it needs no extra backward pass, and parameters without an input factor get plain
            gradients. `"identity"`: no preconditioning.
        orthogonalize: only with `structure="input"`. Replaces every `ΔW` by the nearest orthogonal matrix, times
            `0.2 √max(d_out, d_in)`, which makes it as long as a step of AdamW. Parameters without an input factor
            (biases, embeddings) get Adam steps. A group may have its own `"orthogonalize"`. `natgrad.NewtonMuon`
            takes such steps without a loss, and chooses the parameters for them itself.
        centered: treat weight and bias separately, with the covariance of the inputs as the input factor.
        bias_update: `"exact"`, or `"simple"`, which is `Δb = B⁻¹ ∇_b`, without the term `ΔW m`.
        damping_style: `"factored"` (two Cholesky factorizations per layer) or `"exact"` (two eigendecompositions, and
            twice as many matrix products). None: factored with `centered=True`, else exact. With homogeneous factors,
            the factored style damps the bias as strongly as the weights, which stalls the bias.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step. A longer step is shortened to it.
        average: keep an exponential average of the parameters, with this decay (smaller at first), for
            evaluation within `with opt.averaged():`. None: no average.
        estimator: `"mc"` (labels drawn from the model), `"exact"` or `"empirical"`.
        sharing: `"expand"` or `"reduce"`, for layers used at several positions.
        intervals: `natgrad.Intervals(statistics=, inverses=, bases=, adapt=)`, instead of the options
            `..._every` below.
        statistics_every: steps between updates of the factors. None: 10 with `centered=True` or `"input"`, else 5,
            because the homogeneous input factor contains the mean of the inputs, which changes faster than their
            covariance. If `lr` or `momentum` is adaptive, the interval is shorter at first: a tenth of the steps so
            far.
        statistics_share: the share of a batch's examples that is used for the factors: one of every two, three, and so
            on, different ones each time. None: a quarter, or more if a quarter has fewer than two examples, or fewer
            than 250 cases (examples times positions) in some layer.
        inverses_every: steps between updates of the inverses. None: 20 with `centered=True` or `"input"`, else 5;
            shorter at first, as for `statistics_every`.
        bases_every: steps between updates of the bases of `"ekfac"`. None: 100.
        adapt_every: steps between updates of the damping and of the ratio of `α` and `μ`. None: 8.
        damping_decay: the damping falls at most by this factor per step. None: 0.8.
        damping_floor: the damping does not fall below this number times the typical curvature: the mean diagonal entry
            of each layer (in centered coordinates if it is centered), and then the median over the parameters. None: 1
            with `centered=True`, else 0.03, because the typical curvature then contains the means of the inputs.
        decay: the weight of the past in the moving averages of the factors, at each update.
        max_dim: for factors with more rows than this, only the diagonal is kept.
        input_scales: damp each input of a layer of data, such as raw features or channels, in units of its scale, so
            that an income in dollars and an age in years train as well as standardized features do: `C + π√λ S²` in
            place of `C + π√λ I`, with the scales `S` divided by the largest. The scale of an input is
            `√(E[d⁴] / E[d²])`, with `d = h − m`, or `d = h` if the layer trains no bias. Inputs with a kurtosis above
            20, such as rarely used pixels, have the largest; and if all scales are within a factor of 10, nothing
            changes. None: with `structure="kfac"`, `centered=True` and factored damping, without which it is not
            possible.
        matmul_precision: precision of the float32 matrix products for the direction and the quadratic model, as in
            `torch.set_float32_matmul_precision`. Low precision is enough there, because the factors are sampled
            anyway. `"medium"` is bfloat16 on CPUs with bfloat16 instructions, and TF32 on GPUs. Products for the
            factors and orthogonalized directions then use `"high"`. None: torch's own setting.
        output: a function that makes the loss's input from what the model returns, such as
            `lambda r: r.logits.transpose(1, 2)`. Needed if the loss's input is neither a returned tensor nor a view of
            one.
        generator: the source of the random labels. Default: one seeded by `torch.initial_seed()`.

    Raises:
        TypeError: if the loss is not supported, or is of a model that returns two tensors (`nn.GaussianNLLLoss`).
        ValueError: if an option is out of range.
        NotImplementedError: by `opt.loss`, if a parameter is used in an unsupported way; the error names it.

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
        input_scales: bool | None = None,
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
            raise ValueError("max_kl with orthogonalize=True needs an adaptive step size; leave out lr, or max_kl")
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
            input_scales=_scales(input_scales, structure, centered, damped.style),
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
        if value is None and given and not RUNNING[structure].reads_gradients:
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
        self._assemble(blocks, LevenbergMarquardt(damping_decay**adapt_every, floor))
        self._blocks = blocks

    @property
    def _running(self) -> Running:
        """The moving averages."""
        return self._blocks.running

    @property
    def _inverse(self) -> dict[str, Block] | None:
        """The inverses that the step multiplies by, by layer."""
        return self._blocks.inverse

    def curvature(self) -> BlockDiagonal:
        """The current curvature matrix, from the moving averages: of the mean loss, without damping.

        Raises:
            RuntimeError: before the first step.
            TypeError: with `structure="identity"`, which has none.
        """
        return self._blocks.curvature()


def _scales(wanted: bool | None, structure: str, centered: bool, style: str | None) -> bool:
    """Whether inputs are damped in units of their scales."""
    possible = structure == "kfac" and centered and style in (None, "factored")
    if wanted is None:
        return possible
    check_flag("input_scales", wanted)
    if wanted and not possible:
        raise ValueError(
            f"input_scales=True with structure={structure!r}, centered={centered} and damping_style={style!r} is not "
            "possible; expected 'kfac', True and 'factored': use these, or leave input_scales out"
        )
    return wanted


def _interval(name: str, every: int | None, default: int) -> Interval:
    """The user's number of steps, or the default, which is smaller at the start."""
    check_count(name, default if every is None else every, "steps")
    return Interval(default, True) if every is None else Interval(every, False)


def _check(options: Options) -> None:
    """Raises ValueError for an option that is out of range."""
    check_choice("bias_update", options.bias_update, ("exact", "simple"))
    check_choice("sharing", options.sharing, SHARING)
    check_choice("damping_style", options.damping_style, ("exact", "factored"))
    check_count("bases_every", options.bases_every, "steps")
    check_within("statistics_share", options.statistics_share, "(0, 1]", optional=True)
    check_within("decay", options.decay, "[0, 1)")
    check_max_dim(options.max_dim)
    check_precision(options.matmul_precision)
