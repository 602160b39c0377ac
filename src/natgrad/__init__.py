"""Fisher and Gauss-Newton matrices of PyTorch models, and the optimizers that follow from them."""

from natgrad import linalg
from natgrad.curvature import fisher, gauss_newton
from natgrad.optim import KFAC

__version__ = "0.1.0"
__all__ = ["KFAC", "fisher", "gauss_newton", "linalg"]
