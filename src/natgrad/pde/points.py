"""Random points of the unit cube and of its boundary."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from natgrad.checks.values import check_count


def uniform(
    n: int, d: int, *, generator: Generator | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "n d"]:
    """Points drawn uniformly from the unit cube.

    Args:
        n: how many.
        d: the dimension.
        generator: the source of random numbers. Default: torch's own.
        dtype: of the points. Default: torch's default.

    Raises:
        ValueError: if `n` or `d` is not a whole number above zero.

    Example:
        >>> import natgrad
        >>> natgrad.pde.uniform(5, 2).shape
        torch.Size([5, 2])
    """
    check_count("n", n)
    check_count("d", d)
    return torch.rand(n, d, generator=generator, dtype=dtype)


def on_faces(
    n: int, d: int, *, generator: Generator | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "n d"]:
    """Points drawn uniformly from the faces of the unit cube: one random coordinate is 0 or 1.

    Args:
        n: how many.
        d: the dimension.
        generator: the source of random numbers. Default: torch's own.
        dtype: of the points. Default: torch's default.

    Raises:
        ValueError: if `n` or `d` is not a whole number above zero.

    Example:
        >>> import natgrad
        >>> x = natgrad.pde.on_faces(5, 2)
        >>> bool(((x == 0) | (x == 1)).any(1).all())
        True
    """
    x = uniform(n, d, generator=generator, dtype=dtype)
    axis = torch.randint(d, (n,), generator=generator)
    side = torch.randint(2, (n,), generator=generator)
    x[torch.arange(n), axis] = side.to(x.dtype)
    return x
