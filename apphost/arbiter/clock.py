"""The clock of the arbiter: it stands still while the arbiter does not run.

A container that is paused, a process tree that gets SIGSTOP, a machine that swaps: the monotonic clock goes on. By that
one, every worker would be silent for too long when the arbiter runs again, the beats unread or not sent, as its worker
stood still too. To judge somebody by a deadline one must have been awake all the time, so deadlines are of this clock.
"""

from __future__ import annotations

import time

NAP = 0.75  # s; the longest wait, or a stop could pass for sleep. Workers beat more often: this wakes nobody in vain.
LATE = 0.5  # s by which a turn may come late, before the time since the last one counts as lost


class Clock:
    """Seconds as of `time.monotonic`, without those that were lost. `turn` at least every `NAP`; until the next, `now`
    stays as it is, so that a stop in the middle of a turn expires nothing before what has come meanwhile is read."""

    def __init__(self, now: float | None = None, at: float | None = None) -> None:
        """`now`, `at`: those of a clock that is to go on, of the program before this one."""
        self.at = time.monotonic() if at is None else at  # monotonic: the moment of the last turn
        self.now = self.at if now is None else now

    def turn(self) -> float:
        """A turn begins; the seconds that were lost before it, mostly none.

        All of the time since the last turn is lost then: nobody knows for how much of it we slept on purpose.
        """
        at = time.monotonic()
        passed, self.at = at - self.at, at
        if passed > NAP + LATE:
            return passed
        self.now += passed
        return 0.0

    def until(self, due: float) -> float:
        """Seconds from this very moment to `due`."""
        return due - self.now - (time.monotonic() - self.at)
