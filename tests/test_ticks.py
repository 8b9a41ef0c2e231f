"""The tick of a worker: two looks a second at what has timed out, and two beats that say that its loop lives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from apphost.lifecycle import State
from apphost.worker import server
from apphost.worker.server import TICK, Server
from tests.rawhttp import DEADLINE


def ticks_of(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop, delays: list[float]
) -> tuple[int, list[float]]:
    """Tick until there was one after each of these times: the number of beats, and the times of looks at time-outs."""
    left = iter(delays)
    over = loop.create_future()
    looks: list[float] = []
    beats = 0

    def next_tick(now: float, _wid: int) -> float:
        delay = next(left, None)
        if delay is None:
            over.set_result(None)
        return now + (DEADLINE if delay is None else delay)

    def beat() -> None:
        nonlocal beats
        beats += 1

    worker = SimpleNamespace(
        loop=loop, state=State.READY, assignment=SimpleNamespace(wid=1), context=SimpleNamespace(tick=looks.append),
        _tick_due=float("inf"), _beat=beat, _ask_for_successor=lambda: None,
    )  # fmt: skip
    worker._tick = lambda: Server._tick(worker)  # type: ignore[arg-type]
    monkeypatch.setattr(server, "next_tick", next_tick)
    worker._tick()
    loop.run_until_complete(asyncio.wait_for(over, DEADLINE))
    worker._tick_handle.cancel()
    return beats, looks


@pytest.fixture
def loop(loop_name: str) -> Iterator[asyncio.AbstractEventLoop]:
    if loop_name == "uvloop":
        import uvloop

        made = uvloop.new_event_loop()
    else:
        made = asyncio.new_event_loop()
    yield made
    made.close()


def test_a_process_that_stands_still_while_it_sets_its_next_tick_goes_on(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    """The moment has passed before the loop is told of it: due at once, and uvloop has no time for such a handle."""
    beats, looks = ticks_of(monkeypatch, loop, [0.0, -0.1, 0.0, 0.01])
    assert (beats, len(looks)) == (5, 5)


def test_who_was_stopped_reads_first_and_then_looks_at_time_outs(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    beats, looks = ticks_of(monkeypatch, loop, [0.01, -2 * TICK, 0.01])
    assert (beats, len(looks)) == (4, 3)
