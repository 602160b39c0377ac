"""The exact matrix in other units: each parameter in a unit of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.block_diagonal import Block
from natgrad.linalg.joint import DualInverse, Joint, PrimalInverse
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts


class Rescaled(Joint):
    """`R F R = (R S)(R S)ᵀ` with a positive diagonal matrix `R`: the matrix `F` of the parameters `R⁻¹ θ`.

    Args:
        matrix: `F`.
        r: the diagonal of `R`, with one entry for each parameter.

    Example:
        >>> import torch
        >>> from natgrad.linalg.block_diagonal import Block, BlockDiagonal
        >>> from natgrad.linalg.exact import ExactBlock
        >>> from natgrad.linalg.space import Space
        >>> block = Block(ExactBlock(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[[3.0]]]]), bias=False), ("w",))
        >>> F = Joint(BlockDiagonal({"w": block}, Space(((1, 2),), ("w",))))
        >>> Rescaled(F, (torch.tensor([[1.0, 0.5]]),)).to_dense().tolist()
        [[9.0, 9.0], [9.0, 9.0]]
    """

    def __init__(self, matrix: Joint, r: Parts):
        super().__init__(matrix.layers, matrix.memory)
        self.matrix, self.r = matrix, r

    def inner(self, parts: Parts) -> Float[Tensor, "*batch nk"]:
        """`Sᵀ R v`."""
        return self.matrix.inner(_times(self.r, parts))

    def outer(self, c: Float[Tensor, "*batch nk"]) -> Parts:
        """`R S c`."""
        return _times(self.r, self.matrix.outer(c))

    def _factors(self, block: Block) -> Parts:
        return block.parts(self._named(self.r))

    def formed(self) -> Float[Tensor, "size size"]:
        """`R F R`, from `F`."""
        if self._formed is None:
            r = self.space.flatten(self.r)
            self._formed = self.matrix.formed() * r * r.unsqueeze(1)
        return self._formed

    def trace(self) -> Tensor:
        return torch.stack([d.sum() for d in self._diagonal()]).sum()

    def _diagonal(self) -> Parts:
        return _times(self.r, _times(self.r, self.matrix._diagonal()))

    def cost(self, form: str, *, by_columns: bool = True) -> float:
        """As for `Joint`, but the Gram matrix always comes from columns: pairs would need factors of inputs and
        outputs."""
        return self.matrix.cost(form, by_columns=True)


class RescaledInverse(Operator):
    """`(F + λ R⁻²)⁻¹ = R (R F R + λI)⁻¹ R`.

    Args:
        matrix: `R F R`.
        damping: `λ`.
        form: the solver, as for `Joint.inverse`.

    Raises:
        ValueError: if the damped matrix is not positive definite.
    """

    def __init__(self, matrix: Rescaled, damping: float, form: str | None = None):
        self.matrix = matrix
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device
        inverse = matrix.inverse(damping, form=form)
        assert isinstance(inverse, (DualInverse, PrimalInverse))
        self._inverse = inverse

    def _matmul(self, parts: Parts) -> Parts:
        return _times(self.matrix.r, self._inverse._matmul(_times(self.matrix.r, parts)))

    def solve_columns(self, c: Float[Tensor, " nk"]) -> Parts:
        """`(F + λ R⁻²)⁻¹ S c`."""
        return _times(self.matrix.r, self._inverse.solve_columns(c))


def _times(r: Parts, v: Parts) -> Parts:
    return tuple(a * b for a, b in zip(r, v, strict=True))
