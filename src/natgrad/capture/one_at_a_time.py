"""What one thread at a time may do."""

from __future__ import annotations

import threading

ONE_AT_A_TIME = threading.RLock()
"""To be held where settings of the whole process are changed for a while: the level of forward mode, which attention
kernels are in use, and whether cuDNN is. Another thread would restore what this one has set."""
