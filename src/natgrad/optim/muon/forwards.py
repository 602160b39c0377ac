"""What a model's forwards in training mode show of its parameters: how they are used, and with what inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from natgrad.capture.layer import Layer
from natgrad.capture.recorder import Recorder
from natgrad.curvature.moments import AffineMoments
from natgrad.curvature.problem import buffers_kept
from natgrad.distributed.placement import placed_within
from natgrad.optim.muon.routing import Seen, seen_in
from natgrad.optim.muon.whitening import added, input_sums
from natgrad.optim.parameters import Parameters
from natgrad.optim.tracking.forward import Forward
from natgrad.optim.tracking.watch import Watch


@dataclass
class Shown:
    """What the forwards since the last refresh have shown: uses of parameters, functions of other uses by name, and the
    moments of the inputs of every matrix that may be whitened."""

    uses: list[Seen] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    sums: dict[Layer, AffineMoments] = field(default_factory=dict)


class Forwards:
    """Records forwards while `recording`; their uses are kept while `settling`, as long as the routes are not known.

    Args:
        parameters: those to look at.
        max_dim: the second moments of wider inputs are kept as their diagonals.
        wanted: whether the moments of a weight's inputs are used, by its name.
    """

    def __init__(self, parameters: Parameters, max_dim: int, wanted: Callable[[str], bool]):
        self._parameters, self._max_dim, self._wanted = parameters, max_dim, wanted
        self.settling, self._shown = True, Shown()
        model = parameters.place.model
        # A module of Lightning's is not called itself: its training_step calls its parts.
        parts = model.children() if hasattr(model, "training_step") else ()
        also = [part for part in parts if next(part.parameters(), None) is not None]
        self.watch = Watch(model, parameters, within=self._see_ranks, finished=self._see, also=also, frozen=True)
        self.watch.see_more(parameters.place.follow)

    def take(self) -> Shown:
        """What was shown since the last time."""
        shown, self._shown = self._shown, Shown()
        return shown

    def _see_ranks(self, around: DistributedDataParallel) -> None:
        """Joins the ranks of a `DistributedDataParallel` that was made after the optimizer."""
        place = self._parameters.place
        if place.world.size == 1 and place.shards is None:
            place.world = placed_within(around, place.model).world

    def _see(self, forward: Forward) -> None:
        """The end of a forward in training mode."""
        if not self.watch.recording:
            return
        recorder = forward.recorder or self._again(forward)
        wanted = {n for n, p in self._parameters.items() if p.requires_grad and self._wanted(n)}
        with torch.no_grad(), torch.autocast(self._parameters.device.type, enabled=False):
            sums = input_sums([use for use in recorder.uses if use.weight in wanted], self._max_dim)
            self._shown.sums = added(self._shown.sums, sums, 1.0)
        if self.settling:
            self._shown.uses += seen_in(recorder.uses, recorder.gates)  # frozen layers, too, may come after a matrix
            self._shown.others |= recorder.others

    def _again(self, forward: Forward) -> Recorder:
        """A record of a forward that ran in compiled code, from a second one that does not."""
        recorder = self.watch.recorder()
        with self.watch.suspended(), torch.enable_grad(), buffers_kept(forward.model), recorder:
            forward.again(forward.model, _nothing)
        return recorder


def _nothing(returned: object) -> Tensor:
    return torch.empty(())
