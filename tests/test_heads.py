"""The reader of request heads: what it has seen before means the same, and is not examined again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apphost.protocols import heads, strict
from apphost.protocols.base import BadRequest, Headers, HeadParser
from apphost.protocols.h11_parser import H11Parser
from apphost.protocols.heads import HeadReader
from apphost.protocols.httptools_parser import HttptoolsParser
from apphost.protocols.strict import Limits
from tests.corpus import load_all
from tests.test_fuzz import requests

PARSERS: dict[str, HeadParser] = {"h11": H11Parser(), "httptools": HttptoolsParser()}
TAIL = b"HTTP/1.1\r\nHost: example.org\r\nCookie: a=1\r\n\r\n"


class Counting:
    """A parser that knows how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def parse(self, head: bytes) -> Headers:
        self.asked += 1
        return HttptoolsParser().parse(head)


def reader(parser: HeadParser | None = None, limits: Limits | None = None, underscores: str = "drop") -> HeadReader:
    return HeadReader(parser or HttptoolsParser(), limits or Limits(), underscores)


def outcome(reader: HeadReader, raw: bytes) -> object:
    """All attributes of the head, or the refusal."""
    try:
        head = reader.read(raw)
    except BadRequest as refusal:
        return refusal.status, refusal.why, refusal.fields
    names = [name for name in type(head).__slots__ if name != "fields"]
    return {name: getattr(head, name) for name in names}


def heads_of(data: bytes) -> list[bytes]:
    end = data.find(b"\r\n\r\n") + 4
    return [data[:end]] if end >= 4 else []


def test_what_was_said_twice_is_not_parsed_a_third_time() -> None:
    parser = Counting()
    known = reader(parser)
    for number in range(10):
        head = known.read(b"GET /%d?q=%d %b" % (number, number, TAIL))
        assert (head.method, head.target, head.version) == ("GET", b"/%d?q=%d" % (number, number), "1.1")
        assert (head.raw_path, head.query) == (b"/%d" % number, b"q=%d" % number)
        assert head.headers == [(b"host", b"example.org"), (b"cookie", b"a=1")]
    assert parser.asked == 2


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(TAIL.replace(b"1.1", b"1.0"), id="version"),
        pytest.param(TAIL.replace(b"example", b"other"), id="value"),
        pytest.param(TAIL.replace(b"Host", b"host"), id="case"),
        pytest.param(TAIL.replace(b"Host: ", b"Host:"), id="white space"),
        pytest.param(TAIL.replace(b"Cookie: ", b"Cookie:  "), id="white space before a value of its own"),
        pytest.param(TAIL.replace(b"a=1", b"a=1 "), id="white space behind one"),
        pytest.param(TAIL.replace(b"a=1", b""), id="none"),
    ],
)
def test_another_tail_is_another(other: bytes) -> None:
    parser = Counting()
    known = reader(parser)
    for _ in range(3):
        known.read(b"GET / " + TAIL)
    assert outcome(known, b"GET / " + other) == outcome(reader(), b"GET / " + other)
    assert parser.asked == 3


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("underscores", ["drop", "refuse", "allow"])
def test_the_corpus_means_the_same_each_time(name: str, underscores: str) -> None:
    """P2 to P10, S4"""
    parser = PARSERS[name]
    known = reader(parser, underscores=underscores)
    count = 0
    for case in load_all():
        for raw in heads_of(b"".join(case.segments)):
            wanted = outcome(reader(parser, underscores=underscores), raw)
            for _ in range(3):
                assert outcome(known, raw) == wanted
            count += 1
    assert count > 300


@settings(max_examples=60, deadline=None)
@given(st.lists(requests(), min_size=2, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=12))
def test_any_heads_in_any_order(datas: list[bytes], order: list[int]) -> None:
    """P2 to P10"""
    raws = [raw for data in datas for raw in heads_of(data)]
    for parser in PARSERS.values():
        known = reader(parser)
        for number in order:
            if raws:
                raw = raws[number % len(raws)]
                assert outcome(known, raw) == outcome(reader(parser), raw)


@pytest.mark.parametrize(
    ("beginning", "status"),
    [(b"GET /" + b"a" * 200 + b" ", 414), (b"CONNECT a:1 ", 501), (b"GET /#a ", 400), (b"G(T / ", 400),
     (b"GET  / ", 400), (b"GET * ", 400), (b"GET /\x80 ", 400)],
)  # fmt: skip
def test_the_request_line_is_examined_each_time(beginning: bytes, status: int) -> None:
    """P2, P3: also in front of what is known."""
    known = reader(limits=Limits(request_line=100))
    for _ in range(3):
        known.read(b"GET / " + TAIL)
    with pytest.raises(BadRequest) as refusal:
        known.read(beginning + TAIL)
    assert refusal.value.status == status


def test_only_a_get_asks_for_a_websocket() -> None:
    known = reader()
    tail = b"HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for _ in range(3):
        assert known.read(b"GET / " + tail).upgrade
        assert not known.read(b"POST / " + tail).upgrade


BROWSER = (
    b"HTTP/1.1\r\nX-Forwarded-For: %b\r\nHost: a\r\nCookie: %b\r\nAccept: */*\r\ncookie:%b\r\nX-Request-ID: %b\r\n\r\n"
)


def test_values_of_their_own_are_put_in_their_places() -> None:
    """Fields that say nothing to the server may be new in each request, and nothing is parsed for them."""
    parser = Counting()
    known = reader(parser)
    for number in range(20):
        values = [b"10.0.0.%d" % number, b"a=%d" % number, b"b=%d; c=\xff" % number, b"%032x" % number]
        head = known.read(b"GET / " + BROWSER % tuple(values))
        assert head.headers == [
            (b"x-forwarded-for", values[0]), (b"host", b"a"), (b"cookie", values[1]), (b"accept", b"*/*"),
            (b"cookie", values[2]), (b"x-request-id", values[3]),
        ]  # fmt: skip
        assert head.keep_alive
    assert parser.asked == 2


def test_requests_of_one_shape_do_not_share_their_fields() -> None:
    known = reader()
    tails = [BROWSER % (b"10.0.0.1", b"a=%d" % number, b"b", b"%d" % number) for number in range(4)]
    seen = [known.read(b"GET / " + tail) for tail in tails * 3]
    for number, head in enumerate(seen):
        assert head.headers[2] == (b"cookie", b"a=%d" % (number % 4))
        assert head.fields.headers == head.headers


@pytest.mark.parametrize("value", [b"a\0", b"a\x7f", b"a\rb", b"a\nb", b"a\n b", b"a\r\n b", b"\0"])
def test_values_of_their_own_are_checked(value: bytes) -> None:
    """S1: also where everything else is known."""
    known = reader()
    good = (b"10.0.0.1", b"a=1", b"b=2", b"1")
    for _ in range(5):
        known.read(b"GET / " + BROWSER % good)
    for place in range(4):
        values = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(BadRequest) as refusal:
            known.read(b"GET / " + BROWSER % tuple(values))
        assert refusal.value.status == 400


def test_no_field_of_its_own_means_anything_to_the_server() -> None:
    for name in heads.OWN_FIELDS:
        for value in (b"close", b"chunked", b"100-continue", b"5", b"websocket"):
            headers = [(b"host", b"a"), (name.lower().encode(), value), (name.lower().encode(), value)]
            fields = strict.examine_fields(headers, "1.1")
            assert fields.headers == headers
            assert (fields.keep_alive, fields.chunked, fields.expect, fields.asks) == (True, False, False, False)
            assert fields.content_length is None


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"Host: a", b"host: b", b"Cookie: x", b"Cookie: ", b"Cookie:", b"Cookie:y", b"cookie:  z", b"Cookie: z ",
             b"COOKIE: a b\tc", b"Referer: \0", b"Cookie: \0", b"User-Agent: b", b"user_agent: c", b"X_Under: 1",
             b" folded", b"Connection: close", b"Content-Length: 3", b"Content-Length: 4", b"Expect: 100-continue",
             b"Transfer-Encoding: chunked",
             b"X-Request-Id: \xe9", b"X-Request-Id : 1", b"Cookie", b"Cookie: a\nHost: b", b"Cookie: a\r", b"", b"\0"]
        ),
        st.builds(
            lambda name, value: name.encode() + b": " + value,
            st.sampled_from(heads.OWN_FIELDS),
            st.binary(max_size=4),
        ),
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=16))
def test_shapes_that_are_nearly_the_same(shapes: list[list[bytes]], order: list[int]) -> None:
    """P2 to P10, S1, S4: what is known of other heads never shows."""
    raws = [raw for lines in shapes for raw in heads_of(b"\r\n".join([b"GET / HTTP/1.1", *lines, b"", b""]))]
    for underscores in ("drop", "refuse", "allow"):
        known = reader(underscores=underscores)
        for number in order:
            raw = raws[number % len(raws)]
            assert outcome(known, raw) == outcome(reader(underscores=underscores), raw)


def test_what_it_keeps_is_bounded() -> None:
    """S6: clients that never say the same again leave numbers behind, others a bounded number of heads."""
    known = reader()
    for number in range(3 * heads.SEEN_MAX):
        known.read(b"GET / HTTP/1.1\r\nHost: a\r\nX: %d\r\n\r\n" % number)
    assert known._tails.known == known._shapes.known == {}
    assert len(known._shapes._seen) <= heads.SEEN_MAX
    for number in range(3 * heads.SEEN_MAX):
        known.read(b"GET / HTTP/1.1\r\nHost: a\r\nCookie: %d\r\n\r\n" % number)
    assert (len(known._tails.known), len(known._shapes.known)) == (0, 1)
    assert len(known._tails._seen) <= heads.SEEN_MAX
    for number in range(3 * heads.KNOWN_MAX):
        for _ in range(4):
            known.read(b"GET / HTTP/1.1\r\nHost: a\r\nY: %d\r\n\r\n" % number)
    assert 0 < len(known._tails.known) <= heads.KNOWN_MAX
    assert 0 < len(known._shapes.known) <= heads.KNOWN_MAX
    long = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * heads.TAIL_MAX + b"\r\n\r\n"
    for _ in range(5):
        known.read(long)
    for keys in (known._tails.known, known._shapes.known):
        assert not any(len(key) > heads.TAIL_MAX for key in keys)
