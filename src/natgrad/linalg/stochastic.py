"""Estimates for a matrix that is known only through its products, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.values import check_count
from natgrad.linalg.arguments import check_damping, singular
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate and its standard error, of the same form: the result of an operator's `estimate_*`.

    Args:
        value: the mean over the probes: a scalar, or a vector of the operator.
        standard_error: the standard deviation of that mean.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense
        >>> M = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> trace = M.estimate_trace(samples=400, generator=torch.Generator().manual_seed(0))
        >>> bool((trace.value - 4).abs() < 4 * trace.standard_error)
        True
    """

    value: Any
    standard_error: Any

    def __repr__(self) -> str:
        if isinstance(self.value, Tensor) and self.value.ndim == 0:
            return f"Estimate({self.value:.6g} ± {self.standard_error:.2g})"
        return f"Estimate(value={self.value!r}, standard_error={self.standard_error!r})"


@later
def estimate_trace(operator: Operator, samples: int, generator: torch.Generator | None) -> Estimate:
    """`E[zᵀ M z] = tr M` for random signs `z`."""
    return _mean_of(torch.stack([z @ product(operator, z) for z in probes(operator, samples, generator)]))


@later
def estimate_diagonal(operator: Operator, samples: int, generator: torch.Generator | None) -> Estimate:
    """`E[z ∘ M z] = diag M` for random signs `z`."""
    mean = torch.zeros(operator.space.size, dtype=operator.dtype, device=operator.device)
    scatter = torch.zeros_like(mean)
    for i, z in enumerate(probes(operator, samples, generator), 1):
        difference = z * product(operator, z) - mean
        mean += difference / i
        scatter += difference.square() * ((i - 1) / i)
    error = (scatter / (samples - 1) / samples).sqrt()
    unflatten = operator.space.unflatten
    return Estimate(operator._form(unflatten(mean)), operator._form(unflatten(error)))


@later
def estimate_logdet(
    operator: Operator, damping: float, samples: int, steps: int, generator: torch.Generator | None
) -> Estimate:
    """`E[zᵀ log(M + λI) z]`, each term by the Gauss quadrature of `steps` Lanczos steps from `z`."""
    check_damping(damping)
    check_count("steps", steps, "products")
    values = []
    for z in probes(operator, samples, generator):
        nodes, weights = quadrature(operator, z, min(steps, operator.space.size))
        if not (nodes + damping > 0).all():
            raise singular(operator._label(), damping, float(nodes.min()))
        values.append(z.square().sum() * (weights * (nodes + damping).log()).sum())
    return _mean_of(torch.stack(values))


def quadrature(operator: Operator, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the spectral measure of `z`, by Lanczos with full reorthogonalization."""
    basis, diagonal, below = [z / z.norm()], [], []
    for _ in range(steps):
        w = product(operator, basis[-1])
        diagonal.append(basis[-1] @ w)
        V = torch.stack(basis)
        for _ in range(2):  # a single pass leaves rounding errors that grow
            w = w - V.mT @ (V @ w)
        below.append(w.norm())
        if below[-1] <= torch.finfo(w.dtype).eps * max(d.abs() for d in diagonal) * len(z):
            break  # the space is invariant: the quadrature is exact
        basis.append(w / below[-1])
    T = torch.diag(torch.stack(diagonal))
    if len(diagonal) > 1:
        off = torch.stack(below[: len(diagonal) - 1])
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(T)
    return nodes, vectors[0].square()


def probes(operator: Operator, samples: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Vectors of random signs."""
    check_count("samples", samples, least=2)  # a standard error needs two
    generator = operator._source(generator)
    for _ in range(samples):
        yield random_signs(operator, (), generator)


def random_signs(operator: Operator, lead: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Flat vectors of random signs, along the leading axes `lead`."""
    shape = (*lead, operator.space.size)
    return (2 * torch.randint(2, shape, generator=generator, device=operator.device) - 1).to(operator.dtype)


def product(operator: Operator, z: Tensor) -> Tensor:
    """The product with a flat vector, or with each row."""
    return operator.space.flatten(operator._matmul(operator.space.unflatten(z)))


def _mean_of(values: Tensor) -> Estimate:
    return Estimate(values.mean(), values.std() / len(values) ** 0.5)
