"""What a worker counts while there is an admin listener; without one none of this is there.

It stands where the access log stands, and hands on to that: so a request that nobody counts pays nothing for it.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING

from apphost.interfaces.threads import Job, ThreadPool
from apphost.measures import BOUNDS, CODES, PHASES, Measures, zero
from apphost.protocols.wire import Phase, Wire

if TYPE_CHECKING:
    from apphost.protocols.context import Recorder
    from apphost.protocols.exchange import Exchange
    from apphost.protocols.http1 import Connection

# Connections that a beat looks at to tell their phases, some 40 us; of more than these the rest is estimated.
SAMPLE = 512
_PHASE = {
    Phase.WAITING: "idle", Phase.HEAD: "head", Phase.BUSY: "busy", Phase.DISCARDING: "busy", Phase.MOVING: "moving",
    Phase.UPGRADED: "websocket", Phase.LINGERING: "closing", Phase.CLOSED: "closing",
}  # fmt: skip
_INDEX = {phase: PHASES.index(name) for phase, name in _PHASE.items()}


class Meter:
    """Counts finished requests. Event loop only. `log`: the access log behind it, if there is one.

    A request only leaves three numbers behind; what is to be known of them is counted at the next beat, in loops of C.
    So there are never more of them than half a second brings.
    """

    def __init__(self, log: Recorder | None) -> None:
        self._log = log
        self._statuses: list[int] = []
        self._seconds: list[float] = []
        self._sent: list[int] = []
        self._codes = [0] * len(CODES)
        self._totals = zero()
        self._latency_s = 0.0
        self._queue_s = 0.0
        self.waits: deque[float] = deque()  # s; threads append, the loop takes them out at each beat
        self.write = self._make_write()

    def _make_write(self) -> Callable[..., None]:
        """See `Recorder.write`. A closure, because what it needs is found faster there than in attributes."""
        add_status, add_seconds, add_sent = self._statuses.append, self._seconds.append, self._sent.append
        cut_short = self._totals["cut"]
        log = self._log
        clock = time.perf_counter

        def write(exchange: Exchange, cut: bool = False) -> None:
            add_status(exchange.status)
            add_seconds(clock() - exchange.started_at)
            add_sent(exchange.sent)
            if cut:
                cut_short[0] += 1

        def write_both(exchange: Exchange, cut: bool = False) -> None:
            write(exchange, cut)
            assert log is not None
            log.write(exchange, cut)

        return write if log is None else write_both

    def write_refusal(self, connection: Connection, status: int) -> None:
        self._codes[status // 100] += 1
        if self._log is not None:
            self._log.write_refusal(connection, status)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def measures(self, connections: Iterable[Wire], count: int, moved: int, adopted: int) -> Measures:
        """All counters, as they travel. `connections`: all `count` of them."""
        waits = [self.waits.popleft() for _ in range(len(self.waits))]
        totals, codes = self._totals, self._codes
        for status, many in Counter(self._statuses).items():
            codes[min(status // 100, len(CODES) - 1)] += many  # RFC 9110, 15: what is beyond 599 is a server error
        self._latency_s += _sort_in(totals["latency"], self._seconds)
        self._queue_s += _sort_in(totals["queue"], waits)
        totals["sent"][0] += sum(self._sent)
        for numbers in (self._statuses, self._seconds, self._sent):
            numbers.clear()
        return {
            **totals,
            "codes": codes,
            "latency_us": [int(self._latency_s * 1e6)],
            "queue_us": [int(self._queue_s * 1e6)],
            "moved": [moved],
            "adopted": [adopted],
            "phases": count_phases((connection.phase for connection in connections), count),
        }


def _sort_in(buckets: list[int], seconds: list[float]) -> float:
    """Add to a histogram; the sum of what was added. The bounds belong to their buckets."""
    for index, many in Counter(map(bisect_left, repeat(BOUNDS), seconds)).items():
        buckets[index] += many
    return sum(seconds)


def count_phases(phases: Iterable[Phase], count: int) -> list[int]:
    """How many of `count` connections are in each of `PHASES`; exact up to `SAMPLE`, beyond that scaled up."""
    found = [0] * len(PHASES)
    for phase in islice(phases, SAMPLE):
        found[_INDEX[phase]] += 1
    if count > SAMPLE:
        scaled = [each * count // SAMPLE for each in found]
        scaled[found.index(max(found))] += count - sum(scaled)
        return scaled
    return found


class TimedPool(ThreadPool):
    """Threads that tell how long each job has waited for one of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int, name: str, waits: deque[float]) -> None:
        """`waits`: where the times (s) go, appended by the threads."""
        self._waits = waits
        super().__init__(loop, threads, name)

    def submit(self, job: Job) -> None:
        super().submit(partial(self._run_timed, job, time.perf_counter()))

    def _run_timed(self, job: Job, submitted: float) -> None:
        self._waits.append(time.perf_counter() - submitted)
        job()
