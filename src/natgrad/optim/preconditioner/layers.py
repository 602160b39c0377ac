"""A block for each layer, from moving averages: K-FAC and its relatives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.capture.recorder import Recorder
from natgrad.capture.use import Use
from natgrad.checks.warning import warn
from natgrad.curvature.blocks import assemble, named_blocks
from natgrad.curvature.input_scales import share_of_smallest
from natgrad.linalg import Block, BlockDiagonal, CenteredKronecker, Kronecker, Operator
from natgrad.linalg.precision import matmul_precision, worth_lowering
from natgrad.linalg.state import dump, restore
from natgrad.optim.decay import Decay
from natgrad.optim.labels import Labels
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.base import Preconditioner, Sizes
from natgrad.optim.preconditioner.ladder import Ladder
from natgrad.optim.preconditioner.options import Options
from natgrad.optim.preconditioner.ranks import Names, Ranks, Spread
from natgrad.optim.preconditioner.running import RUNNING, Running
from natgrad.optim.preconditioner.statistics import LayerStatistics
from natgrad.optim.preconditioner.sums import Statistics
from natgrad.optim.rules.damping import weighted_median
from natgrad.optim.rules.stage import Figures
from natgrad.optim.tracking.batch import Batch, Term
from natgrad.optim.vectors import Vector, gram

UNSEEN = 0.01
"""An input of data that counts less than this share of another gives a warning."""


class LayerBlocks(Preconditioner):
    """`blockdiag(F_l)` over the layers `l`, each from moving averages of the layer's statistics.

    The inverse is kept for some steps.

    Args:
        optimizer: its name, for messages.
        parameters: the trained parameters.
        labels: the source of random labels.
        options: the kind of blocks.
    """

    inverted = "a factor"

    def __init__(self, optimizer: str, parameters: Parameters, labels: Labels, options: Options):
        super().__init__(parameters)
        self.options = options
        self.running = self._new_running()
        place = parameters.place
        self.reads_derivatives = self.running.reads_gradients
        self.ranks = Ranks(place) if place.shards is None else Spread(place, self.running.can_be_elsewhere)
        self.inverse: dict[str, Block] | None = None  # by layer
        self.inverse_age = 0
        self.bases_age: int | None = None
        self.frozen: frozenset[str] = frozenset()
        self._looked_at: Names = set()  # layers whose units and weights were looked at
        self._scale: tuple[Statistics, frozenset[str], float] | None = None  # of which averages, without which names
        self.statistics = LayerStatistics(optimizer, parameters, labels, options, self.running, self.ranks)

    def _new_running(self) -> Running:
        options = self.options
        return RUNNING[options.structure](options.centered, options.sharing, options.max_dim, options.input_scales)

    def chosen(self) -> dict[str, Any]:
        return {"structure": self.options.structure} | ({} if self.options.centered else {"centered": False})

    def layers_known(self) -> list[str]:
        return [layer.label for layer in self.running.layers]

    def parts(self) -> Sequence[Any]:
        return self.statistics, self.running, self.ranks

    # Statistics ----------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        return self.statistics.due(step)

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        return self.statistics.check(recorder, output)

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        self.statistics.observe(batch, uses, output, draw, step)

    def follow_along(self, uses: list[Use], output: Tensor, target: Tensor, term: Term, draw: int, step: int) -> None:
        self.statistics.follow_along(uses, output, target, term, draw, step)

    def share(self, pending: list[Batch]) -> None:
        self.ranks.share(pending)

    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        known = set(self.running.layers)
        missing = self.statistics.take_in(objective, gradients, figures, step)
        frozen = frozenset(n for n, p in self.parameters.items() if not p.requires_grad)
        if not known.issuperset(self.running.layers) or frozen != self.frozen:
            self.expire()  # the inverse belongs to other layers
        self.frozen = frozen
        return missing

    def moves(self, gradients: Vector) -> Sequence[str]:
        """The parameters with a gradient, and the others of their layers: a layer moves as a whole, or not at all."""
        partners = {n for names in self._layers() if any(m in gradients for m in names) for n in names}
        return [n for n in self.parameters if n in gradients or n in partners]

    def _layers(self) -> Names:
        """The parameters of each layer that are not frozen."""
        left = (tuple(n for n in layer.names if n not in self.frozen) for layer in self.running.layers)
        return {names for names in left if names}

    # Inverses ------------------------------------------------------------------------------------------

    def prepare(self, damping: float, decay: Decay, figures: Figures, step: int) -> None:
        if self.bases_age is not None:
            self.bases_age += 1
        if self.inverse is None or self.inverse_age >= self.options.inverses.steps(step):
            self.refresh(damping, decay, figures)
        self.inverse_age += 1

    def refresh(self, damping: float, decay: Decay, figures: Figures) -> None:
        figures["inverses"] = True
        self.inverse_age = 0
        if not self.running.layers:
            return
        if self.running.has_bases and (self.bases_age is None or self.bases_age >= self.options.bases_every):
            self.running.turn(self.parameters.place.world)
            self.bases_age = 0
        blocks, before = self._own_blocks(), self.inverse or {}
        # Exact in centered coordinates: a step does not depend on a shift of a layer's inputs.
        exact = "centered" if self.options.damping_style == "exact" else self.options.damping_style
        style = "relative" if self.options.relative else exact
        units = self.running.units()
        self._look_at_weights(units)

        def inverse(name: str, block: Block) -> dict[str, Any]:
            its_damping = damping + (decay.of(block.names[0]) if self.running.reads_gradients else 0.0)
            last = before[name].operator if name in before and before[name].names == block.names else None
            faults = Counter[str]()
            ladder = Ladder(partial(self._inverse_of, style, _units_of(block, units)), faults)
            return {"operator": ladder.inverse(name, block.operator, its_damping, last), "faults": dict(faults)}

        work = {name: partial(inverse, name, block) for name, block in blocks.items()}
        found = self.ranks.done(work, blocks)
        self.faults = sum((Counter(each["faults"]) for each in found.values()), self.faults)
        self.inverse = {name: block.with_operator(found[name]["operator"]) for name, block in blocks.items()}

    def _look_at_weights(self, units: Mapping[tuple[str, ...], Tensor]) -> None:
        """Warns, once for each layer, if inputs are so different in scale that it does not see the small ones."""
        own = self.parameters.local()
        for names in units.keys() - self._looked_at:
            self._looked_at.add(names)
            scales, W = units[names], own[names[0]].flatten(1)
            differ = f"have scales that differ by a factor of {1 / float(scales.min()):.2g}"
            if W.shape[1] != len(scales):
                continue  # stored in another way
            share = share_of_smallest(scales.to(W.dtype), W)
            if share < UNSEEN:
                warn(
                    f"the inputs of {names[0]!r} {differ}, and with its weights the smallest counts {share:.1g} times "
                    "as much as the largest; KFAC damps each in its own units, but cannot see what the weights hide: "
                    "standardize the inputs, or divide the columns of the initial weight by their scales"
                )

    def _inverse_of(self, style: str, units: Tensor | None, operator: Operator, damping: float) -> Operator:
        if isinstance(operator, (CenteredKronecker, Kronecker)) and units is not None:
            return operator.inverse(damping, damping_style=style, units=units)
        return self.running.inverse(operator, damping, style)

    def expire(self) -> None:
        self.inverse_age = self.options.inverses.most  # at least what is due
        if self.statistics.drop_spoiled():
            self.inverse = None

    def damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        """In the coordinates in which the inverse is damped. Then a step's length does not depend on a shift of a
        layer's inputs either."""
        if self.running.damps_inputs:
            return torch.zeros(len(directions), len(directions), dtype=torch.float64)
        precision = self.parameters.precision
        return damping * gram([self._in_coordinates(_in_precision(d, precision)) for d in directions])

    def _in_coordinates(self, d: Vector) -> Vector:
        scaled = {layer.names for layer in self.running.total.scales}  # known to all ranks
        usable = {names for names in self._usable(d) if len(names) > 1 or names in scaled}
        blocks = [b for b in (self.inverse or {}).values() if b.names in usable and b.operator.has_coordinates]
        return self.ranks.coordinates(blocks, d, usable)

    # Direction -----------------------------------------------------------------------------------------

    def _usable(self, v: Vector) -> Names:
        """The layers whose parameters are all in `v` (others are frozen, or not part of this loss)."""
        if self.inverse is None:
            return set()
        return {names for names in self._layers() if all(n in v for n in names)}

    def apply(self, v: Vector) -> Vector:
        v = _in_precision(v, self.parameters.precision) if self.running.layers else v
        usable = self._usable(v)
        rest = self._rest(v, usable)
        blocks = [b for b in (self.inverse or {}).values() if b.names in usable]
        out = rest | self.ranks.applied(self._by_block, blocks, v, self._also(rest), usable)
        # In the order of the parameters, so that sums over them do not depend on the order of the layers.
        return {n: _cast(out[n], p.dtype) for n, p in self.parameters.items() if n in out and p.requires_grad}

    def _rest(self, v: Vector, usable: Names) -> Vector:
        """The direction of parameters without a block."""
        return {} if self.running.reads_gradients else dict(v)

    def _also(self, rest: Vector) -> Vector:
        """The part of it that the blocks need."""
        return {}

    def _by_block(self, blocks: list[Block], v: Vector, rest: Vector) -> Vector:
        """The directions of whole layers. `rest` has the directions of parts without a factor, if there are any."""
        out: Vector = {}
        for block in blocks:
            with matmul_precision(self.options.matmul_precision) if _is_heavy(block) else nullcontext():
                parts = block.operator.apart(block.parts(v))
            # The move of the mean pre-activation is computed in full precision, because inputs far from zero cost many
            # digits.
            simple = self.options.bias_update == "simple"
            out |= block.named(parts if simple else block.operator.from_coordinates(parts))
        return out

    def curvature(self) -> BlockDiagonal:
        """The current matrix from the moving averages, for the mean loss and without damping."""
        if not self.running.observes:
            raise TypeError(f"structure={self.options.structure!r} keeps no curvature; choose another structure")
        if not self.running.layers:
            raise RuntimeError("there is no curvature before the first step; take one")
        blocks = self.running.blocks()
        return assemble(self.ranks.everywhere(blocks) if self.running.total.elsewhere else blocks, self.parameters)

    def _own_blocks(self) -> dict[str, Block]:
        """The blocks of the layers whose averages are on this rank."""
        return named_blocks(self.running.blocks(self.frozen), self.parameters)

    def scale(self) -> float:
        if not self.running.reads_gradients:
            return 1.0  # the damping is relative
        known, alone = self._scale, self.parameters.place.world.size == 1
        if alone and known is not None and known[0] is self.running.total and known[1] == self.frozen:
            return known[2]
        blocks, units = list(self._own_blocks().values()), self.running.units()
        traces = [_trace(block.operator, _units_of(block, units)) for block in blocks]
        sizes = [block.operator.space.size for block in blocks]
        values = torch.stack(traces).tolist() if traces else []
        means = [(trace / size, float(size)) for trace, size in zip(values, sizes, strict=True)]
        scale = weighted_median(self.ranks.means(means))
        self._scale = self.running.total, self.frozen, scale
        return scale

    # Saving --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return self.ranks.state() | {
            "structure": self.options.structure,
            "centered": self.options.centered,
            "running": self.running.state(),
            "inverse": None
            if self.inverse is None
            else {json.dumps([name, *block.names]): dump(block) for name, block in self.inverse.items()},
            "inverse_age": self.inverse_age,
            "bases_age": self.bases_age,
            "last_statistics": self.statistics.last,
            "wanted": self.statistics.wanted,
            "frozen": sorted(self.frozen),
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.running.load(saved["running"])
        self.ranks.load(saved)
        inverse = saved.get("inverse", {})  # a checkpoint has no empty dictionaries
        self.inverse = None if inverse is None else {json.loads(k)[0]: restore(block) for k, block in inverse.items()}
        self.inverse_age, self.bases_age = saved["inverse_age"], saved["bases_age"]
        self.statistics.last, self.statistics.wanted = saved["last_statistics"], saved["wanted"]
        self.frozen = frozenset(saved.get("frozen", ()))

    def adopt(self, sizes: Sizes) -> tuple[Callable[[str], bool], dict[str, Any]]:
        return self.ranks.adopt(sizes)

    def check_state(self, saved: dict[str, Any]) -> None:
        own = {"structure": self.options.structure, "centered": self.options.centered}
        for name, value in own.items():
            if saved[name] != value:
                raise ValueError(
                    f"the state is of {name}={saved[name]!r}, and this optimizer has {value!r}; make it with the same"
                )
        running = self._new_running()
        running.load(saved["running"])
        elsewhere = running.total.elsewhere
        if elsewhere and not self.ranks.spread:
            raise ValueError(
                f"the state is one rank's of several and has no moments of {len(elsewhere)} layers; save it "
                "with torch.distributed.checkpoint and load it with natgrad.load_checkpoint"
            )
        for layer, op in running.blocks().items():
            _check_fits(layer, op.space.size, op.space.shapes, op.dtype, self.parameters)


def _units_of(block: Block, units: Mapping[tuple[str, ...], Tensor]) -> Tensor | None:
    """The units of a block's inputs, if it has any."""
    own = units.get(block.names)
    return None if own is None else own.to(block.operator.dtype)


def _trace(operator: Operator, units: Tensor | None) -> Tensor:
    """The trace in the coordinates in which the inverse is damped."""
    if isinstance(operator, (CenteredKronecker, Kronecker)):
        return operator.trace_in_coordinates(units)
    return operator.trace_in_coordinates()


def _is_heavy(block: Block) -> bool:
    """Whether products with the block's factors are large enough for a lower precision to save time."""
    shape, operator = block.operator.space.shapes[0], block.operator
    return len(shape) != 2 or worth_lowering(prod(shape) * max(shape), operator.device)


def _in_precision(v: Vector, dtype: torch.dtype) -> Vector:
    return {n: _cast(t, dtype) for n, t in v.items()}


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def _check_fits(
    layer: Layer, size: int, shapes: Any, dtype: torch.dtype, parameters: Mapping[str, Tensor] | Parameters
) -> None:
    """Raises ValueError if a layer's operator does not fit these parameters."""
    for n in layer.names:
        if n not in parameters:
            raise ValueError(
                f"the state has moments of {n!r}, which is not a trainable parameter here; load it for the model that "
                "it was saved of"
            )
    own = [tuple(parameters[n].shape) for n in layer.names]
    if sum(map(prod, own)) != size:
        raise ValueError(
            f"the state has moments for {layer.names[0]!r} with matrices of {shapes}; here it has shape {own[0]}: load "
            "it for a model of the same widths"
        )
    expected = torch.promote_types(parameters[layer.names[0]].dtype, torch.float32)
    if dtype != expected:
        raise ValueError(
            f"the state has moments for {layer.names[0]!r} in {dtype}; expected {expected}, for a parameter of "
            f"{parameters[layer.names[0]].dtype}: convert the model first, then load"
        )
