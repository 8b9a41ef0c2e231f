"""The clock of the arbiter, and what the fleet makes of it: nobody is judged by time that the arbiter has lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.arbiter import clock
from apphost.arbiter.clock import LATE, NAP, Clock
from apphost.arbiter.fleet import KILL_GRACE, Fleet, next_deadline, step
from apphost.arbiter.vocabulary import (
    Action,
    Config,
    Dump,
    Event,
    ReloadAsked,
    StopAsked,
    Tick,
    WorkerBeat,
    WorkerLeaves,
    WorkerReady,
)
from apphost.lifecycle import State

BEAT = 0.5  # s; as in the worker
naps = st.floats(0.0, NAP)
freezes = st.floats(NAP + LATE + 0.01, 1e6)


class World:
    """The time that goes on in any case."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(clock, "time", world)
    return world


def test_turn_by_turn_it_shows_the_time(world: World) -> None:
    this = Clock()
    for seconds in (0.0, 0.1, NAP, NAP + LATE, 0.3):
        world.now += seconds
        assert this.turn() == 0.0
        assert this.now == pytest.approx(world.now)


def test_it_stands_still_in_a_turn_but_tells_how_long_to_sleep(world: World) -> None:
    this = Clock()
    assert (this.now, this.until(1003.0)) == (1000.0, 3.0)
    world.now += 1.0
    assert (this.now, this.until(1003.0)) == (1000.0, 2.0)


def test_a_turn_that_comes_too_late_has_lost_all_the_time_since_the_last(world: World) -> None:
    this = Clock()
    world.now += 0.5
    this.turn()
    world.now += 4.5
    assert this.turn() == 4.5
    assert this.now == 1000.5
    world.now += 0.5
    assert this.turn() == 0.0
    assert (this.now, this.until(1002.0)) == (1001.0, 1.0)


def test_the_next_program_goes_on_with_it(world: World) -> None:
    """What it takes to start is not the fault of a worker either."""
    this = Clock()
    world.now += 60.0
    this.turn()
    world.now += 0.3
    this.turn()
    world.now += 3.0
    that = Clock(this.now, this.at)
    assert that.turn() == 3.0
    assert that.now == this.now == pytest.approx(1000.3)


@given(st.lists(st.tuples(naps, st.just(0.0) | freezes), max_size=60))
def test_it_never_goes_back_nor_faster_than_time(turns: list[tuple[float, float]]) -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", world)
        this = Clock()
        for nap, freeze in turns:
            before = this.now
            world.now += nap + freeze
            lost = this.turn()
            assert bool(lost) == bool(freeze)
            assert this.now - before == pytest.approx(0.0 if freeze else nap, abs=1e-6)


# ------------------------------------------------------------------------------------------------ and the fleet


class Site:
    """A fleet with one worker, in turns of the arbiter. A worker that is well beats whenever it runs and it is time."""

    def __init__(self, world: World, well: bool) -> None:
        self.world, self.well = world, well
        self.clock = Clock()
        self.fleet = Fleet(Config(timeout=3.0))
        self.feed(Tick())
        self.feed(WorkerReady(1))
        self.beats = 0  # that wait to be read
        self.beat_at = world.now

    def feed(self, event: Event) -> list[Action]:
        return step(self.fleet, event, self.clock.now)

    def turn(self, nap: float, freeze: float) -> list[Action]:
        """Both sleep for `nap`; then the whole tree is stopped, and the arbiter is the first to run again."""
        self.world.now += nap
        self.beat()
        self.world.now += freeze
        self.clock.turn()
        actions: list[Action] = []
        for _ in range(self.beats):
            actions += self.feed(WorkerBeat(1))
        self.beats = 0
        self.beat()
        return actions + self.feed(Tick())

    def beat(self) -> None:
        if self.well and self.world.now >= self.beat_at + BEAT:
            self.beats += 1
            self.beat_at = self.world.now


@given(st.lists(st.tuples(naps, st.just(0.0) | st.floats(0.0, 1e4)), max_size=60))
def test_a_worker_that_beats_whenever_it_runs_is_never_stuck(turns: list[tuple[float, float]]) -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", world)
        site = Site(world, well=True)
        for nap, freeze in turns:
            assert not [action for action in site.turn(nap, freeze) if isinstance(action, Dump)]


@given(st.lists(freezes, max_size=5))
def test_a_worker_that_does_not_beat_is_stuck_when_the_arbiter_was_awake_for_the_timeout(gaps: list[float]) -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", world)
        site = Site(world, well=False)
        for gap in gaps:
            assert site.turn(0.1, 0.0) == site.turn(0.0, gap) == []
        begin = site.clock.now
        while site.fleet.workers[1].state is State.READY:
            site.turn(0.1, 0.0)
        assert site.clock.now - begin <= 3.0 - 0.1 * len(gaps) + 0.2


@pytest.mark.parametrize(
    ("config", "events"),
    [
        pytest.param(Config(boot_timeout=3.0), [], id="boot"),
        pytest.param(Config(canary=3.0, timeout=0.0), [WorkerReady(1), ReloadAsked(), WorkerReady(2)], id="canary"),
        pytest.param(Config(graceful_timeout=3.0), [WorkerReady(1), WorkerLeaves(1)], id="drain"),
        pytest.param(Config(stop_timeout=3.0), [WorkerReady(1), StopAsked()], id="stop"),
        pytest.param(Config(shutdown_delay=3.0), [WorkerReady(1), StopAsked()], id="shutdown delay"),
    ],
)
def test_whatever_has_its_time_has_it_again(world: World, config: Config, events: list[Event]) -> None:
    site = Site(world, well=False)
    site.fleet = Fleet(config)
    for event in (Tick(), *events):
        site.feed(event)
    site.turn(0.5, 0.0)  # the pause before a successor boots is over
    due = next_deadline(site.fleet)
    assert due is not None
    left = site.clock.until(due)
    assert 0 < left <= 3.0 + KILL_GRACE
    assert site.turn(0.5, 100.0) == []
    assert next_deadline(site.fleet) == due
    assert site.clock.until(due) == left
