"""Tools for networks that solve differential equations: derivatives in one forward pass, and random training points."""

from natgrad.pde.points import on_faces, uniform
from natgrad.pde.taylor import Derivatives, derivatives

__all__ = ["Derivatives", "derivatives", "on_faces", "uniform"]
