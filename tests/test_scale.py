"""What does not grow with the number of workers and connections, found by counting, not by timing. Pure (S10)."""

from __future__ import annotations

import itertools

import pytest

from apphost.arbiter.fleet import Fleet, step
from apphost.arbiter.successors import SUCCESSORS_MAX
from apphost.arbiter.vocabulary import (
    Action,
    Config,
    Drain,
    Event,
    GenerationComplete,
    ReloadAsked,
    Spawn,
    Tick,
    WorkerBeat,
    WorkerGone,
    WorkerReady,
)
from apphost.worker.server import MOMENTS, TICK, next_tick

WORKERS = 64


class World:
    """Boots and drains take no time and the clock stands still, so whatever the fleet waits for, it waits for events.

    connections: of each living worker, moved as `worker/handover.py` does it, one by one to the emptiest successor.
    channels: how many were made between two workers, as `arbiter/successors.py` does it.
    """

    def __init__(self, size: int) -> None:
        self.fleet = Fleet(Config(size=size, timeout=30.0))
        self.connections: dict[int, int] = {}
        self.channels = 0
        self.steps = 0
        self.alive_max = 0
        self.complete = 0

    def happens(self, event: Event) -> None:
        waiting: list[Event] = [event]
        while waiting:
            self.steps += 1
            for action in step(self.fleet, waiting.pop(0), 1000.0):
                waiting += self.follows(action)
            self.alive_max = max(self.alive_max, len(self.fleet.workers))

    def follows(self, action: Action) -> list[Event]:
        if isinstance(action, Spawn):
            self.connections[action.wid] = 0
            return [WorkerReady(action.wid)]
        if isinstance(action, Drain):
            successors = action.successors[:SUCCESSORS_MAX]
            self.channels += len(successors)
            for _ in range(self.connections.pop(action.wid)):
                self.connections[min(successors, key=self.connections.__getitem__)] += 1
            return [WorkerGone(action.wid), *self.beats()]
        assert isinstance(action, GenerationComplete), action
        self.complete = action.generation
        return []

    def beats(self) -> list[Event]:
        return [WorkerBeat(wid, count) for wid, count in self.connections.items()]

    def hold(self, *counts: int) -> None:
        """The workers have so many connections, and have told it."""
        self.connections = dict(zip(self.connections, counts, strict=True))
        for beat in self.beats():
            assert step(self.fleet, beat, 1000.0) == []


def test_a_large_fleet_boots_and_rolls_without_waiting_for_any_clock() -> None:
    world = World(WORKERS)
    world.happens(Tick())
    assert world.complete == 1
    assert world.steps == 1 + WORKERS, "one look, and one more as each is ready"
    world.happens(ReloadAsked())
    assert world.complete == 2
    assert world.alive_max == WORKERS + 2, "one that boots, one that drains"
    assert sorted(world.connections) == list(range(WORKERS + 1, 2 * WORKERS + 1))


def test_a_roll_makes_a_bounded_number_of_channels_for_each_worker() -> None:
    world = World(WORKERS)
    world.happens(Tick())
    world.happens(ReloadAsked())
    assert world.channels <= WORKERS * SUCCESSORS_MAX


@pytest.mark.parametrize(
    "held", [(10_000, 0, 0, 0), (0, 0, 0, 10_000), (2500,) * 4, (100, 4000, 1, 7), (9, 8, 7, 6)], ids=str
)
def test_long_connections_are_balanced_after_a_reload(held: tuple[int, ...]) -> None:
    """Also where one old worker held all of them: it drains last, when there are all the new ones to share them."""
    world = World(len(held))
    world.happens(Tick())
    world.hold(*held)
    world.happens(ReloadAsked())
    now = world.connections.values()
    assert sum(now) == sum(held)
    assert max(now) - min(now) <= 1


def test_a_beat_costs_the_same_in_a_fleet_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the other workers for it."""
    fleet = Fleet(Config(size=WORKERS))
    step(fleet, Tick(), 0.0)
    for wid in range(1, WORKERS + 1):
        step(fleet, WorkerReady(wid), 0.0)

    class Only(dict):  # type: ignore[type-arg]
        def values(self) -> None:  # type: ignore[override]
            raise AssertionError("all were looked at")

        __iter__ = items = keys = values  # type: ignore[assignment]

    fleet.workers = Only(fleet.workers)
    assert step(fleet, WorkerBeat(7, 123), 1.0) == []
    assert fleet.workers[7].connections == 123


@pytest.mark.parametrize("wid", range(1, 9))
@pytest.mark.parametrize("start", [0.0, 0.1, 0.249, 0.25, 0.26, 0.374, 12345.678])
def test_the_ticks_of_all_workers_fall_on_a_few_moments(wid: int, start: float) -> None:
    """So the arbiter wakes as often for the beats of 64 workers as for those of 4."""
    first = next_tick(start, wid)
    assert TICK / 2 <= first - start <= TICK * 3 / 2
    moments = [first]
    for _ in range(5):  # timers are late, and loops round to milliseconds
        moments.append(next_tick(moments[-1] + 0.004, wid))
    gaps = [later - sooner for sooner, later in itertools.pairwise(moments)]
    assert gaps == pytest.approx([TICK] * 5)
    assert first / TICK % 1 == pytest.approx(wid % MOMENTS / MOMENTS, abs=1e-6)
    assert next_tick(first - 0.001, wid) == pytest.approx(first + TICK), "one that is early does not tick twice"
