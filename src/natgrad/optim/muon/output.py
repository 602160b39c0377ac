"""The output side of the whitening: averages over steps of what the gradients of each matrix span in its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.linalg import factor
from natgrad.optim.muon.whitening import InputSide, damped_inverses


class OutputSide:
    """For every matrix the average `B` of `∇ A⁻¹ ∇ᵀ`, whose weights fall by `decay` at each update, and
    `(B / b̄ + ridge I)⁻¹`, with `b̄` the mean of `B`'s eigenvalues.

    `A⁻¹` is the damped inverse of the input side. Every gradient is divided by its norm first: the scale of the loss
    does not matter, and small gradients do not vanish when they are squared.

    Reference: the mutual whitening of Lin et al. (2025), "Understanding and Improving Shampoo and SOAP via
    Kullback-Leibler Minimization", arXiv:2509.03378, with the input side from the inputs themselves; and the inverses
    of both sides, as in K-FAC.
    """

    def __init__(self, ridge: float, decay: float, max_dim: int):
        self.ridge, self.decay, self.max_dim = ridge, decay, max_dim
        self.sums: dict[Layer, Tensor] = {}
        """`B`, up to a factor; the diagonal alone of matrices with more than `max_dim` rows."""
        self._inverses: dict[Layer, Tensor] = {}

    def take_in(self, gradients: Mapping[Layer, Float[Tensor, "_ _"]], inputs: InputSide) -> None:
        """Adds the gradients of matrices to their averages, and inverts these."""
        for unit, G in gradients.items():
            tiny = torch.finfo(G.dtype).tiny
            G = G / G.abs().max().clamp_min(tiny)  # or else the norm of large gradients overflows
            G = G / G.norm().clamp_min(tiny)
            white = inputs.whitened(unit, G)
            new = (white * G).sum(1) if len(G) > self.max_dim else white @ G.mT
            before = self.sums.get(unit)
            self.sums[unit] = new if before is None else self.decay * before + new
        self._invert(list(gradients))

    def _invert(self, units: Sequence[Layer]) -> None:
        found = damped_inverses([self.sums[unit] for unit in units], self.ridge, exponent=0.0)
        self._inverses |= dict(zip(units, found, strict=True))

    def whitened(self, unit: Layer, V: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """`(B / b̄ + ridge I)⁻¹ V`; `V` itself where no gradient was taken in."""
        inverse = self._inverses.get(unit)
        return V if inverse is None else factor.from_left(inverse.to(V.dtype), V)

    def load(self, sums: Mapping[Layer, Tensor]) -> None:
        self.sums, self._inverses = dict(sums), {}
        self._invert(list(self.sums))
