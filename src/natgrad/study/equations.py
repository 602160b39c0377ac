"""Differential equations with known solutions: residuals, conditions, and points of their domains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from natgrad.pde import Derivatives, on_faces, uniform

F64 = torch.float64
Points = Float[Tensor, "n d"]
Values = Float[Tensor, "n 1"]


class Equation(ABC):
    """An equation for `u(x)` in `d` space dimensions. If there is time, it is coordinate 0."""

    formula: str
    has_time = False

    def __init__(self, d: int):
        self.d = d

    @property
    def inputs(self) -> int:
        """The number of coordinates of a point."""
        return self.d + self.has_time

    @property
    def over(self) -> list[int] | None:
        """The coordinates of the Laplacian. None: all coordinates."""
        return list(range(1, self.inputs)) if self.has_time else None

    @abstractmethod
    def solution(self, x: Points) -> Values:
        """`u*`."""

    @abstractmethod
    def residual(self, u: Derivatives, x: Points) -> Values:
        """The expression that is zero inside the domain."""

    def interior(self, n: int, generator: Generator) -> Points:
        """Points inside the domain."""
        return uniform(n, self.inputs, generator=generator, dtype=F64)

    def conditions(self, n: int, generator: Generator) -> Points:
        """Points where `u = u*` is imposed."""
        return on_faces(n, self.d, generator=generator, dtype=F64)


class Poisson(Equation):
    """`Δu = Δu*` on the unit cube, `u = u*` on its faces."""

    @abstractmethod
    def source(self, x: Points) -> Values:
        """`−Δu*`."""

    def residual(self, u: Derivatives, x: Points) -> Values:
        return u.laplacian + self.source(x)


class SineProduct(Poisson):
    """`u* = Π sin(π x_i)`."""

    formula = "Δu + d π² Π sin(π x_i) = 0"

    def solution(self, x: Points) -> Values:
        return (math.pi * x).sin().prod(1, keepdim=True)

    def source(self, x: Points) -> Values:
        return self.d * math.pi**2 * self.solution(x)


class CosineSum(Poisson):
    """`u* = Σ cos(π x_i)`."""

    formula = "Δu + π² Σ cos(π x_i) = 0"

    def solution(self, x: Points) -> Values:
        return (math.pi * x).cos().sum(1, keepdim=True)

    def source(self, x: Points) -> Values:
        return math.pi**2 * self.solution(x)


class Harmonic(Poisson):
    """`u* = Σ x_{2k−1} x_{2k} / c`, where `c` normalizes its mean square on the cube to one."""

    formula = "Δu = 0"

    def __init__(self, d: int):
        super().__init__(d)
        k = d // 2  # products of independent numbers, each with mean 1/4 and mean square 1/9
        self._norm = math.sqrt(k / 9 + k * (k - 1) / 16)

    def solution(self, x: Points) -> Values:
        return (x[:, 0::2] * x[:, 1::2]).sum(1, keepdim=True) / self._norm

    def source(self, x: Points) -> Values:
        return torch.zeros_like(x[:, :1])


class SquareNorm(Poisson):
    """`u* = ‖x‖² / 33.47`."""

    formula = "Δu = 2 d / 33.47"

    def solution(self, x: Points) -> Values:
        return x.square().sum(1, keepdim=True) / 33.47

    def source(self, x: Points) -> Values:
        return torch.full_like(x[:, :1], -2 * self.d / 33.47)


class Heat(Equation):
    """`∂_t u = Δu / 4` on the unit cube, `t` from 0 to 1. Half of the conditions are on the faces, half at `t = 0`."""

    formula = "∂_t u − Δu / 4 = 0"
    has_time = True

    def residual(self, u: Derivatives, x: Points) -> Values:
        return u.gradient[:, 0] - u.laplacian / 4

    def conditions(self, n: int, generator: Generator) -> Points:
        faces = on_faces(n // 2, self.d, generator=generator, dtype=F64)
        faces = torch.cat([uniform(n // 2, 1, generator=generator, dtype=F64), faces], 1)
        start = uniform(n - n // 2, self.d, generator=generator, dtype=F64)
        return torch.cat([faces, torch.cat([torch.zeros_like(start[:, :1]), start], 1)])


class HeatSineProduct(Heat):
    """`u* = exp(−π² d t / 4) Π sin(π x_i)`."""

    def solution(self, x: Points) -> Values:
        t, space = x[:, :1], x[:, 1:]
        return (-(math.pi**2) * self.d * t / 4).exp() * (math.pi * space).sin().prod(1, keepdim=True)


class HeatSineSum(Heat):
    """`u* = exp(−t) Σ sin(2 x_i)`."""

    def solution(self, x: Points) -> Values:
        return (-x[:, :1]).exp() * (2 * x[:, 1:]).sin().sum(1, keepdim=True)


class LogFokkerPlanck(Equation):
    """The logarithm `q` of a density under `dX = −X/2 dt + √2 dW`, from `N(0, I)`: that of `N(0, (2 − e⁻ᵗ) I)`.

    `∂_t q = d/2 + x·∇q/2 + ‖∇q‖² + Δq` for `t` from 0 to 1 and `x` in `[−5, 5]^d`; the conditions are at `t = 0`.
    """

    formula = "∂_t q − d/2 − x·∇q/2 − ‖∇q‖² − Δq = 0"
    has_time = True

    def solution(self, x: Points) -> Values:
        variance = 2 - (-x[:, :1]).exp()
        square = x[:, 1:].square().sum(1, keepdim=True)
        return -(square / variance + self.d * (2 * math.pi * variance).log()) / 2

    def residual(self, u: Derivatives, x: Points) -> Values:
        slope = u.gradient[:, 1:, 0]
        drift = (x[:, 1:] * slope).sum(1, keepdim=True) / 2
        return u.gradient[:, 0] - self.d / 2 - drift - slope.square().sum(1, keepdim=True) - u.laplacian

    def interior(self, n: int, generator: Generator) -> Points:
        x = uniform(n, self.inputs, generator=generator, dtype=F64)
        return torch.cat([x[:, :1], 10 * x[:, 1:] - 5], 1)

    def conditions(self, n: int, generator: Generator) -> Points:
        x = self.interior(n, generator)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
