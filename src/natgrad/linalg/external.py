"""Conversion to and from SciPy's sparse linear operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from natgrad.checks.values import described
from natgrad.linalg.arguments import check_damping, check_plain
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space
from natgrad.linalg.stochastic import product

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def _linear_operator() -> Any:
    try:
        from scipy.sparse.linalg import LinearOperator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("SciPy is not installed; install it: pip install scipy") from error
    return LinearOperator


@later
def to_scipy(operator: Operator) -> LinearOperator:
    """A `scipy.sparse.linalg.LinearOperator` on NumPy vectors."""

    def times(rows: Tensor) -> Tensor:
        return product(operator, rows)

    size = operator.space.size
    return linear_operator((size, size), times, times, operator.dtype, operator.device)


def linear_operator(
    shape: tuple[int, int],
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> LinearOperator:
    """A SciPy operator from products with the rows of a tensor."""
    held = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def columns(apply: Callable[[Tensor], Tensor], V: Any) -> Any:
        """The products with the columns of an array."""
        rows = torch.from_numpy(np.ascontiguousarray(V.T)).to(device, dtype)
        return apply(rows).to("cpu", held).numpy().T

    return _linear_operator()(
        shape=shape,
        matvec=lambda v: columns(times, v.reshape(-1, 1))[:, 0],
        rmatvec=lambda v: columns(transposed_times, v.reshape(-1, 1))[:, 0],
        matmat=lambda V: columns(times, V),
        rmatmat=lambda V: columns(transposed_times, V),
        dtype=torch.empty(0, dtype=held).numpy().dtype,
    )


class External(Operator):
    """A symmetric `scipy.sparse.linalg.LinearOperator`, or anything that SciPy converts to one, as an operator.

    Args:
        matrix: of shape `(size, size)`; it must be symmetric, which is not checked.
        space: the form of its vectors. None: tensors of shape `(size,)`.
        dtype: of the vectors. None: the matrix's own.

    Raises:
        ValueError: if it is not square, or its size is not that of the space.

    Example:
        >>> import scipy.sparse, torch
        >>> from natgrad.linalg import External
        >>> M = External(scipy.sparse.diags([1.0, 2.0, 3.0]))
        >>> (M @ torch.ones(3, dtype=torch.float64)).tolist(), M.top_eigenvalues(1).values.round().tolist()
        ([1.0, 2.0, 3.0], [3.0])
    """

    def __init__(self, matrix: Any, space: Space | None = None, dtype: torch.dtype | None = None):
        _linear_operator()
        from scipy.sparse.linalg import aslinearoperator

        self.matrix = aslinearoperator(matrix)
        rows, columns = self.matrix.shape
        self.space = space or Space(((rows,),))
        if rows != columns or rows != self.space.size:
            raise ValueError(
                f"matrix is {described(matrix)} of shape {(rows, columns)}; expected a square one of "
                f"{self.space.size} rows"
            )
        own = torch.from_numpy(np.zeros(0, self.matrix.dtype or np.float64)).dtype
        self.dtype = dtype or (own if own.is_floating_point else torch.float64)
        self.device = torch.device("cpu")

    def _matmul(self, parts: Parts) -> Parts:
        v = self.space.flatten(parts)
        rows = v.reshape(-1, self.space.size).numpy()
        found: Tensor = torch.from_numpy(np.ascontiguousarray(self.matrix.matmat(rows.T).T)).to(self.dtype)
        return self.space.unflatten(found.reshape(v.shape))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """`(M + damping I)⁻¹` by conjugate gradients."""
        check_damping(damping, damping_style)
        check_plain("a matrix of SciPy", damping_style)
        return IterativeInverse(self, damping)
