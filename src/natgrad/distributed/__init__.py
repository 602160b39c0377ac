"""Several ranks: which rank computes what, how sums are reduced, and how results are sent to the other ranks."""

from natgrad.distributed.assignment import assign
from natgrad.distributed.placement import placed, unwrapped
from natgrad.distributed.world import World

__all__ = ["World", "assign", "placed", "unwrapped"]
