"""Fisher and Gauss-Newton matrices of PyTorch models, and the optimizers that follow from them."""

from natgrad import linalg, losses, pde
from natgrad.curvature.function import Function
from natgrad.curvature.matrices import fisher, gauss_newton, hessian
from natgrad.curvature.residual import residual
from natgrad.linalg import load
from natgrad.optim import (
    KFAC,
    PRONG,
    Damping,
    GrowingBatches,
    Intervals,
    NaturalGradient,
    NewtonMuon,
    load_checkpoint,
)
from natgrad.uses.ewc import EWC, ewc
from natgrad.uses.influence import influence
from natgrad.uses.jacobian import Jacobian, jacobian, ntk
from natgrad.uses.laplace import laplace
from natgrad.uses.lds import LDS, lds
from natgrad.uses.merge import merge
from natgrad.uses.posterior import LaplacePosterior
from natgrad.uses.prune import Pruned, prune
from natgrad.uses.quantize import Quantized, quantize
from natgrad.uses.unlearn import Unlearned, unlearn

__version__ = "0.1.0"
__all__ = [
    "EWC",
    "KFAC",
    "LDS",
    "PRONG",
    "Damping",
    "Function",
    "GrowingBatches",
    "Intervals",
    "Jacobian",
    "LaplacePosterior",
    "NaturalGradient",
    "NewtonMuon",
    "Pruned",
    "Quantized",
    "Unlearned",
    "ewc",
    "fisher",
    "gauss_newton",
    "hessian",
    "influence",
    "jacobian",
    "laplace",
    "lds",
    "linalg",
    "load",
    "load_checkpoint",
    "losses",
    "merge",
    "ntk",
    "pde",
    "prune",
    "quantize",
    "residual",
    "unlearn",
]


def __dir__() -> list[str]:
    """What users want; the rooms behind it are modules of their own."""
    return [*__all__, "__version__"]
