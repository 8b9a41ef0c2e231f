"""prctl(2): what Linux does for a process beyond POSIX. Elsewhere nothing happens, and callers do without."""

from __future__ import annotations

import sys

SET_PDEATHSIG = 1  # linux/prctl.h
SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> bool:
    """Whether it was done."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False
