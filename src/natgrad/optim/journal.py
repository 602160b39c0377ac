"""Records of a run: steps, rejections, faults and losses; and the warnings to users about them."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from natgrad.checks.warning import warn

EXPLODED = 9.0
"""A run counts as exploded if its loss has risen by more than this many times the first loss."""
HOPELESS = 8
"""An exploded run ends if this many of the last twice as many steps were rejected."""
MEND = "give max_kl=0.01, which bounds a step, a larger damping, or a smaller lr; or leave all three out"


class Journal:
    """Counts and figures of a run. `figures` are those of the last step, and become `opt.diagnostics`."""

    def __init__(self, optimizer: str):
        self.optimizer = optimizer
        self.figures: dict[str, Any] = {}
        self.steps = 0
        self.rejections = 0  # in a row
        self.faults: Counter[str] = Counter()
        self.loss_before: float | None = None
        self.first_loss: float | None = None
        self.exploded = self.warned = False
        self.rejected = deque[bool](maxlen=2 * HOPELESS)

    def begin(self, damping: float | None) -> None:
        """A new step."""
        self.figures = {"step": self.steps, "accepted": True, "reason": "", "damping": damping}
        self.figures |= {"loss": None, "lr": None, "momentum": None, "predicted_change": None}

    def see_loss(self, loss: float, *, given: bool) -> None:
        """Records a step's loss. If all numbers are `given` by the user, no step is undone, and one warning is given
        when the loss explodes."""
        self.figures["loss"] = loss
        if self.first_loss is None:
            self.first_loss = loss
        self.exploded = loss - self.first_loss > EXPLODED * abs(self.first_loss)
        if self.exploded and given and not self.warned:
            self.warned = True
            warn(
                f"{self.optimizer} diverges: the loss is {loss:.4g} at step {self.steps}, and was "
                f"{self.first_loss:.4g} at the first. With numbers for lr, momentum and damping nothing is undone: "
                f"{MEND}"
            )

    def reject(self, reason: str) -> None:
        """The step was not taken."""
        self.figures |= {"accepted": False, "reason": reason}
        self.faults["rejected"] += 1
        self.rejections += 1

    def accept(self) -> None:
        """The step was taken."""
        self.rejections = 0

    def end(self, damping: float | None, more: Counter[str]) -> None:
        """Ends the step. Warns at the second, fourth, eighth, ... rejection in a row.

        Raises:
            ValueError: if the run has exploded and too many of the last steps were rejected.
        """
        accepted = self.figures["accepted"]
        self.figures |= {"damping": damping, "faults": dict(self.faults + more)}
        self.rejected.append(not accepted)
        self.steps += 1
        again, reason = self.rejections, self.figures["reason"]
        if again > 1 and again & (again - 1) == 0:  # the second, fourth, eighth in a row, ...
            warn(f"{self.optimizer} rejected step {self.steps - 1} ({again} in a row): {reason}")
        if self.exploded and not accepted and sum(self.rejected) >= HOPELESS:
            raise ValueError(
                f"the run has diverged from a loss of {self.first_loss:.4g}, and {sum(self.rejected)} of the last "
                f"{len(self.rejected)} steps were rejected ({reason}); {MEND}"
            )

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "rejections": self.rejections,
            "faults": dict(self.faults),
            "loss_before": self.loss_before,
            "first_loss": self.first_loss,
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.steps, self.rejections = saved["steps"], saved["rejections"]
        self.faults = Counter(saved["faults"])
        self.loss_before, self.first_loss = saved["loss_before"], saved["first_loss"]
        self.exploded = self.warned = False
        self.rejected.clear()
