"""What every preconditioner does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.recorder import Recorder
from natgrad.capture.use import Use
from natgrad.optim.decay import Decay
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.rules.stage import Figures
from natgrad.optim.tracking.batch import Batch, Term
from natgrad.optim.vectors import Vector, gram

Sizes = Mapping[str, Sequence[torch.Size]]
"""The sizes of each layer's tensors, by the layer's key."""


class Preconditioner(ABC):
    """A matrix `F`, kept from step to step or made for one, and the inverse of `F + λI`.

    A step calls `observe` for each batch (before the backward), `take_in`, `prepare`, and `apply`. An implementation is
    a subclass in a file of its own. What it keeps it replaces, and does not change in place: a step that is interrupted
    goes back to what there was.
    """

    inverted: str
    """What is inverted, for messages."""
    nesterov = False
    """Whether the momentum of given numbers is Nesterov's."""
    runs_again = False
    """Whether it runs the model again in a step."""

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.faults: Counter[str] = Counter()

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether the statistics of the next batches are wanted."""

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        """The uses that the output depends on. Raises NotImplementedError for a parameter that is used in a way that is
        not covered."""
        return recorder.check(output, reached=True)

    @abstractmethod
    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        """Takes the statistics of a batch, or notes its fault; it is the `draw`-th of the step."""

    def follow_along(  # noqa: B027
        self, uses: list[Use], output: Tensor, target: Any, term: Term, draw: int, step: int
    ) -> None:
        """Takes part in bringing together the shards for other ranks' statistics, of which this rank has none."""

    def share(self, pending: list[Batch]) -> None:  # noqa: B027
        """Begins to bring the ranks' statistics of these batches together."""

    @abstractmethod
    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        """Makes the curvature of the pending batches a part of `F`. Returns the names of parameters that have a
        gradient and no curvature yet: they are not to move.

        Raises:
            NotImplementedError: for a gradient that comes from no loss that the optimizer has seen.
        """

    def prepare(self, damping: float, decay: Decay, figures: Figures, step: int) -> None:
        """Sees to it that there is an inverse for this step."""
        self.refresh(damping, decay, figures)

    @abstractmethod
    def refresh(self, damping: float, decay: Decay, figures: Figures) -> None:
        """Inverts the damped curvature. Raises ValueError where that cannot be done."""

    @abstractmethod
    def apply(self, v: Vector) -> Vector:
        """`(F + λI)⁻¹ v`, by the inverse as it is."""

    @abstractmethod
    def scale(self) -> float:
        """The mean of the diagonal of `F`: what a damping is large or small against."""

    def expire(self) -> None:  # noqa: B027
        """The inverse is not to be used again."""

    def parts(self) -> Sequence[Any]:
        """The objects in which it keeps what it has, beside itself."""
        return ()

    def end_step(self) -> None:  # noqa: B027
        """Lets go of what is of one step."""

    def moves(self, gradients: Vector) -> Sequence[str]:
        """The parameters that move."""
        return list(gradients)

    def see_gradient(self, g: Vector) -> None:  # noqa: B027
        """Takes note of the step's gradient."""

    def damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        """What the damping adds to the quadratic model: this rank's share of `λ d_iᵀ d_j`."""
        return damping * gram(directions)

    # How it is shown -----------------------------------------------------------------------------------

    def chosen(self) -> dict[str, Any]:
        """The options that say which kind of curvature it is."""
        return {}

    def layers_known(self) -> list[str]:
        """The layers that the curvature has blocks of, as far as they are known."""
        return []

    # Saving --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the next steps depend on."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Takes what `state` gave."""

    def check_state(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Raises ValueError if it is of another curvature or of other parameters."""

    def adopt(self, sizes: Sizes) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For the state of layers with moments of these sizes, saved on any number of ranks: which layers' is to be
        here, and what else is not as it was saved."""
        return lambda layer: True, {}
