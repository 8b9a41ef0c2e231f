"""What `status` tells of the past, and what a waiting client is told of a generation."""

from __future__ import annotations

import json

import pytest

from apphost.arbiter.history import DETAIL_MAX, ENDS_MAX, OUTCOMES_MAX, History
from apphost.arbiter.processes import Failure


def test_outcomes() -> None:
    history = History(1.0)
    assert history.outcome(1, target=1) is None
    history.note_complete(1, 5.0, "serving")
    assert history.outcome(1, target=1) == {"outcome": "complete", "generation": 1, "at": 5.0, "text": "serving"}
    history.note_given_up(2, 6.0, "given up", Failure("it raised", "Traceback", 3))
    known = history.outcome(2, target=1)
    assert known is not None
    assert (known["outcome"], known["reason"], known["detail"]) == ("given up", "it raised", "Traceback")
    assert history.given_up == known
    assert history.outcome(3, target=3) is None
    superseded = history.outcome(3, target=4)
    assert superseded is not None
    assert (superseded["outcome"], superseded["by"]) == ("superseded", 4)
    assert history.outcome(2, target=4) == known, "that it was given up is known better"
    assert history.outcome(5, target=4) is None, "it waits for its turn"
    history.note_complete(4, 7.0, "serving")
    assert history.given_up is None
    history.note_given_up(5, 8.0, "given up", None)
    assert history.given_up is not None
    assert history.given_up["reason"] == "it could not boot"


def test_a_generation_that_shows_a_failure_is_no_success() -> None:
    """Development mode: the page that says why is served by a generation of its own."""
    history = History(1.0)
    history.note_complete(1, 5.0, "serving")
    history.note_given_up(2, 6.0, "given up", Failure("it raised", "Traceback", 3))
    history.note_stand_in(3)
    assert history.given_up is not None
    assert history.outcome(3, target=3) == history.given_up, "who waits for the newest is told the same"
    history.note_complete(4, 7.0, "serving")
    assert history.given_up is None
    assert history.reloads == {"given up": 1, "complete": 1}, "and nothing was superseded"


def test_it_is_bounded() -> None:
    history = History(1.0)
    for number in range(1, 100):
        history.note_complete(number, 1.0, "")
        history.note_end({"worker": number, "detail": "x" * 10 * DETAIL_MAX}, "crashed")
    wire = history.to_wire()
    assert [each["generation"] for each in wire["outcomes"]] == list(range(100 - OUTCOMES_MAX, 100))
    assert len(wire["ends"]) == ENDS_MAX
    assert wire["replaced"] == {"crashed": 99}
    assert len(json.dumps(wire)) < (ENDS_MAX + 1) * (DETAIL_MAX + 500)


def test_it_goes_along_in_an_upgrade() -> None:
    history = History(1.5)
    history.note_complete(1, 5.0, "serving")
    history.note_given_up(2, 6.0, "given up", Failure("it raised", "Traceback", 3))
    history.note_end({"at": 1.0, "worker": 1, "detail": ""}, "reload")
    again = History.from_wire(json.loads(json.dumps(history.to_wire())), 100.0)
    assert again.to_wire() == history.to_wire()
    assert again.started == 1.5


@pytest.mark.parametrize("wire", [{}, {"started": "x"}, {"ends": 5}, {"outcomes": [{}]}, {"replaced": [1]}])
def test_what_another_version_left_is_no_error(wire: dict[str, object]) -> None:
    history = History.from_wire(wire, 100.0)
    assert history.started == 100.0
    assert history.to_wire()["ends"] == []
