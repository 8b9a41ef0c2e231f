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
def test_due_is_never_early_and_late_by_the_resolution_at_most(deadline: float) -> None:
    deadlines: Deadlines[Item] = Deadlines()
    item = Item(deadline)
    deadlines.watch(item)
    assert deadlines.due(deadline - 0.001) == []
    assert deadlines.due(deadline + RESOLUTION) == [item]


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
