"""Operators: symmetric matrices known by what they do, one contract for all (`Operator`)."""

from natgrad.linalg import coverage as coverage
from natgrad.linalg import restriction as restriction
from natgrad.linalg import submatrix as submatrix
from natgrad.linalg import subspace as subspace
from natgrad.linalg import traces as traces
from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.centered import Centered, CenteredKronecker, homogeneous_inverse
from natgrad.linalg.columns import ColumnBlock
from natgrad.linalg.combination import Scaled, Sum
from natgrad.linalg.coordinates import CoordinateBlocks
from natgrad.linalg.dense import Dense
from natgrad.linalg.density import SpectralDensity
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.diagonal_plus import DiagonalPlusLowRank
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.external import External
from natgrad.linalg.files import load
from natgrad.linalg.kronecker import Homogeneous, Kronecker, KroneckerEigen
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.layout import Layout
from natgrad.linalg.low_rank import LowRank, nystrom
from natgrad.linalg.operator import Operator
from natgrad.linalg.rows import Rows
from natgrad.linalg.space import Space
from natgrad.linalg.stochastic import Estimate
from natgrad.linalg.top import Eigenpairs
from natgrad.linalg.vec import unvec, vec

__all__ = [
    "Block",
    "BlockDiagonal",
    "Centered",
    "CenteredKronecker",
    "ColumnBlock",
    "CoordinateBlocks",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Eigenpairs",
    "Estimate",
    "ExactBlock",
    "External",
    "Homogeneous",
    "IterativeInverse",
    "Kronecker",
    "KroneckerEigen",
    "Layout",
    "LowRank",
    "Operator",
    "Rows",
    "Scaled",
    "Space",
    "SpectralDensity",
    "Sum",
    "homogeneous_inverse",
    "load",
    "nystrom",
    "unvec",
    "vec",
]
