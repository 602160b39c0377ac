"""The sizes of a model's layers, and what follows: memory, bytes sent, and multiplications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from natgrad.capture.layer import Layer
from natgrad.curvature.moments import MAX_DIM, AffineMoments, DiagonalMoments, Moments, ScaleMoments
from natgrad.distributed.assignment import cost

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """The sizes of one layer.

    `inputs` and `outputs` are the shapes of its factors, `(d, d)`, or `(d,)` for a diagonal. `other` is the number of
    entries of other moments, for layers without factors. `cases` is the number of cases in one example.
    """

    name: str
    parameters: int
    inputs: Shape = ()
    outputs: Shape = ()
    bias: bool = False
    other: int = 0
    cases: int | float = 1
    products: float = 0.0
    """Multiplications and additions of one forward on one case."""

    @classmethod
    def affine(cls, name: str, d_in: int, d_out: int, *, bias: bool = True, cases: int | float = 1) -> Size:
        """The size of an affine map, with the default `max_dim` of `KFAC`.

        Example:
            >>> Size.affine("fc", 768, 3072).moments_sent(4)  # 769 numbers in double precision, two triangles, the mass
            20067852
        """
        inputs, outputs = ((d,) * (1 + (d <= MAX_DIM)) for d in (d_in, d_out))
        return cls(name, d_out * (d_in + bias), inputs, outputs, bias, cases=cases, products=2.0 * d_in * d_out)

    @classmethod
    def embedding(cls, name: str, rows: int, d_out: int, cases: int | float) -> Size:
        """The size of an embedding. Its input factor is a diagonal, and it multiplies nothing."""
        return cls(name, rows * d_out, (rows,), (d_out, d_out), cases=cases)

    @classmethod
    def scale(cls, name: str, d: int, *, shift: bool = True) -> Size:
        """The size of a normalization. Each coordinate has the products of the gradients of scale and shift."""
        return cls(name, d * (1 + shift), bias=shift, other=d * (3 if shift else 1))

    @property
    def shapes(self) -> list[Shape]:
        return [self.inputs, self.outputs] if self.inputs else []

    def moments_sent(self, itemsize: int) -> int:
        """The bytes that a rank sends for the moments: count and mean in double precision, the triangles of the sums,
        and the mass."""
        means = 8 * (self.inputs[0] + 1) if self.inputs else 0
        return means + itemsize * (sum(map(triangle, self.shapes)) + self.other + 1)

    def inverse_sent(self, itemsize: int) -> int:
        """The bytes of the damped inverse. With a bias, it includes the mean of the inputs and a separate output factor
        for the bias. For a scale with a shift, it has four numbers for each coordinate."""
        own = [*self.shapes, *([self.outputs, self.inputs[:1]] if self.bias else [])]
        return itemsize * (sum(map(triangle, own)) if self.inputs else self.other + self._cross)

    def held(self, itemsize: int) -> int:
        """The bytes of moments and inverse on the rank that holds them."""
        factors = sum(map(prod, self.shapes)) + self.other
        means = self.inputs[0] * (1 + self.bias) + 1 if self.inputs else 0
        of_bias = prod(self.outputs) if self.bias and self.inputs else 0
        return itemsize * (2 * factors + self._cross + of_bias + means + 1)

    @property
    def _cross(self) -> int:
        """The number of entries that the inverse of a scale with a shift has beyond its moments."""
        return self.other // 3 if self.bias and not self.inputs else 0

    def inverse_flops(self) -> float:
        """`d³` for the Cholesky factor and inverse of each factor; the bias's output factor is inverted separately."""
        return cost(map(torch.Size, [*self.shapes, *([self.outputs] if self.bias and self.inputs else [])]))

    def direction_flops(self) -> float:
        """`B⁻¹ ∇ C⁻¹`: one product with each factor that is a matrix."""
        weights = prod(s[0] for s in self.shapes) if self.inputs else self.parameters
        return 2.0 * weights * sum(s[0] if len(s) == 2 else 1 for s in self.shapes)

    def moments_flops(self) -> float:
        """The two outer products of one case."""
        return 2.0 * sum(map(prod, self.shapes))


def triangle(shape: Shape) -> int:
    """The number of entries that are sent for a symmetric matrix, or for a diagonal."""
    return shape[0] * (shape[0] + 1) // 2 if len(shape) == 2 else shape[0]


def sizes_of(moments: Mapping[Layer, Moments], parameters: Mapping[str, torch.Tensor], examples: int) -> list[Size]:
    """The sizes of a model's layers, from the moments of `examples` examples."""
    sizes = []
    for layer, m in moments.items():
        count = sum(parameters[n].numel() for n in layer.names)
        size = Size(layer.label, count, bias=layer.bias is not None)
        if isinstance(m, AffineMoments):
            inputs, outputs = tuple(m.scatter.shape), tuple(m.output.shape)
            looked_up = layer.function.startswith("embedding")
            cases, products = float(m.count) / examples, 0.0 if looked_up else 2.0 * inputs[0] * outputs[0]
            size = replace(size, inputs=inputs, outputs=outputs, cases=cases, products=products)
        elif isinstance(m, ScaleMoments):
            size = replace(size, other=m.products.numel())
        elif isinstance(m, DiagonalMoments):
            size = replace(size, other=sum(v.numel() for v in m.values))
        sizes.append(size)
    return sizes


def gpt2_small(length: int = 1024) -> list[Size]:
    """GPT-2 small: 12 blocks of width 768, and 50,257 tokens with an embedding tied to the head (Radford et al.
    2019)."""
    d, tokens = 768, 50257
    # Used twice for each token; only the head multiplies.
    tied = replace(Size.embedding("wte", tokens, d, 2 * length), products=1.0 * tokens * d)
    sizes = [tied, Size.embedding("wpe", 1024, d, length), Size.scale("ln_f", d)]
    for k in range(12):
        shapes = [("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)]
        sizes += [Size.affine(f"h.{k}.{name}", *shape, cases=length) for name, *shape in shapes]
        sizes += [Size.scale(f"h.{k}.ln_{j}", d) for j in (1, 2)]
    return sizes


def llama_7b(length: int = 2048) -> list[Size]:
    """LLaMA 7B: 32 blocks of width 4,096, 32,000 tokens (Touvron et al. 2023, arXiv:2302.13971)."""
    d, hidden, tokens = 4096, 11008, 32000
    head = Size.affine("head", d, tokens, bias=False, cases=length)
    sizes = [Size.embedding("embedding", tokens, d, length), head, Size.scale("norm", d, shift=False)]
    for k in range(32):
        shapes = [*((n, d, d) for n in "qkvo"), ("gate", d, hidden), ("up", d, hidden), ("down", hidden, d)]
        sizes += [Size.affine(f"{k}.{name}", *shape, bias=False, cases=length) for name, *shape in shapes]
        sizes += [Size.scale(f"{k}.norm_{j}", d, shift=False) for j in (1, 2)]
    return sizes


MODELS = {"gpt2-small": gpt2_small, "llama-7b": llama_7b}
"""Functions of the number of tokens in an example, by name."""
