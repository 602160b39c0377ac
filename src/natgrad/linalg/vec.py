"""Flattening a matrix in the two common orders."""

from jaxtyping import Shaped
from torch import Tensor


def vec(W: Shaped[Tensor, "*batch m n"]) -> Shaped[Tensor, "*batch mn"]:
    """Stacks the columns of a matrix: `vec(P V Q) = (Qᵀ ⊗ P) vec(V)`.

    PyTorch's `flatten` stacks rows instead, which swaps the factors of a Kronecker product.

    Args:
        W: `(..., m, n)`.

    Returns:
        A tensor of shape `(..., m n)`.

    Raises:
        ValueError: if `W` has fewer than two axes.

    Example:
        >>> import torch
        >>> vec(torch.tensor([[1, 2], [3, 4]]).float()).tolist()
        [1.0, 3.0, 2.0, 4.0]
    """
    if W.ndim < 2:
        raise ValueError(f"vec: W has shape {tuple(W.shape)}; expected a matrix, or a batch of them")
    return W.mT.flatten(-2)


def unvec(v: Shaped[Tensor, "*batch mn"], shape: tuple[int, int]) -> Shaped[Tensor, "*batch m n"]:
    """The inverse of `vec`: the matrix of the given `(rows, columns)` whose stacked columns are `v`.

    Args:
        v: `(..., rows * columns)`.
        shape: `(rows, columns)`.

    Returns:
        A tensor of shape `(..., rows, columns)`.

    Raises:
        ValueError: if `v` does not have `rows * columns` entries.

    Example:
        >>> import torch
        >>> unvec(torch.tensor([1.0, 3.0, 2.0, 4.0]), (2, 2)).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    rows, columns = shape
    if v.shape[-1] != rows * columns:
        raise ValueError(
            f"unvec: v has {v.shape[-1]} entries, but shape {(rows, columns)} needs {rows * columns}; "
            "pass the shape of the matrix that was flattened"
        )
    return v.unflatten(-1, (columns, rows)).mT
