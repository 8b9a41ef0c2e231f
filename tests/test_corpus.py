"""The request corpus on every parser: P1 to P14, H2 to H6, H8, H13, R1 to R5, R8, R9, S12 to S14, known security bugs.

What a case covers stands in its file under `tests/data/`; its README explains the format.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import (
    NEXT,
    SMUGGLED,
    Case,
    CorpusError,
    Expected,
    Outcome,
    Row,
    bytewise,
    cut,
    load_all,
    load_sweep,
    problems,
    unescape,
    whole,
)
from tests.corpus_driver import Driver, driving, read_responses
from tests.corpus_oracle import judge
from tests.quick_driver import QuickDriver

CASES = load_all()
SWEEP = load_sweep()
PARSERS = [name for name in ("h11", "h11 documented", "httptools") if find_spec(name.split()[0])]
ROUNDS = 40  # of invented requests
INVENTED = 60  # requests a round

COVERED = """
    H2 H3 H4 H5 H6 H8 H13 R1 R2 R3 R5 R8 R9 S12 S13 S14 P1 P2 P3 P4 P5 P6 P7 P8 P9 P10 P11 P12 P13 P14 G3
    CVE-2024-1135 CVE-2024-6827 gunicorn#3047 gunicorn#3144 gunicorn#3382 gunicorn#3366 gunicorn#3556 gunicorn-25.3
    CVE-2019-16785 CVE-2019-16786 CVE-2019-16789 CVE-2019-16792 CVE-2020-5236 CVE-2022-24761 CVE-2024-49768
    CVE-2020-7694 CVE-2020-7695 uvicorn#2824 uvicorn#2238 uvicorn-garden-45 CVE-2025-43859 h11-0.15 hypercorn#277 h2c
    CVE-2026-44546 daphne#497 CVE-2015-0219 CVE-2020-10108 CVE-2020-10109 CVE-2022-24801 CVE-2023-46137 CVE-2024-41671
    CVE-2022-32213 CVE-2022-32214 CVE-2022-32215 CVE-2022-35256 CVE-2023-30589 CVE-2024-27982 CVE-2023-47627
    CVE-2023-49081 CVE-2023-49082 CVE-2024-52304 CVE-2025-53643 CVE-2024-21647 CVE-2023-40175 CVE-2024-37890 http-garden
""".split()  # noqa: SIM905  # sixty quoted strings say less


@pytest.fixture(scope="module")
def drivers() -> Iterator[list[Driver]]:
    with ExitStack() as stack:
        yield [stack.enter_context(driving(parser)) for parser in PARSERS]


def run(drivers: list[Driver], case: Case, pieces: list[list[bytes]]) -> Outcome:
    """Feed `case` to each parser; the outcomes must be right and the same."""
    outcomes = [driver.run_case(pieces, app=case.app, eof=case.eof, max_body=case.max_body) for driver in drivers]
    for name, outcome in zip(PARSERS, outcomes, strict=True):
        assert outcome.comparable() == outcomes[0].comparable(), f"{case.id}: {name} and {PARSERS[0]} differ"
        assert problems(case, outcome) == [], f"{case.id} with {name}, fed {case.fed()!r:.1000}"
    return outcomes[0]


# -- the corpus itself


def test_corpus_covers_what_it_must() -> None:
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids)) >= 250
    covered = {item for case in CASES for item in case.covers}
    assert sorted(set(COVERED) - covered) == []


def test_sweep_is_wide() -> None:
    mutations = [name for row in SWEEP for name, _ in row.fields()]
    assert len(mutations) == len(set(mutations)) >= 300
    for kind in ("te", "cl", "ex"):
        assert {row.verdict for row in SWEEP if row.kind == kind} >= {"400"}
    assert all(row.why for row in SWEEP)


@pytest.mark.parametrize("text", ["\\q", "\\", "a\\x4"])
def test_unknown_escapes_are_errors(text: str) -> None:
    with pytest.raises(CorpusError):
        unescape(text)


def test_oracle_agrees_with_the_corpus() -> None:
    """Two readings of the rules, a table and a program: where they differ one of them is wrong."""
    swept = [case for row in SWEEP for case in row.cases()]
    for case in [*CASES, *swept]:
        if case.app == "early":
            continue  # what happens to an unread body is the server's choice, not the bytes'
        verdict = judge(b"".join(case.fed()), case.max_body)
        served = [(r.method.decode(), r.target, r.version.decode(), r.body) for r in verdict.served]
        wanted = [(e.method, e.target, e.version, e.body) for e in case.accepts]
        if case.end == "open":
            wanted.append(("GET", b"/next", "1.1", b""))
        assert served == wanted, case.id
        assert not case.statuses or case.statuses & verdict.statuses, (case.id, verdict.statuses)
        assert case.statuses or verdict.unsure or not verdict.statuses, (case.id, verdict.statuses)
        assert (case.partial is not None) == (verdict.started is not None), case.id


# -- the cases


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_case(drivers: list[Driver], case: Case) -> None:
    """Fed whole, byte by byte, and in random pieces."""
    segments = case.fed()
    run(drivers, case, whole(segments))
    run(drivers, case, bytewise(segments))
    for seed in range(3):
        run(drivers, case, cut(segments, f"{case.id} {seed}"))


QUICK = [name for name in PARSERS if name != "h11 documented"]


@pytest.fixture(scope="module")
def quick_drivers() -> list[QuickDriver]:
    return [QuickDriver(parser) for parser in QUICK]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.kind}-{row.id}") for row in SWEEP])
def test_sweep(drivers: list[Driver], quick_drivers: list[QuickDriver], row: Row) -> None:
    """P2 P3 P4 P5: every mutation is fed whole, byte by byte and in random pieces; with the event loop and ASGI around
    the connection one in seven of each row, and every lone one."""
    for number, case in enumerate(row.cases()):
        segments = case.fed()
        if not row.values or number % 7 == 0:
            run(drivers, case, whole(segments))
        for pieces in (whole(segments), bytewise(segments), cut(segments, case.id)):
            outcomes = [driver.run_case(pieces) for driver in quick_drivers]
            for name, outcome in zip(QUICK, outcomes, strict=True):
                assert outcome.comparable() == outcomes[0].comparable(), f"{case.id}: {name} and {QUICK[0]} differ"
                assert problems(case, outcome) == [], f"{case.id} with {name}, fed {case.fed()!r:.1000}"


def test_the_quick_driver_sees_the_same(quick_drivers: list[QuickDriver]) -> None:
    """What it leaves out makes no difference."""
    for case in CASES:
        if case.app != "echo":
            continue
        pieces = cut(case.fed(), case.id)
        for quick in quick_drivers:
            assert problems(case, quick.run_case(pieces, eof=case.eof, max_body=case.max_body)) == [], case.id


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_cut_of_any_cases(drivers: list[Driver], data: st.DataObject) -> None:
    """Connection after connection on the same parsers, as in a worker: nothing is carried over, wherever the cuts."""
    for case in data.draw(st.lists(st.sampled_from(CASES), min_size=1, max_size=4)):
        pieces = []
        for segment in case.fed():
            places = sorted(data.draw(st.sets(st.integers(0, len(segment)), max_size=12)))
            pieces.append([segment[a:b] for a, b in zip([0, *places], [*places, len(segment)], strict=True)])
        run(drivers, case, pieces)


def test_parsers_carry_nothing_over(drivers: list[Driver]) -> None:
    """Every case leaves the parsers in order for the plainest of requests on another connection."""
    plain = Case("plain", (b"GET /plain HTTP/1.1\r\nHost: a\r\n\r\n",), (Expected("GET", b"/plain", "1.1"),))
    for case in CASES:
        for driver in drivers:
            driver.run_case(whole(case.segments), app=case.app, eof=case.eof, max_body=case.max_body)
        run(drivers, plain, whole(plain.fed()))


def test_more_pipelined_than_is_buffered(drivers: list[Driver]) -> None:
    """S14: reading pauses while 4000 requests wait, and each is answered in its turn."""
    count = 4000
    data = b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(count))
    case = Case("many", (data,), tuple(Expected("GET", b"/%d" % number, "1.1") for number in range(count)))
    run(drivers, case, [[data[start : start + 7001] for start in range(0, len(data), 7001)], [NEXT]])


# -- requests that nobody has written


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_invented_requests(drivers: list[Driver], seed: int) -> None:
    """Mixtures and mutations of the cases: the server must find in them what the oracle finds."""
    rng = random.Random(seed)
    for _ in range(INVENTED):
        data = invent(rng)
        verdict = judge(data)
        pieces = rng.choice([whole([data]), bytewise([data]), cut([data], seed)])
        outcomes = [driver.run_case(pieces) for driver in drivers]
        for name, outcome in zip(PARSERS, outcomes, strict=True):
            where = f"{name}, pieces {pieces!r:.2000}"
            assert outcome.comparable() == outcomes[0].comparable(), where
            assert outcome.fault == "", where
            served = [
                (r.method.encode(), r.target, r.version.encode(), r.headers, r.body)
                for r in outcome.requests
                if r.complete
            ]
            wanted = [(r.method, plain_target(r.target), r.version, r.fields, r.body) for r in verdict.served]
            assert served == wanted, where
            refusals = outcome.statuses[len(served) :]
            assert outcome.statuses[: len(served)] == [200] * len(served), where
            assert len(refusals) <= 1, where
            assert set(refusals) <= verdict.statuses, (where, verdict.statuses)
            assert refusals or verdict.unsure or not verdict.statuses, (where, verdict.statuses)
            assert outcome.closed == (verdict.closed or bool(refusals)), where


def plain_target(target: bytes) -> bytes:
    """A target as a scope can tell it: without the question mark of an empty query."""
    path, _, query = target.partition(b"?")
    return path + b"?" + query if query else path


_SHORT = [
    b"".join(case.segments)
    for case in CASES
    if not case.max_body and case.app != "early" and not case.eof and len(case.data) < 600
]
_SPICE = [
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"0",
    b"\x00",
    b"\x0b",
    b"\x85",
    b"\xa0",
    b"\xff",
    b"_",
    b"-",
    b"\r\n\r\n",
]


def invent(rng: random.Random) -> bytes:
    """A request nobody has thought of: lines of some cases mixed, then a few bytes changed."""
    data = rng.choice(_SHORT)
    if rng.random() < 0.5:
        lines, more = data.split(b"\r\n"), rng.choice(_SHORT).split(b"\r\n")
        place = rng.randrange(len(lines) + 1)
        if rng.random() < 0.7:
            lines[place:place] = rng.sample(more, min(len(more), rng.randint(1, 3)))
        else:
            lines[place:] = more[rng.randrange(len(more)) :]
        data = b"\r\n".join(lines)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        place = rng.randrange(len(data) + 1)
        spice = rng.choice(_SPICE) if rng.random() < 0.7 else bytes([rng.randrange(256)])
        data = data[:place] + spice + data[place + rng.randrange(3) :]
    data = data if rng.random() < 0.3 else data + NEXT
    return data.replace(b"websocket", b"websocke_")  # an upgrade to it is another protocol's business


# -- the tools


GOOD = b"HTTP/1.1 200 OK\r\ndate: x\r\n"


@pytest.mark.parametrize(
    "wire",
    [
        GOOD + b"content-length: 2\r\n\r\na",
        GOOD + b"content-length: 1\r\n\r\nab",
        GOOD + b"content-length: 1\r\ncontent-length: 1\r\n\r\na",
        GOOD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\na",
        GOOD + b"content-length: +1\r\n\r\na",
        GOOD + b"\r\nbody until the end",
        GOOD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n",
        GOOD + b"transfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        GOOD + b"transfer-encoding: gzip\r\n\r\n",
        GOOD + b"x: a\nb: c\r\ncontent-length: 0\r\n\r\n",
        GOOD + b"x : a\r\ncontent-length: 0\r\n\r\n",
        GOOD + b"content-length: 0\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 20 OK\r\ndate: x\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1  200 OK\r\ndate: x\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_reader_refuses_bad_responses(wire: bytes) -> None:
    with pytest.raises(ValueError, match=r"respon|chunk"):
        read_responses(wire, ["GET"], closed=False)


def test_reader_reads_good_responses() -> None:
    wire = (
        b"HTTP/1.1 100 Continue\r\n\r\n"
        + GOOD
        + b"Content-Length: 2\r\n\r\nab"
        + GOOD
        + b"content-length: 9\r\n\r\n"
        + GOOD
        + b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        + GOOD
        + b"\r\nto the end"
    )
    responses, interim = read_responses(wire, ["GET", "HEAD", "GET"], closed=True)
    assert [response.body for response in responses] == [b"ab", b"", b"abc", b"to the end"]
    assert interim == 1


def test_judge_of_outcomes_sees_faults(drivers: list[Driver]) -> None:
    """The other way round: a wrong expectation is noticed, whichever part of it is wrong."""
    data = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab"
    good = Expected("POST", b"/a", "1.1", ((b"host", (b"a",)),), b"ab")
    case = Case("good", (data,), (good,))
    run(drivers, case, whole(case.fed()))
    wrong = [
        Case("method", (data,), (Expected("PUT", b"/a", "1.1", body=b"ab"),)),
        Case("target", (data,), (Expected("POST", b"/b", "1.1", body=b"ab"),)),
        Case("body", (data,), (Expected("POST", b"/a", "1.1", body=b"abc"),)),
        Case("header", (data,), (Expected("POST", b"/a", "1.1", ((b"host", ()),), b"ab"),)),
        Case("too few", (data,), ()),
        Case("too many", (data,), (good, good)),
        Case("refused", (data,), (), statuses=frozenset({400}), end="closed"),
        Case("closed", (data,), (good,), end="closed"),
        Case("waits", (data,), (), partial=good, end="wait"),
    ]
    for other in wrong:
        assert problems(other, drivers[0].run_case(whole(other.fed()))), other.id
    smuggling = Case("smuggling", (data + SMUGGLED,), (good,))
    assert "GET /smuggled reached the application" in problems(smuggling, drivers[0].run_case(whole(smuggling.fed())))
