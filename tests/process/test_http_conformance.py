"""What an application sends, on the wire: S1 to S11 and S15 to S18, on every parser and event loop."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest

from tests.process.conftest import PROBE
from tests.process.probing import ANSWER, STREAM, Probe, Script, body, parsed, script, start
from tests.support import Server, raw, request_bytes

MIB = 2**20
DATE_AND_SERVER = {b"date", b"server"}


def own(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The header fields of a response but those that every response has."""
    return [item for item in headers if item[0] not in DATE_AND_SERVER]


def wire(probe: Probe, of: Script, method: str = "GET", version: str = "1.1") -> bytes:
    """All that comes for one request until the server closes."""
    return raw(probe.port, f"{method} {of.target} HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n".encode())


# -- S: what the application sends


def test_s1_an_error_after_the_start_is_still_a_500(probe: Probe) -> None:
    """S1 S17: the head is held back until there is a body."""
    for steps in ([("raises", "RuntimeError")], []):
        response = probe.request(script(("send", start(200, [(b"x-a", b"1")])), *steps))
        assert (response.status, response.header(b"x-a")) == (500, None)


def test_s2_each_piece_reaches_the_client_at_once(probe: Probe) -> None:
    """S2: as server-sent events need it; the second one is made only after the first was read."""
    flag = f"s2-{probe.port}"
    it = script(
        ("send", start(200, [(b"content-type", b"text/event-stream")])),
        ("send", body(b"data: 1\n\n", True)),
        ("wait", flag),
        ("send", body(b"data: 2\n\n", True)),
        ("until", "http.disconnect"),
    )
    with httpx.Client() as client, client.stream("GET", probe.server.url + it.target) as response:
        lines = response.iter_lines()
        assert next(lines) == "data: 1"
        probe.set(flag)
        assert [next(lines), next(lines)] == ["", "data: 2"]
    assert probe.ended(it)[-1] == {"type": "http.disconnect"}


def test_s2_an_empty_piece_sends_the_head(probe: Probe) -> None:
    """S2: and does not end a chunked body."""
    flag = f"s2-empty-{probe.port}"
    empty = ("send", body(b"", True))
    it = script(("send", start()), empty, ("wait", flag), empty, ("send", body(b"text", True)), empty, ("send", body()))
    with probe.client() as client:
        client.send(request_bytes("GET", it.target))
        head = client.read_head()
        probe.set(flag)
        assert list(client.read_body(head)) == [b"text"]
        assert parsed(client.request("GET", "/"))["path"] == "/"


def test_s3_order_and_duplicates_of_headers(probe: Probe) -> None:
    """S3: several Set-Cookie are never merged."""
    headers = [(b"set-cookie", b"a=1"), (b"x-b", b""), (b"set-cookie", b"c=2, d"), (b"x-a", b"\xe9"), (b"x-b", b"2")]
    response = probe.request(script(("send", start(200, headers)), ("send", body(b"answer"))))
    assert own(response.headers) == [*headers, (b"content-length", b"6")]


@pytest.mark.parametrize("coding", [b"chunked", b"identity", b"gzip", b"gzip, chunked"])
@pytest.mark.parametrize("name", [b"transfer-encoding", b"Transfer-Encoding"])
@pytest.mark.parametrize("more", [True, False])
def test_s4_the_applications_transfer_encoding_is_ignored(probe: Probe, coding: bytes, name: bytes, more: bool) -> None:
    """S4: framing is the server's; data that looks like chunks is data."""
    data = b"5\r\nhello\r\n0\r\n\r\n"
    last = [("send", body(b""))] if more else []
    for length in ([], [(b"content-length", b"%d" % len(data))]):
        it = script(("send", start(200, [(name, coding), *length])), ("send", body(data, more)), *last)
        with probe.client() as client:
            response = client.request("GET", it.target)
            assert response.body == data
            assert response.header(b"transfer-encoding") == (b"chunked" if more and not length else None)
            assert parsed(client.request("GET", "/"))["path"] == "/"
        head, _, rest = wire(probe, it, version="1.0").partition(b"\r\n\r\n")
        assert rest == data
        assert b"transfer-encoding" not in head.lower()


def test_s5_a_body_of_unknown_length_is_chunked(probe: Probe) -> None:
    """S5"""
    with probe.client() as client:
        client.send(request_bytes("GET", script(*STREAM).target))
        response = client.read_head()
        assert own(response.headers) == [(b"transfer-encoding", b"chunked")]
        assert list(client.read_body(response)) == [b"one", b"two", b"three"]
        assert parsed(client.request("GET", "/"))["path"] == "/"


@pytest.mark.parametrize("connection", ["", "Connection: keep-alive\r\n"])
def test_s5_a_body_of_unknown_length_ends_an_http10_connection(probe: Probe, connection: str) -> None:
    """S5 S12: even where keeping it alive was asked for."""
    answer = raw(probe.port, f"GET {script(*STREAM).target} HTTP/1.0\r\n{connection}\r\n".encode())
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert rest == b"onetwothree"
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head


def test_s5_the_length_of_a_whole_body_is_known(probe: Probe) -> None:
    """S5"""
    for steps in (ANSWER, (("send", start()), ("send", {"type": "http.response.body", "body": b"answer"}))):
        assert own(probe.request(script(*steps)).headers) == [(b"content-length", b"6")]
    empty = probe.request(script(("send", start()), ("send", {"type": "http.response.body"})))
    assert own(empty.headers) == [(b"content-length", b"0")]


FIVE = ("send", start(200, [(b"content-length", b"5")]))


@pytest.mark.parametrize(
    ("steps", "rest"),
    [
        ([FIVE, ("send", body(b"abc", True)), ("attempt", body(b"def"))], b"abc"),
        ([FIVE, ("send", body(b"abcde", True)), ("attempt", body(b"f", True))], b"abcde"),
        ([FIVE, ("send", body(b"abc", True)), ("attempt", body(b""))], b"abc"),
    ],
    ids=["too long", "too long by one", "too short"],
)
def test_s6_wrong_length_within_the_response(probe: Probe, steps: Any, rest: bytes) -> None:
    """S6: an error to the application, no byte too many, and the connection ends."""
    mark = probe.server.mark()
    it = script(*steps)
    answer = raw(probe.port, request_bytes("GET", it.target) + request_bytes("GET", "/not-served"))
    assert answer.endswith(b"\r\n\r\n" + rest)
    assert "RuntimeError" in probe.ended(it)[0]
    probe.server.wait_line("without completing its response", after=mark)


@pytest.mark.parametrize(("data", "more"), [(b"abcdef", False), (b"abcdef", True), (b"abcd", False)])
def test_s6_wrong_length_before_anything_is_sent(probe: Probe, data: bytes, more: bool) -> None:
    """S6 S9: a 500 then, and a log line."""
    mark = probe.server.mark()
    answer = wire(probe, script(FIVE, ("send", body(data, more))))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"abc" not in answer
    probe.server.wait_line("the response body is (longer|shorter) than its Content-Length", after=mark)


@pytest.mark.parametrize(
    "steps",
    [ANSWER, STREAM, (FIVE, ("send", body(b"abcde")))],
    ids=["whole", "stream", "declared"],
)
def test_s7_head_is_get_without_the_body(probe: Probe, steps: Any) -> None:
    """S7"""
    with probe.client() as client:
        get = client.request("GET", script(*steps).target)
        head = client.request("HEAD", script(*steps).target)
        assert own(head.headers) == own(get.headers)
        assert parsed(client.request("GET", "/"))["path"] == "/"
    assert wire(probe, script(*steps), "HEAD").endswith(b"\r\n\r\n")


def test_s7_head_may_leave_the_body_out(probe: Probe) -> None:
    """S7: the length that the application declared stands, and none is made up."""
    with probe.client() as client:
        head = client.request("HEAD", script(FIVE, ("send", body())).target)
        assert own(head.headers) == [(b"content-length", b"5")]
        head = client.request("HEAD", script(("send", start()), ("send", body())).target)
        assert own(head.headers) in ([], [(b"transfer-encoding", b"chunked")])
        assert parsed(client.request("GET", "/"))["path"] == "/"


@pytest.mark.parametrize(("status", "length"), [(204, []), (304, [(b"content-length", b"6")])])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("data", [b"", b"answer"])
def test_s8_no_body(probe: Probe, status: int, length: Any, method: str, data: bytes) -> None:
    """S8: neither for 204 nor for 304, which keeps its Content-Length."""
    steps = [("send", start(status, [(b"content-length", b"6")])), ("send", body(data, True)), ("send", body())]
    with probe.client() as client:
        response = client.request(method, script(*steps).target)
        assert (response.status, own(response.headers)) == (status, length)
        bare = client.request(method, script(("send", start(status)), ("send", body(data))).target)
        assert (bare.status, own(bare.headers)) == (status, [])
        assert parsed(client.request("GET", "/"))["path"] == "/"


def test_s8_an_informational_status_has_no_framing(probe: Probe) -> None:
    """S8"""
    it = script(("send", start(150, [(b"content-length", b"6"), (b"transfer-encoding", b"x")])), ("send", body(b"any")))
    answer = wire(probe, it)
    assert answer.startswith(b"HTTP/1.1 150 \r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert not re.search(rb"content-length|transfer-encoding|any", answer)


@pytest.mark.parametrize(
    ("status", "line"),
    [(200, b"200 OK"), (404, b"404 Not Found"), (299, b"299 "), (599, b"599 "), (999, b"999 ")],
)
def test_s9_status(probe: Probe, status: int, line: bytes) -> None:
    """S9: an unknown one has an empty reason."""
    assert wire(probe, script(("send", start(status)), ("send", body()))).startswith(b"HTTP/1.1 " + line + b"\r\n")


@pytest.mark.parametrize("status", [99, 1000, -200, 0, "200", 200.0, None])
def test_s9_what_is_no_status(probe: Probe, status: Any) -> None:
    """S9: and no partial garbage on the wire."""
    answer = wire(probe, script(("send", start(status)), ("send", body(b"never"))))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"never" not in answer


EVIL = b"a\r\nX-Evil: 1"
SPLITTING = [
    *[(b"x-a", b"1" + bad + b"2") for bad in (b"\r\n", b"\n", b"\r", b"\0", b"\r\n ", b"\r\n\r\n<evil>")],
    *[(b"x-a", bad) for bad in (b"\r", b"\n", b"\0")],
    *[(bad, b"1") for bad in (b"", b":x", b"x:", b"x-a\r", b"x-a\n", EVIL, b"x a", b" x", b"x\0", b"x\xff", b"x\t")],
    *[(b"connection", b"close" + bad) for bad in (b"\r", b"\n", b"\0")],
    *[(name, EVIL) for name in (b"connection", b"transfer-encoding", b"content-length", b"date", b"server")],
    *[(b"content-length", bad) for bad in (b"", b"-1", b"+1", b"1, 1", b"0x1", b"1 1", b"1\r\n")],
]


@pytest.mark.parametrize("header", SPLITTING, ids=repr)
def test_s10_response_splitting(probe: Probe, header: tuple[bytes, bytes]) -> None:
    """S10: the exception goes to the application, and the client gets a 500 with nothing of it."""
    it = script(("attempt", start(200, [(b"x-good", b"1"), header])))
    answer = wire(probe, it)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"evil" not in answer.lower()
    assert b"x-good" not in answer
    assert probe.ended(it)[0][0] == "ValueError"


def test_s11_date_and_server(probe: Probe) -> None:
    """S11: added, unless the application gave its own."""
    response = probe.request(script(*ANSWER))
    date = response.header(b"date")
    assert date is not None
    assert parsedate_to_datetime(date.decode()).utcoffset() is not None
    assert response.header(b"server") == b"apphost"
    given = [(b"Date", b"Tue, 15 Nov 1994 08:12:31 GMT"), (b"SERVER", b"mine")]
    for headers in (given, given[:1], given[1:]):
        response = probe.request(script(("send", start(200, headers)), ("send", body())))
        for name, value in headers:
            assert response.header(name.lower()) == value
        assert response.header(b"date")
        assert response.header(b"server")


def test_s11_date_and_server_can_be_switched_off(serve: Callable[..., Server]) -> None:
    """S11: also for the server's own answers."""
    bare = Probe(serve(PROBE, "--no-date-header", "--no-server-header"))
    for answer in (bare.request(script(*ANSWER)), bare.request(script(("raises", "ValueError")))):
        assert not DATE_AND_SERVER & {name for name, _ in answer.headers}


def test_s15_events_out_of_order(probe: Probe) -> None:
    """S15: each raises, and puts nothing on the wire; before, within and after a response."""
    flag = f"s15-{probe.port}"
    extra, again = ("attempt", body(b"extra")), ("attempt", start(500))
    it = script(extra, ("send", start()), again, ("send", body(b"one", True)), again, ("send", body(b"two")), extra,
        again, ("wait", flag), extra, again)  # fmt: skip
    with probe.client() as client:
        assert client.request("GET", it.target).body == b"onetwo"
        probe.noted(it, 5)
        assert parsed(client.request("GET", "/"))["path"] == "/"
        probe.set(flag)
        found = probe.ended(it)
        assert parsed(client.request("GET", "/"))["path"] == "/"
    assert [kinds[0] for kinds in found] == ["ResponseError"] * 7


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("size", [100, 100000])
def test_s16_sending_to_a_client_that_has_gone(probe: Probe, reset: bool, size: int) -> None:
    """S16: raises an OSError, every time."""
    late = ("attempt", body(b"late", True))
    it = script(("send", start()), ("send", body(b"first", True)), ("flood_noted", size), late, ("attempt", body()))
    with probe.client() as client:
        client.send(request_bytes("GET", it.target))
        client.read_head()
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    found = probe.ended(it)
    assert [(kinds[0], "OSError" in kinds) for kinds in found] == [("ClientDisconnected", True)] * 3


def test_s16_the_start_of_a_response_to_a_client_that_has_gone(probe: Probe) -> None:
    """S16"""
    it = script(("until", "http.disconnect"), ("attempt", start()), ("attempt", body()))
    with probe.client() as client:
        client.send(request_bytes("POST", it.target, [("Content-Length", "4")]))
    assert [kinds[0] for kinds in probe.ended(it)[1:]] == ["ClientDisconnected"] * 2


def test_s17_returning_without_a_response(probe: Probe) -> None:
    """S17 S12"""
    mark = probe.server.mark()
    with probe.client() as client:
        response = client.request("GET", script().target)
        assert (response.status, response.header(b"connection")) == (500, b"close")
        assert client.eof()
    probe.server.wait_line("returned without completing its response", after=mark)


def test_s17_returning_within_the_response(probe: Probe) -> None:
    """S17"""
    answer = raw(probe.port, request_bytes("GET", script(*STREAM[:2]).target))
    assert answer.endswith(b"\r\n\r\n3\r\none\r\n")


def test_s17_returning_something(probe: Probe) -> None:
    """S17"""
    mark = probe.server.mark()
    assert probe.request(script(*ANSWER, ("return", "something"))).body == b"answer"
    probe.server.wait_line("returned str instead of None", after=mark)


def test_s18_work_after_the_response(probe: Probe) -> None:
    """S18: the connection does not wait for it."""
    flag = f"s18-{probe.port}"
    it = script(*ANSWER, ("wait", flag))
    with probe.client() as client:
        assert client.request("GET", it.target).body == b"answer"
        assert parsed(client.request("GET", f"/records?{it.key}")) == []
        assert client.request("GET", f"/set?{flag}").body == b"set"
    assert probe.ended(it) == []
