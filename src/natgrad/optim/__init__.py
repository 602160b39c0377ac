"""The optimizers: damping rules and step rules over the operators of `natgrad.linalg`."""

from natgrad.optim.checkpoint import load_checkpoint
from natgrad.optim.growing import GrowingBatches
from natgrad.optim.kfac import KFAC
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.newton_muon import NewtonMuon
from natgrad.optim.options import Damping, Intervals
from natgrad.optim.prong import PRONG

__all__ = [
    "KFAC",
    "PRONG",
    "Damping",
    "GrowingBatches",
    "Intervals",
    "NaturalGradient",
    "NewtonMuon",
    "load_checkpoint",
]
