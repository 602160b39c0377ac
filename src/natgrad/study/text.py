"""Text that comes with every Python, as bytes, and language models for it."""

from __future__ import annotations

import functools
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Generator, Tensor, nn

from natgrad.checks.errors import UserError
from natgrad.study.decoder import Decoder
from natgrad.study.task import Batch, Task

LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__")
)
"""Folders of the standard library that may be missing, or hold tables instead of text."""
EVERY = 10
"""One document in this many is for validation."""
CONTEXT, WINDOWS = 128, 512
VALUES = 256


@functools.cache
def corpus() -> tuple[UInt8[Tensor, " training"], UInt8[Tensor, " validation"]]:
    """The bytes of the standard library's sources and of the reference topics that `help()` shows, in the order of the
    documents' names: nine tenths for training, every tenth document for validation.

    Raises:
        UserError: if the sources are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    sources = sorted(name.as_posix() for name in names if not LEFT_OUT.intersection(name.parts))
    documents = [(root / name).read_bytes() for name in sources]
    documents += [pydoc_data.topics.topics[key].encode() for key in sorted(pydoc_data.topics.topics)]
    if sum(map(len, documents)) < 2**20:
        raise UserError(
            f"the task needs the sources of Python's standard library, but {root} has hardly any; expected those of a "
            "usual installation; run it with another Python."
        )
    held_out = b"".join(documents[EVERY - 1 :: EVERY])
    rest = b"".join(text for i, text in enumerate(documents) if i % EVERY != EVERY - 1)
    training, validation = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (rest, held_out))
    return training, validation


def text_task(width: int, layers: int = 4) -> Task:
    """A byte-level decoder of this width; the figure is the loss on 512 windows of held-out text, in nats per byte."""
    training, validation = corpus()
    held_out = validation[: len(validation) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    held_out = held_out[:: max(1, len(held_out) // WINDOWS)][:WINDOWS].long()

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Decoder(VALUES, width, layers)

    def windows(starts: Tensor) -> Batch:
        w = training[starts[:, None] + torch.arange(CONTEXT + 1)].long()
        return w[:, :-1], w[:, 1:]

    def batches(seed: int, size: int) -> Iterator[Batch]:
        generator = Generator().manual_seed(seed)
        while True:
            yield windows(torch.randint(len(training) - CONTEXT, (size,), generator=generator))

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        parts = held_out.split(64)
        total = sum(len(w) * F.cross_entropy(model(w[:, :-1]), w[:, 1:]).item() for w in parts)
        return {"validation loss": total / len(held_out)}

    def sample(count: int) -> Batch:
        return windows(torch.linspace(0, len(training) - CONTEXT - 1, count).long())

    return Task(f"text-{width}", "validation loss", 16, nn.CrossEntropyLoss(), make_model, batches, evaluate, sample)
