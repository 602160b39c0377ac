"""A decoder as in language models: pre-norm blocks, rotary positions, GPT-2's initialization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

HEAD_WIDTH = 32
STD = 0.02
"""Standard deviation of the initial weights (Radford et al. 2019); weights that write to the residual stream are
smaller."""


class Decoder(nn.Module):
    """Tokens `(N, T)` to logits `(N, V, T)`. The output layer `head` has its own weights."""

    def __init__(self, vocabulary: int, width: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=STD / (2 * layers) ** 0.5 if writes else STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n v t"]:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = (h.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for h in self.qkv(self.norm1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotated(h: Float[Tensor, "n heads t d"]) -> Float[Tensor, "n heads t d"]:
    """Rotates each pair of features by an angle proportional to the position (Su et al. 2021, arXiv:2104.09864)."""
    positions, width = h.shape[-2:]
    frequencies = 1e4 ** -torch.linspace(0, 1, width // 2 + 1, dtype=h.dtype, device=h.device)[:-1]
    angles = torch.outer(torch.arange(positions, dtype=h.dtype, device=h.device), frequencies)
    a, b = h.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)
