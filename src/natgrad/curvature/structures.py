"""The structures of a block-diagonal matrix, by name, and their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from natgrad.curvature.diagonal import DiagonalStructure
from natgrad.curvature.ekfac import EkfacStructure
from natgrad.curvature.exact import ExactStructure
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.kfoc import KfocStructure
from natgrad.curvature.low_rank import RANK, LowRankStructure
from natgrad.curvature.moments import MAX_DIM
from natgrad.curvature.structure import Structure


@dataclass(frozen=True)
class Options:
    """The options of all structures; `natgrad.fisher` describes them."""

    centered: bool = True
    sharing: str = "expand"
    max_dim: int = MAX_DIM
    rank: int = RANK


STRUCTURES: dict[str, Callable[[Options], Structure]] = {
    "block": lambda o: ExactStructure(),
    "kfac": lambda o: KfacStructure(o.centered, o.sharing, o.max_dim),
    "ekfac": lambda o: EkfacStructure(o.centered, o.sharing, o.max_dim),
    "kfoc": lambda o: KfocStructure(o.centered, o.sharing, o.max_dim),
    "low_rank": lambda o: LowRankStructure(o.rank),
    "diagonal": lambda o: DiagonalStructure(),
}
