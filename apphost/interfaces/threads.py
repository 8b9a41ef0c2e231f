"""Threads beside the event loop: work goes to them through a queue, results come back in batches.

Waking the loop from a thread costs a system call and a turn of the loop, more than a small response itself. So results
are gathered and the loop is woken only when it has not been yet: under load one wake-up serves many.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]


class ThreadPool:
    """A fixed number of daemon threads that run jobs. `submit` from the loop, `post` from the threads.

    A job must not raise. Daemon threads, because a thread that hangs in user code must not keep a worker from ending.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int, name: str = "app") -> None:
        self._loop = loop
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._posted: deque[Job] = deque()
        self._woken = False
        self._submitted = 0
        self._finished = [0] * threads  # one counter a thread: each is written by one thread only
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number + 1}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Run `job` on one of the threads, in order of submission."""
        self._submitted += 1
        self._jobs.put(job)

    def post(self, result: Job) -> None:
        """Run `result` on the event loop, in order of posting. From any thread; never blocks."""
        self._posted.append(result)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                pass  # the loop is closed: the worker is ending, nobody waits for the result

    @property
    def busy(self) -> int:
        """Jobs that are not finished."""
        return self._submitted - sum(self._finished)

    def close(self) -> None:
        """Let every thread end after the jobs that were submitted; does not wait."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self, number: int) -> None:
        get = self._jobs.get
        while (job := get()) is not None:
            job()
            self._finished[number] += 1
            del job  # or the last request of an idle thread would stay in memory

    def _drain(self) -> None:
        # Cleared first: whoever posts from here on either is seen below or wakes the loop again.
        self._woken = False
        posted = self._posted
        try:
            for _ in range(len(posted)):
                posted.popleft()()
        finally:  # also when one of them has raised: the others must not wait for the next wake-up
            if posted and not self._woken:
                self._woken = True
                self._loop.call_soon(self._drain)
