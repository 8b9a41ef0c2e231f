"""The thread pool beside the loop, on a real loop; the pure rules of when the loop is woken on a made one."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from apphost.interfaces.threads import ThreadPool
from tests.rawhttp import DEADLINE
from tests.support import wait_for


class MadeLoop:
    """Notes who wants to be called; a test calls."""

    def __init__(self) -> None:
        self.woken: list[Callable[[], None]] = []
        self.soon: list[Callable[[], None]] = []
        self.closed = False
        self.faults: list[BaseException] = []

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.woken.append(callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context["exception"])

    def turn(self) -> None:
        """The end of a turn: what was to be called soon is called."""
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()

    def turn_until(self, happened: threading.Semaphore) -> None:
        """Turns as a loop does, also when it is woken from a thread, until then."""
        deadline = time.monotonic() + DEADLINE
        while not happened.acquire(timeout=0.001):
            assert time.monotonic() < deadline
            woken, self.woken = self.woken, []
            for callback in woken:
                callback()
            self.turn()


def made_pool(threads: int = 1) -> tuple[ThreadPool, Any]:
    loop = MadeLoop()
    return ThreadPool(loop, threads), loop  # type: ignore[arg-type]


def test_many_results_wake_the_loop_once() -> None:
    pool, loop = made_pool()
    seen: list[int] = []
    for number in range(5):
        pool.post(lambda number=number: seen.append(number))
    assert (len(loop.woken), seen) == (1, [])
    loop.woken[0]()
    assert (seen, loop.soon) == ([0, 1, 2, 3, 4], [])
    pool.post(lambda: seen.append(5))
    assert len(loop.woken) == 2
    pool.close()


def test_what_is_posted_meanwhile_waits_for_the_next_turn() -> None:
    """So that results that beget results cannot keep the loop to themselves."""
    pool, loop = made_pool()
    seen: list[str] = []

    def first() -> None:
        seen.append("first")
        pool.post(lambda: seen.append("second"))

    pool.post(first)
    loop.woken[0]()
    assert seen == ["first"]
    assert len(loop.woken) + len(loop.soon) == 2
    (loop.woken[1:] + loop.soon)[0]()
    assert seen == ["first", "second"]
    pool.close()


def test_a_result_that_raises_strands_no_other() -> None:
    pool, loop = made_pool()
    seen: list[str] = []

    def fails() -> None:
        raise ValueError("a defect")

    pool.post(fails)
    pool.post(lambda: seen.append("after"))
    with pytest.raises(ValueError, match="a defect"):
        loop.woken[0]()
    assert len(loop.soon) == 1
    loop.soon[0]()
    assert seen == ["after"]
    pool.post(lambda: seen.append("later"))
    loop.woken[-1]()
    assert seen == ["after", "later"]
    pool.close()


def test_a_closed_loop_is_no_error() -> None:
    pool, loop = made_pool()
    loop.closed = True
    pool.post(lambda: None)
    pool.close()


def test_jobs_in_order_on_one_thread() -> None:
    pool, loop = made_pool()
    seen: list[int] = []
    done = threading.Event()
    for number in range(100):
        pool.submit(lambda number=number: seen.append(number))
    pool.submit(done.set)
    assert (len(loop.soon), seen) == (1, [])  # handed out together, at the end of the turn
    loop.turn()
    assert done.wait(DEADLINE)
    assert seen == list(range(100))
    pool.close()


def gated() -> tuple[threading.Event, threading.Semaphore, Callable[[], None]]:
    """(gate, running, job): each run of the job releases `running`, and then waits for the gate."""
    gate, running = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        running.release()
        gate.wait(DEADLINE)

    return gate, running, wait


def test_a_job_that_raises_costs_no_thread() -> None:
    """G20: nor its place among those that are busy; the loop is told."""
    pool, loop = made_pool()
    done = threading.Semaphore(0)
    errors = [SystemExit(3), ValueError("a defect"), KeyboardInterrupt()]

    def fail(error: BaseException) -> None:
        raise error

    for error in errors:
        pool.submit(partial(fail, error))
    pool.submit(done.release)
    loop.turn_until(done)
    wait_for(lambda: pool.busy == 0, what="the last job to be finished")
    pool._drain()
    assert loop.faults == errors
    assert all(thread.is_alive() for thread in pool.threads)
    pool.close()


def test_busy_counts_what_is_not_finished() -> None:
    pool, loop = made_pool(2)
    gate, running, wait = gated()
    for _ in range(3):
        pool.submit(wait)
    loop.turn()
    loop.turn_until(running)
    loop.turn_until(running)
    assert pool.busy == 3  # two run, one waits for a thread
    gate.set()
    assert running.acquire(timeout=DEADLINE)
    ended = threading.Event()
    pool.submit(ended.set)
    loop.turn()
    assert ended.wait(DEADLINE)
    end_threads(pool)
    assert pool.busy == 0


def end_threads(pool: ThreadPool) -> None:
    pool.close()
    for thread in pool.threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_close_lets_the_jobs_before_it_finish() -> None:
    pool, _ = made_pool(3)
    seen: list[int] = []
    for number in range(50):
        pool.submit(lambda number=number: seen.append(number))
    end_threads(pool)
    assert sorted(seen) == list(range(50))


def test_jobs_of_one_turn_run_beside_each_other() -> None:
    """One that waits for another must not have it waiting behind itself while threads are idle."""
    pool, loop = made_pool(4)
    together = threading.Barrier(4)
    passed = threading.Semaphore(0)

    def meet() -> None:
        together.wait(DEADLINE)
        passed.release()

    for _ in range(50):
        for _ in range(4):
            pool.submit(meet)
        loop.turn()
        for _ in range(4):
            loop.turn_until(passed)
    end_threads(pool)


def wait_until_idle(pool: ThreadPool) -> None:
    """Threads that have just begun look for work themselves."""
    deadline = time.monotonic() + DEADLINE
    while len(pool._idle) < len(pool.threads):
        assert time.monotonic() < deadline


def test_jobs_that_wait_for_nothing_need_one_thread_and_one_wake_up() -> None:
    """To wake the others costs more than such a job: they are woken when the loop finds that there is work left."""
    pool, loop = made_pool(4)
    wait_until_idle(pool)
    seen: list[str] = []
    done = threading.Event()
    for _ in range(50):
        pool.submit(lambda: seen.append(threading.current_thread().name))
    pool.submit(done.set)
    loop.turn()
    assert done.wait(DEADLINE)
    assert (len(seen), len(set(seen)), len(loop.woken)) == (50, 1, 1)
    end_threads(pool)


@pytest.mark.parametrize("more", [0, 1, 3])
def test_the_loop_is_told_of_work_that_is_left(more: int) -> None:
    """By the thread that has taken the first of it, before it knows how long that takes; once, and not for nothing."""
    pool, loop = made_pool(4)
    wait_until_idle(pool)
    gate, running, wait = gated()
    for _ in range(1 + more):
        pool.submit(wait)
    loop.turn()
    assert running.acquire(timeout=DEADLINE)
    assert len(loop.woken) == (1 if more else 0)
    for _ in range(more):
        loop.turn_until(running)
    assert pool.busy == 1 + more
    gate.set()
    end_threads(pool)


def test_no_job_is_stranded_between_a_search_and_a_sleep() -> None:
    """A job that comes just while its only thread goes to sleep is taken all the same."""
    pool, loop = made_pool(1)
    ran = threading.Semaphore(0)
    for _ in range(5000):
        pool.submit(ran.release)
        loop.turn()
        assert ran.acquire(timeout=DEADLINE)
    end_threads(pool)


def test_threads_are_daemons() -> None:
    """A thread that hangs in code of the user must not keep a worker from ending."""
    pool, _ = made_pool(2)
    assert [(thread.daemon, thread.name) for thread in pool.threads] == [(True, "app-1"), (True, "app-2")]
    end_threads(pool)


def test_an_idle_thread_keeps_no_job_alive() -> None:
    pool, loop = made_pool()

    class Job:
        def __call__(self) -> None:
            pass

    job = Job()
    gone = threading.Event()
    weakref.finalize(job, gone.set)
    pool.submit(job)
    del job
    loop.turn()
    loop.soon.clear()
    gc.collect()
    assert gone.wait(DEADLINE)
    end_threads(pool)


def test_round_trip_on_a_real_loop(loop_name: str) -> None:
    """Thousands of jobs from the loop and results to it: none is lost, whichever way wake-ups and posts interleave."""
    if loop_name == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    count = 5000
    seen: set[int] = set()
    threads: set[str] = set()

    async def main() -> None:
        pool = ThreadPool(loop, 4)
        done = loop.create_future()

        def arrived(number: int) -> None:
            threads.add(threading.current_thread().name)
            seen.add(number)
            if len(seen) == count:
                done.set_result(None)

        for number in range(count):
            pool.submit(lambda number=number: pool.post(lambda: arrived(number)))
            if number % 97 == 0:
                await asyncio.sleep(0)
        await asyncio.wait_for(done, DEADLINE)
        end_threads(pool)

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert len(seen) == count
    assert threads == {threading.current_thread().name}
