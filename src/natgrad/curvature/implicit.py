"""Matrices of a model on data that are known only through matrix-vector products."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.graph import refuse_reentrant
from natgrad.curvature.jacobian import Jacobian, twice_differentiable
from natgrad.curvature.problem import Problem, check_mass, check_output
from natgrad.curvature.products import gauss_newton_product, tangent
from natgrad.distributed.gathering import in_common, jointly
from natgrad.linalg import Block, BlockDiagonal, Dense, Operator, Space
from natgrad.linalg.arguments import check_damping, check_plain
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.operator import DENSE_LIMIT
from natgrad.linalg.space import Parts

Vector = dict[str, Tensor]


class Implicit(Operator):
    """A matrix whose product with a vector is a pass over the data.

    `solve` and `inverse` use conjugate gradients, to a relative residual of `eps^¾`. Use the matrix in evaluation mode:
    in training mode, the random numbers of dropout may differ from product to product. With a model on several ranks,
    all ranks compute each product together.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        parameters = problem.parameters
        self.space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
        self.dtype, self.device = problem.dtype, problem.device

    @abstractmethod
    def _add_product(self, batch: Any, v: Vector, total: Vector) -> Tensor:
        """Adds one batch's product with `v`, for the sum over cases, to `total`. Returns the divisor of the mean."""

    def _matmul(self, parts: Parts) -> Parts:
        if parts[0].ndim > len(self.space.shapes[0]):  # leading axes: one product at a time
            rows = [self._matmul(tuple(p[i] for p in parts)) for i in range(len(parts[0]))]
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        assert self.space.names is not None
        total = {n: torch.zeros_like(p) for n, p in zip(self.space.names, parts, strict=True)}
        own = self.problem.parameters
        v = {n: p.to(own[n].dtype) for n, p in zip(self.space.names, parts, strict=True)}
        mass = torch.zeros((), dtype=self.dtype, device=self.device)
        with jointly(self.problem.world, "the product"):
            self._check_common(parts)
            for batch in self.problem:
                mass += self._add_product(batch, v, total)
        for t in (*total.values(), mass):
            self.problem.world.sum(t, "the product")
        scale = self._scale(mass)
        return tuple(total[n] * scale for n in self.space.names)

    def _check_common(self, parts: Parts) -> None:
        world = self.problem.world
        if world.size == 1:
            return
        own = [float(f(p.double())) for p in parts for f in (torch.sum, torch.linalg.vector_norm)]
        if any(other != own for other in world.gather(own, "the vector")):
            raise ValueError(
                f"the ranks multiply different vectors, rank {world.rank} one of norms {own[1::2]}; expected the same "
                "on all, as they are multiplied together"
            )

    def _source(self, generator: torch.Generator | None) -> torch.Generator | None:
        return in_common(self.problem.world, generator, self.device)

    def _scale(self, mass: Tensor) -> Tensor | float:
        check_mass(mass, self.problem.curvature.is_mean)
        return 1 / mass if self.problem.curvature.is_mean else 1.0

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        check_plain("an implicit matrix", damping_style)
        return IterativeInverse(self, damping)


class ImplicitGaussNewton(Implicit):
    """`E[Jᵀ D J]`: each product is a forward-mode and a reverse-mode pass over the data (Schraudolph 2002), or three
    backward passes if forward mode disagrees with the backward pass."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self._jacobian = Jacobian()

    def _add_product(self, batch: Any, v: Vector, total: Vector) -> Tensor:
        held: dict[str, Tensor] = {}
        curvature = self.problem.curvature

        def call(forward: Any) -> Tensor:
            output, held["target"] = self.problem.run(forward, batch)
            return output

        def curve(output: Tensor, Jd: Tensor) -> Tensor:
            check_output(output)
            held["mass"] = curvature.normalizer(output, held["target"])
            return self._curved(output, held["target"], Jd)

        model = self.problem.model
        key = shapes(batch), tuple(module.training for module in model.modules())
        by_reverse = self._jacobian.by_reverse(key, model, call, v, partial(tangent, model, call))
        for n, p in gauss_newton_product(model, call, v, curve, by_reverse).items():
            total[n] += p
        self.notes = self.problem.notes
        return held["mass"]

    def _curved(self, output: Tensor, target: Any, Jd: Tensor) -> Tensor:
        """`D J d`."""
        return self.problem.curvature.product(output, target, Jd)


class ImplicitSampled(ImplicitGaussNewton):
    """`E[Jᵀ S Sᵀ J]`, with columns `S` from random labels or from the given targets. They are the same in every
    product."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        problem.hold_labels()
        self._norms: list[float] = []
        self._at = 0

    def _matmul(self, parts: Parts) -> Parts:
        self.problem.same_labels()
        self._at = 0
        return super()._matmul(parts)

    def _curved(self, output: Tensor, target: Any, Jd: Tensor) -> Tensor:
        self._check_same(float(output.double().norm()))
        total = torch.zeros_like(output)
        for s in self.problem.columns(output, target):
            total += s * (s * Jd).flatten(1).sum(1).view(-1, *[1] * (s.ndim - 1))
        return total

    def _check_same(self, norm: float) -> None:
        """Raises ValueError if a batch gives another output than in the first pass: its labels would belong to other
        examples."""
        if self._at == len(self._norms):
            self._norms.append(norm)
        if not math.isclose(norm, self._norms[self._at], rel_tol=1e-4):
            raise ValueError(
                f"the outputs of batch {self._at} differ from those in the first pass over the data, so its labels no "
                "longer fit; give the data in a fixed order, put the model in evaluation mode, and make the matrix "
                "again after a training step"
            )
        self._at += 1


class ImplicitHessian(Implicit):
    """The objective's Hessian: each product is a gradient of the gradient's inner product with `v`."""

    def _add_product(self, batch: Any, v: Vector, total: Vector) -> Tensor:
        leaves, gradients, mass = self._gradients(batch)
        for n, p in _vjp(gradients, leaves, list(v), [v[n] for n in leaves]).items():
            total[n] += p
        return mass

    def _gradients(self, batch: Any) -> tuple[Vector, Vector, Tensor]:
        """New leaf tensors for the parameters, the gradient of the summed loss in them with its graph, and the mass."""
        model, curvature = self.problem.model, self.problem.curvature
        owned = dict(model.named_parameters())
        leaves: Vector = {n: owned[n] for n in self.space.names or ()}
        with torch.enable_grad(), twice_differentiable():
            output, target = self.problem.run(model, batch)
            check_output(output)
            refuse_reentrant(output)
            mass = curvature.normalizer(output.detach(), target)
            loss = curvature.loss(output, target) * (mass if curvature.is_mean else 1)
            values = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        gradients = {n: g for n, g in zip(leaves, values, strict=True) if g is not None and g.requires_grad}
        return leaves, gradients, mass

    def formed(self) -> Dense:
        """The matrix itself."""
        return Dense(self._formed(self.space), self.space)

    def block_diagonal(self) -> BlockDiagonal:
        """The block of each module, as a dense matrix."""
        shapes = dict(zip(self.space.names or (), self.space.shapes, strict=True))
        blocks = {}
        for group, names in self.space.groups().items():
            space = Space(tuple(shapes[n] for n in names), names)
            blocks[group] = Block(Dense(self._formed(space), Space(space.shapes)), names)
        return BlockDiagonal(blocks, self.space)

    def _formed(self, space: Space) -> Tensor:
        """The rows and columns of some parameters. Each row is the gradient of one entry of the gradient."""
        if space.size > DENSE_LIMIT:
            raise ValueError(
                f"the Hessian has {space.size} rows, above the limit of {DENSE_LIMIT}; use structure='implicit'"
            )
        names = space.names or ()
        H = torch.zeros(space.size, space.size, dtype=self.problem.dtype, device=self.device)
        mass = torch.zeros((), dtype=H.dtype, device=self.device)
        with jointly(self.problem.world, "the Hessian"):
            for batch in self.problem:
                leaves, gradients, batch_mass = self._gradients(batch)
                mass += batch_mass
                its_leaves = {n: leaves[n] for n in names}
                for start, rows in _unit_rows(space, H):
                    units = zip(names, space.unflatten(rows), strict=True)
                    parts = {n: unit.to(leaves[n].dtype) for n, unit in units}
                    products = _vjp(gradients, its_leaves, list(names), [parts[n] for n in names], batched=True)
                    H[start : start + len(rows)] += space.flatten(tuple(products[n].to(H.dtype) for n in names))
        self.problem.world.sum(H, "the Hessian")
        self.problem.world.sum(mass, "the Hessian")
        H = H * self._scale(mass)
        if not torch.isfinite(H).all():
            raise ValueError("the Hessian has entries that are not finite; look for NaN or inf in targets or weights")
        if (H - H.mT).norm() > max(1e-6, 10 * torch.finfo(H.dtype).eps ** 0.5) * H.norm():
            if self.problem.precision is not None:
                raise NotImplementedError(
                    "the second derivatives are not symmetric, because the model is too imprecise within "
                    "torch.autocast; call hessian outside of it"
                )
            raise NotImplementedError(
                "the second derivatives are not symmetric: the backward of some function in the model is not its "
                "derivative, so there is no Hessian. Use natgrad.gauss_newton, or freeze what comes before it"
            )
        return (H + H.mT) / 2


def shapes(value: Any) -> Hashable:
    """The shapes of all tensors in a batch."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((k, shapes(v)) for k, v in value.items())
    return tuple(map(shapes, value)) if isinstance(value, (tuple, list)) else None


def _vjp(gradients: Vector, leaves: Vector, names: list[str], v: list[Tensor], batched: bool = False) -> Vector:
    """The gradient of `⟨gradients, v⟩` in the leaves; if `batched`, for every row of `v`."""
    reached = [(gradients[n], vn) for n, vn in zip(names, v, strict=True) if n in gradients]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if reached:
        outputs, weights = zip(*reached, strict=True)
        found = torch.autograd.grad(
            outputs, list(leaves.values()), weights, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    leading = v[0].shape[:1] if batched else ()
    return {
        n: leaf.new_zeros(*leading, *leaf.shape) if p is None else p
        for (n, leaf), p in zip(leaves.items(), found, strict=True)
    }


def _unit_rows(space: Space, like: Tensor, budget: int = 1 << 25) -> Iterator[tuple[int, Tensor]]:
    """The rows of the identity in blocks, each with the index of its first row."""
    step = max(1, budget // space.size)
    for start in range(0, space.size, step):
        rows = like.new_zeros(min(step, space.size - start), space.size)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1
        yield start, rows
