"""Threads beside the event loop: work goes to them in batches, and results come back in batches.

Both directions cost a system call and, with one interpreter lock for all, a quarrel over who runs. So the loop hands
out what one of its turns has brought when that turn is over and it lets go of the lock anyway, and a thread wakes the
loop only when nobody has: under load one wake-up serves many. (Measured on one core, WSGI hello world: a queue that
wakes a thread for every job costs two context switches a request, the batches a fraction of one.)
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class _Slot:
    """The place of one thread. While idle the thread waits for its own lock; who has put a `job` here releases that."""

    __slots__ = ("finished", "job", "wake")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.wake = threading.Lock()
        self.wake.acquire()
        self.finished = 0


class ThreadPool:
    """A fixed number of daemon threads that run jobs. `submit` from the loop, `post` from the threads.

    A job must not raise. Daemon threads, because a thread that hangs in user code must not keep a worker from ending.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int, name: str = "app") -> None:
        self._loop = loop
        self._fresh: list[Job] = []  # submitted in this turn of the loop
        self._jobs: deque[Job] = deque()  # waiting for a thread
        self._idle: list[_Slot] = []  # the last to become idle is the first to get work: its caches are warm
        self._posted: deque[Job] = deque()
        self._woken = False
        self._closed = False
        self._submitted = 0
        self._slots = [_Slot() for _ in range(threads)]
        self.threads = [
            threading.Thread(target=self._run, args=(slot,), name=f"{name}-{number}", daemon=True)
            for number, slot in enumerate(self._slots, 1)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Run `job` on one of the threads, in order of submission, from the end of this turn of the loop on."""
        self._submitted += 1
        if not self._fresh:
            self._loop.call_soon(self._hand_out)
        self._fresh.append(job)

    def _hand_out(self) -> None:
        fresh, self._fresh = self._fresh, []
        self._jobs.extend(fresh)
        for _ in range(min(len(fresh), len(self._idle))):
            self._wake_one()

    def _wake_one(self) -> None:
        """Give the first waiting job to an idle thread. Either may be gone by the time that it is taken."""
        try:
            slot = self._idle.pop()
        except IndexError:
            return
        try:
            slot.job = self._jobs.popleft()
        except IndexError:
            pass  # it looks for itself, and goes back to sleep
        slot.wake.release()

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
        return self._submitted - sum(slot.finished for slot in self._slots)

    def close(self) -> None:
        """Let every thread end after the jobs that were submitted; does not wait."""
        self._hand_out()
        self._closed = True
        while self._idle:
            self._wake_one()

    def _run(self, slot: _Slot) -> None:
        while (job := self._next(slot)) is not None:
            job()
            slot.finished += 1
            del job  # or the last request of an idle thread would stay in memory

    def _next(self, slot: _Slot) -> Job | None:
        """The next job, waiting for one; None at the end."""
        while True:
            try:
                return self._jobs.popleft()
            except IndexError:
                pass
            if self._closed:
                return None
            self._idle.append(slot)
            # A job or the end may have come before the loop could see that this thread is idle: look once more, and
            # sleep only if that finds nothing, or if somebody has taken the thread from the list and will wake it.
            if (self._jobs or self._closed) and self._leave_idle(slot):
                continue
            slot.wake.acquire()
            job, slot.job = slot.job, None
            if job is not None:
                return job

    def _leave_idle(self, slot: _Slot) -> bool:
        """Take a thread off the list of idle ones; False when somebody else has, who will wake it."""
        try:
            self._idle.remove(slot)
        except ValueError:
            return False
        return True

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
