"""When a worker has served enough: after so many requests, with so much memory, at such an age."""

from __future__ import annotations

import os
import random
import resource
import sys

from apphost.settings import Settings

GROWTH = 1.5  # of the memory that a worker begins with, if `max_rss` is below that


class Recycling:
    """Tells once why the worker should be replaced. Its limits are drawn once, so that workers do not go together.

    It is made when the worker is ready: with a `max_lifetime` that is shorter than its boot, or a `max_rss` that the
    application exceeds before the first request, its successor would be no better, and boots would follow one another
    without end. warning: what is to be said about that, mostly empty.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        """`now`: loop time, as for `due`."""
        self.warning = ""
        self.requests = -1  # the number of requests that is enough; -1: none is
        if settings.max_requests:
            self.requests = settings.max_requests + random.randint(0, settings.max_requests_jitter)  # noqa: S311
        self._ends_at = float("inf")
        if settings.max_lifetime:
            self._ends_at = now + settings.max_lifetime + random.uniform(0, settings.max_lifetime_jitter)  # noqa: S311
        self._max_rss = settings.max_rss
        self._told = False
        if self._max_rss and (rss := resident_bytes()) > self._max_rss:
            self._max_rss = int(rss * GROWTH)
            self.warning = (
                f"max_rss is too small: {settings.max_rss >> 20} MiB are allowed, and the application has taken "
                f"{rss >> 20} MiB before its first request; it is replaced when it has {self._max_rss >> 20} MiB"
            )

    def due(self, requests: int, now: float) -> str:
        """Why it is time, empty while it is not, and after it was said."""
        if self._told:
            return ""
        why = self._why(requests, now)
        self._told = bool(why)
        return why

    def _why(self, requests: int, now: float) -> str:
        if 0 <= self.requests <= requests:
            return f"max_requests: {requests} requests served"
        if now >= self._ends_at:
            return "max_lifetime: it is old enough"
        if self._max_rss and (rss := resident_bytes()) > self._max_rss:
            return f"max_rss: {rss >> 20} MiB of memory, {self._max_rss >> 20} MiB are allowed"
        return ""


def resident_bytes() -> int:
    """The resident set size of this process; where the system does not tell the present one (macOS), the largest."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
