"""When a check of batches has given the same answer so often that it need not be made again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

TRUSTED = 4
"""The number of equal answers after which a check is not repeated."""


def is_settled(answers: Sequence[Hashable]) -> bool:
    """Whether a check has given at least `TRUSTED` answers, all of them equal.

    >>> is_settled([True, True, True, True]), is_settled([True] * 3), is_settled([True, True, True, True, False])
    (True, False, False)
    """
    return len(answers) >= TRUSTED and len(set(answers)) == 1
