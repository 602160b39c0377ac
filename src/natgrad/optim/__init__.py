"""The optimizers: damping rules and step rules over the operators of `natgrad.linalg`."""

from natgrad.optim.kfac import KFAC

__all__ = ["KFAC"]
