"""HTTP/1.1 connections: S12 to S14 and P9 to P14, on every parser and event loop."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.process.conftest import PROBE
from tests.process.probing import ANSWER, STREAM, Probe, parsed, script, start
from tests.support import Server, raw, request_bytes

MIB = 2**20

# -- S: connections that stay, and that end


@pytest.mark.parametrize(
    ("version", "connection", "announced"),
    [
        ("1.1", None, None),
        ("1.1", "keep-alive", None),
        ("1.1", "close", b"close"),
        ("1.1", "x, Close ,y", b"close"),
        ("1.1", "closed", None),
        ("1.0", None, b"close"),
        ("1.0", "close", b"close"),
        ("1.0", "Keep-Alive", b"keep-alive"),
        ("1.0", "keep-alive, close", b"close"),
    ],
)
def test_s12_s13_what_the_client_wishes(
    probe: Probe, version: str, connection: str | None, announced: bytes | None
) -> None:
    """S12 S13: said in the response, and done; what follows a last request is not served."""
    field = f"Connection: {connection}\r\n" if connection else ""
    request = f"GET {{}} HTTP/{version}\r\nHost: a\r\n{field}\r\n"
    with probe.client() as client:
        for _ in range(2):
            client.send(request.format(script(*ANSWER).target).encode() + request.format("/second").encode())
            response = client.read_response()
            assert (response.body, response.header(b"connection")) == (b"answer", announced)
            if announced == b"close":
                assert client.eof()
                break
            assert parsed(client.read_response())["path"] == "/second"


@pytest.mark.parametrize("value", [b"close", b"Close", b"keep-alive, close"])
def test_s12_the_application_may_end_the_connection(probe: Probe, value: bytes) -> None:
    """S12"""
    with probe.client() as client:
        response = client.request("GET", script(("send", start(200, [(b"connection", value)])), ANSWER[1]).target)
        assert response.header(b"connection") == b"close"
        assert client.eof()


def test_s12_a_stopping_worker_announces_the_end(http_parser: str, serve: Callable[..., Server]) -> None:
    """S12: the request in progress is answered in full."""
    probe = Probe(serve(PROBE, "--http", http_parser, "--stop-timeout", "60"))
    with probe.client() as idle, probe.client() as client:
        idle.request("GET", "/")
        it = script(("receive",), ("body",), *ANSWER)
        client.send(request_bytes("POST", it.target, [("Content-Length", "8")]) + b"half")
        probe.noted(it)
        probe.server.signal(signal.SIGTERM)
        assert idle.eof()  # the worker knows
        client.send(b"full")
        response = client.read_response()
        assert (response.body, response.header(b"connection")) == (b"answer", b"close")
        assert client.eof()


def test_s12_no_connection_ends_without_a_word_when_workers_are_replaced(
    http_parser: str, serve: Callable[..., Server]
) -> None:
    """S12: whether it goes on elsewhere, or is closed."""
    probe = Probe(serve(PROBE, "--http", http_parser, "--max-requests", "100", "--graceful-timeout", "60s"))
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(probe.client())
        while not any("worker 1 gen 1 gone" in line for line in probe.server.lines()):
            if client.request("GET", "/").header(b"connection") == b"close":
                assert client.eof()
                client = stack.enter_context(probe.client())
        assert parsed(client.request("GET", "/"))["path"] == "/"


def test_s13_many_requests_on_one_connection(probe: Probe) -> None:
    """S13: with bodies of every framing between them."""
    with probe.client() as client:
        peer = client.sock.getsockname()
        for number in range(30):
            scope = parsed(client.request("GET", f"/{number}"))
            assert (scope["path"], scope["client"]) == (f"/{number}", peer)
            it = script(("body",), *(ANSWER, STREAM)[number % 2])
            response = client.request("POST", it.target, [("X-N", str(number))], b"data" * number)
            assert response.body == (b"answer", b"onetwothree")[number % 2]


def test_s14_pipelined_requests(probe: Probe) -> None:
    """S14: answered in their order, one at a time, even when an earlier one takes longer."""
    slow = script(("note", "slow begins"), ("sleep", 0.1), ("note", "slow ends"), *ANSWER)
    noting = f"/records?{slow.key}"
    with probe.client() as client:
        client.send(
            request_bytes("GET", slow.target)
            + request_bytes("POST", script(("body",), *STREAM).target, body=b"data")
            + request_bytes("GET", noting)
        )
        bodies = [client.read_response().body for _ in range(3)]
    assert bodies == [b"answer", b"onetwothree", b"['slow begins', 'slow ends', 'end']"]


@pytest.mark.parametrize(
    "bad", [b"nonsense\r\n\r\n", b"GET /x HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"]
)
def test_s14_an_error_does_not_lose_earlier_answers(probe: Probe, bad: bytes) -> None:
    """S14 P10: and nothing after it is served."""
    slow = request_bytes("GET", script(("sleep", 0.05), *STREAM).target)
    with probe.client() as client:
        client.send(slow + request_bytes("GET", "/second") + bad + request_bytes("GET", "/not-served"))
        assert client.read_response().body == b"onetwothree"
        assert parsed(client.read_response())["path"] == "/second"
        assert client.read_response().status == 400
        assert client.eof()


def test_s14_a_failing_application_does_not_lose_earlier_answers(probe: Probe) -> None:
    """S14 A6"""
    with probe.client() as client:
        client.send(
            request_bytes("GET", "/first")
            + request_bytes("GET", script(("sleep", 0.05), ("raises", "ValueError")).target)
            + request_bytes("GET", "/not-served")
        )
        assert parsed(client.read_response())["path"] == "/first"
        assert client.read_response().status == 500
        assert client.eof()


# -- P: the connection


@pytest.mark.parametrize("lines", [1, 2, 20])
def test_p9_leading_empty_lines_are_tolerated(probe: Probe, lines: int) -> None:
    """P9: before the first request, between requests, and after the last."""
    crlf = b"\r\n" * lines
    request = crlf + request_bytes("GET", "/")
    with probe.client() as client:
        client.send(request + request + crlf)
        for _ in range(2):
            assert parsed(client.read_response())["path"] == "/"
        for byte in request:
            client.send(bytes([byte]))
        assert parsed(client.read_response())["path"] == "/"


REFUSED = [
    (400, b"<script>alert(1)</script>\r\n\r\n"),
    (400, b"GET /<script> HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: <script>\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\n<script>: b\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: <script>\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n<script>\r\n"),
    (417, b"POST / HTTP/1.1\r\nHost: a\r\nExpect: <script>\r\n\r\n"),
    (413, b"POST / HTTP/1.1\r\nHost: a\r\nX: <script>\r\nContent-Length: 1000000000\r\n\r\n"),
    (414, b"GET /<script>" + b"x" * 8200 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: <script>" + b"x" * 8200 + b"\r\n\r\n"),
    (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: <script>\r\n" * 100 + b"\r\n"),
    (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: <script>\r\n\r\n"),
    (505, b"GET /<script> HTTP/1.2\r\nHost: a\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "request_"), REFUSED)
def test_p10_a_refusal_ends_the_connection_and_echoes_nothing(probe: Probe, status: int, request_: bytes) -> None:
    """P10 S12: nothing after it is taken for a request."""
    with probe.client() as client:
        client.send(request_ + request_bytes("GET", "/not-served"))
        response = client.read_response()
        assert (response.status, response.header(b"connection")) == (status, b"close")
        assert b"script" not in response.body
        assert response.body.startswith(b"%d " % status)
        assert client.eof()


@pytest.mark.parametrize("steps", [ANSWER, STREAM])
def test_p11_a_half_closed_client_gets_the_whole_answer(probe: Probe, steps: Any) -> None:
    """P11 R4: the application is told, and may answer all the same."""
    it = script(("until", "http.disconnect"), *steps)
    answer = raw(probe.port, request_bytes("GET", it.target), half_close=True)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"answer" if steps is ANSWER else b"5\r\nthree\r\n0\r\n\r\n")
    assert probe.ended(it)[-1] == {"type": "http.disconnect"}


def test_p11_all_pipelined_requests_of_a_half_closed_client_are_answered(probe: Probe) -> None:
    """P11 S14: each of them is told."""
    requests = [request_bytes("POST", script(("body",), ("receive",), *ANSWER).target, body=b"data") for _ in range(3)]
    answer = raw(probe.port, b"".join(requests), half_close=True)
    assert answer.count(b"\r\n\r\nanswer") == 3


READING = request_bytes("POST", script(("body",), *ANSWER).target, [("Content-Length", "9")])


@pytest.mark.parametrize("end", [b"", b"\r\n", b"GET / HT", READING, READING + b"part"])
def test_p11_a_half_closed_client_leaves_nothing_waiting(probe: Probe, end: bytes) -> None:
    """P11: whatever is left over after its last request, the connection ends with the answer to that."""
    slow = request_bytes("GET", script(("sleep", 0.05), *ANSWER).target)
    answer = raw(probe.port, slow + end, half_close=True, timeout=5)
    assert answer.endswith(b"\r\n\r\nanswer")


@pytest.mark.parametrize(
    ("status", "head", "unsent"),
    [
        (413, b"Content-Length: 1000000000\r\n\r\n", bytes(4 * MIB)),
        (400, b"Content-Length: 12, 12\r\n\r\n", bytes(4 * MIB)),
        (400, b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n", bytes(4 * MIB)),
    ],
)
def test_p12_an_early_refusal_is_not_lost_to_a_reset(probe: Probe, status: int, head: bytes, unsent: bytes) -> None:
    """P12: though the client goes on sending before it looks."""
    with probe.client() as client:
        client.send(b"POST /receive HTTP/1.1\r\nHost: a\r\n" + head)
        client.send(unsent)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.read_response().status == status
        assert client.eof()


def test_p12_lingering_is_not_for_ever(serve: Callable[..., Server]) -> None:
    """P12: a client that sends on and on is cut off."""
    with Probe(serve(PROBE)).client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1x\r\n\r\n")
        assert client.read_response().status == 400
        assert client.eof()
        client.sock.settimeout(0.1)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012
            while True:
                with contextlib.suppress(TimeoutError):
                    client.sock.recv(1)
                client.send(b"x")


@pytest.mark.parametrize("target", ["a:443", "/", "http://a/", "*"])
def test_p13_connect_is_refused(probe: Probe, target: str) -> None:
    """P13: and no tunnel is opened."""
    request = f"CONNECT {target} HTTP/1.1\r\nHost: a:443\r\n\r\n".encode()
    answer = raw(probe.port, request + request_bytes("GET", "/not-served"))
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("upgrade", ["h2c", "TLS/1.0", "novelty", "h2c, novelty", "HTTP/2.0"])
@pytest.mark.parametrize("connection", ["Upgrade", "Upgrade, HTTP2-Settings", "upgrade, keep-alive"])
@pytest.mark.parametrize("data", [b"", b"data"])
def test_p14_an_unknown_upgrade_is_ignored(probe: Probe, upgrade: str, connection: str, data: bytes) -> None:
    """P14: an ordinary request, with its body, on a connection that goes on."""
    headers = [("Connection", connection), ("Upgrade", upgrade), ("HTTP2-Settings", "AAMAAABkAAQCAAAAAAIAAAAA")]
    it = script(("body",), *ANSWER)
    with probe.client() as client:
        response = client.request("POST", it.target, headers, data)
        assert (response.body, response.interim, response.header(b"upgrade")) == (b"answer", [], None)
        assert parsed(client.request("GET", "/"))["path"] == "/"
    assert probe.ended(it) == [(len(data), data)]


def test_p14_http2_by_prior_knowledge_is_refused(probe: Probe) -> None:
    """P14 P7"""
    assert raw(probe.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").startswith((b"HTTP/1.1 505 ", b"HTTP/1.1 400 "))
