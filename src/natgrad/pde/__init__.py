"""For networks that solve differential equations: their derivatives in one forward pass, and points to train on."""

from natgrad.pde.points import on_faces, uniform
from natgrad.pde.taylor import Derivatives, derivatives

__all__ = ["Derivatives", "derivatives", "on_faces", "uniform"]
