"""Time-outs on one timer, with the clock as an argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.protocols.deadlines import NEVER, RESOLUTION, Deadlines


class Item:
    def __init__(self, deadline: float = NEVER) -> None:
        self.deadline = deadline
        self.slot = 0


def test_due_and_not_due() -> None:
    deadlines: Deadlines[Item] = Deadlines()
    soon, late = Item(1.0), Item(50.0)
    for item in (soon, late):
        deadlines.watch(item)
    assert deadlines.due(0.99) == []
    assert deadlines.due(1.0 + RESOLUTION) == [soon]
    assert deadlines.due(49.0) == []
    assert deadlines.due(50.0 + RESOLUTION) == [late]
    assert deadlines.due(1000.0) == []


def test_a_deadline_that_moves_away_costs_nothing_and_is_seen() -> None:
    deadlines: Deadlines[Item] = Deadlines()
    item = Item(1.0)
    deadlines.watch(item)
    item.deadline = 10.0  # not told
    assert deadlines.due(2.0) == []
    assert deadlines.due(9.9) == []
    assert deadlines.due(10.3) == [item]


def test_a_deadline_that_moves_nearer_must_be_told() -> None:
    deadlines: Deadlines[Item] = Deadlines()
    item = Item(100.0)
    deadlines.watch(item)
    item.deadline = 3.0
    deadlines.watch(item)
    assert deadlines.due(3.3) == [item]
    assert deadlines.due(200.0) == []


def test_never() -> None:
    deadlines: Deadlines[Item] = Deadlines()
    idle, moved = Item(), Item(1.0)
    deadlines.watch(idle)
    deadlines.watch(moved)
    moved.deadline = NEVER
    assert deadlines.due(1e9) == []
    assert not deadlines.late(1e12)
    assert idle.slot == moved.slot == 0


def test_forgetting() -> None:
    deadlines: Deadlines[Item] = Deadlines()
    item, stranger = Item(1.0), Item(1.0)
    deadlines.watch(item)
    deadlines.forget(item)
    deadlines.forget(stranger)
    assert deadlines.due(10.0) == []
    deadlines.watch(item)
    assert deadlines.due(10.0) == [item]


@pytest.mark.parametrize("deadline", [0.0, 0.1, RESOLUTION, 1.0, 1e6])
def test_late_is_when_due_finds_it(deadline: float) -> None:
    deadlines: Deadlines[Item] = Deadlines()
    assert not deadlines.late(1e12)
    item = Item(deadline)
    deadlines.watch(item)
    assert not deadlines.late(deadline)
    assert deadlines.late(deadline + RESOLUTION)
    assert deadlines.due(deadline + RESOLUTION) == [item]
    assert not deadlines.late(1e12)


class Counted(Item):
    """One that counts how often its deadline is asked for."""

    looks = 0

    def __getattribute__(self, name: str) -> object:
        if name == "deadline":
            Counted.looks += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("count", [10, 10_000])
def test_a_tick_looks_at_nothing_that_is_not_due(count: int) -> None:
    """S10: what idle connections cost does not depend on how many there are."""
    deadlines: Deadlines[Item] = Deadlines()
    items = [Counted(75.0) for _ in range(count)]
    for item in items:
        deadlines.watch(item)
    Counted.looks = 0
    for tick in range(149):
        assert deadlines.due(tick / 2) == []
    assert Counted.looks == 0


def test_thousands_that_are_due_together_come_in_parts() -> None:
    deadlines: Deadlines[Item] = Deadlines()
    items = [Counted(1.0) for _ in range(1000)]
    stay = [Counted(1.0) for _ in range(500)]
    for item in (*items, *stay):
        deadlines.watch(item)
    for item in stay:
        item.deadline = 9.0
    found: list[Item] = []
    for rounds in range(1, 16):
        Counted.looks = 0
        found += deadlines.due(2.0, 100)
        assert Counted.looks <= 400
        assert deadlines.late(2.0) == (rounds < 15)
    assert sorted(map(id, found)) == sorted(map(id, items))
    assert deadlines.due(8.0) == []
    assert sorted(map(id, deadlines.due(9.25))) == sorted(map(id, stay))


TIMES = st.floats(0, 30)
STEPS = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 4), TIMES),
    st.tuples(st.just("never"), st.integers(0, 4), st.just(0.0)),
    st.tuples(st.just("forget"), st.integers(0, 4), st.just(0.0)),
    st.tuples(st.just("tick"), st.just(0), st.floats(0, 10)),
)


@given(st.lists(STEPS, max_size=40))
def test_against_a_naive_model(steps: list[tuple[str, int, float]]) -> None:
    """Nothing comes before its time, nothing later than the resolution allows, and nothing twice."""
    deadlines: Deadlines[Item] = Deadlines()
    items = [Item() for _ in range(5)]
    watched: set[Item] = set()
    now = 0.0
    for what, index, value in steps:
        item = items[index]
        if what == "tick":
            now += value
            due = deadlines.due(now)
            assert len(due) == len(set(due))
            must = {item for item in watched if item.deadline + RESOLUTION <= now}
            may = {item for item in watched if item.deadline <= now}
            assert must <= set(due) <= may
            watched -= set(due)
        elif what == "set":
            item.deadline = now + value
            deadlines.watch(item)
            watched.add(item)
        elif what == "never":
            item.deadline = NEVER
            watched.discard(item)
        else:
            deadlines.forget(item)
            watched.discard(item)
