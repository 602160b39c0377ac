"""The networks of the tasks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

INCOMING = 15


def make_autoencoder(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Make an autoencoder with these widths down to the code, and the same widths back up to the image.

    The hidden layers are sigmoids, the code is linear, and the output is logits. The initial weights are sparse, as in
    Martens (2010).
    """
    generator = Generator().manual_seed(seed)
    sizes = [*widths, *reversed(widths[:-1])]
    linear_layers = {len(widths) - 2, len(sizes) - 2}
    modules: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(inputs, outputs)
        sparse_init(layer, generator)
        modules.append(layer)
        if index not in linear_layers:
            modules.append(nn.Sigmoid())
    return nn.Sequential(*modules)


def sparse_init(layer: nn.Linear, generator: Generator) -> None:
    """Give each unit 15 incoming weights from N(0, 1) (or all, if it has fewer); set all else to zero."""
    outputs, inputs = layer.weight.shape
    kept = min(INCOMING, inputs)
    with torch.no_grad():
        chosen = torch.rand(outputs, inputs, generator=generator).topk(kept, dim=1).indices
        values = torch.randn(outputs, kept, generator=generator)
        layer.weight.zero_().scatter_(1, chosen, values)
        layer.bias.zero_()


def make_perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Make a perceptron with a tanh between its layers and torch's default initialization."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def make_convolutional(channels: tuple[int, int] = (16, 32), hidden: int = 64) -> nn.Sequential:
    """Make a small convolutional classifier for 28 x 28 images."""
    first, second = channels
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 49, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


class Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder with tied embeddings: tokens `(N, T)` to logits `(N, V, T)`."""

    def __init__(self, vocabulary: int, context: int, width: int = 128, layers: int = 3, heads: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight).transpose(1, 2)
