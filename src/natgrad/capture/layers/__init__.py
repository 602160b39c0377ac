"""Kinds of layers: which torch functions use a parameter, and the cases of each use."""

from natgrad.capture.layers import affine, bilinear, convolution, embedding, scale
from natgrad.capture.layers.composite import COMPOSITES, FUSED
from natgrad.capture.layers.inputs import Inputs, InputSums, Rows, Sparse, joined, stacked
from natgrad.capture.layers.kind import Call, Kind, View
from natgrad.capture.layers.recurrent import RECURRENCES
from natgrad.capture.layers.scale import ADDITIONS, PRODUCTS, SPREADS, Scale
from natgrad.capture.layers.views import CASTS, ELEMENTWISE, MULTIPLES, OFFSETS, RESHAPES, SELECTIONS, VIEWS

# How each function's arguments are read.
PARSERS = {**affine.PARSERS, **bilinear.PARSERS, **convolution.PARSERS, **embedding.PARSERS, **scale.PARSERS}

__all__ = [
    "ADDITIONS",
    "CASTS",
    "COMPOSITES",
    "ELEMENTWISE",
    "FUSED",
    "MULTIPLES",
    "OFFSETS",
    "PARSERS",
    "PRODUCTS",
    "RECURRENCES",
    "RESHAPES",
    "SELECTIONS",
    "SPREADS",
    "VIEWS",
    "Call",
    "InputSums",
    "Inputs",
    "Kind",
    "Rows",
    "Scale",
    "Sparse",
    "View",
    "joined",
    "stacked",
]
