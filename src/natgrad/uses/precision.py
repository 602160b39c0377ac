"""A posterior's precision `s M + diag(δ)`: its determinant, its inverse, its draws, and how much the data determine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.linalg import (
    Block,
    BlockDiagonal,
    CenteredKronecker,
    Dense,
    Diagonal,
    ExactBlock,
    Homogeneous,
    Kronecker,
    Operator,
    Space,
    factor,
)
from natgrad.linalg.density import spectral_density
from natgrad.linalg.eigenvalues import FORMED, eigenvalues, holds_tensors
from natgrad.linalg.space import Parts
from natgrad.uses.prior import Precisions

PROBES = 20


class Rescaled(Operator):
    """`E M E` with `E` a multiple of the identity on each part: `scales` are its numbers."""

    def __init__(self, operator: Operator, scales: tuple[float, ...]):
        self.operator, self.scales = operator, scales
        self.space, self.dtype, self.device = operator.space, operator.dtype, operator.device

    def _matmul(self, parts: Parts) -> Parts:
        return self._times(self.operator._matmul(self._times(parts)))

    def _diagonal(self) -> Parts:
        return self._times(self._times(self.operator._diagonal()))

    def _times(self, parts: Parts) -> Parts:
        return tuple(s * p for s, p in zip(self.scales, parts, strict=True))


class Spectrum(NamedTuple):
    """Eigenvalues, and how many there are of each: estimated ones, of a matrix that is known by its products alone."""

    values: Tensor
    counts: Tensor


@dataclass
class Piece:
    """`E (s M + damping I) E` of some parameters, with `E = 1` unless there are `scales`."""

    name: str
    block: Block
    scale: float
    damping: float
    spectrum: Spectrum | None
    """That of `M`; None where it is not known."""
    scales: tuple[float, ...] | None = None

    @property
    def _own(self) -> float:
        """The damping that `M` itself has."""
        return self.damping / self.scale

    def logdet(self) -> Tensor:
        M = self.block.operator
        size = M.space.size
        if self.spectrum is not None and self.damping > 0:
            e, counts = self.spectrum
            found = counts @ (self.scale * e + self.damping).log()
        else:
            found = M.logdet(self._own) + size * log(self.scale)
        if self.scales is not None:
            shapes = zip(self.scales, M.space.shapes, strict=True)
            found = found + 2 * sum(prod(shape) * log(s) for s, shape in shapes)
        return found

    @cached_property
    def inverse(self) -> Operator:
        own = self.block.operator.inverse(self._own)
        scaled = own if self.scale == 1 else (1 / self.scale) * own
        return scaled if self.scales is None else Rescaled(scaled, tuple(1 / s for s in self.scales))

    def determined(self) -> Tensor:
        """`tr s M (s M + damping I)⁻¹`, of a piece with one precision: how many of its weights the data determine."""
        if self.spectrum is not None:
            e, counts = self.spectrum
            return counts @ (self.scale * e / (self.scale * e + self.damping))
        M = self.block.operator
        return M.space.size - self._own * M.inverse(self._own).trace()

    def sample(self, n: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draws from `N(0, P⁻¹)`, by name."""
        M = self.block.operator
        draws = M.sample(n, self._own, generator)
        parts = tuple(draws[name] for name in M.space.names or ()) if isinstance(draws, dict) else draws
        parts = (parts,) if isinstance(parts, Tensor) else parts
        scales = self.scales or (1.0,) * len(parts)
        return self.block.named(tuple(p / (s * self.scale**0.5) for p, s in zip(parts, scales, strict=True)))


class Matrix:
    """`M` as independent blocks, whose eigenvalues are computed once.

    Of a matrix that is known by its products alone they are estimated, from `PROBES` random vectors, always the same.
    """

    def __init__(self, M: Operator):
        self.M = M
        self.blocks = M.layers if isinstance(M, BlockDiagonal) else {"all": Block(M, M.space.names or ())}
        self._spectra: dict[str, Spectrum | None] = {}

    def spectrum(self, name: str) -> Spectrum | None:
        if name not in self._spectra:
            self._spectra[name] = spectrum_of(self.blocks[name].operator)
        return self._spectra[name]


def spectrum_of(M: Operator) -> Spectrum | None:
    """What is known of a semidefinite matrix's eigenvalues, if anything: those below zero are rounding."""
    if holds_tensors(M):
        try:
            e = eigenvalues(M).double().clamp_min(0)  # their sums are differences of large numbers
        except TypeError:
            return None
        return Spectrum(e, torch.ones_like(e))
    density = spectral_density(M, PROBES, generator=torch.Generator(M.device).manual_seed(0))
    return Spectrum(density.nodes.double().clamp_min(0), M.space.size * density.weights.double())


class Precision:
    """`P = s M + diag(δ)`, block by block.

    A block with one precision keeps its structure. With several, a diagonal stays one, K-FAC's block of a weight and a
    bias is rescaled, `E (s S A S ⊗ B + I) E` with `S = diag(δ_W^-½, δ_b^-½)`, and a dense or exact block is formed.
    """

    def __init__(self, matrix: Matrix, precisions: Precisions, scale: float):
        self.matrix, self.precisions, self.scale = matrix, precisions, scale
        self.pieces = {name: self._piece(name, block) for name, block in matrix.blocks.items()}

    def _piece(self, name: str, block: Block) -> Piece:
        deltas = [self.precisions[n] for n in block.names]
        if all(d.ndim == 0 and d == deltas[0] for d in deltas):
            return Piece(name, block, self.scale, float(deltas[0]), self.matrix.spectrum(name))
        op = block.operator
        if isinstance(op, (CenteredKronecker, Homogeneous)) and all(d.ndim == 0 for d in deltas):
            stacked = Kronecker(op.A, op.B) if isinstance(op, CenteredKronecker) else op.stacked
            if isinstance(stacked, Kronecker):
                roots = tuple(float(d) ** 0.5 for d in deltas)
                A = factor.full(stacked.A)
                S = torch.full_like(A[0], 1 / roots[0])
                S[-1] = 1 / roots[1]
                whitened = Homogeneous(Kronecker(S[:, None] * A * S, self.scale * stacked.B))
                return Piece(name, block.with_operator(whitened), 1.0, 1.0, spectrum_of(whitened), roots)
        spread = {n: d.expand(shape) for n, d, shape in zip(block.names, deltas, block.shapes, strict=True)}
        parts = block.parts(spread)
        if isinstance(op, Diagonal):
            added = tuple(self.scale * v + d for v, d in zip(op.values, parts, strict=True))
            return Piece(name, block.with_operator(Diagonal(added, op.space)), 1.0, 0.0, None)
        if isinstance(op, (Dense, ExactBlock)) or op.space.size <= FORMED:
            formed = self.scale * op.to_dense() + op.space.flatten(parts).diag()
            return Piece(name, block.with_operator(Dense(formed, op.space)), 1.0, 0.0, None)
        raise TypeError(
            f"the block of {name!r} ({op.describe()}) takes one prior precision for all of its parameters, and was "
            "given several; use one for each layer (per='layer'), bias='apart', or structure='diagonal' or 'dense'"
        )

    def logdet(self) -> Tensor:
        """`log det P`."""
        return torch.stack([piece.logdet().double() for piece in self.pieces.values()]).sum()

    def log_prior(self) -> Tensor:
        """`Σ log δ` over all weights."""
        shapes = zip(self.matrix.M.space.names or (), self.matrix.M.space.shapes, strict=True)
        return torch.stack([self.precisions[n].double().log().expand(shape).sum() for n, shape in shapes]).sum()

    @cached_property
    def covariance(self) -> BlockDiagonal:
        """`P⁻¹`."""
        space = self.matrix.M.space
        blocks = {}
        for name, piece in self.pieces.items():
            block = piece.block
            blocks[name] = Block(piece.inverse, block.names, block.layout, block.shapes, block.function)
        return BlockDiagonal(blocks, Space(space.shapes, space.names))

    def determined(self, together: Callable[[tuple[str, ...]], bool]) -> dict[tuple[str, ...], Any]:
        """How many weights the data determine, by the parameters of each block: the number `γ` of those that are taken
        `together`, else for each parameter the tensor `1 − δ diag(P⁻¹)`, which sums to it."""
        found: dict[tuple[str, ...], Any] = {}
        for piece in self.pieces.values():
            names = piece.block.names
            if piece.scales is None and piece.damping > 0 and together(names):
                found[names] = piece.determined()
            else:
                found[names] = self._each_determined(piece)
        return found

    def _each_determined(self, piece: Piece) -> dict[str, Tensor]:
        """`1 − δ diag(P⁻¹)`, in float64 where that is at hand, as it is a difference."""
        names, op = piece.block.names, piece.block.operator
        deltas = {n: self.precisions[n].double() for n in names}
        own = self.matrix.blocks[piece.name].operator
        if isinstance(own, Diagonal):
            h = piece.block.named(tuple(self.scale * v.double() for v in own.values))
            return {n: h[n] / (h[n] + deltas[n]) for n in names}
        if isinstance(op, Dense):
            inverse: Operator = (1 / piece.scale) * Dense(op.matrix.double(), op.space).inverse(piece._own)
        else:
            inverse = piece.inverse
        variances = piece.block.named(inverse._diagonal())
        return {n: 1 - deltas[n] * variances[n].double() for n in names}

    def sample(self, n: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """`n` draws from `N(0, P⁻¹)`, `(n, *shape)` for each parameter."""
        draws: dict[str, Tensor] = {}
        for piece in self.pieces.values():
            draws |= piece.sample(n, generator)
        return {name: draws[name] for name in self.matrix.M.space.names or ()}
