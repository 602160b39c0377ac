"""The tasks by name."""

from __future__ import annotations

import functools
import pydoc_data.topics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from natgrad.study.images import draw_curves, load_mnist
from natgrad.study.networks import Transformer, make_autoencoder, make_convolutional, make_perceptron
from natgrad.study.pinns import SETTINGS
from natgrad.study.pinns import pinn as published_pinn
from natgrad.study.poisson import PoissonResidual, collocation_points, relative_error
from natgrad.study.task import Batch, Task
from natgrad.study.text import text_task

WEIGHT_COST = 1e-5
SUBSET = 2000
"""The number of examples for a figure on the training data."""


def autoencoder(name: str, data_seed: int = 0) -> Task:
    """Summed cross-entropy of images; the figure is the squared error per image, on 2,000 training images."""
    widths: tuple[int, ...]
    if name == "curves":
        images, widths = draw_curves(10_000, data_seed), (784, 400, 200, 100, 50, 25, 6)
    else:
        images, widths = load_mnist()[0], (784, 1000, 500, 250, 30)

    def evaluate(model: nn.Module) -> dict[str, float]:
        loss, error = reconstruction(model, images[:SUBSET])
        return {"squared error": error, "loss": loss}

    return Task(
        name,
        "squared error",
        1000,
        nn.BCEWithLogitsLoss(reduction="sum"),
        lambda seed: make_autoencoder(widths, seed),
        lambda seed, size: ((x, x) for x in shuffled_batches(images, size, seed)),
        evaluate,
        lambda count: (images[:count], images[:count]),
        WEIGHT_COST,
        images,
        widths,
    )


@torch.no_grad()
def reconstruction(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the cross-entropy and the squared error, summed over pixels and averaged over images."""
    loss = error = 0.0
    for part in images.split(1000):
        logits = model(part)
        loss += F.binary_cross_entropy_with_logits(logits, part, reduction="sum").item()
        error += F.mse_loss(logits.sigmoid(), part, reduction="sum").item()
    return loss / len(images), error / len(images)


def classifier(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Task:
    """A classifier trained on 4,000 digits; another 1,000 are the test set."""
    pixels, labels = load_mnist()
    order = torch.randperm(len(pixels), generator=Generator().manual_seed(0))
    x, y = pixels.view(-1, *shape)[order], labels[order]

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        train, test = model(x[:SUBSET]), model(x[4000:])
        return {
            "training loss": F.cross_entropy(train, y[:SUBSET]).item(),
            "test loss": F.cross_entropy(test, y[4000:]).item(),
            "test error, %": 100 * (test.argmax(1) != y[4000:]).float().mean().item(),
        }

    return Task(
        name,
        "training loss",
        250,
        nn.CrossEntropyLoss(),
        make_model,
        lambda seed, size: ((x[i], y[i]) for i in indices(4000, size, seed)),
        evaluate,
        lambda count: (x[: min(count, 4000)], y[: min(count, 4000)]),
    )


CONTEXT, PASSAGE = 64, 2000


def language_model() -> Task:
    """The characters of Python's language reference, as shipped with CPython; every tenth passage is for validation."""
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(text))
    number = {c: i for i, c in enumerate(alphabet)}
    codes = torch.tensor([number[c] for c in text])
    passages = codes[: len(codes) - len(codes) % PASSAGE].view(-1, PASSAGE)
    apart = torch.arange(len(passages)) % 10 == 9
    held_out = passages[apart].unfold(1, CONTEXT + 1, CONTEXT).flatten(0, 1)[:512]
    windows = passages[~apart].unfold(1, CONTEXT + 1, 1).flatten(0, 1)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(len(alphabet), CONTEXT)

    def batches(seed: int, size: int) -> Iterator[Batch]:
        generator = Generator().manual_seed(seed)
        while True:
            w = windows[torch.randint(len(windows), (size,), generator=generator)]
            yield w[:, :-1], w[:, 1:]

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"validation loss": F.cross_entropy(model(held_out[:, :-1]), held_out[:, 1:]).item()}

    def sample(count: int) -> Batch:
        some = windows[:: max(1, len(windows) // count)][:count]
        return some[:, :-1], some[:, 1:]

    return Task("language", "validation loss", 32, nn.CrossEntropyLoss(), make_model, batches, evaluate, sample)


def pinn() -> Task:
    """Poisson's equation on the unit square, with residuals at 480 points."""
    points = collocation_points(20, 20)
    zero = torch.zeros(len(points), 1, dtype=points.dtype)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return PoissonResidual()

    def batches(seed: int, size: int) -> Iterator[Batch]:
        while True:
            yield points, zero

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PoissonResidual)
        return {"relative error": relative_error(model)}

    return Task(
        "pinn",
        "relative error",
        len(points),
        nn.MSELoss(),
        make_model,
        batches,
        evaluate,
        lambda count: (points[:count], zero[:count]),
    )


def indices(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices, in a new order for each pass."""
    generator = Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        # An incomplete batch is left for a later pass: all batches have the same weight.
        yield from order[: count - count % size].split(size)


def shuffled_batches(examples: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield endless batches of one size, in a new order for each pass through the examples."""
    return (examples[i] for i in indices(len(examples), size, seed))


TASKS: dict[str, Callable[[], Task]] = {
    "curves": lambda: autoencoder("curves"),
    "mnist": lambda: autoencoder("mnist"),
    "classifier": lambda: classifier("classifier", make_convolutional, (1, 28, 28)),
    "perceptron": lambda: classifier("perceptron", lambda: make_perceptron((784, 100, 50, 10)), (784,)),
    "language": language_model,
    "pinn": pinn,
    **{name: functools.partial(published_pinn, name) for name in SETTINGS},
    **{f"text-{width}": functools.partial(text_task, width) for width in (64, 128, 256, 512)},
}
NEED_MNIST = ("mnist", "classifier", "perceptron")
