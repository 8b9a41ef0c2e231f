"""What an application receives: R1 to R9, on every parser and event loop."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.process.probing import ANSWER, Probe, body, parsed, script, start
from tests.support import DEADLINE, raw, request_bytes, wait_for

DISCONNECT = {"type": "http.disconnect"}
MIB = 2**20


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_r1_one_event_where_there_is_no_body(probe: Probe, method: str) -> None:
    """R1"""
    it = script(("receive",), *ANSWER)
    probe.request(it, method)
    assert probe.ended(it) == [{"type": "http.request", "body": b"", "more_body": False}]


def test_r1_a_body_arrives_whole(probe: Probe) -> None:
    """R1"""
    data = json.dumps(list(range(50000))).encode()
    it = script(("body",), *ANSWER)
    probe.request(it, "POST", data=data)
    assert probe.ended(it)[0][0] == len(data)


def test_r2_chunked_bodies_arrive_decoded(probe: Probe) -> None:
    """R2: Transfer-Encoding stays visible, and there is no Content-Length beside it."""
    request = "POST {} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
    it = script(("body",), *ANSWER)
    chunks = b"4;x=y\r\nbody\r\n0A\r\n 10 bytes \r\n0\r\nX-Trailer: 1\r\n\r\n"
    with probe.client() as client:
        client.send(request.format(it.target).encode() + chunks + request.format("/").encode() + b"0\r\n\r\n")
        assert client.read_response().body == b"answer"
        headers = dict(parsed(client.read_response())["headers"])
    assert probe.ended(it) == [(14, b"body 10 bytes ")]
    assert headers == {b"host": b"a", b"transfer-encoding": b"Chunked"}


def test_r3_the_body_streams(probe: Probe) -> None:
    """R3 S2: the application has the beginning, and the client its echo, before the rest is sent."""
    with probe.client() as client:
        client.send(request_bytes("POST", script(("send", start()), ("echo",)).target, [("Content-Length", "6")]))
        client.send(b"one")
        pieces = client.read_body(client.read_head())
        assert next(pieces) == b"one"
        client.send(b"two")
        assert list(pieces) == [b"two"]


def test_r4_after_the_body_receive_waits_for_the_end(probe: Probe) -> None:
    """R4: then `http.disconnect`, however often it is asked."""
    waiting = ("within", 0.05, "receive")
    it = script(("body",), waiting, ("send", start()), waiting, ("send", body(b"answer")), ("receive",), ("receive",))
    probe.request(it, "POST", data=b"data")
    assert probe.ended(it) == [(4, b"data"), "timed out", "timed out", DISCONNECT, DISCONNECT]


def test_r4_a_disconnect_ends_the_waiting(probe: Probe) -> None:
    """R4"""
    it = script(("receive",), ("receive",), ("receive",))
    with probe.client() as client:
        client.send(request_bytes("GET", it.target))
        probe.noted(it)
    assert probe.ended(it)[1:] == [DISCONNECT, DISCONNECT]


@pytest.mark.parametrize("end", [[("raises", "ValueError")], [], ANSWER], ids=["raised", "returned", "answered"])
def test_r4_the_end_of_the_response_ends_the_waiting(probe: Probe, end: Any) -> None:
    """R4 A6 A8: also in a task that the application has left behind."""
    it = script(("receive",), ("aside", [("receive",), ("receive",)]), ("sleep", 0.01), *end)
    probe.request(it)
    entries = wait_for(lambda: len(found := probe.records(it)) >= 5 and found)
    assert sorted(map(str, entries[1:])) == sorted(map(str, [DISCONNECT, DISCONNECT, "end", "end"]))


def _close(sock: socket.socket) -> None:
    sock.close()


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def _half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [_close, _reset, _half_close])
@pytest.mark.parametrize("framing", ["Content-Length: 9\r\n\r\npart", "Transfer-Encoding: chunked\r\n\r\n9\r\npart"])
def test_r5_a_client_that_leaves_within_the_body(
    probe: Probe, framing: str, leave: Callable[[socket.socket], None]
) -> None:
    """R5: a disconnect, never what looks like the end of the body."""
    it = script(("until", "http.disconnect"), ("receive",))
    with probe.client() as client:
        client.send(f"POST {it.target} HTTP/1.1\r\nHost: a\r\n{framing}".encode())
        probe.noted(it)
        leave(client.sock)
        first, *rest = probe.ended(it)
    assert first == {"type": "http.request", "body": b"part", "more_body": True}
    assert rest == [DISCONNECT, DISCONNECT]
    assert probe.complaints(it) == []


def test_r6_a_cancelled_receive_loses_nothing(probe: Probe) -> None:
    """R6"""
    it = script(("cancelled_receive",), ("within", 0.02, "receive"), ("body",), ("cancelled_receive",), *ANSWER)
    with probe.client() as client:
        client.send(request_bytes("POST", it.target, [("Content-Length", "4")]))
        probe.noted(it, 2)
        client.send(b"data")
        assert client.read_response().body == b"answer"
    assert probe.ended(it) == ["cancelled", "timed out", (4, b"data"), "cancelled"]


def test_r7_an_application_that_does_not_read_stops_the_client(probe: Probe) -> None:
    """R7: what the server takes in the meantime is what sockets hold and a little more; later all of it arrives."""
    total = 32 * MIB
    flag = f"r7-{probe.port}"
    it = script(("wait", flag), ("body",), *ANSWER)
    with probe.client() as client:
        client.send(request_bytes("POST", it.target, [("Content-Length", str(total))]))
        client.sock.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < total:
                sent += client.sock.send(bytes(min(MIB, total - sent)))
        assert sent < 24 * MIB
        client.sock.settimeout(DEADLINE)
        probe.set(flag)
        client.send(bytes(total - sent))
        assert client.read_response().body == b"answer"
    assert probe.ended(it)[0][0] == total


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("framing", "rest"),
    [
        (f"Content-Length: {len(SMUGGLED) + 1}", SMUGGLED),
        ("Transfer-Encoding: chunked", b"\r\n%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"),
    ],
)
def test_r8_a_small_unread_body_is_read_away(probe: Probe, framing: str, rest: bytes) -> None:
    """R8: the next request is the one after the body, not one inside of it."""
    first = b"1\r\nx" if "chunked" in framing else b"x"
    with probe.client() as client:
        client.send(f"POST {script(*ANSWER).target} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n".encode() + first)
        assert client.read_response().body == b"answer"
        client.send(rest)
        client.send(request_bytes("GET", "/honest"))
        assert parsed(client.read_response())["path"] == "/honest"


def test_r8_a_large_unread_body_ends_the_connection(probe: Probe) -> None:
    """R8 S12 P12: announced, and the answer is not lost to a reset."""
    with probe.client() as client:
        client.send(request_bytes("POST", script(*ANSWER).target, [("Content-Length", str(9 * MIB))]))
        client.send(SMUGGLED * 50)
        response = client.read_response()
        assert (response.body, response.header(b"connection")) == (b"answer", b"close")
        assert client.eof()


def test_r8_an_endless_unread_body_ends_the_connection(probe: Probe) -> None:
    """R8: nothing announced how long it would get."""
    with probe.client() as client:
        client.send(request_bytes("POST", script(*ANSWER).target, [("Transfer-Encoding", "chunked")]))
        assert client.read_response().body == b"answer"
        client.send(b"10000\r\n" + bytes(65536) + b"\r\n" + b"1000\r\n" + bytes(4096) + b"\r\n")
        assert client.eof()


EXPECTING = [("Content-Length", "4"), ("Expect", "100-Continue")]


def test_r9_continue_is_sent_when_the_body_is_asked_for(probe: Probe) -> None:
    """R9: and not a moment earlier."""
    flag = f"r9-{probe.port}"
    it = script(("note", "called"), ("wait", flag), ("body",), *ANSWER)
    with probe.client() as client:
        client.send(request_bytes("POST", it.target, EXPECTING))
        probe.noted(it)
        client.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        client.sock.settimeout(DEADLINE)
        probe.set(flag)
        assert client.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"data")
        response = client.read_response()
        assert (response.body, response.interim) == (b"answer", [])
        assert parsed(client.request("GET", "/"))["path"] == "/"
    assert probe.ended(it) == ["called", (4, b"data")]


@pytest.mark.parametrize(
    ("version", "steps", "sent_at_once"),
    [
        ("1.1", ANSWER, b""),
        ("1.1", (("send", start()), ("send", body(b"ans", True)), ("body",), ("send", body(b"wer"))), b"data"),
        ("1.1", (("body",), *ANSWER), b"data"),
        ("1.0", (("body",), *ANSWER), b"data"),
    ],
    ids=["answered", "answering", "body is here", "HTTP/1.0"],
)
def test_r9_no_continue(probe: Probe, version: str, steps: Any, sent_at_once: bytes) -> None:
    """R9"""
    request = f"POST {script(*steps).target} HTTP/{version}\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n"
    with probe.client() as client:
        client.send(request.encode() + b"\r\n" + sent_at_once)
        response = client.read_response()
        assert (response.status, response.body, response.interim) == (200, b"answer", [])
        if not sent_at_once:  # it cannot be told whether the body will come, so nothing may follow
            assert response.header(b"connection") == b"close"
            assert client.eof()


@pytest.mark.parametrize("value", ["200-ok", "100-continue, x", "", "100-continu", "100-continue;q=1"])
def test_r9_an_unknown_expectation_is_refused(probe: Probe, value: str) -> None:
    """R9 P10"""
    answer = raw(probe.port, request_bytes("POST", "/", [("Expect", value)], b"data"))
    assert re.match(rb"HTTP/1.1 417 [^\r]+\r\n(?:.+\r\n)*connection: close\r\n", answer)
