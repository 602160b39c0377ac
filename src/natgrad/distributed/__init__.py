"""Several ranks: who computes what, how sums come together and results are handed round."""

from natgrad.distributed.assignment import assign
from natgrad.distributed.placement import placed, unwrapped
from natgrad.distributed.world import World

__all__ = ["World", "assign", "placed", "unwrapped"]
