"""Kinds of layers: which calls of torch use a parameter, and the cases that each use gives."""

from natgrad.layers import affine, convolution, embedding, scale
from natgrad.layers.affine import VIEWS
from natgrad.layers.composite import COMPOSITES
from natgrad.layers.inputs import Inputs, InputSums, Rows, Sparse, joined, stacked
from natgrad.layers.kind import Call, Kind, View
from natgrad.layers.scale import ADDITIONS, PRODUCTS

# How each function's arguments are read.
PARSERS = {**affine.PARSERS, **convolution.PARSERS, **embedding.PARSERS, **scale.PARSERS}

__all__ = [
    "ADDITIONS",
    "COMPOSITES",
    "PARSERS",
    "PRODUCTS",
    "VIEWS",
    "Call",
    "InputSums",
    "Inputs",
    "Kind",
    "Rows",
    "Sparse",
    "View",
    "joined",
    "stacked",
]
