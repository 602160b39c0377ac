"""The optimizers: damping rules and step rules over the operators of `natgrad.linalg`."""

from natgrad.optim.kfac import KFAC
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["KFAC", "NaturalGradient"]
