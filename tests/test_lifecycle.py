"""The life of a worker. The table below is written a second time on purpose: it is what both ends were built for."""

from __future__ import annotations

import itertools

import pytest

from apphost.lifecycle import TRANSITIONS, State, allowed

# rows: from, columns: to;  "=" staying, "+" allowed, "-" not
TABLE = """
            booting  ready  draining  gone
booting        =       +       +       +
ready          -       =       +       +
draining       -       -       =       +
gone           -       -       -       =
"""


def cells() -> list[tuple[State, State, str]]:
    header, *rows = (line.split() for line in TABLE.strip().splitlines())
    return [(State(row[0]), State(to), cell) for row in rows for to, cell in zip(header, row[1:], strict=True)]


@pytest.mark.parametrize(("old", "new", "cell"), cells())
def test_each_move(old: State, new: State, cell: str) -> None:
    assert allowed(old, new) is (cell != "-")
    assert (new in TRANSITIONS[old]) is (cell == "+")


def test_the_table_names_every_state_and_every_pair_once() -> None:
    assert set(TRANSITIONS) == set(State)
    assert sorted((a.value, b.value) for a, b, _ in cells()) == sorted(
        (a.value, b.value) for a, b in itertools.product(State, State)
    )


def test_life_goes_one_way() -> None:
    order = list(State)
    for old, nexts in TRANSITIONS.items():
        assert all(order.index(new) > order.index(old) for new in nexts)


def test_every_state_but_the_last_can_end_at_once_and_only_a_booting_worker_gets_ready() -> None:
    assert {old for old in State if State.GONE in TRANSITIONS[old]} == set(State) - {State.GONE}
    assert {old for old in State if State.READY in TRANSITIONS[old]} == {State.BOOTING}
    assert {old for old in State if State.BOOTING in TRANSITIONS[old]} == set()


def test_the_words_of_messages_and_status() -> None:
    assert [state.value for state in State] == ["booting", "ready", "draining", "gone"]
