"""The natural gradient itself: the exact Fisher matrix of all parameters together, inverted."""

from __future__ import annotations

import torch
from torch import nn

from natgrad.checks.values import check_choice, check_count, check_flag, check_number, check_within
from natgrad.optim.optimizer import CurvatureOptimizer
from natgrad.optim.options import Damping
from natgrad.optim.parameter_groups import Groups, check_one_decay
from natgrad.optim.preconditioner.exact import SOLVERS, ExactMatrix
from natgrad.optim.rules.damping import DampingControl, Eager
from natgrad.optim.rules.projected import Projected
from natgrad.optim.terms import Loss
from natgrad.optim.tracking.returned import Way

TOLERATED_RISE = 1e-3
"""A step after which the loss is higher by more than this share is taken back."""
TRIES = 12
"""How often a step is tried, with more damping each time."""


class NaturalGradient(CurvatureOptimizer):
    """Natural-gradient descent with the exact Fisher matrix of all parameters together.

        Δ = (F + λI)⁻¹ ∇        F = E[Jᵀ D J] = S Sᵀ        θ ← θ − α Δ

    Every case and column of `D` gives a column of `S`, `nk` in all. What is inverted is the smaller of `F` and the
    Gram matrix `SᵀS`, by `(F + λI)⁻¹ v = (v − S (SᵀS + λI)⁻¹ Sᵀ v)/λ`; or neither, by conjugate gradients with the
    products of `F`, where both are large. For squared error this is the Levenberg-Marquardt method. Meant for small
    networks and deterministic batches: physics-informed networks, regression to high accuracy.

    Args:
        model: the module to train. Unless the solver is `"cg"`, every trainable parameter must belong to an affine
            map, and axis 0 of every layer's input must be the example.
        loss: an instance of one of torch's losses that `natgrad.fisher` takes, or `"model"`, as for `KFAC`.
        params: which parameters to train, as for `KFAC`.
        lr: the step size `α`; None: 1 with the exact estimator, else that of the quadratic model.
        momentum: `μ`, from 0 to below 1. The direction is `Δ = (F + λI)⁻¹ (∇ + λ μ Δ₋)` with `Δ₋` the direction
            before: what the last step knew of directions that this batch says nothing about is kept (SPRING). None:
            the step is `−α Δ + μ δ₋` with `α` and `μ` from the quadratic model, as in `KFAC`.
        damping: `λ`, in units of the loss's mean whatever the reduction; None: calibrated on the first batch,
            then Levenberg-Marquardt at every step. Or `natgrad.Damping(value, decay=)`.
        min_damping: the least `λ`, where it adapts; None: what rounding allows. With new points at every step, and
            fewer of them than parameters, every step fits its own points, and the damping would fall until it fits
            nothing else: give the level of what cannot be fitted, say 1e-4 for 500 residuals.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective as the user evaluates it; the same in all groups, unless
            decoupled.
        decoupled_weight_decay: multiply by `1 − α η` at each step instead.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step, which is shortened to keep it.
        max_norm: a bound on the length `‖δ‖` of a step, which is shortened to keep it.
        accelerate: add the acceleration `a = −½ (F + λI)⁻¹ Jᵀ D f''` to a step `δ`, where `f''` is the second
            derivative of the outputs along it. It costs one forward and one solve. Only where `lr` is None and the
            matrix is held as columns: not with `solver="cg"`.
        average: keep averages of the parameters, whose weights fall by this factor a step (and faster at first), for
            evaluation within `with opt.averaged():`; None: none.
        estimator: `"exact"`, `"mc"` (one label for each case, drawn from the model) or `"empirical"`.
        solver: `"dual"` (by `SᵀS`), `"primal"` (by `F`), `"cg"`; None: the smaller of the first two, or the last
            where both are larger than `max_size`.
        max_size: the most rows of a matrix that is factorized.
        tolerance: the relative residual of conjugate gradients. None: `eps^¾`.
        max_iterations: their most products; what they have by then is the direction, with the residual in
            `diagnostics`.
        damping_decay: the factor of the damping after a step that the quadratic model predicted well. None: 0.3.
        output: how the loss's input is made of what the model returns, as for `KFAC`.
        generator: the source of the random labels. Default: one seeded by `torch.initial_seed()`.

    Raises:
        TypeError: if the loss is not supported.
        ValueError: if an option is out of range.
        NotImplementedError: by `loss`, if a parameter is not part of an affine map; it is named.

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
    arXiv:1201.5885.
    """

    _key = "natural_gradient"
    _many_ranks = False

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
        accelerate: bool = True,
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
                    f"damping=Damping({name}={getattr(damped, name)!r}) is no option of NaturalGradient, which inverts "
                    "the matrix itself; leave it out"
                )
        check_choice("solver", solver, SOLVERS, optional=True)
        if solver == "cg" and estimator in ("mc", "empirical"):
            raise ValueError(
                f"solver='cg' has products of the exact matrix only; got estimator={estimator!r}: leave one of them out"
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
                f"min_damping={min_damping} is for a damping that adapts, and damping={damped.value} stays: leave one "
                "of them out"
            )
        check_flag("accelerate", accelerate)
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
        )
        # Below eps · tr F the damping is lost in rounding.
        rule = Eager(factor, eps * min(matrix.size(), max_size))
        projected = Projected(self.parameters, matrix, max_kl, max_norm=max_norm, accelerate=accelerate)
        control = DampingControl(damped.value, rule, min_damping or 0.0)
        self._assemble(matrix, control, TOLERATED_RISE, TRIES, projected)

    def _check_groups(self) -> None:
        super()._check_groups()
        check_one_decay(self.param_groups)
