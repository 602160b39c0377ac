"""Solves with the exact matrix of a model on data, for many right-hand sides at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.problem import Problem, check_mass
from natgrad.distributed.gathering import jointly
from natgrad.distributed.world import World
from natgrad.linalg import Operator, Space
from natgrad.linalg.krylov import check_curvature
from natgrad.linalg.space import Parts
from natgrad.uses.rows import Rows, rows_of

KEPT = 1 << 27
"""The cases of all batches are kept in memory if they are no more numbers than this."""
BUDGET = 1 << 25


class ByCases(Operator):
    """The Fisher information `Σ s sᵀ` of a problem, from the cases of its layers.

    A product reads the data once for any number of vectors: `k` backward passes a batch, of `k` columns. If the cases
    are small they are kept, and products need no pass at all. If the data are those of several ranks, a product is that
    of all of them, and all ranks compute it together.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        parameters = problem.parameters
        self.space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
        self.dtype, self.device = problem.dtype, problem.device
        self._kept: list[Rows] | None = None
        self._own_mass = torch.zeros((), dtype=self.dtype, device=self.device)
        self._mass: Tensor | None = None

    def _matmul(self, parts: Parts) -> Parts:
        flat = self.space.flatten(parts)
        V = flat.reshape(-1, self.space.size)
        v = dict(zip(self.space.names or (), self.space.unflatten(V), strict=True))
        total = torch.zeros_like(V)
        with jointly(self.problem.world, "the product"):
            for rows in self._rows():
                width = max(cases.h.shape[1] * cases.g.shape[3] for _, _, cases in rows.blocks())
                step = max(1, BUDGET // max(1, len(V) * width))
                for start in range(0, len(rows), step):
                    part = rows.part(slice(start, start + step))
                    found = part.transposed(part.times(v))
                    total += self.space.flatten(tuple(found[n] for n in self.space.names or ()))
        total = self.problem.world.sum(total, "the product")
        if self._mass is None:
            self._mass = self.problem.world.sum(self._own_mass, "the losses' normalizers")
            check_mass(self._mass, self.problem.curvature.is_mean)
        if self.problem.curvature.is_mean:
            total = total / self._mass
        return self.space.unflatten(total.reshape(flat.shape))

    def _rows(self) -> Iterator[Rows]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Rows] | None = []
        mass = torch.zeros((), dtype=self.dtype, device=self.device)
        total = 0
        for rows in rows_of(self.problem, self.problem.columns):
            mass += self.problem.curvature.normalizer(rows.output, rows.target)
            total += sum(cases.h.numel() + cases.g.numel() for _, _, cases in rows.blocks())
            kept = [*kept, rows] if kept is not None and total <= KEPT else None
            yield rows
        self._kept, self._own_mass = kept, mass


def refined(
    M: Operator,
    damping: float,
    preconditioner: Operator,
    b: Float[Tensor, "q size"],
    x: Float[Tensor, "q size"],
    steps: int,
    tol: float,
    world: World,
) -> Float[Tensor, "q size"]:
    """`(M + damping I)⁻¹ b` by at most `steps` steps of preconditioned conjugate gradients from `x`, row by row.

    A row whose residual is below `tol ‖b‖` stays where it is. The ranks of `world` compute this together, and stop
    together.

    Raises:
        NotDefiniteError: if `M + damping I` is not positive definite.
    """
    x = x.clone()
    r = b - (M @ x + damping * x)
    z = preconditioner @ r
    p, rz = z, (r * z).sum(1)
    size = b.norm(dim=1)
    for _ in range(steps):
        open_ = r.norm(dim=1) > tol * size
        if not world.numbers([float(open_.any())], "the residuals")[0]:
            break
        Mp = M @ p + damping * p
        curvature = (p * Mp).sum(1)
        check_curvature(curvature[open_])
        step = torch.where(open_, rz / curvature, 0.0).unsqueeze(1)
        x, r = x + step * p, r - step * Mp
        z = preconditioner @ r
        now = (r * z).sum(1)
        p, rz = z + torch.where(open_, now / rz, 0.0).unsqueeze(1) * p, now
    return x
