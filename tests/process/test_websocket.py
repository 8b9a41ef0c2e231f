"""WebSockets from the opening to the closing handshake: W1 to W12, W16, X1 and A7, on sockets that see every byte."""

from __future__ import annotations

import ast
import contextlib
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.process.probing import (
    WS_APP,
    WS_PAIRS,
    Probe,
    Script,
    body,
    flags,
    parsed,
    script,
    serving_websockets,
    start,
)
from tests.process.ws_probe import (
    ASKING,
    BINARY,
    CLOSE,
    CONTINUED,
    KEY,
    PING,
    PONG,
    TEXT,
    Frame,
    WsClient,
    close_frame,
    fragments,
    frame,
    handshake,
)
from tests.support import RawClient, Server, raw, request_bytes, wait_for, write_app

ALL = [*WS_PAIRS, ("h11", "uvloop"), ("httptools", "asyncio")]
CONNECT = {"type": "websocket.connect"}
ACCEPT = {"type": "websocket.accept"}

everywhere = pytest.mark.parametrize("ws", ALL, ids="-".join, indirect=True)


@pytest.fixture(scope="module", params=WS_PAIRS, ids="-".join)
def ws(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    logs = ("--log-level", "debug", "--access-log", "-")
    with serving_websockets(request.param, tmp_path_factory.mktemp("ws"), *logs) as probe:
        yield probe


@pytest.fixture(scope="module", params=WS_PAIRS, ids="-".join)
def hasty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """A server that waits 1 s for the close frame of a client: of its own, as nothing else shall depend on that."""
    with serving_websockets(request.param, tmp_path_factory.mktemp("hasty"), "--ws-close-timeout", "1s") as probe:
        yield probe


@pytest.fixture(scope="module")
def pingless() -> Iterator[Probe]:
    with Server(WS_APP, "--ws-ping-interval", "0") as server:
        yield Probe(server)


def received(data: str | bytes) -> dict[str, Any]:
    text = isinstance(data, str)
    return {"type": "websocket.receive", "bytes": None if text else data, "text": data if text else None}


def disconnect(code: int, reason: str = "") -> dict[str, Any]:
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


def denial(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "type": "websocket." + event["type"]}


def errors(ws: Probe, it: Script) -> list[str]:
    """Warnings and errors about the script that its end has left in the log. What another script has said after that is
    there, so this one's are, too."""
    mark = ws.server.mark()
    raw(ws.port, handshake(script(("raises", "ZeroDivisionError")).target))
    ws.server.wait_line("raised ZeroDivisionError", after=mark)
    return ws.complaints(it)


def leave(client: WsClient, how: str) -> None:
    """End the connection without a word: "close", "reset", or only our "half"."""
    if how == "half":
        client.sock.shutdown(socket.SHUT_WR)
        return
    if how == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# -- all at once, everywhere


@everywhere
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_w1_w6_w7_w8_a_socket_from_beginning_to_end(ws: Probe, unix: bool) -> None:
    """W1 W6 W7 W8 W12"""
    it = script(("accept",), ("echo",), ("receive",))
    messages = ["text", b"bytes", "", b"", "caf\u00e9 \U0001f600", bytes(range(256)) * 1024]
    with WsClient(ws.socket_path if unix else ws.port, it.target).opened() as client:
        client.say(*messages)
        assert [client.hear() for _ in messages] == messages
        client.send(frame(TEXT, b"in ", fin=False) + frame(PING, b"?") + frame(CONTINUED, b"two"))
        assert client.read_frame() == Frame(PONG, b"?")
        assert client.hear() == "in two"
        assert client.part(4321, "genug \u20ac".encode()) == (4321, "genug \u20ac")
    assert ws.ended(it) == [disconnect(4321, "genug \u20ac")] * 2


@everywhere
def test_access_log_line(ws: Probe) -> None:
    """One line for each handshake, at its answer; the socket's end is not another request."""
    opened, mark = "/" + next(flags), ws.server.mark()
    with WsClient(ws.port, opened).opened() as client:
        assert client.hear()
        ws.server.wait_line(f'"GET {opened} HTTP/1.1" 101 0 [0-9.]+$', after=mark)
        assert client.closed() == (1000, "")
        client.send(close_frame())
        assert client.eof()
    raw(ws.port, handshake(script().target))
    ws.server.wait_line('"GET /script.* HTTP/1.1" 403 0 ', after=mark)
    raw(ws.port, handshake("/refused").replace(b": 13", b": 12"))
    ws.server.wait_line('"-" 426 ', after=mark)
    assert sum(opened in line for line in ws.server.lines(mark)) == 1


# -- W1, W2, X1: the answer to the handshake


def test_w1_the_handshake_waits_for_the_application(ws: Probe) -> None:
    """W1: websocket.connect comes first, and nothing is answered before accept."""
    flag = next(flags)
    it = script(("receive",), ("wait", flag), ("send", ACCEPT), ("echo",))
    with WsClient(ws.port, it.target) as client:
        assert ws.noted(it) == [CONNECT]
        assert client.silent()
        ws.set(flag)
        client.opened()
        client.say("on")
        assert client.hear() == "on"


def test_w1_accept_without_receiving_connect(ws: Probe) -> None:
    """W1: connect is still the first event then."""
    it = script(("send", ACCEPT), ("receive",), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        client.say("first")
        assert ws.ended(it) == [CONNECT, received("first")]


@pytest.mark.parametrize(
    "steps",
    [
        [("receive",), ("send", {"type": "websocket.close"})],
        [("receive",), ("send", {"type": "websocket.close", "code": 4000, "reason": "secret"})],
        [("send", {"type": "websocket.close", "code": None, "reason": None})],
        [("receive",)],
        [],
    ],
    ids=["close", "close with a code", "close at once", "return", "return at once"],
)
def test_w2_no_accept_is_403(ws: Probe, steps: list[Any]) -> None:
    """W2: and no upgrade; nothing more is read from this client, nothing logged."""
    it = script(*steps)
    with WsClient(ws.port, it.target, early=frame(TEXT, b"early") + request_bytes("GET", "/not-served")) as client:
        response = client.read_response()
        assert (response.status, response.body, response.header(b"connection")) == (403, b"", b"close")
        assert response.header(b"upgrade") is None
        assert client.eof()
    assert ws.ended(it) == [CONNECT] * (("receive",) in steps)
    assert errors(ws, it) == []


@pytest.mark.parametrize("exception", ["RuntimeError", "SystemExit", "KeyboardInterrupt", "BaseException"])
def test_w2_an_exception_before_accept_is_500(ws: Probe, exception: str) -> None:
    """W2 A6"""
    mark = ws.server.mark()
    with WsClient(ws.port, script(("receive",), ("raises", exception)).target) as client:
        response = client.read_response()
        assert (response.status, response.header(b"connection")) == (500, b"close")
        assert b"said the script" not in response.body
        assert client.eof()
    said = f"raised {exception} .so said the script.: the client got a 500 answer.*, in WebSocket /script"
    ws.server.wait_line(said, after=mark)


def test_w2_w12_after_a_denial_comes_the_disconnect(ws: Probe) -> None:
    """W2 W11 W12: 1006, as often as asked; `send` raises an OSError."""
    close = {"type": "websocket.close"}
    sends = [("attempt", event) for event in ({"type": "websocket.send", "text": "x"}, close, ACCEPT)]
    it = script(("receive",), ("send", close), ("receive",), ("receive",), *sends)
    assert raw(ws.port, handshake(it.target)).startswith(b"HTTP/1.1 403 ")
    _, *events, one, two, three = ws.ended(it)
    assert events == [disconnect(1006)] * 2
    assert all("OSError" in names for names in (one, two, three))


def test_w2_w11_what_send_raises_after_a_denial_may_come_back(ws: Probe) -> None:
    """W2 W11 A7"""
    it = script(("receive",), ("send", {"type": "websocket.close"}), ("send", ACCEPT))
    assert raw(ws.port, handshake(it.target)).startswith(b"HTTP/1.1 403 ")
    assert errors(ws, it) == []


def test_x1_a_denial_in_one_piece(ws: Probe) -> None:
    """X1: an ordinary response, and the end of the connection; nothing of the socket comes after it."""
    headers = [(b"content-type", b"text/plain"), (b"x-a", b"1"), (b"X-A", b"2"), (b"set-cookie", b"a=1")]
    steps = [("send", denial(start(404, headers))), ("send", denial(body(b"there is none")))]
    it = script(("receive",), *steps, ("receive",), ("receive",))
    with WsClient(ws.port, it.target, early=frame(TEXT, b"early") + request_bytes("GET", "/not-served")) as client:
        response = client.read_response()
        assert (response.status, response.body) == (404, b"there is none")
        assert response.headers[:4] == [(name.lower(), value) for name, value in headers]
        assert (response.header(b"content-length"), response.header(b"connection")) == (b"13", b"close")
        assert client.eof()
    assert ws.ended(it) == [CONNECT, disconnect(1006), disconnect(1006)]


def test_x1_a_denial_in_pieces(ws: Probe) -> None:
    """X1 S2: each on its way before the next is sent."""
    flag = next(flags)
    pieces = [denial(body(b"one", True)), denial(body(b"", True)), denial(body(b"two"))]
    it = script(("send", denial(start(401))), ("send", pieces[0]), ("wait", flag), *(("send", p) for p in pieces[1:]))
    with WsClient(ws.port, it.target) as client:
        response = client.read_head()
        assert (response.status, response.header(b"transfer-encoding")) == (401, b"chunked")
        parts = client.read_body(response)
        assert next(parts) == b"one"
        ws.set(flag)
        assert list(parts) == [b"two"]
        assert client.eof()
    assert errors(ws, it) == []


@pytest.mark.parametrize(
    "event",
    [
        denial(body(b"before start")),
        denial(start("404")),
        denial(start(404, [("x-a", b"1")])),
        denial(start(404, [(b"x-a", b"1\r\nx-split: 1")])),
        denial(start(404, [(b"x-a\r\nx-split", b"1")])),
        denial(start(404, [(b"x-a", b"1\nx-split: 1")])),
        denial(start(404, [(b"x-a", b"x-split\0")])),
        start(404),
        body(b"x"),
        {"type": "websocket.http.response.novelty"},
    ],
)
def test_x1_s10_a_bad_denial_raises(ws: Probe, event: Any) -> None:
    """X1 S10 A5: nothing of it is sent, and the socket can still be denied, or accepted."""
    it = script(("attempt", event), ("send", denial(start(410))), ("send", denial(body(b"gone"))))
    answer = raw(ws.port, handshake(it.target))
    assert answer.startswith(b"HTTP/1.1 410 ")
    assert b"x-split" not in answer
    assert "Exception" in ws.ended(it)[0]
    it = script(("attempt", event), ("accept",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.closed() == (1000, "")


@pytest.mark.parametrize(
    "event",
    [
        denial(start(402)),
        ACCEPT,
        {"type": "websocket.send", "text": "x"},
    ],
    ids=["second start", "accept", "send"],
)
def test_x1_s15_within_a_denial(ws: Probe, event: Any) -> None:
    """X1 S15: what does not belong there raises, and the denial goes on."""
    it = script(("send", denial(start(418))), ("attempt", event), ("send", denial(body(b"teapot"))))
    answer = raw(ws.port, handshake(it.target))
    assert answer.startswith(b"HTTP/1.1 418 ")
    assert answer.endswith(b"teapot")
    assert "RuntimeError" in ws.ended(it)[0]


@pytest.mark.parametrize("end", [("raises", "RuntimeError"), ("return", None)])
def test_x1_a6_a_denial_that_does_not_end(ws: Probe, end: Any) -> None:
    """X1 A6 S17: 500 while the head is not out; never the clean end of a body after that."""
    mark = ws.server.mark()
    answer = raw(ws.port, handshake(script(("send", denial(start(401))), end).target))
    assert answer.startswith(b"HTTP/1.1 500 ")
    pieces = [("send", denial(start(401))), ("send", denial(body(b"part", True)))]
    assert raw(ws.port, handshake(script(*pieces, end).target)).endswith(b"\r\n\r\n4\r\npart\r\n")
    said = "returned without completing" if end[0] == "return" else "raised RuntimeError .*: the response was cut short"
    ws.server.wait_line(said, after=mark)


@pytest.mark.parametrize("size", [3, 5])
def test_x1_s6_a_denial_of_another_length_than_it_says(ws: Probe, size: int) -> None:
    """X1 S6: an exception, and a 500."""
    steps = [("send", denial(start(401, [(b"content-length", b"4")]))), ("attempt", denial(body(bytes(size))))]
    it = script(*steps)
    assert raw(ws.port, handshake(it.target)).startswith(b"HTTP/1.1 500 ")
    assert "ResponseError" in ws.ended(it)[0]


def test_x1_a_denial_after_accept_raises(ws: Probe) -> None:
    """X1: the socket is not disturbed."""
    it = script(("accept",), ("attempt", denial(start(404))), ("attempt", denial(body(b"x"))), ("say", "still open"))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "still open"
    assert all("Exception" in names for names in ws.ended(it))


# -- W3: what is no handshake


def without(*names: str) -> list[tuple[str, str]]:
    return [item for item in ASKING if item[0] not in names]


def asking(**changes: str) -> list[tuple[str, str]]:
    """The fields of a handshake with other values, `key`, `version` and so on; more fields are appended."""
    names = {"key": "Sec-WebSocket-Key", "version": "Sec-WebSocket-Version", "connection": "Connection"}
    names |= {"upgrade": "Upgrade"}
    changed = {names[name]: value for name, value in changes.items()}
    return [(name, changed.get(name, value)) for name, value in ASKING]


K, V, P, X = "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"
REFUSED: list[tuple[str, int, list[tuple[str, str]]]] = [
    ("no key", 400, without(K)),
    ("empty key", 400, asking(key="")),
    ("key of 15 bytes", 400, asking(key="AAAAAAAAAAAAAAAAAAAA")),
    ("key of 17 bytes", 400, asking(key="AAAAAAAAAAAAAAAAAAAAAAA=")),
    ("key of 18 bytes", 400, asking(key="AAAAAAAAAAAAAAAAAAAAAAAA")),
    ("key without padding", 400, asking(key=KEY.rstrip("="))),
    ("key with bits in its padding", 400, asking(key="AAAAAAAAAAAAAAAAAAAAAB==")),
    ("key in another alphabet", 400, asking(key="AAAA-_AAAAAAAAAAAAAAAA==")),
    ("key with a space", 400, asking(key="AAAAAAAA AAAAAAAAAAAAA==")),
    ("key in quotes", 400, asking(key=f'"{KEY}"')),
    ("two keys", 400, [*ASKING, (K, "AAAAAAAAAAAAAAAAAAAAAA==")]),
    ("the same key twice", 400, [*ASKING, (K, KEY)]),
    ("no version", 400, without(V)),
    ("empty version", 400, asking(version="")),
    ("version 8", 426, asking(version="8")),
    ("version 14", 426, asking(version="14")),
    ("version 013", 426, asking(version="013")),
    ("version +13", 426, asking(version="+13")),
    ("version 13.0", 426, asking(version="13.0")),
    ("versions in a list", 426, asking(version="13, 8")),
    ("version twice", 426, [*ASKING, (V, "13")]),
    ("version thirteen", 426, asking(version="thirteen")),
    ("a body", 400, [*ASKING, ("Content-Length", "4")]),
    ("a chunked body", 400, [*ASKING, ("Transfer-Encoding", "chunked")]),
    ("subprotocol with a space", 400, [*ASKING, (P, "a b")]),
    ("subprotocol in quotes", 400, [*ASKING, (P, '"a"')]),
    ("subprotocol with parameter", 400, [*ASKING, (P, "a;b")]),
    ("subprotocol beyond ASCII", 400, [*ASKING, (P, "\xe9")]),
    ("extension without name", 400, [*ASKING, (X, "; a")]),
    ("extension with a value", 400, [*ASKING, (X, "a=b")]),
    ("extension with an empty parameter", 400, [*ASKING, (X, "a;;b")]),
    ("extension with an empty value", 400, [*ASKING, (X, "a; b=")]),
    ("extension with an open quote", 400, [*ASKING, (X, 'a; b="c')]),
    ("extension with quoted space", 400, [*ASKING, (X, 'a; b="c d"')]),
    ("extensions without comma", 400, [*ASKING, (X, "a b")]),
]


@pytest.mark.parametrize(("status", "fields"), [pytest.param(*case, id=what) for what, *case in REFUSED])
def test_w3_bad_handshakes(ws: Probe, status: int, fields: list[tuple[str, str]]) -> None:
    """W3 P10: refused before the application is called, in the server's own words, and the connection ends."""
    it = script(("note", "called"))
    with ws.client() as client:
        client.send(request_bytes("GET", it.target, fields) + request_bytes("GET", "/not-served"))
        response = client.read_response()
        assert (response.status, response.header(b"connection")) == (
            status,
            b"close, upgrade" if status == 426 else b"close",
        )
        assert response.body.startswith(b"%d " % status)
        assert response.header(b"sec-websocket-version") == (b"13" if status == 426 else None)
        assert response.header(b"upgrade") == (b"websocket" if status == 426 else None)
        assert client.eof()
    assert ws.records(it) == []


def test_w3_http_1_0(ws: Probe) -> None:
    """W3"""
    answer = raw(ws.port, handshake().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_w3_p1_without_host(ws: Probe) -> None:
    """W3 P1"""
    assert raw(ws.port, handshake().replace(b"Host", b"Toast")).startswith(b"HTTP/1.1 400 ")


def test_w3_hostile_extensions_are_read_in_no_time(ws: Probe) -> None:
    """W3: nothing in the grammar makes the reader go back and forth."""
    began = time.monotonic()
    for value in (
        "a" + " " * 8000,
        "a" + "; b" * 2600 + "!",
        "a;" * 4000,
        "a; b=" + '"' * 8000,
        "a;b=c" * 1600,
        "," * 8000,
    ):
        raw(ws.port, handshake("/", [(X, value)]) + frame(CLOSE))
    assert time.monotonic() - began < 30  # s; hundredths of one, if it is in proportion


ORDINARY: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("POST", "POST", list(ASKING)),
    ("OPTIONS", "OPTIONS", list(ASKING)),
    ("get", "get", list(ASKING)),
    ("no Connection", "GET", without("Connection")),
    ("other Connection", "GET", asking(connection="keep-alive")),
    ("longer word in Connection", "GET", asking(connection="upgraded")),
    ("words in Connection without comma", "GET", asking(connection="keep-alive upgrade")),
    ("no Upgrade", "GET", without("Upgrade")),
    ("other Upgrade", "GET", asking(upgrade="h2c")),
    ("longer word in Upgrade", "GET", asking(upgrade="websockets")),
    ("version in Upgrade", "GET", asking(upgrade="websocket/13")),
]


@pytest.mark.parametrize(("method", "fields"), [pytest.param(*case, id=what) for what, *case in ORDINARY])
def test_w3_what_does_not_ask_for_a_websocket(ws: Probe, method: str, fields: list[tuple[str, str]]) -> None:
    """W3 P14: is a request like any other, on a connection that goes on."""
    with ws.client() as client:
        scope = parsed(client.request(method, "/plain", fields))
        assert (scope["type"], scope["method"]) == ("http", method)
        assert parsed(client.request("GET", "/"))["path"] == "/"


ASKED: list[tuple[str, list[tuple[str, str]]]] = [
    ("several words in Connection", asking(connection="keep-alive, Upgrade")),
    ("any case", asking(connection="x ,UPGRADE", upgrade="WebSocket")),
    ("two Connection fields", [("Connection", "keep-alive"), *ASKING]),
    ("close, too", asking(connection="close, upgrade")),
    ("several words in Upgrade", asking(upgrade="h2c, websocket")),
    ("empty members", asking(connection=", upgrade,", upgrade=",websocket")),
    ("white space", asking(connection="\tupgrade ", key=f"  {KEY}\t", version=" 13 ")),
    ("an empty body", [*ASKING, ("Content-Length", "0")]),
    ("no subprotocols in the list", [*ASKING, (P, " , ,")]),
    ("unknown extensions", [*ASKING, (X, 'x-a, x-b; c; d=1; e="f"'), (X, "x-g")]),
    ("lower-case names", [(name.lower(), value) for name, value in ASKING]),
]


@pytest.mark.parametrize("fields", [pytest.param(fields, id=what) for what, fields in ASKED])
def test_w3_ways_to_ask(ws: Probe, fields: list[tuple[str, str]]) -> None:
    """W3"""
    with WsClient.ask(ws.port, request_bytes("GET", "/echo", fields)).opened() as client:
        client.say("there")
        assert client.hear() == "there"


@pytest.mark.parametrize("value", ["x-a,,x-b", "x-a, ,", ",x-a", ",,permessage-deflate,,"])
def test_w3_empty_members_in_the_list_of_extensions(ws: Probe, value: str) -> None:
    """W3: a recipient must ignore them (RFC 9110, 5.6.1.2)."""
    with WsClient(ws.port, "/echo", [(X, value)]).opened() as client:
        client.say("there")
        assert client.hear() == "there"


def test_w3_the_handshake_may_follow_other_requests(ws: Probe) -> None:
    """W3 S14: pipelined, too."""
    ordinary = request_bytes("GET", "/first")
    with WsClient.ask(ws.port, ordinary * 2 + handshake("/echo") + frame(TEXT, b"early")) as client:
        assert [parsed(client.read_response())["path"] for _ in range(2)] == ["/first"] * 2
        assert client.opened().hear() == "early"


# -- W4: the scope


def scope_of(address: Any, target: str = "/scope", headers: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    with WsClient(address, target, headers).opened() as client:
        scope = ast.literal_eval(str(client.hear()))
        client.send(close_frame())
        assert client.ended() == (1000, "")
    assert isinstance(scope, dict)
    return scope


@everywhere
def test_w4_scope(ws: Probe) -> None:
    """W4 A2 A9: every key."""
    client = WsClient(ws.port, "/a%2Fb%20%C3%BC?q=%20+&r", [("X-A", " 1 "), ("Cookie", "a=1"), ("Cookie", "b=2")])
    with client.opened():
        own = client.sock.getsockname()
        message = client.hear()
    assert ast.literal_eval(str(message)) == {
        "is a": "dict",
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": "/a/b ü",
        "raw_path": b"/a%2Fb%20%C3%BC",
        "query_string": b"q=%20+&r",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1"),
            *((name.lower().encode(), value.encode()) for name, value in ASKING),
            (b"x-a", b"1"),
            (b"cookie", b"a=1"),
            (b"cookie", b"b=2"),
        ],
        "client": own,
        "server": ("127.0.0.1", ws.port),
        "subprotocols": [],
        "state": {"shared": []},
        "extensions": {"websocket.http.response": {}},
    }


def test_w4_addresses_of_a_unix_socket(ws: Probe) -> None:
    """W4 H10 H11"""
    scope = scope_of(ws.socket_path)
    assert (scope["client"], scope["server"]) == (None, (ws.socket_path, None))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (["chat"], ["chat"]),
        (["b, a,c"], ["b", "a", "c"]),
        (["b,a", "c"], ["b", "a", "c"]),
        (["c", "", " b ,, a\t"], ["c", "b", "a"]),
        (["graphql-ws, v1.x.example.com, !#$%&'*+-.^_`|~"], ["graphql-ws", "v1.x.example.com", "!#$%&'*+-.^_`|~"]),
    ],
)
def test_w4_subprotocols(ws: Probe, fields: list[str], found: list[str]) -> None:
    """W4: from one list or from many, in order."""
    assert scope_of(ws.port, "/", [(P, value) for value in fields])["subprotocols"] == found


def test_w4_a3_nothing_leaks_into_the_next_scope(pingless: Probe) -> None:
    """W4 A3 H12: only what is inside of the state's values is shared."""
    scopes = [scope_of(pingless.port, path, [(P, "a")]) for path in ("/clean", "/mutate", "/clean")]
    shared = [scope["state"].pop("shared") for scope in scopes]
    for scope in scopes:
        del scope["path"], scope["raw_path"], scope["client"]
        assert scope == scopes[0]
    assert shared == [[], [], ["seen by all"]]


def test_w4_h7_root_path_and_no_lifespan(serve: Callable[..., Server]) -> None:
    """W4 H7 H12"""
    scope = scope_of(serve(WS_APP, "--root-path", "/mount", "--lifespan", "off").port, "/a")
    assert (scope["root_path"], scope["path"], scope["raw_path"]) == ("/mount", "/mount/a", b"/mount/a")
    assert "state" not in scope


# -- W5: accept


def accepting(**fields: Any) -> dict[str, Any]:
    return {**ACCEPT, **fields}


def test_w5_subprotocol_and_headers(ws: Probe) -> None:
    """W5 S3: in the application's order, duplicates kept."""
    headers = [(b"X-A", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), [b"x-a", b"caf\xe9"]]
    it = script(("send", accepting(subprotocol="b", headers=headers, novelty=1)))
    with WsClient(ws.port, it.target, [(P, "a, b")]).opened() as client:
        assert client.response
        assert client.response.header(b"sec-websocket-protocol") == b"b"
        given = [item for item in client.response.headers if item[0] in (b"x-a", b"set-cookie")]
        assert given == [(name.lower(), value) for name, value in headers]
        names = [name for name, _ in client.response.headers]
        assert names.count(b"date") == names.count(b"server") == 1
        assert b"content-length" not in names
        assert b"sec-websocket-extensions" not in names


@pytest.mark.parametrize("fields", [{}, {"subprotocol": None, "headers": None}, {"headers": []}])
def test_w5_no_subprotocol_is_chosen_unless_the_application_does(ws: Probe, fields: Any) -> None:
    """W5"""
    with WsClient(ws.port, script(("send", accepting(**fields))).target, [(P, "a, b")]).opened() as client:
        assert client.response
        assert client.response.header(b"sec-websocket-protocol") is None


BAD_ACCEPTS: list[tuple[str, Any]] = [
    ("subprotocol that was not offered", accepting(subprotocol="c")),
    ("subprotocol in another case", accepting(subprotocol="A")),
    ("two subprotocols", accepting(subprotocol="a, b")),
    ("empty subprotocol", accepting(subprotocol="")),
    ("subprotocol that splits", accepting(subprotocol="a\r\nx-split: 1")),
    ("bytes subprotocol", accepting(subprotocol=b"a")),
    ("list of subprotocols", accepting(subprotocol=["a"])),
    ("CRLF in a value", accepting(headers=[(b"x-a", b"1\r\nx-split: 1")])),
    ("LF in a value", accepting(headers=[(b"x-a", b"1\nx-split: 1")])),
    ("CR in a value", accepting(headers=[(b"x-a", b"1\rx-split: 1")])),
    ("NUL in a value", accepting(headers=[(b"x-a", b"x-split\0")])),
    ("CRLF in a name", accepting(headers=[(b"x-a: 1\r\nx-split", b"1")])),
    ("empty name", accepting(headers=[(b"", b"x-split")])),
    ("name with a colon", accepting(headers=[(b":x-split", b"1")])),
    ("name with a space", accepting(headers=[(b"x-split ", b"1")])),
    ("end of the head", accepting(headers=[(b"x-a", b"1\r\n\r\nx-split")])),
    ("str name", accepting(headers=[("x-split", b"1")])),
    ("str value", accepting(headers=[(b"x-split", "1")])),
    ("header of one item", accepting(headers=[(b"x-split",)])),
    ("int headers", accepting(headers=1)),
    ("a good header before a bad one", accepting(headers=[(b"x-split", b"1"), (b"x-a", b"\n")])),
    ("own Sec-WebSocket-Protocol", accepting(headers=[(b"Sec-WebSocket-Protocol", b"a")])),
    ("own Sec-WebSocket-Accept", accepting(headers=[(b"sec-websocket-accept", b"a")])),
    ("own Sec-WebSocket-Extensions", accepting(headers=[(b"sec-websocket-extensions", b"permessage-deflate")])),
    ("own Upgrade", accepting(headers=[(b"upgrade", b"h2c")])),
]


@pytest.mark.parametrize("event", [pytest.param(event, id=what) for what, event in BAD_ACCEPTS])
def test_w5_s10_a_bad_accept_raises(ws: Probe, event: Any) -> None:
    """W5 S10 A5: nothing of it is sent, and a good one may follow; or the exception is the application's end."""
    it = script(("attempt", event), ("send", accepting(subprotocol="b")), ("say", "open"))
    with WsClient(ws.port, it.target, [(P, "a, b")]).opened() as client:
        assert client.response
        assert b"x-split" not in repr(client.response.headers).encode()
        assert client.response.all(b"sec-websocket-protocol") == [b"b"]
        assert client.hear() == "open"
    assert "Exception" in ws.ended(it)[0]
    answer = raw(ws.port, handshake(script(("send", event)).target, [(P, "a, b")]))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"x-split" not in answer


def test_w5_fields_of_the_connection_are_the_servers(ws: Probe) -> None:
    """W5: those of the framing are left out, as in any response."""
    headers = [(b"connection", b"close"), (b"transfer-encoding", b"chunked"), (b"content-length", b"5")]
    with WsClient(ws.port, script(("send", accepting(headers=headers)), ("say", "x")).target).opened() as client:
        assert client.hear() == "x"


def test_w5_s11_own_date_and_server(ws: Probe) -> None:
    """W5 S11: those of the application replace the server's."""
    it = script(("send", accepting(headers=[(b"Server", b"mine"), (b"date", b"today")])))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.response
        assert client.response.all(b"server") == [b"mine"]
        assert client.response.all(b"date") == [b"today"]


def test_w5_accept_only_once(ws: Probe) -> None:
    """W5 S15"""
    it = script(("accept",), ("attempt", ACCEPT), ("say", "still open"))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "still open"
    assert "RuntimeError" in ws.ended(it)[0]


# -- before and at the 101


@everywhere
@pytest.mark.parametrize("late", [False, True], ids=["at once", "accepted later"])
def test_w6_frames_that_come_with_the_handshake(ws: Probe, late: bool) -> None:
    """W6: a client that does not wait for the 101; thousands of them in their order, the last one in two parts."""
    flag = next(flags)
    wait = [("receive",), ("wait", flag)] if late else []
    it = script(*wait, ("send", ACCEPT), *([] if late else [("receive",)]), ("echo",))
    messages = [f"message {number}" for number in range(2000)]
    last = frame(BINARY, b"the last one")
    early = b"".join(frame(TEXT, message.encode()) for message in messages) + last[:9]
    with WsClient(ws.port, it.target, early=early) as client:
        if late:
            ws.noted(it)
            ws.set(flag)
        client.opened()
        assert [client.hear() for _ in messages] == messages
        client.send(last[9:])
        assert client.hear() == b"the last one"
        assert client.part() == (1000, "")


def test_w6_more_than_can_wait_comes_with_the_handshake(ws: Probe) -> None:
    """W6 W15: it is left in the kernel until the application accepts, and then arrives."""
    flag = next(flags)
    it = script(("receive",), ("wait", flag), ("send", ACCEPT), ("tally",))
    with WsClient(ws.port, it.target, early=frame(BINARY, bytes(200000)) * 5) as client:
        ws.noted(it)
        ws.set(flag)
        client.opened()
        client.part()
    assert ws.ended(it)[1:] == [(5, 1000000), disconnect(1000)]


@pytest.mark.parametrize(
    ("early", "code", "seen"),
    [
        (frame(TEXT, b"a") + close_frame(3000, b"early"), 3000, [received("a"), disconnect(3000, "early")]),
        (frame(TEXT, b"a") + frame(TEXT, b"b", mask=b""), 1002, [received("a"), disconnect(1002)]),
        (frame(PING, b"p") + close_frame(None), None, [disconnect(1005)]),
    ],
    ids=["close", "nonsense", "close without code"],
)
def test_w8_the_end_comes_with_the_handshake(ws: Probe, early: bytes, code: int | None, seen: list[Any]) -> None:
    """W8 W13"""
    it = script(("accept",), ("until", "websocket.disconnect"))
    with WsClient(ws.port, it.target, early=early).opened() as client:
        *_, last = client.frames()
        assert last.opcode == CLOSE
        assert last.payload[:2] == (struct.pack("!H", code) if code else b"")
    assert [{**event, "reason": ""} for event in ws.ended(it)] == [{**event, "reason": ""} for event in seen]


@pytest.mark.parametrize("kind", ["close", "reset", "half"])
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_w8_a_client_that_does_not_wait_for_the_answer(ws: Probe, kind: str, unix: bool) -> None:
    """W8 A7: connect, then disconnect with 1006; what `accept` may raise then is no failure."""
    flag = next(flags)
    it = script(("receive",), ("receive",), ("wait", flag), ("send", ACCEPT), ("receive",))
    with WsClient(ws.socket_path if unix else ws.port, it.target) as client:
        ws.noted(it)
        leave(client, kind)
        assert ws.noted(it, 2) == [CONNECT, disconnect(1006)]
        ws.set(flag)
        assert all(event == disconnect(1006) for event in ws.ended(it)[2:])
    assert errors(ws, it) == []


@pytest.mark.parametrize("kind", ["close", "half"])
def test_w8_a_client_that_has_gone_before_accept(pingless: Probe, kind: str) -> None:
    """W8: an application that has only asked for connect must hear of it after accept; no ping will tell."""
    flag = next(flags)
    it = script(("receive",), ("wait", flag), ("attempt", ACCEPT), ("receive",))
    with WsClient(pingless.port, it.target) as client:
        pingless.noted(it)
        leave(client, kind)
        assert pingless.records(it)  # a round trip: the server has seen the end
        pingless.set(flag)
        wait_for(lambda: len(pingless.records(it)) > 2)
        assert pingless.records(it)[2] == disconnect(1006)


# -- W6, A5, A8: messages


MESSAGES: list[tuple[str, bytes, str | bytes]] = [
    ("text", frame(TEXT, b"text"), "text"),
    ("bytes", frame(BINARY, b"\xff\x00"), b"\xff\x00"),
    ("empty text", frame(TEXT), ""),
    ("empty bytes", frame(BINARY), b""),
    ("text of 125 bytes", frame(TEXT, b"x" * 125), "x" * 125),
    ("text of 126 bytes", frame(TEXT, b"x" * 126), "x" * 126),
    ("text of 65535 bytes", frame(TEXT, b"x" * 65535), "x" * 65535),
    ("text of 65536 bytes", frame(TEXT, b"x" * 65536), "x" * 65536),
    ("other mask", frame(TEXT, b"text", mask=b"\0\0\0\0"), "text"),
    ("NUL and newlines", frame(TEXT, b"\0\r\n"), "\0\r\n"),
    ("noncharacters", frame(TEXT, "\ufffe\uffff\ufdd0\ufeff".encode()), "\ufffe\uffff\ufdd0\ufeff"),
    ("fragments", fragments(TEXT, b"a", b"b", b"c"), "abc"),
    ("fragments of bytes", fragments(BINARY, b"\xff", b"\xfe"), b"\xff\xfe"),
    ("empty fragments", fragments(TEXT, b"", b"", b"x", b"", b""), "x"),
    ("nothing but empty fragments", fragments(BINARY, b"", b"", b""), b""),
    (
        "a character in four fragments",
        fragments(TEXT, *(bytes([byte]) for byte in "\U0001f600".encode())),
        "\U0001f600",
    ),
    ("a large fragment and a small", fragments(BINARY, bytes(100000), b"x"), bytes(100000) + b"x"),
    ("many fragments", fragments(TEXT, *[b"x"] * 5000), "x" * 5000),
]


@pytest.mark.parametrize(("wire", "message"), [pytest.param(*case, id=what) for what, *case in MESSAGES])
def test_w6_receive(ws: Probe, wire: bytes, message: str | bytes) -> None:
    """W6: exactly one of text and bytes; whole frames, and frames that come in three parts with a ping behind them."""
    it = script(("accept",), ("receive",), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        client.send(wire)
        ws.noted(it)
        for part in (wire[:1], wire[1:5], wire[5:] + frame(PING, b"?")):
            client.send(part)
            ws.request("/")  # so that it comes alone
        assert client.read_frame() == Frame(PONG, b"?")
    assert ws.ended(it) == [received(message)] * 2


def test_w6_control_frames_between_fragments(ws: Probe) -> None:
    """W6 W7"""
    with WsClient(ws.port, "/echo").opened() as client:
        pieces = [frame(TEXT, b"a", False), frame(PING, b"1"), frame(PONG, b"2"), frame(CONTINUED, b"b", False)]
        client.send(b"".join([*pieces, frame(PING), frame(PING, b"3"), frame(CONTINUED, b"c")]))
        assert [client.read_frame() for _ in range(3)] == [Frame(PONG, b"1"), Frame(PONG, b""), Frame(PONG, b"3")]
        assert client.hear() == "abc"


@pytest.mark.parametrize(
    ("event", "got"),
    [
        ({"text": "x"}, "x"),
        ({"bytes": b"x"}, b"x"),
        ({"text": "x", "bytes": None}, "x"),
        ({"bytes": b"x", "text": None}, b"x"),
        ({"text": ""}, ""),
        ({"bytes": b"", "text": None}, b""),
        ({"text": "x", "novelty": 1}, "x"),
    ],
)
def test_w6_a4_send(ws: Probe, event: Any, got: str | bytes) -> None:
    """W6 A4: empty messages are messages, too."""
    with WsClient(
        ws.port, script(("accept",), ("send", {"type": "websocket.send", **event})).target
    ).opened() as client:
        assert client.hear() == got
        assert client.closed() == (1000, "")


@pytest.mark.parametrize("kind", ["bytearray", "memoryview"])
def test_w6_a5_bytes_like_messages_are_taken(ws: Probe, kind: str) -> None:
    """W6 A5"""
    event = {"type": "websocket.send", "bytes": b"like bytes"}
    with WsClient(ws.port, script(("accept",), ("attempt_made", event, "bytes", kind)).target).opened() as client:
        assert client.hear() == b"like bytes"


BAD_EVENTS: list[tuple[str, Any]] = [
    ("neither", {"type": "websocket.send"}),
    ("two Nones", {"type": "websocket.send", "bytes": None, "text": None}),
    ("both", {"type": "websocket.send", "bytes": b"x", "text": "x"}),
    ("two empty ones", {"type": "websocket.send", "bytes": b"", "text": ""}),
    ("bytes as text", {"type": "websocket.send", "text": b"x"}),
    ("text as bytes", {"type": "websocket.send", "bytes": "x"}),
    ("int as text", {"type": "websocket.send", "text": 1}),
    ("list as bytes", {"type": "websocket.send", "bytes": [1]}),
    ("lone surrogate", {"type": "websocket.send", "text": "\ud800"}),
    ("unknown type", {"type": "websocket.novelty"}),
    ("type of a receive", {"type": "websocket.receive", "text": "x"}),
    ("type of a response", {"type": "http.response.body", "body": b"x"}),
    ("no type", {"text": "x"}),
    ("no dict", None),
]


@pytest.mark.parametrize("event", [pytest.param(event, id=what) for what, event in BAD_EVENTS])
def test_w6_a5_a_bad_event_raises(ws: Probe, event: Any) -> None:
    """W6 A5: nothing is sent for it, and the socket goes on."""
    it = script(("accept",), ("attempt", event), ("say", "still open"))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "still open"
    assert "Exception" in ws.ended(it)[0]


@pytest.mark.parametrize("event", [{"type": "websocket.send", "text": "x"}, {"type": "websocket.receive"}])
def test_w6_send_before_accept_raises(ws: Probe, event: Any) -> None:
    """W6 S15"""
    it = script(("attempt", event), ("send", ACCEPT), ("say", "open"))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "open"
    assert "Exception" in ws.ended(it)[0]


def test_w6_many_messages_stay_in_order(ws: Probe) -> None:
    """W6"""
    with WsClient(ws.port, "/echo").opened() as client:
        for turn in range(20):
            messages = [f"{turn}.{number}" for number in range(100)]
            client.say(*messages)
            assert [client.hear() for _ in messages] == messages


def test_w6_large_messages(ws: Probe) -> None:
    """W6: of several MiB both ways, in one frame."""
    text = "\u20ac\u00e9x" * 400000
    with WsClient(ws.port, "/echo").opened() as client:
        client.say(text)
        assert client.hear() == text


def test_w6_a8_messages_from_other_tasks_do_not_mix(ws: Probe) -> None:
    """A8: `send` and `receive` in several tasks at once; larger messages than fit any buffer."""
    letters = "abcdefgh"
    says = [("shout", letter, 300000) for letter in letters]
    it = script(("accept",), ("together", [*says, ("receive",), ("receive",)]))
    with WsClient(ws.port, it.target).opened() as client:
        client.say("one", "two")
        assert sorted(str(client.hear()) for _ in letters) == [letter * 300000 for letter in letters]
    assert sorted(event["text"] for event in ws.ended(it)) == ["one", "two"]


def test_w6_r6_a_cancelled_receive_loses_nothing(ws: Probe) -> None:
    """R6: CancelledError comes through, and `receive` can be called again."""
    it = script(("accept",), ("cancelled_receive",), ("cancelled_receive",), ("say", "now"), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "now"
        client.say("then")
        assert ws.ended(it) == ["cancelled", "cancelled", received("then")]


# -- W7: pings


def test_w7_pings_are_answered(ws: Probe) -> None:
    """W7: with their payload, in their order, whatever the application does."""
    flag = next(flags)
    payloads = [b"", b"x", bytes(range(125)), b"\xff\xfe", b"y"]
    with WsClient(ws.port, script(("accept",), ("wait", flag), ("echo",)).target).opened() as client:
        for payload in payloads:
            client.send(frame(PING, payload))
            assert client.read_frame() == Frame(PONG, payload)
        client.send(b"".join(frame(PING, payload) for payload in payloads) + frame(TEXT, b"text") + frame(PING, b"z"))
        assert [client.read_frame().payload for _ in payloads] == payloads
        assert client.read_frame() == Frame(PONG, b"z")
        ws.set(flag)
        assert client.hear() == "text"


def test_w7_pongs_that_nobody_asked_for_are_ignored(ws: Probe) -> None:
    """W7"""
    with WsClient(ws.port, "/echo").opened() as client:
        client.send(frame(PONG) + frame(PONG, b"unasked") + frame(TEXT, b"text"))
        assert client.hear() == "text"


@pytest.fixture(scope="module", params=WS_PAIRS, ids="-".join)
def pinging(request: pytest.FixtureRequest) -> Iterator[Probe]:
    """A server that pings all the time."""
    parser, loop = request.param
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    pings = ("--ws-ping-interval", "0.3s", "--ws-ping-timeout", "3s", "--ws-close-timeout", "1s")
    with Server(WS_APP, "--http", parser, "--loop", loop, *pings) as server:
        yield Probe(server)


def ping(client: WsClient) -> bytes:
    """The payload of the ping that must come next."""
    got = client.read_frame()
    assert got.opcode == PING, got
    return got.payload


def test_w7_a_client_that_answers_stays_others_do_not(pinging: Probe) -> None:
    """W7 W12: one that says nothing, or the pong of another ping, is closed with 1011, which the application hears."""
    pongs = [b"", frame(PONG) * 3, frame(PONG, b"other")]
    others = [script(("accept",), ("echo",), ("receive",)) for _ in pongs]
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(WsClient(pinging.port, "/echo").opened())
        silent = [stack.enter_context(WsClient(pinging.port, it.target).opened()) for it in others]
        for other, pong in zip(silent, pongs, strict=True):
            assert len(ping(other)) > 0
            other.send(pong)
        payloads = []
        for _ in range(3):
            payloads.append(ping(client))
            client.send(frame(PONG, payloads[-1]))
        assert len(set(payloads)) == len(payloads)
        for it, other in zip(others, silent, strict=True):
            assert other.ended()[0] == 1011
            assert [event["code"] for event in pinging.ended(it)] == [1011, 1011]
        client.say("still there")
        assert answering(client) == Frame(TEXT, b"still there")


def answering(client: WsClient) -> Frame:
    """The next frame that is no ping; those are answered."""
    while (got := client.read_frame()).opcode == PING:
        client.send(frame(PONG, got.payload))
    return got


@pytest.mark.parametrize("pinging", WS_PAIRS[1:], ids="-".join, indirect=True)
def test_w7_w15_an_application_that_does_not_receive_is_not_a_silent_client(pinging: Probe) -> None:
    """W7 W15: the answers wait behind what is not read; another client's end shows that the time has passed."""
    flag, size, count = next(flags), 60000, 20
    it = script(("accept",), ("wait", flag), ("several", count), ("echo",))
    with WsClient(pinging.port, it.target).opened() as client:
        client.send(frame(BINARY, bytes(size)) * count)
        client.send(frame(PONG, ping(client)))
        with WsClient(pinging.port, "/echo").opened() as other:
            ping(other)
            assert other.ended()[0] == 1011
        assert client.silent()
        pinging.set(flag)
        assert pinging.noted(it) == [[size] * count]
        client.say("answer")
        assert answering(client) == Frame(TEXT, b"answer")


@pytest.mark.parametrize("pinging", WS_PAIRS[:1], ids="-".join, indirect=True)
def test_w7_a_client_in_the_middle_of_a_large_frame_is_not_silent(pinging: Probe) -> None:
    """W7: no pong may stand within a frame (RFC 6455, 5.4), so that its next bytes are all that it can say."""
    wire = frame(BINARY, bytes(2**20))
    with WsClient(pinging.port, "/echo").opened() as client:
        for position in range(0, len(wire), 2**14):
            client.send(wire[position : position + 2**14])
            time.sleep(0.08)  # a slow network: 5 s in all
        assert answering(client) == Frame(BINARY, bytes(2**20))


def test_w7_an_application_that_blocks_the_loop_is_not_a_silent_client(pinging: Probe) -> None:
    """W7: the answer lay in the kernel when its time was up."""
    name = next(flags)
    with WsClient(pinging.port, script(("accept",), ("receive",), ("block", 4, name), ("echo",)).target) as client:
        payload = ping(client.opened())
        client.say("go")
        pinging.server.wait_line(f"{name}: blocking")
        client.send(frame(PONG, payload))
        assert ping(client) != payload


# -- W8: the client's close


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 3000, 3999, 4000, 4999])
def test_w8_codes_of_the_client(ws: Probe, code: int) -> None:
    """W8: told to the application, and echoed; then the server ends the connection."""
    it = script(("accept",), ("echo",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.part(code)[0] == code
    assert ws.ended(it) == [disconnect(code)]


def test_w8_code_1014_of_the_client(ws: Probe) -> None:
    """W8: registered, as 1012 and 1013 are, and as an application may send it."""
    it = script(("accept",), ("echo",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.part(1014)[0] == 1014
    assert ws.ended(it) == [disconnect(1014)]


@pytest.mark.parametrize("reason", ["", "x" * 123, "\u20ac" * 41, "a\r\nb\0"])
def test_w8_reasons_of_the_client(ws: Probe, reason: str) -> None:
    """W8"""
    it = script(("accept",), ("echo",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.part(3001, reason.encode())[0] == 3001
    assert ws.ended(it) == [disconnect(3001, reason)]


def test_w8_close_without_a_code(ws: Probe) -> None:
    """W8: 1005 for the application, and never on the wire."""
    it = script(("accept",), ("echo",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.part(None) == (None, "")
    assert ws.ended(it) == [disconnect(1005)]


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("kind", ["close", "reset", "half"])
def test_w8_a_lost_connection(ws: Probe, kind: str, unix: bool) -> None:
    """W8: 1006; all that came before still arrives, and no answer is sent to a client that has said its last word."""
    it = script(("accept",), ("say", "not read"), ("tally",), ("receive",))
    with WsClient(ws.socket_path if unix else ws.port, it.target).opened() as client:
        if kind != "reset":
            assert client.hear() == "not read"
            client.send(frame(TEXT, b"x") * 3000)
        leave(client, kind)
        if kind == "half":
            assert list(client.frames()) == []
        count = 0 if kind == "reset" else 3000
        assert ws.ended(it) == [(count, count), disconnect(1006), disconnect(1006)]
    assert errors(ws, it) == []


@pytest.mark.parametrize(
    "rest", [b"", frame(TEXT, b"half")[:-2], frame(TEXT, b"a", fin=False), frame(BINARY, bytes(99999))[:-1]]
)
def test_w8_a_connection_lost_within_a_message(ws: Probe, rest: bytes) -> None:
    """W8: what is not whole never arrives."""
    it = script(("accept",), ("until", "websocket.disconnect"))
    with WsClient(ws.port, it.target).opened() as client:
        client.send(frame(TEXT, b"whole") + rest)
    assert ws.ended(it) == [received("whole"), disconnect(1006)]


def test_w8_messages_before_the_close_frame_arrive(ws: Probe) -> None:
    """W8: though they are received when the socket is long closed; those behind it do not."""
    flag = next(flags)
    it = script(("accept",), ("wait", flag), ("tally",), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        client.send(frame(TEXT, b"x") * 500 + close_frame(3002) + frame(TEXT, b"behind") * 10)
        assert client.ended()[0] == 3002
        ws.set(flag)
    assert ws.ended(it) == [(500, 500), disconnect(3002), disconnect(3002)]


def test_w8_a_close_frame_in_parts(ws: Probe) -> None:
    """W8"""
    it = script(("accept",), ("echo",))
    with WsClient(ws.port, it.target).opened() as client:
        for byte in close_frame(3003, b"slowly"):
            client.send(bytes([byte]))
        assert client.ended() == (3003, "slowly")
    assert ws.ended(it) == [disconnect(3003, "slowly")]


def test_w8_a_client_that_closes_and_does_not_read(ws: Probe) -> None:
    """W8: close frame and end of the connection at once."""
    it = script(("accept",), ("echo",))
    with WsClient(ws.port, it.target).opened() as client:
        client.send(close_frame(3004))
        client.close()
    assert ws.ended(it) == [disconnect(3004)]


# -- W9: the application's close


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({}, (1000, "")),
        ({"code": None, "reason": None}, (1000, "")),
        ({"code": 1000, "reason": "done"}, (1000, "done")),
        *(({"code": code}, (code, "")) for code in (1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014)),
        *(({"code": code, "reason": "\u20ac"}, (code, "\u20ac")) for code in (3000, 3999, 4000, 4999)),
        ({"reason": "x" * 123}, (1000, "x" * 123)),
        ({"reason": "x" * 500}, (1000, "x" * 123)),
        ({"reason": "xx" + "\u20ac" * 41}, (1000, "xx" + "\u20ac" * 40)),
        ({"reason": "x" + "\U0001f600" * 31}, (1000, "x" + "\U0001f600" * 30)),
        ({"code": 1000, "novelty": 1}, (1000, "")),
    ],
)
def test_w9_codes_and_reasons_of_the_application(ws: Probe, event: Any, said: Any) -> None:
    """W9 A4: 1000 by default; a reason that is too long is cut, not within a character."""
    it = script(("accept",), ("send", {"type": "websocket.close", **event}), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.closed() == said
        client.send(close_frame(4999))
        assert client.eof()
    assert ws.ended(it) == [disconnect(4999)]


BAD_CLOSES: list[tuple[str, Any]] = [
    *((str(code), {"code": code}) for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65536, -1)),
    ("str code", {"code": "1000"}),
    ("float code", {"code": 1000.0}),
    ("bool code", {"code": True}),
    ("bytes reason", {"reason": b"x"}),
    ("int reason", {"reason": 1}),
]


@pytest.mark.parametrize("event", [pytest.param(event, id=what) for what, event in BAD_CLOSES])
def test_w9_a5_a_bad_close_raises(ws: Probe, event: Any) -> None:
    """W9 A5: nothing is sent for it, and the socket goes on."""
    it = script(("accept",), ("attempt", {"type": "websocket.close", **event}), ("say", "still open"))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "still open"
    assert "Exception" in ws.ended(it)[0]


def test_w9_a5_a_reason_that_cannot_be_encoded(ws: Probe) -> None:
    """W9 A5: raises, and the socket goes on, as after any other bad event."""
    it = script(
        ("accept",),
        ("attempt", {"type": "websocket.close", "reason": "\ud800"}),
        ("attempt", {"type": "websocket.send", "text": "on"}),
    )
    with WsClient(ws.port, it.target).opened() as client:
        error, sent = ws.ended(it)
        assert ("ValueError" in error, sent) == (True, "sent")
        assert client.hear() == "on"


def test_w9_a_code_may_be_an_enum(ws: Probe) -> None:
    """W9 A5: the members of http.HTTPStatus are good for a status, those of an IntEnum of close codes for a code."""
    it = script(("accept",), ("close_with_an_enum",))
    with WsClient(ws.port, it.target).opened() as client:
        assert ws.ended(it) == ["sent"]
        assert client.closed() == (1001, "")


@everywhere
def test_w9_the_server_waits_for_the_clients_answer(ws: Probe) -> None:
    """W9: and only then ends the connection; what comes before it is not for the application any more."""
    it = script(("accept",), ("close", 4000, "enough"), ("receive",), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.closed() == (4000, "enough")
        client.send(frame(TEXT, b"late") * 1000 + frame(PING, b"late"))
        assert ws.records(it) == []
        assert client.silent()
        client.send(close_frame(4001, b"agreed"))
        assert client.eof()
    assert ws.ended(it) == [disconnect(4001, "agreed")] * 2


def test_w9_but_not_for_ever(hasty: Probe) -> None:
    """W9: `ws_close_timeout`, here 1 s; 1006 for the application. Whatever may still be on its way from the client."""
    rests = [b"", frame(TEXT, b"half")[:-1], frame(TEXT, b"half", fin=False)]
    scripts = [script(("accept",), ("close",), ("receive",)) for _ in rests]
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        clients = [stack.enter_context(WsClient(hasty.port, it.target).opened()) for it in scripts]
        for client, rest in zip(clients, rests, strict=True):
            assert client.closed() == (1000, "")
            client.send(rest)
        assert all(client.eof() for client in clients)
        assert time.monotonic() - began > 0.9
    assert [hasty.ended(it) for it in scripts] == [[disconnect(1006)]] * 3


def test_w9_a_client_that_talks_on_is_not_waited_for(hasty: Probe) -> None:
    """W9: nothing that it sends makes the time longer."""
    it = script(("accept",), ("close",), ("receive",))
    with WsClient(hasty.port, it.target).opened() as client:
        assert client.closed() == (1000, "")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 30:
                client.send(frame(TEXT, b"x" * 1000) + frame(PING, b"x"))
                time.sleep(0.01)
        assert time.monotonic() - began < 30
    assert hasty.ended(it) == [disconnect(1006)]


def test_w9_both_close_at_once(ws: Probe) -> None:
    """W9 W8: the server says it only once."""
    flag = next(flags)
    it = script(("accept",), ("wait", flag), ("attempt", {"type": "websocket.close", "code": 4002}), ("receive",))
    with WsClient(ws.port, it.target).opened() as client:
        ws.set(flag)
        client.send(close_frame(4003))
        closes = [got for got in client.frames() if got.opcode == CLOSE]
        assert len(closes) == 1
    assert ws.ended(it)[1] == disconnect(4003)


@pytest.mark.parametrize("rest", [frame(TEXT, b"x", mask=b""), frame(3), frame(TEXT, b"\xff")])
def test_w9_w13_nonsense_in_place_of_the_answer(ws: Probe, rest: bytes) -> None:
    """W9 W13: no second close frame."""
    with WsClient(ws.port, script(("accept",), ("close",), ("receive",)).target).opened() as client:
        client.send(rest)
        assert client.ended() == (1000, "")


def test_w9_close_reaches_a_receive_in_another_task(ws: Probe) -> None:
    """W9 A8"""
    it = script(("accept",), ("together", [("until", "websocket.disconnect"), ("close", 4004)]))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.closed() == (4004, "")
        client.send(close_frame(4004))
        assert client.eof()
    assert ws.ended(it) == [disconnect(4004)]


def test_w9_messages_before_the_close_go_out(ws: Probe) -> None:
    """W9: also more than fit the buffers."""
    it = script(("accept",), ("shout", "x", 3000000), ("say", "y"), ("close", 4005))
    with WsClient(ws.port, it.target).opened() as client:
        assert client.hear() == "x" * 3000000
        assert client.hear() == "y"
        assert client.closed() == (4005, "")


# -- W10: the application ends


def test_w10_an_application_that_returns(ws: Probe) -> None:
    """W10: 1000, and nothing in the log; also with messages that it has not received."""
    flag = next(flags)
    it = script(("accept",), ("wait", flag))
    with WsClient(ws.port, it.target).opened() as client:
        client.say("not received")
        ws.set(flag)
        assert client.closed() == (1000, "")
        client.send(close_frame())
        assert client.eof()
    assert errors(ws, it) == []


@pytest.mark.parametrize("exception", ["RuntimeError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "OSError"])
def test_w10_an_application_that_raises(ws: Probe, exception: str) -> None:
    """W10 A6: 1011 and a line in the log; nothing of the exception for the client, and the worker goes on."""
    mark = ws.server.mark()
    it = script(("accept",), ("raises", exception))
    with WsClient(ws.port, it.target).opened() as client:
        code, reason = client.closed()
        assert code == 1011
        assert "script" not in reason
        client.send(close_frame(1011))
        assert client.eof()
    said = "raised (RuntimeError|SystemExit|KeyboardInterrupt|GeneratorExit|OSError) .so said the script.: "
    line = ws.server.wait_line(said + r"the WebSocket was closed with 1011.*, in WebSocket /script", after=mark)
    assert " error " in line.string
    assert "script" in scope_of(ws.port, "/script-not")["path"]


def test_w10_a_returned_value_is_logged(ws: Probe) -> None:
    """W10 S17"""
    mark = ws.server.mark()
    with WsClient(ws.port, script(("accept",), ("return", 1)).target).opened() as client:
        assert client.closed() == (1000, "")
    ws.server.wait_line("returned int instead of None, which is ignored, in WebSocket", after=mark)


# -- W11, W12: after the end


AFTER: list[tuple[str, Any]] = [
    ("send", {"type": "websocket.send", "text": "x"}),
    ("close", {"type": "websocket.close"}),
    ("accept", ACCEPT),
    ("denial", denial(start(404))),
]
ENDS: list[tuple[str, list[Any], Callable[[WsClient], Any] | None]] = [
    ("closed by the client", [("until", "websocket.disconnect")], lambda client: client.part()),
    ("lost", [("until", "websocket.disconnect")], lambda client: client.close()),
    ("closed by the application", [("close",)], None),
    ("closed by both", [("close",), ("receive",)], lambda client: client.send(close_frame())),
    ("broken", [("until", "websocket.disconnect")], lambda client: client.send(frame(7))),
]


@pytest.mark.parametrize(("steps", "end"), [pytest.param(*case, id=what) for what, *case in ENDS])
def test_w11_send_after_the_end_raises_an_oserror(ws: Probe, steps: list[Any], end: Any) -> None:
    """W11 A7: whatever is sent, and by whomever the socket was closed."""
    it = script(("accept",), *steps, ("note", "after"), *(("attempt", event) for _, event in AFTER))
    with WsClient(ws.port, it.target).opened() as client:
        if end:
            end(client)
        found = ws.ended(it)
    for names in found[found.index("after") + 1 :]:
        assert "OSError" in names


@pytest.mark.parametrize(
    ("steps", "end"),
    [pytest.param(*case, id=what) for what, *case in ENDS],
)
@pytest.mark.parametrize("event", [event for _, event in AFTER[:2]], ids=["send", "close"])
def test_w11_what_it_raises_may_come_back(ws: Probe, steps: list[Any], end: Any, event: Any) -> None:
    """W11 A7: an application that does not care is no failure."""
    it = script(("accept",), *steps, ("send", event))
    with WsClient(ws.port, it.target).opened() as client:
        if end:
            end(client)
        ws.ended(it)
    assert errors(ws, it) == []


def test_w11_an_exception_of_its_own_after_the_end_is_logged(ws: Probe) -> None:
    """W11 A6"""
    it = script(("accept",), ("until", "websocket.disconnect"), ("raises", "RuntimeError"))
    with WsClient(ws.port, it.target).opened() as client:
        client.part()
    assert len(errors(ws, it)) == 1


@pytest.mark.parametrize(("steps", "end"), [pytest.param(*case, id=what) for what, *case in ENDS])
def test_w11_w10_the_log_does_not_say_1011_where_nobody_was_told_that(ws: Probe, steps: list[Any], end: Any) -> None:
    """W11 W10: an exception after the end changes nothing for the client any more."""
    it = script(("accept",), *steps, ("raises", "RuntimeError"))
    with WsClient(ws.port, it.target).opened() as client:
        if end:
            end(client)
        ws.ended(it)
    assert [line for line in errors(ws, it) if "closed with 1011" in line] == []


@everywhere
def test_w11_s16_an_application_that_only_sends_hears_of_the_end(ws: Probe) -> None:
    """W11 S16 A8: one that awaits nothing but `send` must not send to nobody for ever."""
    it = script(("accept",), ("stream", 2**24, 2**10))
    with WsClient(ws.port, it.target).opened() as client:
        client.hear()
    sent, names = ws.ended(it)
    assert sent < 2**24
    assert "OSError" in names


@pytest.mark.parametrize(("steps", "end"), [pytest.param(*case, id=what) for what, *case in ENDS])
def test_w12_receive_after_disconnect_repeats_it(ws: Probe, steps: list[Any], end: Any) -> None:
    """W12: in any task; nothing waits for ever."""
    again = [("receive",)] * 3
    it = script(("accept",), *steps, ("note", "after"), *again, ("together", again))
    with WsClient(ws.port, it.target).opened() as client:
        if end:
            end(client)
        else:
            client.part()
        found = ws.ended(it)
    after = found[found.index("after") + 1 :]
    assert [event["type"] for event in after] == ["websocket.disconnect"] * 6
    assert after == [after[0]] * 6


# -- W16: the end of the worker


@pytest.mark.parametrize(("parser", "loop"), WS_PAIRS)
def test_w16_a_stop(serve: Callable[..., Server], parser: str, loop: str) -> None:
    """W16: open sockets are closed with 1001 or 1012, with all of the closing handshake, and the application hears of
    it; a handshake that is not answered yet may still be denied; no process is left behind."""
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    probe = Probe(serve(WS_APP, "--http", parser, "--loop", loop, "--stop-timeout", "60s"))
    it = script(("accept",), ("say", "open"), ("tell", "told", ("receive",)))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WsClient(probe.port, it.target).opened()) for _ in range(3)]
        assert [client.hear() for client in clients] == ["open"] * 3
        undecided = stack.enter_context(WsClient(probe.port, script(("receive",), ("receive",)).target))
        mark = probe.server.mark()
        probe.server.signal(signal.SIGTERM)
        for client in clients:
            code, _ = client.closed()
            assert code in (1001, 1012)
            assert client.silent()
            client.send(close_frame(code))
            assert client.eof()
        for _ in clients:
            line = probe.server.wait_line(r"told: .*'websocket.disconnect'.*'code': 10(01|12)", after=mark)
            mark = probe.server.lines().index(line.string) + 1
        undecided.close()
    assert probe.server.wait_exit() == 0


def test_w16_a_stop_does_not_wait_for_a_silent_client(serve: Callable[..., Server]) -> None:
    """W16 W9: nor for an application that does not care."""
    probe = Probe(serve(WS_APP, "--stop-timeout", "2s", "--ws-close-timeout", "1s"))
    ignoring = script(("accept",), ("say", "open"), ("tally",), ("wait", "never"))
    with WsClient(probe.port, "/echo").opened(), WsClient(probe.port, ignoring.target).opened() as client:
        assert client.hear() == "open"
        assert probe.server.stop() == 0


def test_w16_a_reload(serve: Callable[..., Server]) -> None:
    """W16: 1012, as the clients are to come back; the new worker serves them."""
    server = serve(WS_APP, "--graceful-timeout", "60s")
    with WsClient(server.port, "/echo").opened() as client:
        client.say("old")
        assert client.hear() == "old"
        server.reload()
        code, _ = client.closed()
        assert code == 1012
        client.send(close_frame(code))
        assert client.eof()
    server.wait_line("worker 1 gen 1 gone")
    with WsClient(server.port, "/echo").opened() as client:
        client.say("new")
        assert client.hear() == "new"


# -- without WebSockets


WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["HTTP_UPGRADE"].encode()]
"""


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_ws_none(serve: Callable[..., Server], parser: str) -> None:
    """A9 P14: the handshake is a request like any other, on a connection that goes on."""
    pytest.importorskip(parser)
    server = serve(WS_APP, "--ws", "none", "--http", parser)
    with RawClient(server.port) as client:
        for fields in (list(ASKING), asking(version="8"), without(K)):
            client.send(request_bytes("GET", "/asked", fields))
            scope = parsed(client.read_response())
            assert (scope["type"], scope["method"]) == ("http", "GET")
            assert "websocket.http.response" not in scope["extensions"]


def test_a_wsgi_application(serve: Callable[..., Server], tmp_path: Any) -> None:
    """P14: cannot have WebSockets."""
    write_app(tmp_path, "plain", WSGI)
    server = serve("plain:app", cwd=tmp_path)
    with RawClient(server.port) as client:
        for _ in range(2):
            client.send(handshake("/"))
            assert client.read_response().body == b"websocket"
