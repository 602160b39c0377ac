"""The networks of the twelve tasks, as people write them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of ReLUs."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def convolutional() -> nn.Sequential:
    """Of images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Residual(nn.Module):
    """Two convolutions with batch normalization, around which the input goes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(h)) + self.around(x))


def residual() -> nn.Sequential:
    """Of images of 14 x 14."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
        Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Encoder(nn.Module):
    """torch's own transformer layers, both ways, the mean of the positions, and a linear layer."""

    def __init__(self, embed: nn.Module, positions: int, width: int, layers: int, classes: int):
        super().__init__()
        self.embed, self.positions = embed, nn.Parameter(0.02 * torch.randn(positions, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.embed(x) + self.positions)
        logits: Tensor = self.head(self.norm(h).mean(1))
        return logits


class Patches(nn.Module):
    """Images of 8 x 8 as 16 patches of 2 x 2."""

    def __init__(self, width: int):
        super().__init__()
        self.kernel = nn.Conv2d(1, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.kernel(x)
        return patches.flatten(2).mT


class Tagger(nn.Module):
    """A bidirectional LSTM over padded lines; logits `(N, C, T)`."""

    def __init__(self, symbols: int, tags: int, width: int):
        super().__init__()
        self.symbols = nn.Embedding(symbols, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.symbols(x))[0])
        return logits.mT


class UNet(nn.Module):
    """Down twice, up twice, and across; logits of the shape of the images."""

    def __init__(self, width: int):
        super().__init__()
        w = width
        self.in_, self.down1, self.down2 = self._two(1, w), self._two(w, 2 * w), self._two(2 * w, 4 * w)
        self.rise2, self.rise1 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.up2, self.up1, self.out = self._two(4 * w, 2 * w), self._two(2 * w, w), nn.Conv2d(w, 1, 1)

    @staticmethod
    def _two(inputs: int, outputs: int) -> nn.Sequential:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        a = self.in_(x)
        b = self.down1(F.max_pool2d(a, 2))
        c = self.down2(F.max_pool2d(b, 2))
        d = self.up2(torch.cat([self.rise2(c), b], 1))
        logits: Tensor = self.out(self.up1(torch.cat([self.rise1(d), a], 1)))
        return logits


class GraphNetwork(nn.Module):
    """Two graph convolutions, `Â X W + b`, with `Â = D^(-1/2) (E + I) D^(-1/2)` (Kipf & Welling 2017)."""

    def __init__(self, edges: Tensor, inputs: int, hidden: int, classes: int):
        super().__init__()
        loops = edges + torch.eye(len(edges))
        root = loops.sum(1).rsqrt()
        self.register_buffer("adjacency", root[:, None] * loops * root)
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.adjacency @ self.first(x))
        return self.adjacency @ self.second(F.dropout(h, 0.5, self.training))


def autoencoder() -> nn.Sequential:
    """Of 64 pixels."""
    widths = (64, 128, 64, 32, 6, 32, 64, 128, 64)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.Identity() if outputs == 6 else nn.Tanh()]
    return nn.Sequential(*modules[:-1])
