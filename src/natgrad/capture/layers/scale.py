"""Scales and shifts `y = w ∘ z + c`, in normalization layers and in plain products and sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from natgrad.capture.layers.inputs import Rows
from natgrad.capture.layers.kind import Call, Kind


@dataclass(frozen=True)
class Scale(Kind):
    """`y = w ∘ z + c` with parameters that are broadcast over the output like tensors of shape `spread`.

    A case is an example, with `Σ g z` and `Σ g` over all places of the example where a coordinate is used. For each
    coordinate, K-FAC keeps the exact block `E[(Σ g z, Σ g)(Σ g z, Σ g)ᵀ]` of scale and shift. Blocks between
    coordinates are zero.
    """

    name: str
    spread: tuple[int, ...]
    has_scale: bool
    has_shift: bool
    normalize: Callable[[Tensor], Tensor] | None = None
    entries: tuple[Int[Tensor, " o"] | None, Int[Tensor, " o"] | None] = field(default=(None, None), compare=False)
    """The positions of the coordinates of scale and shift in their parameters. None: in order."""
    sizes: tuple[int, int] = (0, 0)
    """The sizes of the parameters, if entries are given."""
    slopes: tuple[Float[Tensor, " o"] | None, Float[Tensor, " o"] | None] = field(default=(None, None), compare=False)
    """If a function of a parameter is the scale or the shift, as in `exp(w) ∘ z`: the derivative of each coordinate in
    its entry of the parameter."""
    is_one: bool = False
    """Whether scale and shift are one parameter."""

    @property
    def is_elementwise(self) -> bool:
        """Whether it is applied without a normalization."""
        return self.normalize is None

    def inputs(self, h: Tensor) -> Rows:
        """Inputs of width zero, because a scale's input is part of its gradient."""
        return Rows(h.new_zeros(1, 1, 0))

    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "*grid 1 o"]:
        """`(g z, g)` in every row, concatenated."""
        parts = []
        if self.has_scale:
            z = h if self.normalize is None else self.normalize(h)
            parts.append(self._sloped(self._coordinates(g * z.to(g.dtype)), 0))
        if self.has_shift:
            parts.append(self._sloped(self._coordinates(g), 1))
        return torch.cat(parts, -1).unsqueeze(-2)

    def _sloped(self, g: Float[Tensor, "*grid o"], which: int) -> Float[Tensor, "*grid o"]:
        slope = self.slopes[which]
        return g if slope is None else g * slope.to(g.dtype)

    def placed(self, g: Float[Tensor, "n 1 o"]) -> Float[Tensor, "n 1 p"]:
        """The gradients of the coordinates at their positions in the parameters; zero for unused entries."""
        own = [i for i, has in enumerate((self.has_scale, self.has_shift)) if has]
        placed = []
        for i, part in zip(own, g.chunk(len(own), -1), strict=True):
            entries = self.entries[i]
            if entries is not None:
                part = part.new_zeros(len(part), 1, self.sizes[i]).index_add_(2, entries, part)
            placed.append(part)
        return sum(placed[1:], placed[0]) if self.is_one else torch.cat(placed, -1)

    def grid(self, a: Tensor) -> tuple[int, ...]:
        return tuple(a.shape[axis] for axis in self._axes(a.ndim)[0])

    def rows(self, a: Tensor) -> Tensor:
        coordinates = self._coordinates(a)
        return coordinates.flatten(0, -2) if coordinates.ndim > 1 else coordinates.unsqueeze(0)

    def width(self, a: Tensor) -> int:
        both = zip((self.has_scale, self.has_shift), self.entries, self.sizes, strict=True)
        widths = [prod(self.spread) if entries is None else size for has, entries, size in both if has]
        return widths[0] if self.is_one else sum(widths)

    def kept(self, weight: bool, bias: bool) -> Scale:
        return self if self.is_one else replace(self, has_scale=weight, has_shift=bias)

    def _axes(self, ndim: int) -> tuple[list[int], list[int]]:
        """The axes along which the parameters are constant, and those along which they vary."""
        spread = (1,) * (ndim - len(self.spread)) + self.spread
        return [i for i, s in enumerate(spread) if s == 1], [i for i, s in enumerate(spread) if s != 1]

    def _coordinates(self, t: Tensor) -> Float[Tensor, "*grid o"]:
        """A tensor of the output's shape, with the grid first and the flattened coordinates last."""
        grid, own = self._axes(t.ndim)
        moved = t.permute(*grid, *own)
        return moved.flatten(len(grid)) if own else moved.unsqueeze(-1)


def _norm(
    name: str, spread: Sequence[int], input: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: Any
) -> Call:
    kind = Scale(name, tuple(spread), weight is not None, bias is not None, normalize)
    return Call(kind, input, weight, bias)


def _channels(input: Tensor) -> tuple[int, ...]:
    return (input.shape[1], *[1] * (input.ndim - 2))


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Call:
    shape = list(normalized_shape)
    return _norm("layer_norm", shape, input, weight, bias, lambda h: F.layer_norm(h, shape, eps=eps))


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Call:
    shape = list(normalized_shape)
    return _norm("rms_norm", shape, input, weight, None, lambda h: F.rms_norm(h, shape, eps=eps))


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Call:
    spread = _channels(input)
    return _norm("group_norm", spread, input, weight, bias, lambda h: F.group_norm(h, num_groups, eps=eps))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call:
    kept = (None, None) if training else (running_mean, running_var)

    def normalize(h: Tensor) -> Tensor:
        return F.batch_norm(h, *kept, training=training, eps=eps)

    return _norm("batch_norm", _channels(input), input, weight, bias, normalize)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call:
    kept = (None, None) if use_input_stats else (running_mean, running_var)

    def normalize(h: Tensor) -> Tensor:
        return F.instance_norm(h, *kept, use_input_stats=use_input_stats, eps=eps)

    return _norm("instance_norm", _channels(input), input, weight, bias, normalize)


def product(z: Tensor, w: Tensor) -> Call:
    """`z ∘ w` for a parameter `w`."""
    return Call(Scale("mul", tuple(w.shape), True, False), z, w)


def shift(z: Tensor, c: Tensor) -> Call:
    """`z + c` for a parameter `c`."""
    return Call(Scale("add", tuple(c.shape), False, True), z, None, c)


def _addcmul(
    input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1
) -> tuple[Call, ...] | list[Call] | None:
    """`input + tensor1 ∘ tensor2`: either of the factors may be the scale."""
    if value != 1:
        return None
    factors = ((tensor1, tensor2), (tensor2, tensor1))
    pairs = [(z, w) for z, w in factors if w.shape == input.shape]
    if pairs:
        return tuple(Call(Scale("addcmul", tuple(w.shape), True, True), z, w, input) for z, w in pairs)
    return [*(product(z, w) for z, w in factors), shift(tensor1, input)]


def _expand(input: Tensor, *_: Any, **__: Any) -> Call:
    return Call(Scale("expand", tuple(input.shape), False, True), input.new_zeros(()), None, input)


def _repeat(input: Tensor, *repeats: Any, **named: Any) -> Call | None:
    """A parameter that is repeated along new axes, or axes of length 1."""
    times = repeats_of(repeats, named)
    times = (1,) * (input.ndim - len(times)) + times
    own = (1,) * (len(times) - input.ndim) + tuple(input.shape)
    return _expand(input) if all(size == 1 or n == 1 for size, n in zip(own, times, strict=True)) else None


def repeats_of(args: Sequence[Any], named: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of repetitions of every axis in a call of `repeat` or `tile`."""
    given = next(iter(named.values())) if named else args[0] if len(args) == 1 else args
    return (given,) if isinstance(given, int) else tuple(given)


def stack_of_copies(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """`torch.stack` of several copies of one tensor, as a repetition. NotImplemented for different tensors."""
    if len(tensors) == 0 or any(t is not tensors[0] for t in tensors):
        return NotImplemented
    return cat_of_copies([tensors[0].unsqueeze(dim)] * len(tensors), dim)


def cat_of_copies(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """`torch.cat` of copies of one tensor of length 1 along `dim`, as a repetition. NotImplemented otherwise."""
    if len(tensors) == 0 or any(t is not tensors[0] for t in tensors) or tensors[0].shape[dim] != 1:
        return NotImplemented
    times = [1] * tensors[0].ndim
    times[dim] = len(tensors)
    return tensors[0].repeat(times)


REPEATS = {Tensor.repeat, Tensor.tile, torch.tile}
PARSERS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.addcmul: _addcmul,
    Tensor.addcmul: _addcmul,
    **dict.fromkeys([Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to], _expand),
    **dict.fromkeys(REPEATS, _repeat),
}

ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
SPREADS = {
    *(Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to, *REPEATS),
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
}
"""Functions that copy a shared tensor for every example."""
