"""Weight decay as part of the objective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.optim.vectors import Vector, dots, gram


class Decay:
    """`½ Σ η_n ‖θ_n‖²` over the parameters, per unit of the loss's mean."""

    def __init__(self, eta: Mapping[str, float]):
        self.eta = {n: value for n, value in eta.items() if value != 0}

    def of(self, name: str) -> float:
        return self.eta.get(name, 0.0)

    def value(self, parameters: Mapping[str, Tensor]) -> float:
        squares = dots(({n: parameters[n]}, {n: parameters[n]}) for n in self.eta)
        return 0.5 * sum(eta * square for eta, square in zip(self.eta.values(), squares, strict=True))

    def add_gradient(self, g: Vector, parameters: Mapping[str, Tensor]) -> None:
        """Adds `η_n θ_n` to each."""
        for n, eta in self.eta.items():
            if n in g:
                g[n].add_(parameters[n], alpha=eta)

    def gram(self, directions: list[Vector]) -> Tensor:
        """The matrix of `Σ η_n d_{i,n}ᵀ d_{j,n}`, in float64."""
        Q = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        by_value: dict[float, list[str]] = {}
        for n, eta in self.eta.items():
            if n in directions[0]:
                by_value.setdefault(eta, []).append(n)
        for eta, names in by_value.items():
            parts = [{n: d[n] for n in names} for d in directions]
            Q += eta * gram(parts)
        return Q

    def same(self, parameters: Mapping[str, Tensor]) -> float:
        """The one `η` of all parameters.

        Raises:
            ValueError: if there are several.
        """
        values = {self.of(n) for n in parameters}
        if len(values) > 1:
            raise ValueError(
                f"the groups have weight decays of {sorted(values)} per unit of the loss's mean, but the matrix "
                "of all parameters has only one damping; expected the same in all groups"
            )
        return values.pop()
