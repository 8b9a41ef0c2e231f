"""What workers count for the admin listener, and how it travels in their beats: lists of whole numbers. Pure.

Counters only grow while a worker lives. When it ends the arbiter adds its last ones to a total, so that sums over all
workers never fall.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Measures = dict[str, list[int]]

# s: the default buckets of the Prometheus clients, and three below, as answers out of memory take less than 1 ms.
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS = len(BOUNDS) + 1  # the last one is for all that took longer
CODES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")  # none: the client had left before there was an answer
PHASES = ("idle", "head", "busy", "websocket", "moving", "closing")  # of connections

# Name to length. latency: requests by bucket, queue: waits for a thread (WSGI) by bucket; *_us: their sums in
# microseconds. cut: responses that ended incomplete. sent: bytes of response bodies. moved, adopted: connections that
# went to and came from other workers.
COUNTERS: Mapping[str, int] = {
    "codes": len(CODES), "latency": BUCKETS, "latency_us": 1, "queue": BUCKETS, "queue_us": 1, "cut": 1, "sent": 1,
    "moved": 1, "adopted": 1,
}  # fmt: skip
GAUGES: Mapping[str, int] = {"phases": len(PHASES)}

_KNOWN = {**COUNTERS, **GAUGES}

NUMBER_MAX = 2**53  # what every reader of JSON takes for a whole number


def zero() -> Measures:
    return {name: [0] * length for name, length in COUNTERS.items()}


def fits(value: Any) -> bool:
    """Whether this is what a worker may say. Names that are unknown here are of another version, and are let pass."""
    if not isinstance(value, dict):
        return False
    return all(_numbers(each, _KNOWN[name]) for name, each in value.items() if name in _KNOWN)


def _numbers(value: Any, length: int) -> bool:
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(each) is int and 0 <= each <= NUMBER_MAX for each in value)


def add(total: Measures, more: Mapping[str, Any]) -> None:
    """Add the counters of `more` to those of `total`, as far as both are of the same shape."""
    for name, length in COUNTERS.items():
        numbers = more.get(name)
        if numbers is not None and _numbers(numbers, length):
            total[name] = [min(a + b, NUMBER_MAX) for a, b in zip(total[name], numbers, strict=True)]


def quantile(buckets: list[int], fraction: float) -> float | None:
    """An estimate in s, linear within its bucket as Prometheus' `histogram_quantile` does it; None without requests.

    What lies beyond the last bound is told as that bound.
    """
    total = sum(buckets)
    if not total:
        return None
    rank = fraction * total
    below = 0
    lower = 0.0
    for count, bound in zip(buckets, BOUNDS, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * max(0.0, rank - below) / count
        below += count
        lower = bound
    return BOUNDS[-1]
