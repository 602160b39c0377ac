"""What the checks of a model's assumptions cost in a training run.

natgrad looks whether rows depend on one another, compares forward mode with the backward, and the gradients with those
of the known losses. This measures their share of a run's processor time, for mini-batches of one shape and of a new
length each.

    python -m benchmarks.checks
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine
from natgrad.capture.separation import SeparationCheck
from natgrad.curvature import jacobian
from natgrad.optim.untold import Untold

STEPS = 200
spent = 0.0


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global spent
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent += time.process_time() - start

    return wrapped


class Decoder(nn.Module):
    def __init__(self, width: int = 64, words: int = 64, longest: int = 64):
        super().__init__()
        self.tokens, self.places = nn.Embedding(words, width), nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.layers(h, mask=mask, is_causal=True)).flatten(0, 1)


def text(length: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(64, (16, length + 1))
    return x[:, :-1], x[:, 1:].flatten()


def images(_: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(128, 1, 12, 12)
    return x, (x.mean((1, 2, 3)) > 0).long()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 2),
    )


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "CNN with batch norm": (convolutional, images),
    "decoder, one length": (Decoder, lambda step: text(48)),
    "decoder, a new length each step": (Decoder, lambda step: text(16 + step % 48)),
}


def main() -> None:
    global spent
    print(machine())
    torch.set_num_threads(1)
    SeparationCheck.of = timed(SeparationCheck.of)  # type: ignore[method-assign]
    jacobian._look = timed(jacobian._look)
    Untold.look = timed(Untold.look)  # type: ignore[method-assign]
    for name, (model, batch) in RUNS.items():
        for options in ({}, {"lr": 0.02, "momentum": 0.9, "damping": 0.1}):
            torch.manual_seed(0)
            net = model()
            opt = natgrad.KFAC(net, nn.CrossEntropyLoss(), **options)  # type: ignore[arg-type]
            spent, start = 0.0, time.process_time()
            for step in range(STEPS):
                x, y = batch(step)
                loss = opt.loss(net(x), y)
                opt.zero_grad()
                loss.backward()
                opt.step()
            total = time.process_time() - start
            how = "given numbers" if options else "adaptive"
            print(
                f"{name}, {how}: {spent:.2f} s of {total:.1f} s in {STEPS} steps, {spent / (total - spent):.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
