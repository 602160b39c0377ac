"""Twelve tasks that people have, small, on data that come with packages or are drawn."""

from __future__ import annotations

import functools
import io
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.no_regret import networks
from natgrad.study.comparison import Problem
from natgrad.study.images import load_mnist
from natgrad.study.networks import Transformer
from natgrad.study.split import Split
from natgrad.study.tasks import indices
from natgrad.study.text import corpus

HELD_OUT = 5
"""Of so many examples, one is held out."""


@dataclass(frozen=True)
class Task:
    """A model from torch's global seed, a loss, and training and held-out pairs."""

    make: Callable[[], nn.Module]
    loss: nn.Module
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    batch: int

    def problem(self, seed: int) -> Problem:
        torch.manual_seed(seed)
        return Problem(self.make(), self.loss, self._split(), _read, seed)

    def _split(self) -> Split:
        def training(seed: int) -> Iterator[Any]:
            return ((self.x[i], self.y[i]) for i in indices(len(self.x), self.batch, seed))

        size = max(self.batch, 64)
        sample = list(zip(self.x[:512].split(size), self.y[:512].split(size), strict=True))
        return Split(training, sample, list(zip(self.held_x.split(size), self.held_y.split(size), strict=True)))


def _read(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return model(x), y


def _task(make: Callable[[], nn.Module], loss: nn.Module, x: Tensor, y: Tensor, batch: int) -> Task:
    """Every fifth example, in an order that is always the same, is held out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, own = order[: len(x) // HELD_OUT], order[len(x) // HELD_OUT :]
    return Task(make, loss, x[own], y[own], x[held], y[held], batch)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def digits_cnn() -> Task:
    return _task(networks.convolutional, nn.CrossEntropyLoss(), *_digits(), 64)


def residual_cnn() -> Task:
    pixels, labels = load_mnist()
    images = F.avg_pool2d(pixels.view(-1, 1, 28, 28), 2)
    return _task(networks.residual, nn.CrossEntropyLoss(), images, labels, 128)


def regression(scales: bool) -> Task:
    """Friedman's first function of ten features (1991). With `scales`, their largest values are 1 to 1000 and they
    are not centered."""
    from sklearn.datasets import make_friedman1

    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_friedman1(4000, noise=1.0, random_state=0))
    y = ((y - y.mean()) / y.std())[:, None]
    x = x * 10 ** torch.linspace(0, 3, 10) if scales else (x - x.mean(0)) / x.std(0)
    return _task(lambda: networks.perceptron(10, 64, 1), nn.MSELoss(), x, y, 64)


def classification() -> Task:
    """20 features, of which 12 tell, seven classes in several clusters each."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        6000, 20, n_informative=12, n_classes=7, n_clusters_per_class=3, flip_y=0.05, random_state=0
    )
    return _task(
        lambda: networks.perceptron(20, 128, 7),
        nn.CrossEntropyLoss(),
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y),
        128,
    )


def _windows(text: Tensor, length: int, count: int) -> Tensor:
    return text[: len(text) // length * length].view(-1, length)[:: len(text) // length // count][:count].long()


def char_gpt() -> Task:
    """The next byte of Python's sources."""
    own, held = corpus()
    w, h = _windows(own, 65, 20_000), _windows(held, 65, 512)
    make = functools.partial(Transformer, 256, 64, 64, 2)
    return Task(make, nn.CrossEntropyLoss(), w[:, :-1], w[:, 1:], h[:, :-1], h[:, 1:], 16)


PACKAGES = ("asyncio", "email", "importlib", "xml")


def bert_like() -> Task:
    """Which of four packages of the standard library 64 bytes of source are from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [b"".join(path.read_bytes() for path in sorted((root / p).rglob("*.py"))) for p in PACKAGES]
    windows = [_windows(torch.frombuffer(bytearray(t), dtype=torch.uint8), 64, 2000)[:2000] for t in texts]
    labels = torch.cat([torch.full((len(w),), label) for label, w in enumerate(windows)])
    return _task(
        lambda: networks.Encoder(nn.Embedding(256, 64), 64, 64, 2, 4), nn.CrossEntropyLoss(), torch.cat(windows),
        labels, 16,
    )  # fmt: skip


def vision_transformer() -> Task:
    return _task(lambda: networks.Encoder(networks.Patches(64), 16, 64, 2, 10), nn.CrossEntropyLoss(), *_digits(), 64)


def tagger() -> Task:
    """The kind of token that each character of a line of Python is of; lines of all lengths, padded to 64."""
    own, _ = corpus()
    lines, tags = _tagged(bytes(own[:400_000].tolist()).decode(errors="replace"), 3000)
    make = functools.partial(networks.Tagger, 128, 8, 48)
    return _task(make, nn.CrossEntropyLoss(ignore_index=-100), lines, tags, 32)


KINDS = {tokenize.NAME: 1, tokenize.OP: 2, tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.COMMENT: 5}


def _tagged(text: str, count: int) -> tuple[Tensor, Tensor]:
    lines: list[Tensor] = []
    tags: list[Tensor] = []
    for line in dict.fromkeys(text.splitlines()):
        if len(lines) == count:
            break
        line = line.strip()
        if not (8 <= len(line) <= 64 and line.isascii() and line.isprintable()):
            continue
        own = [0] * len(line)
        try:
            for token in tokenize.generate_tokens(io.StringIO(line + "\n").readline):
                if token.type in KINDS and token.start[0] == token.end[0] == 1:
                    its = KINDS[token.type]
                    own[token.start[1] : token.end[1]] = [its] * (token.end[1] - token.start[1])
        except (tokenize.TokenError, SyntaxError, IndentationError):
            continue
        lines.append(F.pad(torch.tensor([ord(c) for c in line]), (0, 64 - len(line))))
        tags.append(F.pad(torch.tensor(own), (0, 64 - len(line)), value=-100))
    return torch.stack(lines), torch.stack(tags)


def segmentation() -> Task:
    """Where the digit is in a noisy picture of 32 x 32."""
    images, _ = _digits()
    generator = torch.Generator().manual_seed(0)
    canvas = torch.zeros(1000, 1, 32, 32)
    for picture, digit, (top, left) in zip(
        canvas, images, torch.randint(17, (1000, 2), generator=generator).tolist(), strict=False
    ):
        picture[:, top : top + 16, left : left + 16] = digit.repeat_interleave(2, 1).repeat_interleave(2, 2)
    noisy = canvas + 0.6 * torch.randn(canvas.shape, generator=generator)
    return _task(lambda: networks.UNet(8), nn.BCEWithLogitsLoss(), noisy, (canvas > 0.3).float(), 16)


def graph() -> Task:
    """The block of each of 800 nodes of a graph, of which every tenth is labelled; features with noise."""
    generator = torch.Generator().manual_seed(0)
    nodes, classes = 800, 6
    y = torch.arange(nodes) % classes
    near = torch.where(y[:, None] == y, 0.02, 0.004)
    edges = (torch.rand(nodes, nodes, generator=generator) < near).float().triu(1)
    x = 0.7 * F.one_hot(y, 40).float() + 0.5 * torch.randn(nodes, 40, generator=generator)
    own = torch.rand(nodes, generator=generator) < 0.1
    labels = [torch.where(which, y, -100)[None] for which in (own, ~own)]
    loss = nn.CrossEntropyLoss(ignore_index=-100)
    make = lambda: nn.Sequential(Whole(networks.GraphNetwork(edges + edges.T, 40, 32, classes)))  # noqa: E731
    return Task(make, loss, x[None], labels[0], x[None], labels[1], 1)


class Whole(nn.Module):
    """A network of a whole graph, on a batch of one."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x[0])
        return logits.mT[None]


def autoencoder() -> Task:
    x = _digits()[0].flatten(1)
    return _task(networks.autoencoder, nn.MSELoss(), x, x, 64)


TASKS: dict[str, Callable[[], Task]] = {
    "digits, convolutions": digits_cnn,
    "MNIST, residual with batch norm": residual_cnn,
    "regression, features scaled": lambda: regression(False),
    "regression, features raw": lambda: regression(True),
    "classification of 20 features": classification,
    "characters, GPT": char_gpt,
    "text, BERT-like": bert_like,
    "digits, ViT": vision_transformer,
    "tags, LSTM, padded": tagger,
    "segmentation, U-Net": segmentation,
    "nodes of a graph, GCN": graph,
    "autoencoder": autoencoder,
}
