"""A network's value, gradient and Laplacian in one forward pass, propagated from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Derivatives:
    """The value, gradient and Laplacian of a network `u` at some points.

    Args:
        value: `u`.
        gradient: `∂u/∂x_i`.
        laplacian: `Σ ∂²u/∂x_i²` over the coordinates in `over`.

    Example:
        >>> import torch, natgrad
        >>> u = natgrad.pde.derivatives(torch.nn.Linear(2, 1), torch.rand(5, 2))
        >>> u.laplacian.abs().max().item()  # an affine function has none
        0.0
    """

    value: Float[Tensor, "n outputs"]
    gradient: Float[Tensor, "n d outputs"]
    laplacian: Float[Tensor, "n outputs"]


def derivatives(net: nn.Module, x: Tensor, over: Sequence[int] | None = None) -> Derivatives:
    """The value, the gradient and the Laplacian of a network at each point.

    All three are propagated through the layers together. An affine map multiplies the derivatives by its weight, and
    for `z = σ(a)`

        ∂z = σ'(a) ∂a        Δz = σ'(a) Δa + σ''(a) Σ (∂_i a)²

    So one forward pass is enough, and the backward pass is that of an ordinary network. `torch.autograd.grad` within
    the forward pass needs one more pass for each coordinate.

    Args:
        net: an `nn.Sequential`, nested or not, of `nn.Linear` and of `nn.Tanh`, `nn.Sigmoid`, `nn.SiLU`,
            `nn.Softplus` or `nn.Identity`; or one of these alone.
        x: the points, `(n, d)`.
        over: the coordinates that the Laplacian sums over. None: all. For the heat equation, leave out time.

    Raises:
        TypeError: if there is a layer of another kind; the error names it.
        ValueError: if `x` does not have the shape `(n, d)`, or if `over` has a coordinate that does not exist.

    Example:
        >>> import torch, natgrad
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
        >>> u = natgrad.pde.derivatives(net, torch.rand(5, 2))
        >>> u.value.shape, u.gradient.shape, u.laplacian.shape
        (torch.Size([5, 1]), torch.Size([5, 2, 1]), torch.Size([5, 1]))

    Reference: Li et al. (2024), "A computational framework for neural network-based variational Monte Carlo with
    Forward Laplacian", arXiv:2307.08214.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (n, d): a row for each point")
    n, d = x.shape
    chosen = list(range(d)) if over is None else list(over)
    if not all(0 <= i < d for i in chosen):
        raise ValueError(f"over={chosen} names coordinates of points with {d}; expected numbers from 0 to {d - 1}")
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    # Along axis 1: ∂ in every coordinate, then Δ.
    z, dz = x, torch.cat([eye, eye.new_zeros(1, d)]).expand(n, d + 1, d)
    for name, layer in _layers(net):
        if isinstance(layer, nn.Linear):
            z, dz = F.linear(z, layer.weight, layer.bias), F.linear(dz, layer.weight)
            continue
        bends = next((bends for kind, bends in _BENDS.items() if isinstance(layer, kind)), None)
        if bends is None:
            raise TypeError(
                f"layer {name!r} is {layer}; natgrad.pde.derivatives supports nn.Linear, nn.Tanh, nn.Sigmoid, "
                "nn.SiLU, nn.Softplus and nn.Identity. Compute derivatives of other networks with torch.autograd.grad"
            )
        z, slope, bend = bends(layer, z)
        own = dz[:, :d] if over is None else dz[:, chosen]
        first = slope.unsqueeze(1) * dz[:, :d]
        second = slope * dz[:, d] + bend * own.square().sum(1)
        dz = torch.cat([first, second.unsqueeze(1)], 1)
    return Derivatives(z, dz[:, :d], dz[:, d])


def _layers(net: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The layers in the order in which they are called, by name."""
    if not isinstance(net, nn.Sequential):
        return [(name or type(net).__name__, net)]
    # `named_children` would leave out a layer that is called twice.
    parts = zip(net._modules, net, strict=True)
    return [found for n, part in parts for found in _layers(part, f"{name}.{n}" if name else n)]


Bends = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`σ(a)`, `σ'(a)` and `σ''(a)`."""


def _tanh(layer: nn.Module, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = a.tanh()
    slope = 1 - z.square()
    return z, slope, -2 * z * slope


def _sigmoid(layer: nn.Module, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = a.sigmoid()
    slope = z * (1 - z)
    return z, slope, slope * (1 - 2 * z)


def _silu(layer: nn.Module, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = a.sigmoid()
    slope = s * (1 - s)
    return a * s, s + a * slope, slope * (2 + a * (1 - 2 * s))


def _softplus(layer: nn.Module, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(layer, nn.Softplus)
    s = (layer.beta * a).sigmoid()
    return layer(a), s, layer.beta * s * (1 - s)


def _identity(layer: nn.Module, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a, torch.ones_like(a), torch.zeros_like(a)


_BENDS: dict[type[nn.Module], Bends] = {
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    nn.SiLU: _silu,
    nn.Softplus: _softplus,
    nn.Identity: _identity,
}
