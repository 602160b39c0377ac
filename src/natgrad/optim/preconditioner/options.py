"""The kind of blocks of the layers, and the refresh intervals."""

from __future__ import annotations

from dataclasses import dataclass, field

from natgrad.curvature.moments import MAX_DIM
from natgrad.optim.preconditioner.interval import Interval


@dataclass(frozen=True)
class Options:
    """The docstring of `KFAC` explains each option."""

    structure: str = "kfac"
    centered: bool = True
    bias_update: str = "exact"
    damping_style: str = "factored"
    relative: bool = False
    estimator: str = "mc"
    sharing: str = "expand"
    statistics: Interval = field(default_factory=lambda: Interval(10, False))
    statistics_share: float | None = None
    inverses: Interval = field(default_factory=lambda: Interval(20, False))
    bases_every: int = 100
    decay: float = 0.8
    max_dim: int = MAX_DIM
    matmul_precision: str | None = "medium"
    input_scales: bool = False
