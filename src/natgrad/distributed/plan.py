"""The cost of a K-FAC step on many ranks: memory, bytes sent, and a prediction of its time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log2

from natgrad.checks.values import check_choice
from natgrad.distributed.assignment import assign
from natgrad.distributed.sizes import Size

SCHEMES = ("replicated", "sharded")
"""Under `DistributedDataParallel`, and under `torch.distributed.fsdp.fully_shard`."""


@dataclass(frozen=True)
class Machine:
    """The speed of one device and its link: products and factorizations in FLOP/s, bytes/s in each direction, seconds
    for one message, and bytes of memory.

    The defaults are assumptions, not measurements: 0.4 of the TF32 peak of an A100 (156 TFLOP/s according to its data
    sheet), an eighth of that for factorizations, and 200 Gbit/s of network for each device. `benchmarks/constants.py`
    measures the values of your machine.
    """

    flops: float = 62e12
    inverse_flops: float = 8e12
    bandwidth: float = 25e9
    latency: float = 20e-6
    memory: float = 80 * 2.0**30
    overlap: bool = True
    """Whether torch's communication during forward and backward does not slow them down."""

    def all_reduce(self, size: int | float, ranks: int) -> float:
        """Seconds for an all-reduce of `size` bytes: `2 (N − 1)/N · size / bandwidth`."""
        return 2 * self.spread(size, ranks)

    def spread(self, size: int | float, ranks: int, messages: int = 1) -> float:
        """Seconds for an all-gather: at first each rank has its share of `size` bytes, at the end all ranks have all of
        them. The data are sent in `messages` messages, one after the other. A reduce-scatter takes the same time."""
        if ranks == 1:
            return 0.0
        return size * (ranks - 1) / ranks / self.bandwidth + self.latency * (messages - 1 + ceil(log2(ranks)))


@dataclass(frozen=True)
class Settings:
    """The settings of `KFAC`. The defaults are those of `KFAC`."""

    batch: int = 8
    """Examples on each rank."""
    statistics_every: int = 10
    statistics_share: float = 0.25
    inverses_every: int = 20
    adapt_every: int = 8
    adaptive: bool = True
    """Whether step size and momentum come from the quadratic model."""
    itemsize: int = 4


@dataclass(frozen=True)
class Prediction:
    """The prediction for one step: seconds by purpose, and the bytes on the rank that holds the most."""

    scheme: str
    ranks: int
    held: float
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def time(self) -> float:
        return float(sum(self.seconds.values()))

    @property
    def sending(self) -> float:
        """The seconds in which nothing is computed."""
        return float(sum(s for what, s in self.seconds.items() if what.endswith("sent")))


def predict(layers: Sequence[Size], ranks: int, scheme: str, machine: Machine, settings: Settings) -> Prediction:
    """The average cost of one step over the intervals; `docs/scaling.md` has the formulas.

    Some communication overlaps with computation. With `"replicated"`, the sums of gradients and of moments overlap with
    the backward. With `"sharded"`, the sums of gradients and the gathering of parameters overlap with forward and
    backward.

    Raises:
        ValueError: for an unknown scheme.

    Example:
        >>> layers = [Size.affine(str(i), 4096, 4096, cases=2048) for i in range(32)]
        >>> one, many = (predict(layers, n, "sharded", Machine(), Settings()) for n in (1, 64))
        >>> many.held < one.held / 20
        True
    """
    check_choice("scheme", scheme, SCHEMES)
    s, m, size = settings, machine, settings.itemsize
    own: list[list[Size]] = [[] for _ in range(ranks)]
    for i, rank in assign({i: layer.inverse_flops() for i, layer in enumerate(layers)}, ranks).items():
        own[rank].append(layers[i])
    parameters = size * sum(layer.parameters for layer in layers)
    most = size * max(sum(layer.parameters for layer in its) for its in own)
    forward = s.batch * sum(layer.cases * layer.products for layer in layers) / m.flops
    hidden = forward if m.overlap else 0.0
    seen = max(1, round(s.batch * s.statistics_share))
    moments = seen * sum(layer.cases * (layer.moments_flops() + layer.products) for layer in layers) / m.flops
    moments_sent = sum(layer.moments_sent(size) for layer in layers)
    owners = sum(any(layer.inputs for layer in its) for its in own)
    inverses = max(sum(layer.inverse_flops() for layer in its) for its in own) / m.inverse_flops
    passes = (1 + 1 / s.adapt_every) if s.adaptive else 0.0
    trials = 1 / s.adapt_every if s.adaptive else 0.0
    computed = {
        "forward and backward": 3 * forward,
        "statistics": moments / s.statistics_every,
        "quadratic model": passes * 2 * forward + trials * forward,
        "inverses": inverses / s.inverses_every,
    }
    if scheme == "replicated":
        inverse_sent = sum(layer.inverse_sent(size) for layer in layers)
        gradients = max(0.0, m.all_reduce(parameters, ranks) - 2 * hidden)
        both = max(0.0, m.all_reduce(parameters, ranks) + m.all_reduce(moments_sent, ranks) - 2 * hidden)
        seconds = {
            **computed,
            "direction": sum(layer.direction_flops() for layer in layers) / m.flops,
            "gradients sent": gradients,
            "moments sent": (both - gradients) / s.statistics_every,
            "inverses sent": m.spread(inverse_sent, ranks, owners) / s.inverses_every,
        }
        held = 3.0 * parameters + sum(layer.held(size) for layer in layers)
    else:
        seconds = {
            **computed,
            "direction": max(sum(layer.direction_flops() for layer in its) for its in own) / m.flops,
            "parameters and gradients sent": max(0.0, m.spread(3 * parameters, ranks, 3) - 3 * hidden),
            "tangents sent": m.spread(2 * parameters, ranks, 2) * passes,
            "moments sent": m.spread(moments_sent, ranks, owners) / s.statistics_every,
            "directions sent": m.spread(2 * most, ranks, 2 * owners) + m.spread(most, ranks, owners) * passes,
        }
        share = max(3 * parameters / ranks + sum(layer.held(size) for layer in its) for its in own)
        whole = 2.0 * size * max(layer.parameters for layer in layers) if ranks > 1 else 0.0
        held = share + whole
    return Prediction(scheme, ranks, held, seconds)


def best(predictions: Iterable[Prediction], memory: float) -> Prediction | None:
    """The fastest prediction that fits into `memory` bytes, if there is one."""
    fitting = [p for p in predictions if p.held <= memory]
    return min(fitting, key=lambda p: p.time) if fitting else None
