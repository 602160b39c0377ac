"""The interface of all preconditioners."""

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
    """A matrix `F`, kept from step to step or made for one step, and the inverse of `F + λI`.

    A step calls `observe` for each batch (before the backward pass), then `take_in`, `see_gradient`, `prepare` and
    `apply`. An implementation is a subclass in its own file. It supplies `inverted`, `take_in`, `refresh`, `apply` and
    `scale`. It also supplies `observe` if it needs statistics of batches, and sets `observes = False` if it needs only
    gradients. `state` and `load` save what it keeps from step to step. It must replace its attributes and not change
    them in place, so that an interrupted step can be undone.
    """

    inverted: str
    """The name of what is inverted, for messages."""
    nesterov = False
    """Whether a given momentum is Nesterov momentum."""
    runs_again = False
    """Whether it runs the model again in a step."""
    reads_derivatives = False
    """Whether it reads the layers' uses within derivatives that the forward takes itself."""
    observes = True
    """Whether it needs statistics of batches. Only then must every parameter be used in a supported way."""

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.faults: Counter[str] = Counter()

    def due(self, step: int) -> bool:
        """Whether the next batches should be observed. Default: always, if it observes batches at all."""
        return self.observes

    def check(self, recorder: Recorder, output: Tensor) -> list[Use]:
        """The uses that the output depends on. Raises NotImplementedError if a parameter is used in an unsupported way,
        unless no batches are observed."""
        return recorder.check(output, reached=True) if self.observes else recorder.uses

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        """Computes the statistics of a batch, the `draw`-th of the step, into `batch.statistics`, or records its fault
        in `batch.fault`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method observe; expected one that computes the statistics of a batch, or "
            "the class attribute observes = False"
        )

    def follow_along(  # noqa: B027
        self, uses: list[Use], output: Tensor, target: Any, term: Term, draw: int, step: int
    ) -> None:
        """Helps to gather the shards for the statistics of other ranks. This rank has no statistics."""

    def share(self, pending: list[Batch]) -> None:  # noqa: B027
        """Starts the sum of these batches' statistics over the ranks."""

    @abstractmethod
    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        """Adds the curvature of the pending batches to `F`. Returns the names of parameters that have a gradient but no
        curvature yet: the step must not change them. The gradients are as the backward pass left them;
        `see_gradient` receives those of the objective.

        Raises:
            NotImplementedError: for a gradient that comes from no loss that the optimizer has seen.
        """

    def prepare(self, damping: float, decay: Decay, figures: Figures, step: int) -> None:
        """Makes sure that there is an inverse for this step."""
        self.refresh(damping, decay, figures)

    @abstractmethod
    def refresh(self, damping: float, decay: Decay, figures: Figures) -> None:
        """Inverts `F + (λ + η) I`, where `η` is the weight decay: `decay.of(name)` for one parameter, `decay.same(...)`
        for all. Raises ValueError if it cannot be inverted."""

    @abstractmethod
    def apply(self, v: Vector) -> Vector:
        """`(F + λI)⁻¹ v`, with the current inverse."""

    @abstractmethod
    def scale(self) -> float:
        """The mean of the diagonal of `F`, as the unit of the damping."""

    def expire(self) -> None:  # noqa: B027
        """Marks the inverse as outdated."""

    def parts(self) -> Sequence[Any]:
        """The other objects in which it keeps its state."""
        return ()

    def end_step(self) -> None:  # noqa: B027
        """Frees what is needed for one step only."""

    def moves(self, gradients: Vector) -> Sequence[str]:
        """The parameters that the step changes."""
        return list(gradients)

    def see_gradient(self, g: Vector) -> None:  # noqa: B027
        """Receives the step's gradient, per unit of the objective and including weight decay."""

    def damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        """What the damping adds to the quadratic model: this rank's share of `λ d_iᵀ d_j`."""
        return damping * gram(directions)

    # How it is shown -----------------------------------------------------------------------------------

    def chosen(self) -> dict[str, Any]:
        """The options that define the kind of curvature."""
        return {}

    def layers_known(self) -> list[str]:
        """The layers that have blocks in the curvature, as far as they are known."""
        return []

    # Saving --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the next steps depend on. The names must differ from those in `own_state` (`saved.py`), as both are
        saved in one dictionary."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Loads the result of `state`."""

    def check_state(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Raises ValueError if the state belongs to another kind of curvature or to other parameters."""

    def adopt(self, sizes: Sizes) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For a state saved on any number of ranks, with layers whose moments have these sizes: which layers belong on
        this rank, and which other parts of the state change."""
        return lambda layer: True, {}
