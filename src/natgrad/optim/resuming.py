"""What an optimizer that follows its model keeps from step to step, and how it is saved and resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.optim.follow import Following
from natgrad.optim.saved import state_of
from natgrad.optim.vectors import copied


class Resuming(Following):
    """Numbers that the next steps depend on beside the parameters and torch's own state, in `state_dict`, so that steps
    resume bit for bit. A subclass adds its own."""

    _key: ClassVar[str]
    """Under which `state_dict` has what is not torch's own."""
    _damping: float | None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._adapts_lr = self._has_free_lr()  # whatever a scheduler writes into the groups
        self._steps = 0
        self._combination: list[float] | None = None
        self._rejections = 0  # in a row
        self._faults: Counter[str] = Counter()
        self._loss_before: float | None = None
        self._first_loss: float | None = None

    # What a subclass supplies --------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        """What the next steps depend on beside the parameters and the state that is kept here."""
        return {}

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        """Takes what `_own_state` gave."""

    def _check_own_state(self, saved: dict[str, Any]) -> None:
        """Raises ValueError if it is of other parameters."""

    def _adopt(self, sizes: Mapping[str, Sequence[torch.Size]]) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For the state of layers with moments of these sizes, saved on any number of ranks: which layers' is to be
        here, and what else is not as it was saved."""
        return lambda layer: True, {}

    # Saving --------------------------------------------------------------------------------------------

    def _has_free_lr(self) -> bool:
        """Whether a step size is the optimizer's to find."""
        return any(group["lr"] is None for group in self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on beside the parameters: they resume bit for bit.

        As in torch, tensors are not copied.
        """
        own = {
            "steps": self._steps,
            "damping": self._damping,
            "combination": self._combination,
            "rejections": self._rejections,
            "faults": dict(self._faults),
            "loss_before": self._loss_before,
            "first_loss": self._first_loss,
            "first_mass": self._first_mass[0] if self._first_mass else None,
            "generator": self._generator.get_state(),
            "seed": self._generator.initial_seed(),
        }
        whole, params = super().state_dict(), self._by_index()
        state = {
            i: {k: self._place.stored(params[i], v) if isinstance(v, Tensor) else v for k, v in its.items()}
            for i, its in whole["state"].items()
        }
        return whole | {"state": state, self._key: own | self._own_state()}

    def _by_index(self) -> list[Tensor]:
        """The parameters as `state_dict` counts them."""
        return [p for group in self.param_groups for p in group["params"]]

    def _resume_generator(self, state: Tensor, seed: int) -> None:
        """Random numbers go on as they would have; or, from another kind of device, whose generators are others, from a
        seed of the run's own."""
        if state.shape == self._generator.get_state().shape:
            self._generator.set_state(state)
        else:
            self._generator.manual_seed((seed * 1_000_003 + self._steps) % 2**63)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave, for a model of the same parameters.

        Raises:
            ValueError: if it is not of such an optimizer, or of other parameters.
        """
        saved = state_of(state_dict, self._key, type(self).__name__)
        missing = [k for k in ("steps", "damping", "combination", "generator", "faults") if k not in saved]
        if missing:
            raise ValueError(
                f"the state has no {missing[0]!r} under {self._key!r}; expected what state_dict() of this version gives"
            )
        self._check_own_state(saved)
        whole = {k: v for k, v in state_dict.items() if k != self._key}
        state = {
            i: {k: self._place.local(v) if isinstance(v, Tensor) else v for k, v in its.items()}
            for i, its in whole["state"].items()
        }
        super().load_state_dict(whole | {"state": state})
        saved = copied(saved, self._device)
        self._steps, self._damping, self._combination = saved["steps"], saved["damping"], saved["combination"]
        self._rejections, self._loss_before = saved["rejections"], saved["loss_before"]
        self._first_loss = saved["first_loss"]
        self._first_mass = [] if saved["first_mass"] is None else [saved["first_mass"]]
        self._faults = Counter(saved["faults"])
        self._adapts_lr = self._has_free_lr()
        self._resume_generator(saved["generator"].cpu(), saved["seed"])
        self._load_own_state(saved)
        self._pending = []
        self._arm()
