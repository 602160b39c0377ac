"""The natural gradient itself: the exact Fisher matrix of all parameters together, inverted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.cases import read_cases
from natgrad.capture.recorder import Recorder
from natgrad.checks.values import check_choice, check_count, check_within
from natgrad.linalg import Operator
from natgrad.linalg.joint import Joint
from natgrad.optim.adaptive import Adaptive
from natgrad.optim.batch import Batch, Objective
from natgrad.optim.damping import LevenbergMarquardt
from natgrad.optim.decay import Decay
from natgrad.optim.exact import ByProducts, TruncatedInverse, from_cases
from natgrad.optim.output import Way
from natgrad.optim.parameter_groups import Groups
from natgrad.optim.vectors import Vector

SOLVERS = ("dual", "primal", "cg")


class NaturalGradient(Adaptive):
    """Natural-gradient descent with the exact Fisher matrix of all parameters together.

        Δ = (F + λI)⁻¹ ∇        F = E[Jᵀ D J] = S Sᵀ        θ ← θ − α Δ

    Every case and column of `D` gives a column of `S`, `nk` in all. What is inverted is the smaller of `F` and the
    Gram matrix `SᵀS`, by `(F + λI)⁻¹ v = (v − S (SᵀS + λI)⁻¹ Sᵀ v)/λ`; or neither, by conjugate gradients with the
    products of `F`, where both are large. For squared error this is the Levenberg-Marquardt method. Meant for small
    networks and deterministic batches: physics-informed networks, regression to high accuracy.

    Args:
        model: the module to train. Unless the solver is `"cg"`, every trainable parameter must belong to an affine
            map, and axis 0 of every layer's input must be the example.
        loss: an instance of one of torch's losses that `natgrad.fisher` takes.
        params: which parameters to train, as for `KFAC`.
        lr: the step size `α`; None: from the quadratic model, where it is 1 up to rounding with the exact estimator
            and no momentum.
        momentum: `μ`, for a step `−α Δ + μ δ` with `δ` the step before. The quadratic model, which None asks, sees
            no use in it with the exact estimator: its minimum is `−Δ`.
        damping: `λ`, in units of the loss's mean whatever the reduction; None: calibrated on the first batch,
            then Levenberg-Marquardt at every step.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective as the user evaluates it; the same in all groups, unless
            decoupled.
        decoupled_weight_decay: multiply by `1 − α η` at each step instead.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step, which is shortened to keep it.
        average: keep averages of the parameters, whose weights fall by this factor a step (and faster at first), for
            evaluation within `with opt.averaged():`; None: none.
        estimator: `"exact"`, `"mc"` (one label for each case, drawn from the model) or `"empirical"`.
        solver: `"dual"` (by `SᵀS`), `"primal"` (by `F`), `"cg"`; None: the smaller of the first two, or the last
            where both are larger than `max_size`.
        max_size: the most rows of a matrix that is factorized.
        tolerance: the relative residual of conjugate gradients. None: `eps^¾`.
        max_iterations: their most products; what they have by then is the direction, with the residual in
            `diagnostics`.
        damping_decay: the factor of the damping after a step that the quadratic model predicted well.
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
    (2019), arXiv:1906.02353; for physics-informed networks Müller & Zeinhofer (2023), arXiv:2302.13163.
    """

    _key = "natural_gradient"
    _what_is_inverted = "the Fisher matrix"
    _tolerated_rise = 1e-3
    _tries = 8

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        params: Groups = None,
        lr: float | None = None,
        momentum: float | None = 0.0,
        damping: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_kl: float | None = None,
        average: float | None = None,
        estimator: str = "exact",
        solver: str | None = None,
        max_size: int = 5000,
        tolerance: float | None = None,
        max_iterations: int = 250,
        damping_decay: float = 0.2,
        output: Way | None = None,
        generator: torch.Generator | None = None,
    ):
        check_choice("solver", solver, SOLVERS, optional=True)
        if solver == "cg" and estimator in ("mc", "empirical"):
            raise ValueError(
                f"solver='cg' has products of the exact matrix only; got estimator={estimator!r}: leave one of them out"
            )
        for name, count in (("max_size", max_size), ("max_iterations", max_iterations)):
            check_count(name, count)
        check_within("tolerance", tolerance, "(0, 1)", optional=True)
        check_within("damping_decay", damping_decay, "(0, 1]")
        super().__init__(
            model,
            loss,
            params=params,
            lr=lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            max_kl=max_kl,
            average=average,
            estimator=estimator,
            adapt_every=1,
            matmul_precision=None,
            output=output,
            generator=generator,
        )
        self.solver, self.max_size, self.max_iterations = solver, max_size, max_iterations
        eps = torch.finfo(next(iter(self._parameters.values())).dtype).eps
        self.tolerance = eps**0.75 if tolerance is None else tolerance
        # Below eps · tr F the damping is lost in rounding.
        self._rule = LevenbergMarquardt(damping_decay, eps * self._size())
        self._matrix: Joint | ByProducts | None = None
        self._inverse: Operator | None = None

    def _chosen(self) -> dict[str, Any]:
        return {} if self.solver is None else {"solver": self.solver}

    def _check_groups(self) -> None:
        super()._check_groups()
        shares = {0.0 if group["decoupled_weight_decay"] else group["weight_decay"] for group in self.param_groups}
        if len(shares) > 1:
            raise ValueError(
                f"weight_decay is {' and '.join(f'{eta:g}' for eta in sorted(shares))} in several groups, and "
                "one matrix of all parameters is damped by one; expected the same in all groups, or "
                "decoupled_weight_decay=True"
            )

    def _size(self) -> int:
        return sum(p.numel() for p in self._parameters.values() if p.requires_grad)

    # Between forward and step --------------------------------------------------------------------------

    def _statistics_due(self) -> bool:
        return self.solver != "cg"

    def _runs_again(self) -> bool:
        return self.solver in (None, "cg") or super()._runs_again()

    def _may_run_again(self) -> bool:
        return self.solver in (None, "cg") or super()._may_run_again()

    def _takes_cases(self, output: Tensor) -> bool:
        """Whether this batch, with those before it, is to be solved for by its cases."""
        if self.solver is not None:
            return self.solver != "cg"
        shapes = [b.shape for b in self._pending] + [output.shape]
        columns = sum(s.numel() if self.estimator == "exact" else s[0] for s in shapes)
        return min(columns, self._size()) <= self.max_size

    def _check_recorded(self, recorder: Recorder, output: Tensor) -> None:
        if not self._takes_cases(output):
            return
        try:
            recorder.check(output)
        except NotImplementedError as error:
            raise NotImplementedError(f"{error}, or use solver='cg', which covers all") from None

    def _observe(self, batch: Batch, recorder: Recorder, output: Tensor) -> None:
        if not self._takes_cases(output):
            return
        columns = self._curvature.columns(output, batch.target, self.estimator, generator=self._generator)
        # The matrix squares the condition of J: float64, whatever the parameters are.
        cases = read_cases(
            recorder.uses, output, columns, batch.mass, torch.float64, sampled=self.estimator == "mc"
        ).kept()
        if not all(torch.isfinite(g.sum()) for column in cases.columns for uses in column.values() for g in uses):
            batch.fault = "the curvature is not finite"
        batch.statistics = cases

    # The step ------------------------------------------------------------------------------------------

    def _step(self, pending: list[Batch], gradients: Vector) -> str | None:
        try:
            return super()._step(pending, gradients)
        finally:
            self._matrix = self._inverse = None  # they hold the batches

    def _take_in(self, objective: Objective, gradients: Vector) -> None:
        parameters = {n: self._parameters[n] for n in gradients}
        if all(b.statistics is not None for b in objective.batches):
            self._matrix = from_cases(objective, parameters)
        elif self.estimator == "exact":
            self._matrix = ByProducts(objective, parameters, self.tolerance, self.max_iterations)
        else:
            raise ValueError(
                f"the batch has more than max_size={self.max_size} cases and the model more parameters, and "
                f"conjugate gradients need estimator='exact', not {self.estimator!r}; use smaller batches, or raise "
                "max_size"
            )

    def _move(self, objective: Objective, g: Vector, decay: Decay, loss: float) -> str | None:
        """The step; where it fails and the damping is free, again with more damping and the same matrix."""
        for tries in range(1, self._tries + 1):
            fault = super()._move(objective, g, decay, loss)
            self.diagnostics["tries"] = tries
            if fault is None or not self._adaptive_damping:
                break
            assert self._damping is not None
            self._damping = self._rule.after_rejection(self._damping, tries)
        return fault

    def _refresh(self, damping: float, decay: Decay) -> None:
        assert self._matrix is not None
        damping += decay.same(self._parameters)
        if isinstance(self._matrix, Joint):
            form = self.solver or self._matrix.cheaper_form()
            self._inverse = self._matrix.inverse(damping, form=form)
        else:
            form = "cg"
            self._inverse = self._matrix.inverse(damping)
        self.diagnostics["solver"] = form

    def _direction(self, v: Vector) -> Vector:
        assert self._inverse is not None
        names = self._inverse.space.names or ()
        solved = self._inverse._matmul(tuple(v[n].to(self._inverse.dtype) for n in names))
        if isinstance(self._inverse, TruncatedInverse):
            _, residual, products = self._inverse.solution
            self.diagnostics |= {"residual": residual, "products": products}
        return {n: d.to(v[n].dtype) for n, d in zip(names, solved, strict=True)}

    def _scale(self) -> float:
        assert self._matrix is not None
        if isinstance(self._matrix, Joint):
            trace = self._matrix.trace()
        else:
            trace = self._matrix.estimate_trace(2, self._generator).value
        return float(trace) / self._matrix.space.size
