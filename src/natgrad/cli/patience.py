"""Threads that sleep while they wait, for commands that measure processor time."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TIMED = ("demo", "compare")
"""Commands whose budgets are processor time."""
POLICY = "OMP_WAIT_POLICY"


def wait_asleep(arguments: Sequence[str]) -> None:
    """Restart the process if the command is timed, with OpenMP's threads set to sleep while they wait.

    By default they spin while they wait for one another, which counts as processor time. On a busy machine they wait
    long: at a load of 8 to 15 on two cores, a step of K-FAC took 1.4 s of processor time with spinning threads and
    0.1 s with sleeping ones. OpenMP reads the variable when torch is loaded, so it would be too late to set it here. If
    the user has set the variable, it is not changed.
    """
    if arguments[:1] and arguments[0] in TIMED and os.name == "posix" and sys.executable and POLICY not in os.environ:
        os.environ[POLICY] = "PASSIVE"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "natgrad", *arguments])
