"""How well conditioned the inputs of a model's affine layers are, with and without centering.

K-FAC's input factor for a layer with inputs h is the second moment E[x x^T] of x = [h; 1]; centered K-FAC
works with the covariance of h instead.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.study.measure import condition_number


@dataclass(frozen=True)
class LayerConditioning:
    """The condition numbers at one affine layer's input.

    Inputs that are equal for all images are left out of both matrices. `floored_*` count the eigenvalues that were
    raised to the floor; if there are any, the condition number is only a lower bound.
    """

    layer: str
    inputs: int
    constant_inputs: int
    second_moment: float
    covariance: float
    floored_second_moment: int
    floored_covariance: int


@torch.no_grad()
def layer_conditioning(model: nn.Sequential, images: Float[Tensor, "images pixels"]) -> list[LayerConditioning]:
    """Compute the condition numbers at the input of each affine layer, in float64."""
    result = []
    h = images
    for module in model:
        if isinstance(module, nn.Linear):
            inputs = h.double()
            varying = inputs.amax(0) > inputs.amin(0)
            inputs = inputs[:, varying]
            homogeneous = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
            second_moment, floored_second_moment = condition_number(_second_moment(homogeneous))
            covariance, floored_covariance = condition_number(_second_moment(inputs - inputs.mean(0)))
            result.append(
                LayerConditioning(
                    f"{module.in_features}→{module.out_features}",
                    inputs.shape[1],
                    len(varying) - inputs.shape[1],
                    second_moment,
                    covariance,
                    floored_second_moment,
                    floored_covariance,
                )
            )
        h = module(h)
    return result


def _second_moment(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "columns columns"]:
    return rows.T @ rows / len(rows)
