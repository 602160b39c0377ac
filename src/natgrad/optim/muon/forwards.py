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
from natgrad.optim.muon.moments import InputMoments, added
from natgrad.optim.muon.routing import Seen, seen_in
from natgrad.optim.parameters import Parameters
from natgrad.optim.tracking.forward import Forward
from natgrad.optim.tracking.watch import Watch


@dataclass
class Shown:
    """What the recorded forwards since the last step have shown: uses of parameters, functions of other uses by name,
    the moments of the inputs of every matrix that may be whitened, and matrices of which an input was changed since."""

    forwards: int = 0
    uses: list[Seen] = field(default_factory=list)
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
            moments = InputMoments(self._max_dim, self._rows_per_input, self._seed)
            sums, changed = moments.of([use for use in recorder.uses if use.weight in wanted])
        self._shown.forwards += 1
        self._shown.sums = added(self._shown.sums, sums, 1.0)
        self._shown.changed |= dict.fromkeys(changed)
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
