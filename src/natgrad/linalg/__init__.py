"""Operators: symmetric matrices known by what they do, one contract for all (`Operator`)."""

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.centered import CenteredKronecker, homogeneous_inverse
from natgrad.linalg.dense import Dense
from natgrad.linalg.kronecker import Homogeneous, Kronecker
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Space
from natgrad.linalg.vec import unvec, vec

__all__ = [
    "Block",
    "BlockDiagonal",
    "CenteredKronecker",
    "Dense",
    "Homogeneous",
    "Kronecker",
    "Operator",
    "Space",
    "homogeneous_inverse",
    "unvec",
    "vec",
]
