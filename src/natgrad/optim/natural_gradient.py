"""The natural gradient itself: the exact Fisher matrix of all parameters together, inverted."""

from __future__ import annotations

import torch
from torch import nn

from natgrad.checks.values import check_choice, check_count, check_flag, check_number, check_within
from natgrad.optim.optimizer import CurvatureOptimizer
from natgrad.optim.options import Damping
from natgrad.optim.parameter_groups import Groups, check_one_decay
from natgrad.optim.preconditioner.exact import SOLVERS, ExactMatrix
from natgrad.optim.rules.damping import Eager
from natgrad.optim.rules.projected import Projected
from natgrad.optim.terms import Loss
from natgrad.optim.tracking.returned import Way

TOLERATED_RISE = 1e-3
"""A step that raises the loss by more than this share is undone."""
TRIES = 12
"""How often a step is tried, with more damping each time."""


class NaturalGradient(CurvatureOptimizer):
    """Natural-gradient descent with the exact Fisher matrix of all parameters together.

        Δ = (F + λM)⁻¹ ∇        F = E[Jᵀ D J] = S Sᵀ        θ ← θ − α Δ

    `M` is `I` if `λ` is given. If `λ` is adaptive, `M = (diag F / mean(diag F))^½`: see `scaling`. There is one column
    of `S` for each case and each column of a square root of `D`, `nk` in all. The optimizer inverts the smaller of `F`
    and the Gram matrix `SᵀS`, by `(F + λI)⁻¹ v = (v − S (SᵀS + λI)⁻¹ Sᵀ v)/λ`. If both are large, it uses conjugate
    gradients with products of `F`. For squared error this is the Levenberg-Marquardt method. It is meant
    for small networks and deterministic batches: physics-informed networks, regression to high accuracy.

    Args:
        model: the module to train. Unless the solver is `"cg"`, every trainable parameter must belong to an affine
            map, and axis 0 of every layer's input must be the example.
        loss: an instance of one of torch's losses that `natgrad.fisher` takes, or `"model"`, as for `KFAC`.
        params: which parameters to train, as for `KFAC`.
        lr: the step size `α`. None: 1 with the exact estimator, else that of the quadratic model.
        momentum: `μ`, from 0 to below 1. The direction is `Δ = (F + λM)⁻¹ (∇ + λ μ M Δ₋)`, where `Δ₋` is the previous
            direction. In directions that the batch does not determine, this keeps what earlier steps found (SPRING).
            None: the step is `−α Δ + μ δ₋` with `α` and `μ` from the quadratic model, as in `KFAC`.
        damping: `λ`, in units of the mean loss, also for `reduction="sum"`. None: it is calibrated on the first batch
            and then adapted by Levenberg-Marquardt at every step. Or `natgrad.Damping(value, decay=)`.
        min_damping: the smallest `λ` if the damping is adapted. When `λ` has reached it, it stays there. None: the
            rounding limit. Use it if every step has new points, and fewer points than there are parameters, for example
            1e-4 for 500 residuals. Such a step can fit its own points in any case, so its own loss says little about
            the damping.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective, for both reductions. It must be the same in all groups,
            unless it is decoupled.
        decoupled_weight_decay: multiply the parameters by `1 − α η` at each step instead.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step. A longer step is shortened to it.
        max_norm: a bound on the length `‖δ‖` of a step. A longer step is shortened to it.
        accelerate: add the acceleration `a = −½ (F + λM)⁻¹ Jᵀ D f''` to a step `δ`, where `f''` is the second
            derivative of the outputs along the step. It costs one forward pass and one solve. None: if `lr` is None
            and the matrix is the exact one, not by conjugate gradients. True: also with a number for `lr`, which a
            scheduler may change; an error if it is not possible.
        scaling: the exponent `p` of the damping `λ M`, with `M = (diag F / mean(diag F))^p`. 0: the damping is `λ I`,
            as Levenberg's. 1: Marquardt's, with which the units of the parameters matter no more. None: 1/2 if the
            damping is adaptive and the matrix then costs at most 1.5 times as much, else 0. Conjugate gradients use
            `λ I`.
        line_search: halve a step as long as that lowers the loss. It costs one or more forward passes, and requires
            `lr=None` and a number for `momentum`.
        average: keep an exponential average of the parameters, with this decay (smaller at first), for
            evaluation within `with opt.averaged():`. None: no average.
        estimator: `"exact"`, `"mc"` (one label for each case, drawn from the model) or `"empirical"`.
        solver: `"dual"` (factorizes `SᵀS`), `"primal"` (factorizes `F`) or `"cg"` (conjugate gradients). None: the
            cheaper of the first two, or `"cg"` if both matrices are larger than `max_size`.
        max_size: the largest number of rows of a matrix that is factorized.
        tolerance: the relative residual at which conjugate gradients stop. None: `eps^¾`.
        max_iterations: the largest number of products in conjugate gradients. If it is reached, the optimizer uses the
            current result as the direction, and `diagnostics` has the residual.
        damping_decay: the factor of the damping after a step that the quadratic model predicted well. None: 0.3.
        output: a function that makes the loss's input from what the model returns, as for `KFAC`.
        generator: the source of the random labels. Default: one seeded by `torch.initial_seed()`.

    Raises:
        TypeError: if the loss is not supported.
        ValueError: if an option is out of range.
        NotImplementedError: by `opt.loss`, if a parameter is used in an unsupported way; the error names it.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1)).double()
        >>> opt = natgrad.NaturalGradient(model, torch.nn.MSELoss())
        >>> x = torch.linspace(-2, 2, 50, dtype=torch.float64).unsqueeze(1)
        >>> for _ in range(50):
        ...     loss = opt.loss(model(x), x.sin())
        ...     opt.zero_grad(); loss.backward(); opt.step()
        >>> loss.item() < 1e-7
        True

    Reference: Amari (1998), "Natural Gradient Works Efficiently in Learning"; for the dual form Ren & Goldfarb
    (2019), arXiv:1906.02353; for physics-informed networks Müller & Zeinhofer (2023), arXiv:2302.13163; for the
    momentum Goldshlager, Abrahamsen & Lin (2024), arXiv:2401.10190; for the acceleration Transtrum & Sethna (2012),
    arXiv:1201.5885; for the scaling of the damping Marquardt (1963); for the line search Müller & Zeinhofer (2023).
    """

    _key = "natural_gradient"

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        params: Groups = None,
        lr: float | None = None,
        momentum: float | None = 0.8,
        damping: float | Damping | None = None,
        min_damping: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_kl: float | None = None,
        max_norm: float | None = None,
        accelerate: bool | None = None,
        scaling: float | None = None,
        line_search: bool = False,
        average: float | None = None,
        estimator: str = "exact",
        solver: str | None = None,
        max_size: int = 5000,
        tolerance: float | None = None,
        max_iterations: int = 250,
        damping_decay: float | None = None,
        output: Way | None = None,
        generator: torch.Generator | None = None,
    ):
        damped = Damping.of(damping, decay=damping_decay)
        for name in ("floor", "style"):
            if getattr(damped, name) is not None:
                raise ValueError(
                    f"damping=Damping({name}={getattr(damped, name)!r}) is not an option of NaturalGradient, which "
                    "inverts the exact matrix; leave it out"
                )
        check_choice("solver", solver, SOLVERS, optional=True)
        if solver == "cg" and estimator in ("mc", "empirical"):
            raise ValueError(
                f"solver='cg' works only with estimator='exact'; got estimator={estimator!r}: leave one of them out"
            )
        for name, count in (("max_size", max_size), ("max_iterations", max_iterations)):
            check_count(name, count)
        check_within("tolerance", tolerance, "(0, 1)", optional=True)
        factor = 0.3 if damped.decay is None else damped.decay
        check_within("damping_decay", factor, "(0, 1]")
        check_number("max_norm", max_norm, optional=True, positive=True)
        check_number("min_damping", min_damping, optional=True, positive=True)
        if damped.value is not None and min_damping is not None:
            raise ValueError(
                f"min_damping={min_damping} is for an adaptive damping, but damping={damped.value} is fixed: leave one "
                "of them out"
            )
        if accelerate is not None:
            check_flag("accelerate", accelerate)
        may_accelerate = solver != "cg" and estimator == "exact" and momentum is not None
        if accelerate and not may_accelerate:
            raise ValueError(
                f"accelerate=True was given with solver={solver!r}, estimator={estimator!r} and momentum={momentum}: "
                "expected 'dual' or 'primal', 'exact' and a number; leave accelerate out, or change them"
            )
        check_within("scaling", scaling, "[0, 1]", optional=True)
        if scaling and solver == "cg":
            raise ValueError(f"scaling={scaling} works only with solver='dual' or 'primal'; leave one of them out")
        check_flag("line_search", line_search)
        if line_search and (lr is not None or momentum is None):
            raise ValueError(
                f"line_search=True was given with lr={lr} and momentum={momentum}: expected lr=None and a number for "
                "momentum; leave line_search out, or change them"
            )
        adaptive = damped.value is None
        super().__init__(
            model,
            loss,
            params=params,
            defaults={
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            damping=damped.value,
            max_kl=max_kl,
            average=average,
            estimator=estimator,
            adapt_every=1,
            matmul_precision=None,
            output=output,
            generator=generator,
        )
        eps = torch.finfo(next(iter(self.parameters.values())).dtype).eps
        matrix = ExactMatrix(
            self.parameters,
            self.labels,
            estimator=estimator,
            solver=solver,
            max_size=max_size,
            tolerance=eps**0.75 if tolerance is None else tolerance,
            max_iterations=max_iterations,
            scaling=0.0 if scaling is None and not adaptive else scaling,
        )
        # A damping below eps · tr F is lost in rounding.
        rule = Eager(factor, eps * min(matrix.size(), max_size))
        projected = Projected(
            self.parameters,
            matrix,
            max_kl,
            max_norm=max_norm,
            accelerate=accelerate,
            line_search=line_search,
        )
        if may_accelerate and accelerate is not False and not line_search:
            self._numbers = "lr=1.0 and accelerate=True, which take the same steps"
        self._assemble(matrix, rule, TOLERATED_RISE, TRIES, projected, min_damping or 0.0)

    def _check_groups(self) -> None:
        super()._check_groups()
        check_one_decay(self.param_groups)
