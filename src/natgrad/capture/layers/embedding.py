"""Embeddings: the input is one-hot, so its factor is diagonal and is not formed as a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from natgrad.capture.layers.inputs import Sparse
from natgrad.capture.layers.kind import Call, Kind
from natgrad.linalg.layout import Layout


@dataclass(frozen=True)
class Embedding(Kind):
    """`a = Wᵀ e(h)` for token indices `h`, `W` of shape `(tokens, d_out)`.

    Its input factor contains the tokens' frequencies and is exactly diagonal (`sharing="expand"`). Padding
    (`padding_idx`) has no gradient and does not count as a token.
    """

    tokens: int
    padding: int | None = None

    layout = Layout("transposed")
    name = "embedding"

    def inputs(self, h: Tensor) -> Sparse:
        h = h.flatten(1) if h.ndim > 1 else h.reshape(h.numel(), 1)
        index = h.flatten()
        row = torch.arange(len(index), device=h.device)
        if self.padding is not None:
            row, index = row[index != self.padding], index[index != self.padding]
        value = torch.ones(len(index), device=h.device)
        return Sparse(row, index, value, (len(h), h.shape[1], self.tokens))

    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "*grid 1 o"]:
        return g.unsqueeze(-2)


@dataclass(frozen=True)
class EmbeddingBag(Kind):
    """The sum or mean of a bag's embeddings, with weights for a sum; bags are examples.

    The input counts the tokens of a bag. Only the diagonal of its second moment is kept: the factor leaves out that two
    tokens occur in one bag. The exact block does not.
    """

    tokens: int
    offsets: tuple[int, ...] | None
    mean: bool
    padding: int | None = None
    weights: Tensor | None = None

    layout = Layout("transposed")
    name = "embedding_bag"

    def inputs(self, h: Tensor) -> Sparse:
        row, bags = self._bags(h)
        index = h.flatten()
        value = torch.ones(index.shape, dtype=torch.float64, device=h.device)
        if self.weights is not None:
            value = self.weights.detach().flatten().double()
        if self.padding is not None:
            own = index != self.padding
            row, index, value = row[own], index[own], value[own]
        if self.mean:
            value = value / torch.bincount(row, minlength=bags)[row]
        return Sparse(row, index, value, (bags, 1, self.tokens))

    def _bags(self, h: Tensor) -> tuple[Int[Tensor, " e"], int]:
        """The bag of each token, and the number of bags."""
        if self.offsets is None:
            return torch.arange(len(h), device=h.device).repeat_interleave(h.shape[1]), len(h)
        sizes = torch.tensor([*self.offsets[1:], h.numel()]) - torch.tensor(self.offsets)
        return torch.arange(len(sizes)).repeat_interleave(sizes).to(h.device), len(sizes)

    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "*grid 1 o"]:
        return g.unsqueeze(-2)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq:
        return None  # its gradients are not those of the function
    return Call(Embedding(len(weight), _index(padding_idx, len(weight))), input, weight)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq or mode == "max":
        return None
    starts = None if offsets is None else tuple(offsets.tolist())
    if starts is not None and include_last_offset:
        starts = starts[:-1]
    kind = EmbeddingBag(len(weight), starts, mode == "mean", _index(padding_idx, len(weight)), per_sample_weights)
    others = () if per_sample_weights is None else (per_sample_weights,)
    return Call(kind, input, weight, others=others)


def _getitem(input: Tensor, index: Any) -> Call | None:
    """`W[index]` for a tensor of row numbers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or input.ndim != 2:
        return None
    return Call(Embedding(len(input)), index % len(input), input)


def can_be_opened(*args: Any, **kwargs: Any) -> bool:
    """Whether `embedding_bag` supports these arguments of `F.embedding_bag`."""
    return _embedding_bag(*args, **kwargs) is not None


def embedding_bag(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding_bag`, computed by functions that have a forward mode.

    Raises:
        NotImplementedError: for the maximum of a bag, or renormalized embeddings.
    """
    call = _embedding_bag(input, weight, *args, **kwargs)
    if call is None:
        raise NotImplementedError(
            "embedding_bag with mode='max', max_norm or scale_grad_by_freq has no forward mode; use mode='sum' or "
            "'mean', or give lr, momentum and damping as numbers"
        )
    x = call.kind.inputs(input)
    assert isinstance(x, Sparse)
    terms = weight[x.column] * x.value.to(weight.dtype).unsqueeze(1)
    return weight.new_zeros(x.shape[0], weight.shape[1]).index_add(0, x.row, terms)


def _index(padding: int | None, tokens: int) -> int | None:
    return padding + tokens if padding is not None and padding < 0 else padding


PARSERS: dict[Any, Callable[..., Call | None]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    Tensor.__getitem__: _getitem,
}
