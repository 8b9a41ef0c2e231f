"""The rule by which new code is judged on its probation: a table of cases, and what must hold for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.arbiter.canary import ANSWERS_MIN, ERRORS_MIN, MARGIN, Answers, fails

HEALTHY = Answers(1000, 0)
SILENT = Answers(0, 0)


@pytest.mark.parametrize(
    ("new", "old", "failed"),
    [
        pytest.param(SILENT, HEALTHY, False, id="no traffic reaches it: nothing is known"),
        pytest.param(SILENT, SILENT, False, id="no traffic at all"),
        pytest.param(Answers(200, 0), HEALTHY, False, id="it is as good as the old code"),
        pytest.param(Answers(200, 0), Answers(100, 100), False, id="it mends what was broken"),
        pytest.param(Answers(200, 1), HEALTHY, False, id="a single bad answer decides nothing"),
        pytest.param(Answers(19, 19), HEALTHY, False, id="all bad, but too few answers"),
        pytest.param(Answers(20, 20), HEALTHY, True, id="all bad, and enough answers"),
        pytest.param(Answers(20, 2), HEALTHY, False, id="a tenth is bad, but too few of them"),
        pytest.param(Answers(20, 3), HEALTHY, True, id="a few bad ones are enough where the old code has none"),
        pytest.param(Answers(60, 3), HEALTHY, False, id="exactly the margin is no failure"),
        pytest.param(Answers(59, 3), HEALTHY, True, id="just beyond the margin"),
        pytest.param(Answers(20, 20), SILENT, True, id="the old code had no traffic to compare with"),
        pytest.param(Answers(100, 20), Answers(100, 10), False, id="twice the errors of code that always has some"),
        pytest.param(Answers(100, 25), Answers(100, 10), False, id="twice and the margin"),
        pytest.param(Answers(100, 26), Answers(100, 10), True, id="more than twice and the margin"),
        pytest.param(Answers(100, 100), Answers(100, 50), False, id="where half was bad nothing can be told"),
        pytest.param(Answers(100, 100), Answers(100, 47), True, id="all bad where nearly half was"),
    ],
)
def test_the_rule(new: Answers, old: Answers, failed: bool) -> None:
    assert fails(new, old) is failed


def test_the_share_of_no_answers_is_no_error() -> None:
    assert SILENT.share == 0.0
    assert Answers(8, 2).share == 0.25


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    """Most often in the numbers in which the rule changes its mind."""
    total = draw(st.integers(0, 3 * ANSWERS_MIN) | st.integers(0, 10**6))
    few = st.integers(0, min(total, 2 * ERRORS_MIN))
    return Answers(total, draw(few | st.integers(0, total)))


@given(new=answers(), old=answers())
def test_one_more_bad_answer_never_clears_a_canary(new: Answers, old: Answers) -> None:
    if fails(new, old):
        assert fails(Answers(new.all + 1, new.errors + 1), old)
        assert fails(Answers(new.all, new.all), old), "all of them bad is no better"


@given(new=answers(), old=answers(), good=st.integers(1, 100))
def test_good_answers_never_fail_a_canary_that_was_judged(new: Answers, old: Answers, good: int) -> None:
    if new.all >= ANSWERS_MIN and not fails(new, old):
        assert not fails(Answers(new.all + good, new.errors), old)


@given(new=answers(), old=answers())
def test_an_error_of_old_code_never_fails_a_canary(new: Answers, old: Answers) -> None:
    if not fails(new, old):
        assert not fails(new, Answers(old.all + 1, old.errors + 1))
        assert not fails(new, Answers(max(old.all, 1), max(old.all, 1)))


@given(new=answers(), old=answers(), good=st.integers(1, 100))
def test_good_answers_of_old_code_never_clear_a_canary(new: Answers, old: Answers, good: int) -> None:
    if fails(new, old):
        assert fails(new, Answers(old.all + good, old.errors))


@given(new=answers(), old=answers())
def test_a_canary_no_worse_than_old_code_never_fails(new: Answers, old: Answers) -> None:
    if new.share <= old.share:
        assert not fails(new, old)


@given(new=answers(), old=answers())
def test_no_judgement_without_evidence(new: Answers, old: Answers) -> None:
    if fails(new, old):
        assert new.all >= ANSWERS_MIN
        assert new.errors >= ERRORS_MIN
        assert new.share > MARGIN


@given(old=answers())
def test_a_canary_that_only_fails_is_given_up_after_the_fewest_answers_unless_old_code_is_as_bad(old: Answers) -> None:
    broken = Answers(ANSWERS_MIN, ANSWERS_MIN)
    assert fails(broken, old) == (2 * old.share + MARGIN < 1.0)
