"""Low rank plus diagonal: the largest eigenvalues of each layer's exact block, and its diagonal."""

from __future__ import annotations

from natgrad.capture.layer import Layer
from natgrad.checks.values import check_count
from natgrad.curvature.exact import ExactStructure
from natgrad.linalg import ExactBlock, Operator
from natgrad.linalg.diagonal_plus import nearest_low_rank

RANK = 10


class LowRankStructure(ExactStructure):
    """`diag(d) + U diag(e) Uᵀ` of each layer: its exact block's largest eigenvalues `e` with their eigenvectors, and a
    `d ≥ 0` with which the diagonal is the exact one. The cases are held while it is built.

    Args:
        rank: how many eigenvalues of each layer.
    """

    def __init__(self, rank: int = RANK):
        check_count("rank", rank, "eigenvalues")
        super().__init__()
        self.rank = rank

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        blocks: dict[Layer, Operator] = {}
        for layer, block in super().build(is_mean).items():
            assert isinstance(block, ExactBlock)
            blocks[layer] = nearest_low_rank(block, self.rank)
        return blocks
