"""What K-FAC neglects, and the condition numbers of its input factors, in the middle of a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import natgrad
from natgrad.curvature.blocks import input_factor
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.moments import AffineMoments
from natgrad.curvature.problem import Problem
from natgrad.study.spec import Measure
from natgrad.study.task import Task
from natgrad.study.tasks import SUBSET

FEW_OUTPUTS = 16
"""Up to this many outputs per example, all columns of the output curvature are used; above, sampled labels."""
RELATIVE_FLOOR = torch.finfo(torch.float64).eps
"""Eigenvalues below the largest times this, times the size of the matrix, are rounding errors and are raised to that
value. NumPy and MATLAB determine the rank of a matrix with the same threshold."""


def measure(model: nn.Module, task: Task, wanted: Measure, seed: int) -> dict[str, Any]:
    """For each layer: `relative`, `unbiased` (`hsic_unbiased^½ / ‖G‖`, or zero), `cka`, `p_value`, the spreads of `x
    xᵀ` and of the output curvature in units of the norms of their means, and the condition numbers of `A` and `C`.
    Values that do not exist are None. The measurement has its own random numbers, so it does not affect the training.

    Residuals use `wanted.examples` examples, because an independence test compares all pairs. Condition numbers use the
    first 2,000, because every covariance of fewer cases than inputs is singular.
    """
    x, y = task.sample(wanted.examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs = model(x[:1]).numel()
        few = outputs <= FEW_OUTPUTS
        report = natgrad.residual(
            model,
            task.loss,
            (x, y),
            estimator="exact" if few else "mc",
            samples=1 if few else wanted.samples,
            permutations=wanted.permutations,
            generator=torch.Generator(x.device).manual_seed(seed),
        )
        conditions = conditioning(model, task)
    return {
        name: {
            "relative": _number(r.relative),
            "unbiased": _number(math.sqrt(max(r.hsic_unbiased, 0.0)) / r.block_norm if r.block_norm else math.nan),
            "cka": _number(r.cka),
            "input_spread": _number(r.input_spread / r.input_norm if r.input_norm else math.nan),
            "output_spread": _number(r.output_spread / r.output_norm if r.output_norm else math.nan),
            "p_value": _number(r.p_value),
            **conditions.get(name, {"A": None, "C": None, "floored": False}),
        }
        for name, r in report.items()
    }


def conditioning(model: nn.Module, task: Task) -> dict[str, dict[str, float | bool | None]]:
    """For each layer, the condition numbers of the second moment `A` of `x = [h; 1]` and of the covariance `C` of `h`,
    and whether one of them is a lower bound because some eigenvalues are rounding errors."""
    x, y = task.sample(SUBSET)
    structure = KfacStructure()
    batches = list(zip(x.split(500), y.split(500), strict=True))
    for cases in Problem(model, task.loss, batches, estimator="mc", dtype=torch.float64).cases():
        structure.add(cases)
    found: dict[str, dict[str, float | bool | None]] = {}
    for layer, m in structure.moments.items():
        if not isinstance(m, AffineMoments) or not layer.weight or m.scatter.ndim == 1:
            continue
        varying = m.C.diagonal() > RELATIVE_FLOOR * m.A.diagonal()
        A = input_factor(layer, m, centered=False).double()
        of_A, raised = condition_number(_part(A, varying))
        of_C, more = condition_number(_part(m.C.double(), varying)) if layer.bias else (None, 0)
        found[layer.name] = {"A": of_A, "C": of_C, "floored": raised + more > 0}
    return found


def _part(M: Float[Tensor, "d d"], varying: Bool[Tensor, " inputs"]) -> Float[Tensor, "kept kept"]:
    """The matrix without inputs that never vary, such as pixels at the border; a row of the bias is kept."""
    kept = torch.cat([varying, varying.new_ones(len(M) - len(varying))])
    return M[kept][:, kept]


def condition_number(M: Float[Tensor, "d d"]) -> tuple[float, int]:
    """The largest eigenvalue of a positive semidefinite matrix divided by the smallest, and the number of eigenvalues
    that were raised to the floor; if there are any, the condition number is a lower bound.

    >>> condition_number(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
    (4.0, 0)
    """
    if len(M) == 0:
        return 1.0, 0
    eigenvalues = torch.linalg.eigvalsh(M)
    largest = eigenvalues[-1].item()
    floor = RELATIVE_FLOOR * len(M) * largest
    smallest = max(eigenvalues[0].item(), floor)
    return (largest / smallest if smallest > 0 else 1.0), int((eigenvalues < floor).sum())


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
