"""Operators: symmetric matrices known by what they do, one contract for all (`Operator`)."""

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.centered import Centered, CenteredKronecker, homogeneous_inverse
from natgrad.linalg.combination import Scaled, Sum
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.kronecker import Homogeneous, Kronecker, KroneckerEigen
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Space
from natgrad.linalg.state import load
from natgrad.linalg.stochastic import Estimate
from natgrad.linalg.vec import unvec, vec

__all__ = [
    "Block",
    "BlockDiagonal",
    "Centered",
    "CenteredKronecker",
    "Dense",
    "Diagonal",
    "Estimate",
    "ExactBlock",
    "Homogeneous",
    "Kronecker",
    "KroneckerEigen",
    "Operator",
    "Scaled",
    "Space",
    "Sum",
    "homogeneous_inverse",
    "load",
    "unvec",
    "vec",
]
