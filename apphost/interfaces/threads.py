"""Threads beside the event loop: work goes to them in batches, and results come back in batches.

Both directions cost a system call and, with one interpreter lock for all, a quarrel over who runs. So the loop hands
out what one of its turns has brought when that turn is over and it lets go of the lock anyway, and wakes one thread for
it. That one wakes the loop, as its results will have to: the loop then waits for the interpreter, has it as soon as the
thread waits for something else, and finds out whether there is work left for a second thread. Work that waits for
nothing is done by the first thread meanwhile, and its results go back together.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

Job = Callable[[], None]


class _Slot:
    """The place of one thread. While idle the thread waits for its own lock."""

    __slots__ = ("finished", "wake")

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.finished = 0


class ThreadPool:
    """A fixed number of daemon threads that run jobs. `submit` from the loop, `post` from the threads.

    A job that raises is a defect of ours, and the loop's exception handler is told. Daemon threads, because a thread
    that hangs in user code must not keep a worker from ending.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int, name: str = "app") -> None:
        self._loop = loop
        self._fresh: list[Job] = []  # submitted in this turn of the loop
        self._jobs: deque[Job] = deque()  # waiting for a thread
        self._idle: list[_Slot] = []  # the last to become idle is the first to get work: its caches are warm
        self._posted: deque[Job] = deque()
        self._starting = False  # a thread has been woken and is not there yet
        self._woken = False  # `_drain` is going to run
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
        self._start_one()

    def _start_one(self) -> None:
        """Wake a thread if there is work for it, one at a time: who comes sees to the next (`_take`)."""
        if self._jobs and not self._starting:
            self._wake_one()

    def _wake_one(self) -> None:
        try:
            slot = self._idle.pop()
        except IndexError:
            return  # all are busy, and look for work themselves before they are idle
        self._starting = True
        slot.wake.release()

    def post(self, result: Job) -> None:
        """Run `result` on the event loop, in order of posting. From any thread; never blocks."""
        self._posted.append(result)
        if not self._woken:
            self._wake_loop()

    def _wake_loop(self) -> None:
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
        while (job := self._take() or self._wait(slot)) is not None:
            try:
                job()
            except BaseException as exc:  # a thread that ended would be missed for good, and its requests wait for ever
                self.post(partial(self._complain, exc))
            slot.finished += 1
            del job  # or the last request of an idle thread would stay in memory

    def _complain(self, exc: BaseException) -> None:
        self._loop.call_exception_handler({"message": "a job of the thread pool failed", "exception": exc})

    def _take(self) -> Job | None:
        jobs = self._jobs
        try:
            job = jobs.popleft()
        except IndexError:
            return None
        if jobs and not self._woken and self._idle:
            self._wake_loop()  # it gets the interpreter when this thread waits, and then starts another for the rest
        return job

    def _wait(self, slot: _Slot) -> Job | None:
        """The next job when there is one; None at the end."""
        while not self._closed:
            self._idle.append(slot)
            # A job or the end may have come before the loop could see that this thread is idle: look once more, and
            # sleep only if that finds nothing, or if somebody has taken the thread from the list and will wake it.
            if not ((self._jobs or self._closed) and self._leave_idle(slot)):
                slot.wake.acquire()
                self._starting = False  # before it looks for jobs: those of a later turn start a thread themselves
            job = self._take()
            if job is not None:
                return job
        return self._take()

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
            self._start_one()
            if posted and not self._woken:
                self._woken = True
                self._loop.call_soon(self._drain)
