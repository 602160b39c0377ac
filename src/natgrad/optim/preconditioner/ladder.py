"""The fallbacks that are tried, one after the other, if a layer's factor cannot be inverted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from natgrad.checks.warning import warn
from natgrad.linalg import Diagonal, Operator

MORE = (10.0, 100.0, 1000.0)


class Ladder:
    """The damped inverse of a layer's operator. If it cannot be computed, these are tried:

    1. the inverse with ten to a thousand times the damping (factorizations try float64 themselves);
    2. the last good inverse;
    3. the inverse of the diagonal, if memory has run out and there is no last inverse.

    Every such fallback is counted in `faults`, and a warning is given.
    """

    def __init__(self, invert: Callable[[Operator, float], Operator], faults: Counter[str]):
        self._invert, self._faults = invert, faults

    def inverse(self, name: str, operator: Operator, damping: float, last: Operator | None) -> Operator:
        """Raises ValueError if all of them fail."""
        try:
            return self._invert(operator, damping)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return self._despite(name, operator, damping, last, error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if last is not None:
                return self._kept(name, last, error)
            self._note("diagonal_for_memory", f"layer {name!r}: {error}; its diagonal is inverted instead")
            return Diagonal(operator._diagonal()).inverse(damping)

    def _despite(
        self, name: str, operator: Operator, damping: float, last: Operator | None, error: Exception
    ) -> Operator:
        for more in MORE if damping > 0 else ():
            try:
                inverse = self._invert(operator, more * damping)
            except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                continue
            self._note("more_damping", f"layer {name!r}: {error}; it was damped {more:g} times as much")
            return inverse
        if last is None:
            raise ValueError(f"layer {name!r}: {error}") from error
        return self._kept(name, last, error)

    def _kept(self, name: str, last: Operator, error: Exception) -> Operator:
        self._note("kept_inverse", f"layer {name!r}: {error}; its last inverse is kept")
        return last

    def _note(self, fault: str, message: str) -> None:
        self._faults[fault] += 1
        warn(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out on any device: torch has a special error only for accelerators."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
