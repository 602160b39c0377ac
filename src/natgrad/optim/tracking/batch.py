"""The parts of one step's objective: losses of batches, predicted distributions, penalties."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.use import Use
from natgrad.curvature.replay import Replay
from natgrad.losses import OutputCurvature
from natgrad.optim.tracking.factors import Observed
from natgrad.optim.tracking.forward import Forward, RandomState, changed_in_place, with_versions
from natgrad.optim.tracking.returned import Way

LOSS_NOT_FINITE = "the loss is not finite: look for NaN or inf in the batch and in the parameters"


@dataclass(frozen=True)
class Term:
    """A term of the objective: its name (empty if there is only one term), and the curvature of its loss."""

    name: str
    curvature: OutputCurvature

    def check(self, output: Tensor, target: Any) -> None:
        """Raises TypeError or ValueError if output and target do not fit this loss; the message names the term."""
        try:
            self.curvature.check(output, target)
        except (TypeError, ValueError) as error:
            if not self.name:
                raise
            raise type(error)(f"term {self.name!r}: {error}") from None


@dataclass(frozen=True)
class Sharing:
    """The all-reduce of the ranks' statistics, which runs during a backward. It holds the batches of this rank whose
    statistics are sent, and the pending result; None if a rank had no statistics to send."""

    batches: list[Batch]
    result: Callable[[], Any] | None


@dataclass(eq=False)
class Batch(Observed):
    """A batch whose loss was computed by `opt.loss`.

    `way` maps what the model returned to the loss's input; None if no forward can be run again. `statistics` is what
    the preconditioner has taken from the batch. `replay` differentiates the forward again. `weight` is the factor that
    multiplied the loss's gradient, so that each rank counts in proportion to its cases. `versions` are the versions of
    the parameters at the forward. `scalar` is the loss that the model computed itself.
    """

    term: Term
    forward: Forward
    target: Any
    shape: torch.Size
    way: Way | None
    mass: Tensor
    loss: Tensor
    versions: list[int]
    targets: list[tuple[Tensor, int]] = field(init=False)
    statistics: Any = None
    fault: str | None = None
    uses: list[Use] = field(default_factory=list)
    replay: Replay | None = None
    weight: float = 1.0
    sharing: Sharing | None = None
    scalar: weakref.ref[Tensor] | None = None

    def __post_init__(self) -> None:
        self.targets = with_versions(self.target)

    @property
    def lost(self) -> bool:
        """Whether the model's own loss is no longer alive, and no backward came from it."""
        return self.scalar is not None and self.scalar() is None and not self.seen

    @property
    def kind(self) -> str:
        """Gradients that were set by hand are shared among parts of the same kind."""
        return self.term.name

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over cases."""
        return self.term.curvature.is_mean

    @property
    def is_measured(self) -> bool:
        """Whether the part has a value."""
        return True

    @property
    def is_empty(self) -> bool:
        """Whether the batch has no examples. This is possible on one of several ranks."""
        return self.shape.numel() == 0

    def run(self, forward: Callable[..., Any]) -> Tensor:
        """The loss's input from `forward` on this batch.

        Raises:
            RuntimeError: if an input has been changed in place since.
        """
        (output,) = run_again([self], forward)
        return output

    @property
    def unchanged(self) -> bool:
        """Whether inputs and target are unchanged, so that the loss can be computed again."""
        return changed_in_place(self.targets) is None and self.forward.unchanged

    def value(self, output: Tensor) -> float:
        """The loss of another output for this batch, as a float."""
        return float(self.loss_of(output))

    def loss_of(self, output: Tensor) -> Tensor:
        """The loss of another output for this batch. Raises RuntimeError if the target has been changed in place
        since."""
        if self.is_empty:
            return output.sum()
        if (t := changed_in_place(self.targets)) is not None:
            raise RuntimeError(
                f"the target, of shape {tuple(t.shape)}, was changed in place after opt.loss took it, and "
                "the step measures the loss again; give opt.loss a copy (y.clone()), or change it after the step"
            )
        return self.term.curvature.loss(output, self.target)


def by_forward(batches: Iterable[Batch]) -> list[list[Batch]]:
    """Groups the batches by the forward that they came from."""
    groups: dict[int, list[Batch]] = {}
    for batch in batches:
        groups.setdefault(id(batch.forward), []).append(batch)
    return list(groups.values())


def run_again(batches: Sequence[Batch], forward: Callable[..., Any]) -> list[Tensor]:
    """The losses' inputs for batches of one forward, from a single run of `forward`.

    Raises:
        RuntimeError: if an input of the model has been changed in place since.
    """
    ways = []
    for batch in batches:
        assert batch.way is not None
        ways.append(batch.way)
    return batches[0].forward.again_for(forward, ways)


def in_order(batches: Sequence[Batch]) -> list[Use]:
    """The recorded uses of one forward for any of these batches, in the order of their computation."""
    if len(batches) == 1:
        return batches[0].uses
    found = {id(use): use for batch in batches for use in batch.uses}
    return sorted(found.values(), key=lambda use: use.edge.node._sequence_nr())


@dataclass(eq=False)
class Penalty(Observed):
    """A part of the objective that is computed from the parameters. It adds no curvature. `rng` is the random state
    before it was computed."""

    penalty: Callable[[], Tensor]
    loss: Tensor
    versions: list[int]
    rng: RandomState
    kind = ""
    is_mean = False
    unchanged = True

    @property
    def mass(self) -> Tensor:
        return self.loss.new_ones(())

    def again(self) -> Tensor:
        """The penalty at the current parameters, with the same random numbers. Its function may take derivatives
        itself."""
        with self.rng.restored(), torch.enable_grad():
            return self.penalty().reshape(())

    def value(self) -> float:
        """The penalty at the current parameters, as a float."""
        return float(self.again().detach())


@dataclass(eq=False)
class Prediction(Batch):
    """Outputs that define a predictive distribution, which gives the curvature. The gradient comes from the user's own
    loss.

    `arrivals`: how many times gradients had been added to parameters when the prediction was noted.
    """

    arrivals: int = 0

    @property
    def kind(self) -> str:
        return f"predicted {self.term.name}"

    @property
    def is_mean(self) -> bool:
        return True

    @property
    def is_measured(self) -> bool:
        return False

    def value(self, output: Tensor) -> float:
        return 0.0
