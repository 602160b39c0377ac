"""Convolutions as affine maps: the input of each output position is a patch, the weight a matrix over patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layers.inputs import Inputs, InputSums, Rows
from natgrad.capture.layers.kind import Call, Kind
from natgrad.capture.order import Order
from natgrad.linalg.layout import Layout

CHUNK = 1 << 23
"""The approximate number of entries of the unfolded input in memory at a time, so that they fit the CPU caches."""
GPU_CHUNK = 1 << 27
"""The same on a GPU, where large products are efficient."""


@dataclass(frozen=True)
class Convolution(Kind):
    """One group of a convolution: `a[:, p] = W · patch(h, p) + b` at every output position `p`.

    `kernel`, `stride`, `padding` (before and after), `dilation` have an entry for each spatial axis; `channels` are the
    group's input channels and `outputs` its output channels: the first, and the last plus one. The cases are exact.
    K-FAC treats each position as a case (Grosse & Martens 2016, arXiv:1602.01407), and each group as a layer.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    channels: tuple[int, int]
    outputs: tuple[int, int]
    groups: int = 1
    stuffing: tuple[int, ...] | None = None
    """The stride of a transposed convolution: `stuffing − 1` zeros are inserted between the inputs."""

    features = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        what = "conv" if self.stuffing is None else "conv_transpose"
        return f"{what}{len(self.kernel)}d"

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return Layout() if self.stuffing is None else Layout("deconvolution", self.groups)

    def inputs(self, h: Tensor) -> Patches:
        h = _batched(h, len(self.kernel))[:, slice(*self.channels)]
        return Patches(h if self.stuffing is None else _stuffed(h, self.stuffing), self)

    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "n p o"]:
        return _batched(g, len(self.kernel))[:, slice(*self.outputs)].flatten(2).mT

    def grid(self, a: Tensor) -> tuple[int, ...]:
        return (len(_batched(a, len(self.kernel))),)

    def positions(self, a: Tensor) -> int:
        return prod(_batched(a, len(self.kernel)).shape[2:])

    def rows(self, a: Tensor) -> Tensor:
        return _batched(a, len(self.kernel)).flatten(1)

    def width(self, a: Tensor) -> int:
        return self.outputs[1] - self.outputs[0]


class Patches(Inputs):
    """The patches of a convolution's input, `(example, position, channels · kernel)`, written to memory only if
    necessary.

    An example may have several `images`, which are consecutive in `h`.
    """

    def __init__(
        self,
        h: Float[Tensor, "n c ..."],
        convolution: Convolution,
        dtype: torch.dtype | None = None,
        images: int = 1,
    ):
        self.h, self.convolution, self.dtype, self.images = h, convolution, dtype or h.dtype, images
        spatial = zip(h.shape[2:], *self._geometry(), strict=True)
        self.sizes = [(size + sum(pad) - d * (k - 1) - 1) // s + 1 for size, k, s, pad, d in spatial]
        self.shape = (len(h) // images, images * prod(self.sizes), h.shape[1] * prod(convolution.kernel))

    def _geometry(self) -> tuple[Any, ...]:
        c = self.convolution
        return c.kernel, c.stride, c.padding, c.dilation

    def _padded(self, h: Tensor) -> Tensor:
        return F.pad(h, [side for sides in reversed(self.convolution.padding) for side in sides])

    def _unfolded(self, h: Tensor, first: int) -> Tensor:
        """Windows along the spatial axes from `first` on. The positions replace the axes, and the kernels are the last
        axes."""
        for axis, (k, s, _, d) in enumerate(zip(*self._geometry(), strict=True)):
            if axis >= first:
                h = h.unfold(axis + 2, d * (k - 1) + 1, s)[..., ::d]
        return h

    @property
    def area(self) -> int:
        """The entries of a patch in one channel."""
        return prod(self.convolution.kernel)

    def pixels(self) -> Float[Tensor, "pixels c"]:
        """The channels' values at every place of every image, without padding."""
        return self.h.to(self.dtype).movedim(1, -1).flatten(0, -2)

    def dense(self) -> Tensor:
        space = len(self.sizes)
        windows = self._unfolded(self._padded(self.h.to(self.dtype)), 0)
        patches = windows.flatten(2 + space).flatten(2, 1 + space).permute(0, 2, 1, 3).flatten(2)
        return patches if self.images == 1 else patches.reshape(self.shape)

    def sums(self, kept: Tensor | None = None, diagonal: bool = False) -> InputSums:
        """The scatter of the patches, without writing the patches to memory.

        The input is unfolded along all axes except the first, which gives `X` with rows `y`. The block of the kernel
        rows `u` and `v` is then `M(u, v) = Σ_p X[s p + d u]ᵀ X[s p + d v]`. With stride 1 it depends only on `v − u`,
        except at the ends: `M(u+1, v+1)` lacks the first `d` terms of `M(u, v)` and has `d` more terms after the last.
        The channels are first shifted to mean zero, so that subtracting the mean of the patches causes no cancellation.
        """
        if kept is not None or diagonal or not len(self.h):
            return Rows(self.dense()).sums(kept, diagonal)
        k = self.convolution.kernel[0]
        shift = self.h.mean([0, *range(2, self.h.ndim)], dtype=self.dtype)
        f = self.shape[2] // k
        M, total = shift.new_zeros(k, f, k, f), shift.new_zeros(k, f)
        chunk = CHUNK if self.h.device.type == "cpu" else GPU_CHUNK
        step = max(1, chunk * len(self.h) // max(1, self.h.numel() * prod(self.convolution.kernel[1:])))
        for h in self.h.split(step):
            self._add(h.to(self.dtype), shift, M, total)
        c = self.h.shape[1]

        def channels_first(t: Tensor) -> Tensor:
            return t.unflatten(-1, (c, -1)).movedim(-3, -2).flatten(-3)  # (k, c · rest) to c · k · rest

        M = channels_first(channels_first(M).movedim(-1, 0)).mT
        count = shift.new_tensor(float(self.shape[0] * self.shape[1]))
        mean = channels_first(total) / count
        scatter = M - count * torch.outer(mean, mean)
        return InputSums(count, mean + shift.repeat_interleave(prod(self.convolution.kernel)), scatter)

    def _add(self, h: Tensor, shift: Tensor, M: Tensor, total: Tensor) -> None:
        """Adds the sums of some examples."""
        k, s, d, out = (
            self.convolution.kernel[0],
            self.convolution.stride[0],
            self.convolution.dilation[0],
            self.sizes[0],
        )
        h = self._padded(h) - shift.view(-1, *[1] * len(self.sizes))
        space = len(self.sizes)
        windows = self._unfolded(h, 1)  # (n, c, y, positions ..., kernel ...)
        order = [2, 0, *range(3, 2 + space), 1, *range(2 + space, windows.ndim)]
        X = windows.permute(order).flatten(1, space).flatten(2)  # (y, n · positions, c · kernel)

        def rows(start: int, many: int, stride: int = 1) -> Tensor:
            return X[start : start + stride * (many - 1) + 1 : stride].flatten(0, 1)

        for u in range(k):
            total[u] += rows(d * u, out, s).sum(0)
        blocks: dict[tuple[int, int], Tensor] = {}
        for u in range(k):
            for v in range(u, k):
                if s > 1 or u == 0 or d > out:
                    block = rows(d * u, out, s).mT @ rows(d * v, out, s)
                else:
                    a, b = d * (u - 1), d * (v - 1)
                    first = rows(a, d).mT @ rows(b, d)
                    block = blocks[u - 1, v - 1] - first + rows(a + out, d).mT @ rows(b + out, d)
                blocks[u, v] = block
                M[u, :, v] += block
                if u != v:
                    M[v, :, u] += block.mT

    def averaged(self, kept: Tensor | None = None) -> Rows:
        if kept is not None:
            return Rows(self.dense()).averaged(kept)
        space = len(self.sizes)
        windows = self._unfolded(self._padded(self.h.to(self.dtype)), 0)
        means = windows.mean([*range(2, 2 + space)]).flatten(1)
        return Rows(means.unflatten(0, (-1, self.images)).mean(1, keepdim=True))

    def to(self, dtype: torch.dtype) -> Patches:
        return Patches(self.h, self.convolution, dtype, self.images)

    def part(self, start: int, stop: int, step: int = 1) -> Patches:
        if self.images == 1:
            return Patches(self.h[start:stop:step], self.convolution, self.dtype)
        h = self.h.unflatten(0, (-1, self.images))[start:stop:step].flatten(0, 1)
        return Patches(h, self.convolution, self.dtype, self.images)

    def sample(self, count: int, order: Tensor) -> Patches:
        """All patches of some examples."""
        examples, positions, _ = self.shape
        which = order[order < examples][: -(-count // positions)]
        h = self.h[which] if self.images == 1 else self.h.unflatten(0, (-1, self.images))[which].flatten(0, 1)
        return Patches(h, self.convolution, self.dtype, self.images)

    def arranged(self, order: Order) -> Inputs:
        if order.is_identity:
            return self
        if not order.rows:  # a case without images
            return Rows(self.h.new_zeros(order.cases, 0, self.shape[2]), self.dtype)
        h = order.of(self.h)  # (cases, images, c, ...)
        return Patches(h.flatten(0, 1), self.convolution, self.dtype, h.shape[1])

    def blank(self, n: int) -> Patches:
        return Patches(self.h.new_zeros(n, *self.h.shape[1:]), self.convolution, self.dtype)


def _convolution(space: int) -> Callable[..., list[Call] | None]:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> list[Call]:
        kernel = tuple(weight.shape[2:])
        steps, spread = _tuple(stride, space), _tuple(dilation, space)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
            sides = tuple((t // 2, t - t // 2) for t in total)
        else:
            sides = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, space))
        calls = []
        for channels, outputs in _groups(weight.shape[1] * groups, weight.shape[0], groups):
            kind = Convolution(kernel, steps, sides, spread, channels, outputs, groups)
            calls.append(Call(kind, input, weight, bias, outputs if groups > 1 else None))
        return calls

    return parse


def _transposed_convolution(space: int) -> Callable[..., list[Call] | None]:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> list[Call]:
        """A convolution with the flipped kernel, of the input with zeros between its entries."""
        kernel = tuple(weight.shape[2:])
        steps, pads, extra, spread = (_tuple(v, space) for v in (stride, padding, output_padding, dilation))
        sides = tuple(
            (d * (k - 1) - p, d * (k - 1) - p + e) for k, p, e, d in zip(kernel, pads, extra, spread, strict=True)
        )
        calls = []
        for channels, outputs in _groups(weight.shape[0], weight.shape[1] * groups, groups):
            kind = Convolution(kernel, (1,) * space, sides, spread, channels, outputs, groups, stuffing=steps)
            calls.append(Call(kind, input, weight, bias, outputs if groups > 1 else None))
        return calls

    return parse


def _groups(d_in: int, d_out: int, groups: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Input and output channels of every group."""
    i, o = d_in // groups, d_out // groups
    for j in range(groups):
        yield (j * i, (j + 1) * i), (j * o, (j + 1) * o)


def _stuffed(h: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Inserts `stride − 1` zeros between neighbours along every spatial axis."""
    sizes = [s * (size - 1) + 1 for s, size in zip(stride, h.shape[2:], strict=True)]
    out = h.new_zeros(*h.shape[:2], *sizes)
    places = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    out[places] = h
    return out


def _batched(t: Tensor, space: int) -> Tensor:
    return t if t.ndim == space + 2 else t.unsqueeze(0)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


PARSERS: dict[Any, Callable[..., list[Call] | None]] = {
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed_convolution(1),
    F.conv_transpose2d: _transposed_convolution(2),
    F.conv_transpose3d: _transposed_convolution(3),
}
