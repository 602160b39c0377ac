"""The cost of influence scores on many ranks: memory, and a prediction of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from natgrad.distributed.assignment import assign
from natgrad.distributed.plan import Machine, Prediction
from natgrad.distributed.sizes import Size

EIGEN = 9.0
"""Of an eigendecomposition of `d` rows, the FLOP in units of `d³` (Golub & Van Loan 2013, section 8.3)."""


@dataclass(frozen=True)
class Scoring:
    """What is scored, by `natgrad.influence` with EKFAC and one sampled label for each example. In
    `DistributedDataParallel` every rank has its share of the training data, and all queries.

    Args:
        train: training examples, on all ranks together.
        queries: how many.
        rank: of the query gradients. None: they are held in full.
        batch: examples, and queries, in a batch.
        itemsize: bytes of a number.
    """

    train: int
    queries: int = 100
    rank: int | None = None
    batch: int = 8
    itemsize: int = 4


def predict_influence(layers: Sequence[Size], ranks: int, machine: Machine, scoring: Scoring) -> Prediction:
    """Seconds by purpose, and the bytes on one rank. `docs/scaling.md` has the formulas.

    Example:
        >>> layers = [Size.affine(str(i), 768, 768, cases=512) for i in range(12)]
        >>> one, many = (predict_influence(layers, n, Machine(), Scoring(100_000)) for n in (1, 8))
        >>> many.time < one.time / 7, many.held == one.held
        (True, True)
    """
    s, m, size = scoring, machine, scoring.itemsize
    own = s.train / ranks
    forward = sum(layer.cases * layer.products for layer in layers)
    moments = sum(layer.cases * layer.moments_flops() for layer in layers)
    # Both passes take a forward and a backward to the layers' outputs. The second rotates inputs and gradients, which
    # costs what the outer products of the first do, and multiplies their squares.
    passes = own * (4 * forward + 2 * moments + forward)
    eigen = {i: EIGEN * sum(d[0] ** 3 for d in layer.shapes if len(d) == 2) for i, layer in enumerate(layers)}
    owners = assign(eigen, ranks)
    bases = max(sum((flops for i, flops in eigen.items() if owners[i] == r), 0.0) for r in range(ranks))
    parameters = sum(layer.parameters for layer in layers)
    queries = s.queries * (3 * forward + 2 * sum(layer.direction_flops() for layer in layers))
    formed = sum(layer.cases * layer.products for layer in layers)
    inner = 2.0 * s.queries * parameters
    if s.rank is not None:
        formed, inner = 0.0, sum(_low_rank_flops(layer, s) for layer in layers)
    factors = size * sum(sum(map(prod, layer.shapes)) + layer.other for layer in layers)
    seconds = {
        "factors": passes / m.flops,
        "eigenbases": bases / m.inverse_flops,
        "queries": queries / m.flops,
        "scores": own * (2 * forward + formed + inner) / m.flops,
        "factors sent": m.all_reduce(sum(layer.moments_sent(size) for layer in layers), ranks),
        "eigenbases sent": m.spread(factors, ranks, ranks),
        "eigenvalues sent": m.all_reduce(size * parameters, ranks),
    }
    return Prediction("influence", ranks, _held(layers, s, factors, parameters), seconds)


def _low_rank_flops(layer: Size, s: Scoring) -> float:
    """Of one training example with all queries: `2 r (d_in + d_out)` for each case and query. Of an embedding, whose
    gradients are formed, all of its entries, and its share of the products that the queries are."""
    rank = s.rank or 0
    if not layer.inputs:
        return 2.0 * s.queries * layer.parameters
    if len(layer.inputs) == 1:
        return 2.0 * s.queries * layer.parameters * (1 + rank / s.batch)
    return layer.cases * 2.0 * s.queries * rank * (layer.inputs[0] + layer.outputs[0])


def _held(layers: Sequence[Size], s: Scoring, factors: float, parameters: int) -> float:
    """The model, its factors with their eigenbases, eigenvalues with their inverses, the queries, and a batch."""
    kept = s.queries * sum(_kept(layer, s.rank) for layer in layers)
    worked_on = 2 * (s.queries if s.rank is None else min(s.batch, s.queries)) * parameters  # gradients, and solved
    queries = worked_on if s.rank is None else kept + worked_on
    cases = s.batch * sum(layer.cases * sum(shape[0] for shape in layer.shapes if len(shape) == 2) for layer in layers)
    formed = s.batch * sum(layer.parameters for layer in layers if len(layer.inputs) != 2)
    return s.itemsize * (parameters + cases + formed + queries + 2 * parameters) + 2 * factors


def _kept(layer: Size, rank: int | None) -> int:
    """The numbers of one query."""
    if rank is None or not layer.inputs:
        return layer.parameters
    return min(rank * (layer.inputs[0] + layer.outputs[0]), layer.parameters)
