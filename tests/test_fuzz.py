"""A little of the differential fuzzing, and that it would notice: P2 to P10, W3, W13.

The rest is `tests/fuzz_differential.py` run by hand.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apphost.protocols.strict import Limits
from tests import fuzz_differential as fuzz
from tests.corpus import NEXT, bytewise
from tests.quick_driver import Hang

pytest.importorskip("httptools")
CASES = 800


@pytest.fixture(scope="module")
def maker() -> fuzz.Maker:
    return fuzz.Maker()


@pytest.fixture(scope="module")
def http(maker: fuzz.Maker) -> fuzz.Http:
    return fuzz.Http(maker)


@pytest.mark.parametrize("target", [kind.name for kind in fuzz.TARGETS])
def test_some_cases(target: str) -> None:
    """Each of them can be made again: `python -m tests.fuzz_differential --seed suite --target ... --case N`."""
    fuzzer = fuzz.Fuzzer("suite", target)
    for number in range(CASES // len(fuzz.TARGETS)):
        assert fuzzer.run(number) is None


LINES = st.one_of(st.sampled_from(fuzz._FIELDS), st.binary(max_size=12))
BODIES = st.one_of(
    st.sampled_from([b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"0\r\nX: y\r\n\r\n"]), st.binary(max_size=20)
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    line = b" ".join(draw(st.sampled_from(words)) for words in (fuzz._METHODS, fuzz._TARGETS, fuzz._VERSIONS))
    head = b"\r\n".join([line, b"Host: a", *draw(st.lists(LINES, max_size=4)), b"", b""])
    data = head + draw(BODIES) + NEXT
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.sampled_from(fuzz._SPICE)) + data[place + draw(st.integers(0, 2)) :]
    return data


@settings(max_examples=200, deadline=None)
@given(requests(), st.lists(st.integers(0, 400), max_size=6), st.randoms(use_true_random=False))
def test_any_request_in_any_pieces(http: fuzz.Http, data: bytes, places: list[int], rng: random.Random) -> None:
    """P2 to P10: h11, httptools and the oracle agree, and so do the whole, the bytes and any pieces."""
    places = sorted({0, len(data), *(place for place in places if place < len(data))})
    for pieces in ([data[a:b] for a, b in pairwise(places)], bytewise([data])[0]):
        assert http.check(data, pieces, rng) is None


# -- it would notice


class Wrong:
    """A parser with a fault."""

    def __init__(self, parser: Any, change: Any) -> None:
        self.parser = parser
        self.change = change

    def parse(self, head: bytes) -> Any:
        return self.change(self.parser.parse(head))


def hurt(monkeypatch: pytest.MonkeyPatch, http: fuzz.Http, change: Any, which: slice = slice(1)) -> None:
    for driver in http.drivers[which]:
        monkeypatch.setattr(driver, "parser", Wrong(driver.parser, change))


def drop_expect(headers: Any) -> Any:
    return [item for item in headers if item[0] != b"expect"]


EXPECTING = b"GET / HTTP/1.1\r\nHost: a\r\nExpect: y\r\n\r\n"


@pytest.mark.parametrize(("parsers", "kind"), [(slice(1), "parsers"), (slice(2), "oracle")])
def test_a_lenient_parser_is_noticed(
    monkeypatch: pytest.MonkeyPatch, http: fuzz.Http, parsers: slice, kind: str
) -> None:
    """One that differs from the other, and both when they err alike."""
    monkeypatch.setattr(http, "limits", (Limits(),))
    assert http.check(EXPECTING, [EXPECTING], random.Random(1)) is None
    hurt(monkeypatch, http, drop_expect, parsers)
    finding = http.check(EXPECTING, [EXPECTING], random.Random(1))
    assert finding is not None
    assert finding.kind == kind


def test_a_difference_between_whole_and_pieces_is_noticed(monkeypatch: pytest.MonkeyPatch, http: fuzz.Http) -> None:
    calls = iter(range(100))
    monkeypatch.setattr(http, "limits", (Limits(),))
    hurt(monkeypatch, http, lambda headers: headers if next(calls) < 2 else [*headers, (b"x", b"y")], slice(2))
    data = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    finding = http.check(data, bytewise([data])[0], random.Random(1))
    assert finding is not None
    assert finding.kind == "splits"


@pytest.mark.parametrize(("error", "kind"), [(Hang(), "hang"), (fuzz.Slow(), "slow"), (KeyError(1), "crash")])
def test_an_exception_is_a_finding(error: Exception, kind: str) -> None:
    def check() -> None:
        raise error

    finding = fuzz.guarded(check, "http")
    assert finding is not None
    assert finding.kind == kind


def test_a_finding_is_reduced() -> None:
    data = b"GET / HTTP/1.1\r\nHost: a\r\nX: evil\r\nY: z\r\n\r\n"
    assert fuzz.reduce(data, lambda shorter: b"ev" in shorter and b"Y" in shorter) == b"evY"


def test_a_case_is_the_same_each_time(maker: fuzz.Maker) -> None:
    for kind in fuzz.TARGETS:
        made = [kind(maker).make(random.Random(f"suite/{number}")) for number in (1, 1, 2)]
        assert made[0] == made[1]
