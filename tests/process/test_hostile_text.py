"""Text of clients and applications where it could do harm: in response heads, on error pages, in logs.

Heads: each place where an application can put text into one, with each piece that could end a line or a head. What the
single fields may hold otherwise is in test_response, test_handshake, and the conformance tests of each interface.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support import RawClient, Server, raw, request_bytes, write_app

SPLITS = ["\r", "\n", "\0", "\r\n", "\r\nx-split: 1", "\nx-split: 1", "\r\n\r\n<x-split>", "\r\n x-split",
          "\x01", "\x0bx-split: 1", "\x1c", "\x1b[2J", "\x7f"]  # fmt: skip

# Text that a terminal, or a reader of lines, takes for something else.
EVIL = "\x1b]0;owned\x07\x1b[2J\r\n2026-01-01 00:00:00.000 +0000 [1] info forged\x9b1m\x7f\u2028\u202e\b\0"

WSGI = """
import os, sys, tempfile
from urllib.parse import unquote

def app(environ, start_response):
    place, _, bad = environ["PATH_INFO"].encode("latin-1").decode()[1:].partition("/")
    status, headers, late = "200 OK", [("X-Good", "1")], None
    if place.startswith("status"):
        status += bad
    elif place.startswith("name"):
        headers.append(("X-A" + bad, "1"))
    elif place.startswith("value"):
        headers.append(("X-A", "1" + bad))
    elif place.startswith("length"):
        headers.append(("Content-Length", "4" + bad))
    elif place == "raise":
        raise RuntimeError(bad)
    elif place == "errors":
        environ["wsgi.errors"].write(bad)
        bad = "OK"
    if place.endswith("-late"):
        start_response("200 First", [])
        try:
            raise LookupError
        except LookupError:
            start_response(status, headers, sys.exc_info())
    else:
        put = start_response(status, headers)
    if place.endswith("-write"):
        put(b"body")
        return []
    if place.endswith("-file"):
        file = tempfile.TemporaryFile()
        file.write(b"body")
        file.seek(0)
        return environ["wsgi.file_wrapper"](file)
    return [b"body"]
"""

ASGI = """
from urllib.parse import unquote

async def app(scope, receive, send):
    place, _, bad = scope["path"][1:].partition("/")
    bad = bad.encode()
    name, value = b"x-a", b"1"
    if place == "name":
        name += bad
    elif place == "value":
        value += bad
    elif place == "raise":
        raise RuntimeError(bad.decode())
    headers = [(b"x-good", b"1"), (name, value)]
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"body"})
        return
    await receive()
    if scope["query_string"] == b"deny":
        await send({"type": "websocket.http.response.start", "status": 200, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"body"})
        return
    subprotocol = "a" + bad.decode() if place == "subprotocol" else None
    await send({"type": "websocket.accept", "headers": headers, "subprotocol": subprotocol})
    await receive()
"""

OPTIONS = ("--access-log", "access.log", "--lifespan", "off")


@pytest.fixture(scope="module", params=["text", "json"])
def wsgi(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("wsgi")
    write_app(folder, "wsgi_app", WSGI)
    with Server("wsgi_app:app", *OPTIONS, "--log-format", request.param, cwd=folder, until=None) as server:
        server.wait_line("is serving")
        yield server


@pytest.fixture(scope="module")
def asgi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("asgi")
    write_app(folder, "asgi_app", ASGI)
    with Server("asgi_app:app", *OPTIONS, cwd=folder) as server:
        yield server


def port(server: Server) -> int:
    return int(server.wait_line(r"listening at http://127\.0\.0\.1:(\d+)")[1])


def handshake(target: str) -> bytes:
    key = base64.b64encode(bytes(16)).decode()
    fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"),
              ("Sec-WebSocket-Key", key), ("Sec-WebSocket-Protocol", "a")]  # fmt: skip
    return request_bytes("GET", target, fields)


def check_refused(answer: bytes) -> None:
    """One response, a 500 of the server's own, with nothing of what the application gave."""
    assert answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    for text in (b"split", b"x-good", b"x-a", b"\0", b"body"):
        assert text not in answer.lower()


WSGI_PLACES = [
    f"{what}{way}" for what in ("status", "name", "value", "length") for way in ("", "-late", "-write", "-file")
]


@pytest.mark.parametrize("place", WSGI_PLACES)
def test_s10_g11_wsgi(wsgi: Server, place: str) -> None:
    """S10 G11: in status, name, value and length; with exc_info, before write(), before a file."""
    for bad in SPLITS:
        check_refused(raw(port(wsgi), request_bytes("GET", f"/{place}/{quote(bad)}", [("Connection", "close")])))
    good = raw(port(wsgi), request_bytes("GET", f"/{place}/", [("Connection", "close")]))
    assert good.startswith(b"HTTP/1.1 200 ")
    assert good.endswith(b"body") or b"\r\n4\r\nbody\r\n0\r\n\r\n" in good


@pytest.mark.parametrize("place", ["name", "value"])
@pytest.mark.parametrize("kind", ["http", "accept", "deny"])
def test_s10_w5_x1_asgi(asgi: Server, place: str, kind: str) -> None:
    """S10 W5 X1: in the response, the accept and the denial of a WebSocket."""
    for bad in SPLITS:
        target = f"/{place}/{quote(bad)}"
        data = request_bytes("GET", target, [("Connection", "close")])
        check_refused(raw(port(asgi), data if kind == "http" else handshake(f"{target}?{kind}")))


def test_s10_w5_subprotocol(asgi: Server) -> None:
    for bad in SPLITS:
        check_refused(raw(port(asgi), handshake(f"/subprotocol/{quote(bad)}")))


# Error pages and logs

HOSTILE = [
    request_bytes("GET", "/raise/" + quote(EVIL), [("Connection", "close")]),
    request_bytes("GET", "/raise/x?" + quote(EVIL), [("User-Agent", "evil"), ("Connection", "close")]),
    request_bytes("GET", "/errors/" + quote(EVIL + "\n" + EVIL), [("Connection", "close")]),
    b"GET /\x1b[2J HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x1b[2J /evil HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /evil HTTP/1.1\r\nHost: a\r\nX-\x1b[2J: evil\r\n\r\n",
    b"GET /evil HTTP/1.1\r\nHost: evil\x1b[2J\r\n\r\n",
    b"GET /evil HTTP/1.1\r\nHost: a\r\nReferer: \x1b[2J\x9b\x85\r\nAuthorization: Basic evil\r\n\r\n",
    b"EVIL" * 3000,
    b"\x16\x03\x01\x02\x00\x01evil\r\n\r\n",
]


def test_p10_error_pages_echo_nothing(wsgi: Server, asgi: Server) -> None:
    """P10: neither the request nor what the application has raised."""
    for server in (wsgi, asgi):
        for data in HOSTILE[:2] + HOSTILE[3:]:
            answer = raw(port(server), data)
            assert re.match(rb"HTTP/1\.1 (4|5)\d\d ", answer), data
            assert b"evil" not in answer.lower()
            assert b"forged" not in answer
            assert not set(answer) - set(b"\r\n") & set(range(32))


def test_no_line_of_a_log_is_forged(wsgi: Server, asgi: Server) -> None:
    """Visible text alone, and each line a record of the server's or an indented line of one; also the access log."""
    for server in (wsgi, asgi):
        mark = server.mark()
        for data in HOSTILE:
            raw(port(server), data)
        server.wait_line("the application raised RuntimeError", after=mark)
        with RawClient(port(server)) as client:
            client.request("GET", "/value/")
        access = Path(server.cwd, "access.log")
        lines = server.lines(mark)
        assert any("forged" in line for line in lines), "it is told, as text"
        for line in lines + access.read_bytes().decode().split("\n")[:-1]:
            assert line.isprintable()
            if line.startswith("{"):
                assert json.loads(line)["time"] > "2026-02"
            else:
                assert re.match(r"    |\d{4}-\d\d-\d\d \S+ \S+ \[\d{2,}\] |127\.0\.0\.1 - - \[", line), line
                assert not line.startswith("2026-01-01")


def test_no_secret_of_a_request_is_logged(tmp_path: Path) -> None:
    """Neither header fields nor the body, whatever fails, at the lowest level; query strings are left out on demand."""
    write_app(tmp_path, "wsgi_app", WSGI)
    options = (*OPTIONS, "--log-level", "debug", "--no-log-query")
    with Server("wsgi_app:app", *options, cwd=tmp_path, env={"A_KEY": "s3cret-of-the-environment"}) as server:
        fields = [("Authorization", "Bearer s3cret"), ("Cookie", "id=s3cret"), ("X-Api-Key", "s3cret")]
        for path in ("/value/", "/raise/boom", "/status/%0A"):
            with RawClient(server.port) as client:
                client.request("POST", f"{path}?token=s3cret", fields, b"password=s3cret")
        for bad in (b"Host: a\r\nHost: b", b"Host: a b", b"Host: a\r\nContent-Length: 1\r\nContent-Length: 2"):
            raw(server.port, b"GET /?s3cret HTTP/1.1\r\nAuthorization: s3cret\r\n" + bad + b"\r\n\r\n")
        server.reload()
        if sys.platform.startswith("linux"):
            titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (server.pid, *server.children())]
            assert len(titles) >= 3
            assert not any(b"s3cret" in title for title in titles)
        assert server.stop() == 0
    access = (tmp_path / "access.log").read_text()
    assert access.count("?... HTTP/1.1") == 3
    assert "in POST /raise/boom?..." in server.log
    assert "s3cret" not in server.log + access
