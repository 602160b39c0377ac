"""The exact Fisher matrix of the pending batches: from their cases, or by its products alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.order import Grouping
from natgrad.capture.reading import by_autograd, read_cases, with_zeros
from natgrad.capture.recorder import Recorder
from natgrad.capture.separation import SeparationCheck
from natgrad.capture.use import Use
from natgrad.linalg import Operator
from natgrad.linalg.joint import DualInverse, Joint, PrimalInverse
from natgrad.linalg.rescaled import RescaledInverse
from natgrad.optim.decay import Decay
from natgrad.optim.labels import Labels
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.base import Preconditioner
from natgrad.optim.preconditioner.joint import from_cases
from natgrad.optim.preconditioner.products import ByProducts, TruncatedInverse
from natgrad.optim.preconditioner.scaled import ScaledDamping, exponent_for
from natgrad.optim.rules.stage import Figures
from natgrad.optim.tracking.batch import Batch
from natgrad.optim.vectors import Vector

SOLVERS = ("dual", "primal", "cg")


@dataclass(frozen=True)
class ObservedBatch:
    """A batch's cases, the columns of its outputs, the outputs, and which of their rows make up a case."""

    cases: Cases
    columns: list[Tensor]
    output: Tensor
    grouping: Grouping

    def inner(self, output: Tensor) -> Tensor:
        """`Lᵀ (f − f₀)`, case by case and column by column as in `S`."""
        f = (output - self.output).double()
        parts = [part for column in self.columns for part in self.grouping.parts(column)]
        return torch.stack([self.grouping.of(part * f).flatten(1).sum(1) for part in parts], 1).flatten()


class ExactMatrix(Preconditioner):
    """`F = E[Jᵀ D J]` over all parameters together, of one step's batches.

    `NaturalGradient` says what the options mean. With `scaling=None` each step's matrix decides whether it is scaled.
    """

    inverted = "the Fisher matrix"
    reads_derivatives = True

    def __init__(
        self,
        parameters: Parameters,
        labels: Labels,
        *,
        estimator: str,
        solver: str | None,
        max_size: int,
        tolerance: float,
        max_iterations: int,
        scaling: float | None = 0.0,
    ):
        super().__init__(parameters)
        self.scaling = scaling
        self.labels, self.estimator, self.solver = labels, estimator, solver
        self.max_size, self.tolerance, self.max_iterations = max_size, tolerance, max_iterations
        self.runs_again = solver in (None, "cg")
        self._separation = SeparationCheck()
        self._derives = False  # whether the last forward that was checked takes derivatives itself
        self._matrix: Joint | ByProducts | None = None
        self._inverse: Operator | None = None
        self._scaled: ScaledDamping | None = None
        self._objective: Objective | None = None
        self._figures: Figures = {}
        self._columns = 0  # of this step's batches so far

    def chosen(self) -> dict[str, Any]:
        return {} if self.solver is None else {"solver": self.solver}

    def size(self) -> int:
        """The number of rows of `F`."""
        return sum(p.numel() for p in self.parameters.values() if p.requires_grad)

    # Between forward and step --------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        return self.solver != "cg"

    def _takes_cases(self, output: Tensor) -> bool:
        """Whether the step is computed from the cases of this batch and of those before it."""
        if self.solver is not None:
            return self.solver != "cg"
        columns = self._columns + (output.numel() if self.estimator == "exact" else len(output))
        return min(columns, self.size()) <= self.max_size

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        self._derives = recorder.takes_derivatives
        if not self._takes_cases(output):
            return recorder.uses
        try:
            return recorder.check(output, reached=True)
        except NotImplementedError:  # the rows of the Jacobian come from autograd alone then
            return []

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        takes = self._takes_cases(output)
        self._columns += output.numel() if self.estimator == "exact" else len(output)
        if not takes:
            return
        grouping = Grouping(len(output))
        taken: list[Tensor] = []

        def columns() -> Iterable[Tensor]:
            source = self.labels.generator
            L = batch.term.curvature.columns(output, batch.target, self.estimator, generator=source)
            taken[:] = [column.detach() for column in L]
            return taken

        trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        # The matrix squares the condition of J: float64, whatever the parameters are.
        if uses:
            separation = self._separation.of(uses, output, batch.forward.mode).in_common()
            grouping = separation.groupings[0]
            cases = read_cases(
                uses,
                output,
                columns,
                batch.mass,
                torch.float64,
                separation=separation,
                sampled=self.estimator == "mc",
            ).kept()
            if self._derives:  # a derivative may not depend on a bias that the model uses
                cases = with_zeros(cases, trained)
        else:
            cases = by_autograd(output, columns(), trained, batch.mass, torch.float64)
        if not all(torch.isfinite(g.sum()) for column in cases.columns for uses in column.values() for g in uses):
            batch.fault = "the curvature is not finite"
        batch.statistics = ObservedBatch(cases, taken, output.detach(), grouping)

    # The step ------------------------------------------------------------------------------------------

    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        parameters = {n: self.parameters[n] for n in gradients}
        self._figures = figures
        self._objective = objective
        self._scaled = None
        if all(b.statistics is not None for b in objective.batches):
            self._matrix = from_cases([b.statistics.cases for b in objective.batches], objective.shares, parameters)
            exponent = exponent_for(self._matrix, self.solver) if self.scaling is None else self.scaling
            if exponent != 0:
                self._scaled = ScaledDamping(self._matrix, exponent, self.solver)
        elif self.estimator == "exact":
            self._matrix = ByProducts(objective, parameters, self.tolerance, self.max_iterations)
        else:
            raise ValueError(
                f"the batch has more than max_size={self.max_size} cases and the model more parameters, and "
                f"conjugate gradients need estimator='exact', not {self.estimator!r}; use smaller batches, or raise "
                "max_size"
            )
        return set()

    def refresh(self, damping: float, decay: Decay, figures: Figures) -> None:
        assert self._matrix is not None
        eta = decay.same(self.parameters)
        if not isinstance(self._matrix, Joint):
            form = "cg"
            self._inverse = self._matrix.inverse(damping + eta)
        elif self._scaled is not None:
            form, self._inverse = self._scaled.form, self._scaled.inverse(damping, eta)
        else:
            form = self.solver or self._matrix.cheaper_form()
            self._inverse = self._matrix.inverse(damping + eta, form=form)
        figures["solver"] = form
        if self._scaled is not None:
            figures["scaling"] = self._scaled.exponent

    def in_units_of_damping(self, v: Vector) -> Vector:
        """`M v`, where the damping adds `λ M` to the matrix."""
        return v if self._scaled is None else self._scaled.times(v)

    def damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        if self._scaled is None:
            return super().damped_gram(directions, damping)
        return damping * self._scaled.gram(directions)

    def apply(self, v: Vector) -> Vector:
        assert self._inverse is not None
        names = self._inverse.space.names or ()
        solved = self._inverse._matmul(tuple(v[n].to(self._inverse.dtype) for n in names))
        if isinstance(self._inverse, TruncatedInverse):
            _, residual, products = self._inverse.solution
            self._figures |= {"residual": residual, "products": products}
        return {n: d.to(v[n].dtype) for n, d in zip(names, solved, strict=True)}

    # The columns of its matrix ---------------------------------------------------------------------------

    @property
    def holds_columns(self) -> bool:
        return isinstance(self._matrix, Joint) and self.estimator == "exact"

    def inner(self, v: Vector) -> Tensor:
        assert isinstance(self._matrix, Joint)
        names = self._matrix.space.names or ()
        return self._matrix.inner(tuple(v[n].to(self._matrix.dtype) for n in names))

    def inner_outputs(self, outputs: list[Tensor]) -> Tensor:
        assert self._objective is not None
        inner = []
        for share, batch, output in zip(self._objective.shares, self._objective.batches, outputs, strict=True):
            inner.append(share**0.5 * batch.statistics.inner(output))
        return torch.cat(inner)

    def solve_columns(self, c: Tensor) -> Vector:
        assert isinstance(self._inverse, (DualInverse, PrimalInverse, RescaledInverse))
        names = self._inverse.space.names or ()
        solved = self._inverse.solve_columns(c)
        return {n: d.to(self.parameters[n].dtype) for n, d in zip(names, solved, strict=True)}

    def scale(self) -> float:
        """The mean of the eigenvalues that can differ from zero: as many as there are columns, or rows."""
        assert self._matrix is not None
        if isinstance(self._matrix, Joint):
            trace = self._matrix.trace()
        else:
            trace = self._matrix.estimate_trace(2, self.labels.generator).value
        return float(trace) / max(1, min(self._matrix.space.size, self._columns))

    def end_step(self) -> None:
        self._matrix = self._inverse = self._scaled = self._objective = None  # they hold the batches
        self._columns = 0
