"""What a worker counts while there is an admin listener; without one none of this is there.

It stands where the access log stands, and hands on to that: so a request that nobody counts pays nothing for it.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from apphost.interfaces.threads import Job, ThreadPool
from apphost.measures import BOUNDS, BUCKETS, CODES, PHASES, Measures
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
    """Counts finished requests. Event loop only. `log`: the access log behind it, if there is one."""

    def __init__(self, log: Recorder | None) -> None:
        self._log = log
        self._codes = [0] * 10  # by the first digit of the status
        self._latency = [0] * BUCKETS
        self._seconds = 0.0
        self._cut = 0
        self._sent = 0
        self._queue = [0] * BUCKETS
        self._queue_seconds = 0.0
        self.waits: deque[float] = deque()  # s; threads append, the loop takes them out at each beat

    def write(self, exchange: Exchange, cut: bool = False) -> None:
        """A request is finished; see `AccessLog`. Measured with its time stamps: see docs/metrics.md."""
        status = exchange.status
        self._codes[status // 100] += 1
        if status:
            seconds = time.perf_counter() - exchange.started_at
            self._latency[bisect_left(BOUNDS, seconds)] += 1
            self._seconds += seconds
        self._sent += exchange.sent
        if cut:
            self._cut += 1
        if self._log is not None:
            self._log.write(exchange, cut)

    def write_refusal(self, connection: Connection, status: int) -> None:
        self._codes[status // 100] += 1
        if self._log is not None:
            self._log.write_refusal(connection, status)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def measures(self, connections: Iterable[Wire], count: int, moved: int, adopted: int) -> Measures:
        """All counters, as they travel. `connections`: all `count` of them."""
        for _ in range(len(self.waits)):
            waited = self.waits.popleft()
            self._queue[bisect_left(BOUNDS, waited)] += 1
            self._queue_seconds += waited
        last = len(CODES) - 1
        return {
            # RFC 9110, 15: a status beyond 599 is to be taken for a server error.
            "codes": [*self._codes[:last], sum(self._codes[last:])],
            "latency": self._latency,
            "latency_us": [int(self._seconds * 1e6)],
            "queue": self._queue,
            "queue_us": [int(self._queue_seconds * 1e6)],
            "cut": [self._cut],
            "sent": [self._sent],
            "moved": [moved],
            "adopted": [adopted],
            "phases": count_phases((connection.phase for connection in connections), count),
        }


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
