"""What a model's forwards in training mode show of its parameters: how they are used, and with what inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from natgrad.capture.layer import Layer
from natgrad.capture.recorder import Recorder
from natgrad.checks.warning import warn
from natgrad.curvature.moments import AffineMoments
from natgrad.curvature.problem import buffers_kept
from natgrad.distributed.placement import placed_within
from natgrad.optim.muon.moments import InputMoments, added
from natgrad.optim.muon.routing import Seen, followed_by_matrices, seen_in
from natgrad.optim.parameters import Parameters
from natgrad.optim.tracking.forward import Forward
from natgrad.optim.tracking.watch import Watch

OTHER = 0.05
"""A relative difference of two outputs that rounding in compiled code does not make."""
GRAPHS = 8
"""The autograd graphs of so many forwards are kept until it is known which matrices come after which."""


@dataclass
class Shown:
    """What the recorded forwards since the last step have shown: uses of parameters, functions of other uses by name,
    the moments of the inputs of every matrix that may be whitened, and matrices of which an input was changed since."""

    forwards: int = 0
    uses: dict[Seen, None] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    sums: dict[Layer, AffineMoments] = field(default_factory=dict)
    changed: dict[Layer, None] = field(default_factory=dict)


class Forwards:
    """Records forwards while `recording`; their uses are kept while `settling`, as long as the routes are not known.

    Args:
        parameters: those of the optimizer. The uses of the model's others show what comes after a matrix.
        wanted: whether the moments of a weight's inputs are used, by its name.
        max_dim: the second moments of wider inputs are kept as their diagonals.
        rows_per_input: as in `InputMoments`.
    """

    def __init__(self, parameters: Parameters, wanted: Callable[[str], bool], max_dim: int, rows_per_input: int | None):
        self._parameters, self._wanted = parameters, wanted
        self._max_dim, self._rows_per_input, self._seed = max_dim, rows_per_input, 0
        self.settling, self._shown = True, Shown()
        self._told = False
        self._recent: list[list[Seen]] = []  # the uses of the last forwards
        model = parameters.place.model
        # A module of Lightning's is not called itself: its training_step calls its parts.
        parts = model.children() if hasattr(model, "training_step") else ()
        also = [part for part in parts if next(part.parameters(), None) is not None]
        self.watch = Watch(model, self._every(), within=self._see_ranks, finished=self._see, also=also, frozen=True)
        self.watch.see_more(parameters.place.follow)

    def _every(self) -> dict[str, Tensor]:
        """All parameters of the model, those of the optimizer by its names."""
        model = self._parameters.place.model
        return {n: p for n, p in model.named_parameters() if n not in self._parameters} | dict(self._parameters)

    def follow(self) -> None:
        """Looks at the parameters that there are now."""
        self.watch.follow(self._every())

    def begin(self, step: int, recording: bool) -> None:
        """Before the forwards of a step."""
        self._seed, self.watch.recording = step, recording

    def take(self) -> Shown:
        """What was shown since the last time."""
        self._forget(0)
        shown, self._shown = self._shown, Shown()
        return shown

    def _forget(self, most: int) -> None:
        """Keeps the autograd graphs of so many forwards. Of others remains what comes after which matrix."""
        inner = followed_by_matrices([s for its in self._recent for s in its]) if len(self._recent) > most else set()
        while len(self._recent) > most:
            for s in self._recent.pop(0):
                known = replace(s, nodes=(), sources=(), is_inner=s.is_inner or not inner.isdisjoint(s.nodes))
                self._shown.uses[known] = None

    def _see_ranks(self, around: DistributedDataParallel) -> None:
        """Joins the ranks of a `DistributedDataParallel` that was made after the optimizer.

        Raises:
            RuntimeError: within its `join()`.
        """
        place = self._parameters.place
        if around._join_config.enable and dist.get_world_size(around.process_group) > 1:
            raise RuntimeError(
                "NewtonMuon cannot run within DistributedDataParallel.join(): in a step its ranks exchange more than "
                "gradients; give every rank the same number of batches"
            )
        if place.world.size == 1 and place.shards is None:
            place.world = placed_within(around, place.model).world

    def _see(self, forward: Forward) -> None:
        """The end of a forward in training mode."""
        if not self.watch.recording:
            return
        recorder = forward.recorder or self._again(forward)
        wanted = {n for n, p in self._parameters.items() if p.requires_grad and self._wanted(n)}
        with torch.no_grad(), torch.autocast(self._parameters.device.type, enabled=False):
            moments = InputMoments(self._max_dim, self._rows_per_input, self._seed)
            sums, changed = moments.of([use for use in recorder.uses if use.weight in wanted])
        self._shown.forwards += 1
        self._shown.sums = added(self._shown.sums, sums, 1.0)
        self._shown.changed |= dict.fromkeys(changed)
        if self.settling:
            # Frozen layers, too, may come after a matrix, also in another forward.
            self._recent.append(list(seen_in(recorder.uses, recorder.gates)))
            self._forget(GRAPHS)
            self._shown.others |= recorder.others

    def _again(self, forward: Forward) -> Recorder:
        """A record of a forward that ran in compiled code, from a second one that does not."""
        recorder, other = self.watch.recorder(), False

        def compared(returned: Any) -> Tensor:
            nonlocal other
            with torch.no_grad():
                other = forward.returned is not None and forward.returned.differs(returned, OTHER)
            return torch.empty(())

        with self.watch.suspended(), torch.enable_grad(), buffers_kept(forward.model), recorder:
            forward.again(forward.model, compared)
        if other and not self._told:
            self._told = True
            warn(
                "the compiled model was run again to see its layers' inputs, and returned something else: it has a "
                "state of its own, which the second forward has changed, too. Keep the state in buffers "
                "(register_buffer), or do not compile the model"
            )
        return recorder
