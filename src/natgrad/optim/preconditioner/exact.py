"""The exact Fisher matrix of the pending batches: from their cases, or by its products alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, Rows
from natgrad.capture.reading import read_cases
from natgrad.capture.recorder import Recorder
from natgrad.capture.separation import SeparationCheck
from natgrad.capture.use import Use
from natgrad.curvature.blocks import assemble
from natgrad.curvature.exact import ExactStructure
from natgrad.linalg import Operator, Space
from natgrad.linalg.joint import Joint
from natgrad.linalg.krylov import Solution, conjugate_gradient
from natgrad.linalg.operator import check_damping
from natgrad.linalg.space import Parts
from natgrad.optim.decay import Decay
from natgrad.optim.labels import Labels
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.base import Preconditioner
from natgrad.optim.rules.stage import Figures
from natgrad.optim.tracking.batch import Batch
from natgrad.optim.vectors import Vector

SOLVERS = ("dual", "primal", "cg")


class ExactMatrix(Preconditioner):
    """`F = E[Jᵀ D J]` over all parameters together, of one step's batches.

    `NaturalGradient` says what the options mean.
    """

    inverted = "the Fisher matrix"

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
    ):
        super().__init__(parameters)
        self.labels, self.estimator, self.solver = labels, estimator, solver
        self.max_size, self.tolerance, self.max_iterations = max_size, tolerance, max_iterations
        self.runs_again = solver in (None, "cg")
        self._separation = SeparationCheck()
        self._matrix: Joint | ByProducts | None = None
        self._inverse: Operator | None = None
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
        """Whether this batch, with those before it, is to be solved for by its cases."""
        if self.solver is not None:
            return self.solver != "cg"
        columns = self._columns + (output.numel() if self.estimator == "exact" else len(output))
        return min(columns, self.size()) <= self.max_size

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        if not self._takes_cases(output):
            return recorder.uses
        try:
            return recorder.check(output, reached=True)
        except NotImplementedError as error:
            raise NotImplementedError(f"{error}, or use solver='cg', which covers all") from None

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        takes = self._takes_cases(output)
        self._columns += output.numel() if self.estimator == "exact" else len(output)
        if not takes:
            return
        # The matrix squares the condition of J: float64, whatever the parameters are.
        cases = read_cases(
            uses,
            output,
            partial(
                batch.term.curvature.columns, output, batch.target, self.estimator, generator=self.labels.generator
            ),
            batch.mass,
            torch.float64,
            separation=self._separation.of(uses, output, batch.forward.mode).in_common(),
            sampled=self.estimator == "mc",
        ).kept()
        if not all(torch.isfinite(g.sum()) for column in cases.columns for uses in column.values() for g in uses):
            batch.fault = "the curvature is not finite"
        batch.statistics = cases

    # The step ------------------------------------------------------------------------------------------

    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        parameters = {n: self.parameters[n] for n in gradients}
        self._figures = figures
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
        return set()

    def refresh(self, damping: float, decay: Decay, figures: Figures) -> None:
        assert self._matrix is not None
        damping += decay.same(self.parameters)
        if isinstance(self._matrix, Joint):
            form = self.solver or self._matrix.smaller_form()
            self._inverse = self._matrix.inverse(damping, form=form)
        else:
            form = "cg"
            self._inverse = self._matrix.inverse(damping)
        figures["solver"] = form

    def apply(self, v: Vector) -> Vector:
        assert self._inverse is not None
        names = self._inverse.space.names or ()
        solved = self._inverse._matmul(tuple(v[n].to(self._inverse.dtype) for n in names))
        if isinstance(self._inverse, TruncatedInverse):
            _, residual, products = self._inverse.solution
            self._figures |= {"residual": residual, "products": products}
        return {n: d.to(v[n].dtype) for n, d in zip(names, solved, strict=True)}

    def scale(self) -> float:
        assert self._matrix is not None
        if isinstance(self._matrix, Joint):
            trace = self._matrix.trace()
        else:
            trace = self._matrix.estimate_trace(2, self.labels.generator).value
        return float(trace) / self._matrix.space.size

    def end_step(self) -> None:
        self._matrix = self._inverse = None  # they hold the batches
        self._columns = 0


def from_cases(objective: Objective, parameters: Mapping[str, Tensor]) -> Joint:
    """`F` over the given parameters, from the cases that were taken of every batch.

    Raises:
        NotImplementedError: if a parameter is in no layer, or in layers with one bias here and another there.
        ValueError: if a batch counts negatively.
    """
    layers: dict[Layer, tuple[Inputs, int]] = {}
    for batch in objective.batches:
        for layer, h in batch.statistics.h.items():
            layers[layer] = (h[0], batch.statistics.d_out[layer])
    kept = {layer: _within(layer, parameters) for layer in layers}
    _check_covered([part for part in kept.values() if part is not None], parameters)
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    uses = (names for batch in objective.batches for names in batch.statistics.together)
    together = dict.fromkeys(tuple(n for n in names if n in parameters) for names in uses)
    structure = ExactStructure()
    for share, batch in zip(objective.shares, objective.batches, strict=True):
        if share < 0:
            raise ValueError(
                f"a batch counts {share:.3g} times in the objective: the Fisher matrix of a loss with a negative "
                "factor is not positive semidefinite; expected positive factors"
            )
        cases = _weighted(batch.statistics, share**0.5, layers, kept)
        structure.add(replace(cases, shapes=shapes, together=tuple(together)))
    return Joint(assemble(structure.build(is_mean=False), parameters))


def _within(layer: Layer, parameters: Mapping[str, Tensor]) -> Layer | None:
    """What is left of a layer with the given parameters alone."""
    weight = layer.weight if layer.weight in parameters else None
    bias = layer.bias if layer.bias in parameters else None
    return replace(layer, weight=weight, bias=bias) if weight or bias else None


def _check_covered(layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> None:
    covered = [n for names in {layer.names for layer in layers} for n in names]
    for n in parameters:
        if n not in covered:
            raise NotImplementedError(
                f"{n!r} has a gradient but was not used in any forward that opt.loss followed; expected gradients "
                "from opt.loss alone. Freeze it with requires_grad_(False)"
            )
        if covered.count(n) > 1:
            raise NotImplementedError(
                f"{n!r} was used with one partner in one batch and with another in the next: the exact matrix cannot "
                "be put together from their cases; pass solver='cg'"
            )


def _weighted(
    cases: Cases, factor: float, layers: Mapping[Layer, tuple[Inputs, int]], kept: Mapping[Layer, Layer | None]
) -> Cases:
    """The cases of the layers that are kept, with `factor` times the gradients; zeros where a layer was not used."""
    columns = list(cases.columns)
    number = next(iter(cases.h.values()))[0].shape[0]  # of cases, the same in all layers
    h: dict[Layer, list[Inputs]] = {}
    g: list[dict[Layer, list[Tensor]]] = [{} for _ in columns]
    d_out: dict[Layer, int] = {}
    for layer, (template, width) in layers.items():
        part = kept[layer]
        if part is None:
            continue
        uses = cases.h.get(layer, [template.blank(number)])
        h[part] = uses if part.weight else [Rows(cases.mass.new_zeros(*use.shape[:2], 0)) for use in uses]
        for its, column in zip(g, columns, strict=True):
            gradients = column.get(layer, [cases.mass.new_zeros(*use.shape[:2], width) for use in uses])
            its[part] = [factor * _of(part, layer, use) for use in gradients]
        d_out[part] = _of(part, layer, cases.mass.new_empty(width)).shape[-1]
    return Cases(h, g, d_out, cases.mass, cases.examples)


def _of(part: Layer, layer: Layer, g: Tensor) -> Tensor:
    """The gradients of what is left of a layer: of a scale's coordinates, those of the scale or of the shift."""
    if not layer.scale or part.names == layer.names:
        return g
    return g.chunk(2, -1)[0 if part.weight else 1]


class ByProducts(Operator):
    """`F` by a forward-mode and a reverse-mode pass over the pending batches for each product.

    The inverse is by conjugate gradients, to a relative residual of `tolerance` or `max_iterations` products.
    """

    def __init__(self, objective: Objective, parameters: Mapping[str, Tensor], tolerance: float, max_iterations: int):
        self.space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self._names = tuple(parameters)
        self._product = objective.product(self._names)

    def _matmul(self, parts: Parts) -> Parts:
        product = self._product(dict(zip(self._names, parts, strict=True)))
        return tuple(product[n] for n in self._names)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> TruncatedInverse:
        check_damping(damping, damping_style)
        return TruncatedInverse(self, damping)


class TruncatedInverse(Operator):
    """`(F + λI)⁻¹` as far as conjugate gradients have come; `solution` tells of the last time."""

    solution: Solution

    def __init__(self, matrix: ByProducts, damping: float):
        self.matrix, self.damping = matrix, damping
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device

    def _matmul(self, parts: Parts) -> Parts:
        def product(v: Tensor) -> Tensor:
            return self.space.flatten(self.matrix._matmul(self.space.unflatten(v))) + self.damping * v

        tolerance, most = self.matrix.tolerance, self.matrix.max_iterations
        try:
            self.solution = conjugate_gradient(product, self.space.flatten(parts), tol=tolerance, max_iter=most)
        except RuntimeError as error:  # not positive definite
            raise ValueError(str(error)) from error
        return self.space.unflatten(self.solution.x)
