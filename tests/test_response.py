"""The head of a response: S3 to S5, S7 to S12, and the framing decided as a table."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.protocols import strict
from apphost.protocols.base import RequestHead, ResponseError
from apphost.protocols.exchange import Exchange
from apphost.protocols.response import (
    Framing,
    ResponseHead,
    ServerFields,
    custom_status_line,
    decide_framing,
    error_response,
    finish_head,
    status_line,
    wrong_length,
)

LENGTH, CHUNKED, CLOSE, NONE = Framing.LENGTH, Framing.CHUNKED, Framing.CLOSE, Framing.NONE


def finished(
    status: int = 200,
    headers: Any = (),
    *,
    modern: bool = True,
    known: int | None = None,
    keep_alive: bool = True,
    extra: bytes = b"",
) -> list[bytes]:
    """The lines of a whole head, without CRLF and without the empty line."""
    head = ResponseHead(status, headers)
    text = finish_head(head, decide_framing(modern, head, known), modern, known, keep_alive, extra)
    assert text.endswith(b"\r\n\r\n")
    return text[:-4].split(b"\r\n")


def test_an_upgrade_field_is_named_in_connection() -> None:
    """RFC 9110, 7.8: as in a 426, beside what else Connection has to say."""
    field = [(b"Upgrade", b"websocket")]
    for modern, keep_alive, line in (
        (True, True, b"upgrade"), (True, False, b"close, upgrade"), (False, True, b"keep-alive, upgrade"),
    ):  # fmt: skip
        lines = finished(426, field, modern=modern, known=0, keep_alive=keep_alive)
        assert b"connection: " + line in lines
        assert b"Upgrade: websocket" in lines


# -- framing: status, declared length, version, size of a body that is known at once

TABLE = """
    status  declared  version  known  framing
    200     -         1.1      -      CHUNKED
    200     -         1.0      -      CLOSE
    200     -         1.1      5      LENGTH
    200     -         1.0      5      LENGTH
    200     -         1.1      0      LENGTH
    200     5         1.1      -      LENGTH
    200     5         1.0      -      LENGTH
    200     5         1.1      5      LENGTH
    200     0         1.1      -      LENGTH
    404     -         1.1      -      CHUNKED
    999     -         1.1      -      CHUNKED
    205     -         1.1      0      LENGTH
    204     -         1.1      -      NONE
    204     5         1.0      5      NONE
    304     -         1.1      5      NONE
    304     5         1.1      -      NONE
    100     -         1.1      -      NONE
    103     5         1.1      5      NONE
    199     -         1.0      -      NONE
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()[1:]]


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_framing(row: list[str]) -> None:
    """S5 S8: and what of it is said in the head."""
    status, declared, version, known, framing = row
    modern, length = version == "1.1", None if known == "-" else int(known)
    headers = [] if declared == "-" else [(b"content-length", declared.encode())]
    assert decide_framing(modern, ResponseHead(int(status), headers), length) is Framing[framing]
    lines = finished(int(status), headers, modern=modern, known=length)[1:]
    lengths = [line for line in lines if line.startswith(b"content-length")]
    assert (b"transfer-encoding: chunked" in lines) is (framing == "CHUNKED")
    if framing == "LENGTH":
        assert lengths == [b"content-length: %d" % int(declared if declared != "-" else known)]
    elif status == "304" and declared != "-":
        assert lengths == [b"content-length: 5"]
    else:
        assert lengths == []


@given(st.integers(100, 999), st.booleans(), st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
def test_framing_is_never_told_twice(status: int, modern: bool, declared: int | None, known: int | None) -> None:
    """S4 S5 S8"""
    headers = [(b"transfer-encoding", b"chunked")]
    if declared is not None:
        headers.append((b"content-length", b"%d" % declared))
    told = [
        line
        for line in finished(status, headers, modern=modern, known=known)
        if b"chunked" in line or b"length" in line
    ]
    assert len(told) <= 1
    assert modern or b"transfer-encoding: chunked" not in told
    if status < 200 or status == 204:
        assert told == []


# -- lines


def test_order_and_duplicates() -> None:
    """S3: as the application gave them, with its spelling; framing and our own behind."""
    headers = [(b"Set-Cookie", b"a"), [b"x-a", b""], (b"set-cookie", b"b"), (b"X-8", b"\x80\xff\t")]
    assert finished(200, headers, known=1, extra=b"date: d\r\nserver: s\r\n") == [
        *[b"HTTP/1.1 200 OK", b"Set-Cookie: a", b"x-a: ", b"set-cookie: b", b"X-8: \x80\xff\t"],
        *[b"content-length: 1", b"date: d", b"server: s"],
    ]


def test_a_declared_length_keeps_its_place() -> None:
    """S3"""
    assert finished(200, [(b"a", b"1"), (b"Content-Length", b"5"), (b"b", b"2")])[1:] == [
        b"a: 1",
        b"Content-Length: 5",
        b"b: 2",
    ]


@pytest.mark.parametrize(
    ("modern", "keep_alive", "lines"),
    [(True, True, []), (True, False, [b"connection: close"]), (False, True, [b"connection: keep-alive"]),
     (False, False, [b"connection: close"])],
)  # fmt: skip
def test_connection(modern: bool, keep_alive: bool, lines: list[bytes]) -> None:
    """S12: ours alone; what the application says of it is a wish."""
    found = finished(200, [(b"Connection", b"x-mine")], modern=modern, known=0, keep_alive=keep_alive)
    assert [line for line in found if line.lower().startswith(b"connection")] == lines


@pytest.mark.parametrize(
    ("value", "close"), [(b"close", True), (b"a, CLOSE", True), (b"keep-alive", False), (b"", False)]
)
def test_the_application_may_close(value: bytes, close: bool) -> None:
    """S12"""
    assert ResponseHead(200, [(b"connection", value)]).close is close


@pytest.mark.parametrize("name", [b"transfer-encoding", b"Transfer-Encoding", b"TRANSFER-ENCODING"])
def test_transfer_encoding_is_dropped(name: bytes) -> None:
    """S4"""
    assert finished(200, [(name, b"gzip, chunked")], known=3)[1:] == [b"content-length: 3"]


BAD_NAMES = [
    b"",
    b" ",
    b":",
    b":a",
    b"a:",
    b"a b",
    b" a",
    b"a ",
    b"a\r",
    b"a\n",
    b"a\0",
    b"a\t",
    b"\x80",
    b"(a)",
    b"a\r\nb: c",
]
BAD_VALUES = [b"\r", b"\n", b"\0", b"a\r\nb: c", b"a\nb: c", b"a\rb", b"\r\n", b"\r\n\r\n", b"a\0", b"a\r\n",
              *(bytes([code]) for code in (*range(9), *range(11, 32), 127))]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: bytes) -> None:
    """S10: each time, not only the first."""
    for _ in range(2):
        with pytest.raises(ValueError, match="header name"):
            ResponseHead(200, [(b"good", b"1"), (name, b"value")])


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("name", [b"x", b"connection", b"transfer-encoding", b"date", b"server", b"content-length"])
def test_bad_values(name: bytes, value: bytes) -> None:
    """S10: also in what is not sent."""
    for status in (200, 204):
        with pytest.raises(ValueError, match=r"CR, LF or NUL|Content-Length"):
            ResponseHead(status, [(name, value), (b"good", b"1")])


@given(st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=12)), max_size=4))
def test_no_header_makes_more_than_its_line(headers: list[tuple[bytes, bytes]]) -> None:
    """S10"""
    try:
        lines = finished(200, headers, known=0)
    except ValueError:
        return
    assert len(lines) <= len(headers) + 2
    assert not any(set(b"\r\n\0") & set(line) for line in lines)


@pytest.mark.parametrize(
    "headers",
    [
        [("str", b"1")], [(b"a", "str")], [(b"a", None)], [(b"a", 1)], [(None, b"1")], [(bytearray(b"a"), b"1")],
        [(b"date", "str")], [(b"server", 1)], None, [None], 1,
    ],
)  # fmt: skip
def test_wrong_types(headers: Any) -> None:
    """A5"""
    with pytest.raises(TypeError):
        ResponseHead(200, headers)


@pytest.mark.parametrize("headers", [[(b"a",)], [(b"a", b"b", b"c")], ["abc"], [b"a"]])
def test_wrong_shapes(headers: Any) -> None:
    """A5"""
    with pytest.raises((ValueError, TypeError)):
        ResponseHead(200, headers)


@pytest.mark.parametrize(
    "value", [b"", b" ", b"-1", b"+1", b"1,1", b"1 1", b"0x1", b"a", b"\xb2", b"1.0", b"\x0b1", b"1\x0c"]
)
def test_bad_lengths(value: bytes) -> None:
    """S6"""
    with pytest.raises(ValueError, match="Content-Length"):
        ResponseHead(200, [(b"content-length", value)])


def test_two_lengths() -> None:
    """S6: the same twice is one, two different ones are an error."""
    both = [(b"content-length", b"5"), (b"Content-Length", b"05")]
    assert finished(200, both)[1:] == [b"content-length: 5"]
    with pytest.raises(ValueError, match="two different"):
        ResponseHead(200, [(b"content-length", b"5"), (b"content-length", b"6")])


# -- status


@given(st.integers(100, 999))
def test_every_status(status: int) -> None:
    """S9"""
    known = {member.value: member.phrase for member in HTTPStatus}
    assert status_line(status) == f"HTTP/1.1 {status} {known.get(status, '')}\r\n".encode()


def test_members_of_an_enum_are_ints() -> None:
    """S9"""
    assert status_line(HTTPStatus.NOT_FOUND) == b"HTTP/1.1 404 Not Found\r\n"


@pytest.mark.parametrize("status", [-1, 0, 1, 99, 1000, 10**9])
def test_no_status(status: int) -> None:
    """S9"""
    with pytest.raises(ValueError, match="status"):
        status_line(status)


@pytest.mark.parametrize("status", ["200", b"200", 200.0, None, True, False, [200]])
def test_status_of_another_type(status: Any) -> None:
    """A5 S9"""
    with pytest.raises(TypeError):
        status_line(status)


def test_a_reason_of_the_applications_own() -> None:
    """G11 S10"""
    assert custom_status_line(200, b"Fine \xe9") == b"HTTP/1.1 200 Fine \xe9\r\n"
    with pytest.raises(ValueError, match="CR, LF"):
        ResponseHead(200, [], b"OK\r\nx: y")


# -- Date and Server


@pytest.mark.parametrize(
    ("headers", "missing"),
    [
        ([], [b"date", b"server"]),
        ([(b"Date", b"x")], [b"server"]),
        ([(b"server", b"x")], [b"date"]),
        ([(b"DATE", b"x"), (b"Server", b"")], []),
        ([(b"x-date", b"x"), (b"x-server", b"x")], [b"date", b"server"]),
    ],
)
def test_date_and_server(headers: Any, missing: list[bytes]) -> None:
    """S11"""
    lines = ServerFields(date=True, server=True).missing(ResponseHead(200, headers)).splitlines()
    assert [line.partition(b":")[0] for line in lines] == missing


@pytest.mark.parametrize(("date", "server"), [(True, False), (False, True), (False, False)])
def test_date_and_server_switched_off(date: bool, server: bool) -> None:
    """S11"""
    fields = ServerFields(date=date, server=server)
    fields.refresh(2e9)
    text = fields.missing(ResponseHead(200, []))
    assert (b"date: " in text, b"server: " in text) == (date, server)


def test_the_date_goes_on() -> None:
    """S11: in the form of RFC 9110, 5.6.7."""
    fields = ServerFields(date=True, server=True)
    fields.refresh(784111777.9)
    assert fields.both == b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\nserver: apphost\r\n"
    fields.refresh(784111778.0)
    line = fields.both.splitlines()[0].removeprefix(b"date: ").decode()
    assert parsedate_to_datetime(line).timestamp() == 784111778


# -- the server's own answers


@pytest.mark.parametrize("status", [400, 408, 413, 414, 417, 431, 500, 501, 505])
def test_error_response(status: int) -> None:
    """P10 S12"""
    head, _, body = error_response(status, "why", b"server: s\r\n").partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 %d " % status)
    assert set(lines[1:]) == {
        b"content-type: text/plain; charset=utf-8",
        b"content-length: %d" % len(body),
        b"connection: close",
        b"server: s",
    }
    assert body == f"{status} {HTTPStatus(status).phrase}: why\n".encode()


def test_wrong_length() -> None:
    """S6"""
    assert isinstance(wrong_length(3), ResponseError)
    assert "3 bytes missing" in str(wrong_length(3))
    assert "2 bytes too many" in str(wrong_length(-2))


@given(
    status=st.sampled_from([200, 201, 204, 206, 301, 304, 404, 500, 799]),
    method=st.sampled_from(["GET", "HEAD", "POST"]),
    version=st.sampled_from(["1.0", "1.1"]),
    fields=st.lists(
        st.sampled_from(
            [(b"content-length", b"5"), (b"Content-Type", b"a/b"), (b"connection", b"close"), (b"connection", b"x"),
             (b"date", b"now"), (b"Server", b"me"), (b"transfer-encoding", b"chunked"), (b"x-list", b"1")]
        ),
        unique=True,
    ),
    keep_alive=st.booleans(),
)  # fmt: skip
def test_the_short_way_of_a_response_in_one_piece_is_the_long_way(
    status: int, method: str, version: str, fields: list[tuple[bytes, bytes]], keep_alive: bool
) -> None:
    """What `Exchange.write` sends at once for a plain response is what framing and head by their rules come to."""
    body = b"12345"
    expected, unplain = (_written(status, method, version, fields, keep_alive, body, plain) for plain in (True, False))
    assert expected == unplain


class _Calm:
    """The context of a worker that serves."""

    draining = closing = False
    server_fields = ServerFields(date=False, server=True)


def _written(
    status: int,
    method: str,
    version: str,
    fields: list[tuple[bytes, bytes]],
    keep_alive: bool,
    body: bytes,
    plain: bool,
) -> tuple[bytes, bool, int]:
    class Wire:
        context = _Calm()
        scheme, client, server, connected = "http", None, ("a", 1), True

        def __init__(self) -> None:
            self.out = b""
            self.transport = self

        def write(self, data: bytes) -> None:
            self.out += data

        def write_framed(self, before: bytes, data: bytes, after: bytes) -> None:
            self.out += before + data + after

        def response_done(self, exchange: Exchange) -> None:
            assert exchange.complete

    wire = Wire()
    head = RequestHead(method, b"/", version, [(b"host", b"a")])
    strict.examine(head)
    head.keep_alive = keep_alive
    exchange = Exchange(cast(Any, wire), head, None)
    response = ResponseHead(status, fields)
    response.plain = response.plain and plain
    exchange.start(response)
    exchange.write(body, False)
    return wire.out, exchange.keep_alive, exchange.sent
