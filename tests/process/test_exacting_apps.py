"""Two applications that are hard on their host, served for real: a WSGI application inside `wsgiref.validate`, which
raises at every breach of PEP 3333, and a Starlette application whose middleware juggles task groups.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import DEADLINE, RawClient, Server, raw, request_bytes, write_app

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()

VALIDATED = '''
import hashlib
import time
from wsgiref.validate import validator

TEXT = [("Content-Type", "text/plain")]


def inner(environ, start_response):
    return ROUTES[environ["PATH_INFO"]](environ, start_response)


def hello(environ, start_response):
    start_response("200 OK", TEXT + [("X-Method", environ["REQUEST_METHOD"])])
    return [b"hello"]


def digest(environ, start_response):
    body, total = environ["wsgi.input"], hashlib.sha256()
    while chunk := body.read(65536):
        total.update(chunk)
    assert body.read(1) == b""
    start_response("200 OK", TEXT)
    return [total.hexdigest().encode()]


def lines(environ, start_response):
    body = environ["wsgi.input"]
    found = [body.readline(), *body]
    start_response("200 OK", TEXT)
    return [repr(found).encode()]


def write(environ, start_response):
    put = start_response("200 OK", TEXT)
    put(b"written, ")
    put(b"twice, ")
    return [b"then returned"]


class Stream:
    """Counts its close()."""

    def __init__(self, environ, count, pause):
        self.errors, self.numbers, self.pause, self.closed = environ["wsgi.errors"], iter(range(count)), pause, 0

    def __iter__(self):
        return self

    def __next__(self):
        if number := next(self.numbers):
            time.sleep(self.pause)
        return f"piece {number} made at {time.time():.6f}\\n".encode()

    def close(self):
        self.closed += 1
        self.errors.write(f"stream closed {self.closed}\\n")
        self.errors.flush()


def stream(environ, start_response):
    start_response("200 OK", TEXT)
    return Stream(environ, 4, 0.15)


def endless(environ, start_response):
    start_response("200 OK", TEXT)
    return Stream(environ, 10**9, 0.01)


def nothing(environ, start_response):
    start_response("204 No Content", [])
    return []


def error(environ, start_response):
    raise RuntimeError("fails before the response")


def recovered(environ, start_response):
    try:
        start_response("200 OK", TEXT + [("X-First", "1")])
        raise RuntimeError("caught by the application")
    except RuntimeError:
        import sys

        start_response("503 Sorry", TEXT, sys.exc_info())
        return [b"recovered"]


def late(environ, start_response):
    start_response("200 OK", TEXT)

    def pieces():
        yield b"first"
        raise RuntimeError("fails within the response")

    return pieces()


ROUTES = {"/" + f.__name__: f for f in (hello, digest, lines, write, stream, endless, nothing, error, recovered, late)}
app = validator(inner)
'''

ANYIO = '''
import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route


class Outer(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-outer"] = "seen"
        return response


class Reader(BaseHTTPMiddleware):
    """Reads the body before the endpoint does."""

    async def dispatch(self, request, call_next):
        size = len(await request.body())
        response = await call_next(request)
        response.headers["x-size"] = str(size)
        return response


async def fan_out(request):
    results = {}

    async def one(number):
        await anyio.sleep(0.01 * (5 - number))
        results[number] = number * number

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(one, number)
    return JSONResponse(results)


async def first_wins(request):
    """The slow one is cancelled."""
    winner = []

    async def race(name, seconds, scope):
        await anyio.sleep(seconds)
        winner.append(name)
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(race, "slow", 30, group.cancel_scope)
        group.start_soon(race, "fast", 0.01, group.cancel_scope)
    return PlainTextResponse(winner[0])


async def double(request):
    return PlainTextResponse(str(2 * len(await request.body())))


async def endless(request):
    async def pieces():
        print("stream: started", flush=True)
        try:
            while True:
                yield b"x" * 1000
                await anyio.sleep(0.01)
        finally:
            print("stream: ended", flush=True)

    return StreamingResponse(pieces())


async def group_failure(request):
    async def fail():
        raise ValueError("inside the group")

    async with anyio.create_task_group() as group:
        group.start_soon(fail)


app = Starlette(
    routes=[
        Route("/fan-out", fan_out),
        Route("/first-wins", first_wins),
        Route("/double", double, methods=["POST"]),
        Route("/endless", endless),
        Route("/group-failure", group_failure),
    ],
    middleware=[Middleware(Outer), Middleware(Reader)],
)
'''


def started(source: str, folder: Path, parser: str) -> Iterator[Server]:
    write_app(folder, "app", source)
    with Server("app:app", "--http", parser, cwd=folder) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def validated(http_parser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The validated application, whose log must be free of complaints at the end."""
    for server in started(VALIDATED, tmp_path_factory.mktemp("validated"), http_parser):
        yield server
        assert "AssertionError" not in server.log, server.log
        assert "garbage collected" not in server.log, server.log


@pytest.fixture(scope="module")
def juggler(http_parser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("starlette")
    yield from started(ANYIO, tmp_path_factory.mktemp("juggler"), http_parser)


# -------------------------------------------------------------------------------------------------- wsgiref.validate


def test_validated_get_head_and_204(validated: Server) -> None:
    """G1, G2, G4, G17"""
    with RawClient(validated.port) as client:
        get = client.request("GET", "/hello?a=1&b=%20")
        head = client.request("HEAD", "/hello")
        nothing = client.request("GET", "/nothing")
    assert (get.status, get.body) == (200, b"hello")
    assert (head.status, head.body, head.header(b"x-method")) == (200, b"", b"HEAD")
    assert (nothing.status, nothing.body) == (204, b"")


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_validated_post(validated: Server, framing: str) -> None:
    """G3, G5"""
    content = PAYLOAD if framing == "content-length" else iter([PAYLOAD[:1000], PAYLOAD[1000:]])
    with httpx.Client(base_url=validated.url, timeout=DEADLINE, trust_env=False) as client:
        answer = client.post("/digest", content=content, headers={"Content-Type": "application/octet-stream"})
        assert answer.text == DIGEST
        assert client.post("/lines", content=b"one\ntwo\r\n\nend").text == repr([b"one\n", b"two\r\n", b"\n", b"end"])


def test_validated_unread_body(validated: Server) -> None:
    """R8, G5: what the application leaves unread is never taken for a request."""
    with RawClient(validated.port) as client:
        answer = client.request("POST", "/hello", body=b"GET /error HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.body == b"hello"
        assert client.request("GET", "/hello").body == b"hello"


def test_validated_write(validated: Server) -> None:
    """G8: what went through write() comes before the iterable."""
    with RawClient(validated.port) as client:
        assert client.request("GET", "/write").body == b"written, twice, then returned"


def test_validated_stream(validated: Server) -> None:
    """G13, G14: each piece is sent before the next is made, and close() is called once."""
    mark = validated.mark()
    with RawClient(validated.port) as client:
        client.send(request_bytes("GET", "/stream"))
        pieces = [(time.time(), piece) for piece in client.read_body(client.read_head())]
    made = [float(match) for match in re.findall(rb"made at ([\d.]+)\n", b"".join(piece for _, piece in pieces))]
    assert len(made) == 4
    assert pieces[0][0] < made[-1]
    assert validated.wait_line(r"stream closed (\d)", after=mark)[1] == "1"


def test_validated_client_leaves(validated: Server) -> None:
    """G14: close() is called when the client is gone."""
    mark = validated.mark()
    with RawClient(validated.port) as client:
        client.send(request_bytes("GET", "/endless"))
        assert client.read_head().status == 200
    assert validated.wait_line(r"stream closed (\d)", after=mark)[1] == "1"


def test_validated_errors(validated: Server) -> None:
    """G10, G19: 500 before the head; exc_info replaces the head; after the head, an end that is seen as a failure."""
    mark = validated.mark()
    with RawClient(validated.port) as client:
        assert client.request("GET", "/error").status == 500
    validated.wait_line("RuntimeError: fails before the response", after=mark)
    with RawClient(validated.port) as client:
        recovered = client.request("GET", "/recovered")
    assert (recovered.status, recovered.reason, recovered.body) == (503, "Sorry", b"recovered")
    assert recovered.header(b"x-first") is None
    late = raw(validated.port, request_bytes("GET", "/late"))
    validated.wait_line("RuntimeError: fails within the response", after=mark)
    assert b"first" in late
    assert not late.endswith(b"0\r\n\r\n")


# ----------------------------------------------------------------------------------------- middleware and task groups


def test_task_groups_behind_middleware(juggler: Server) -> None:
    """A8, R6: receive and send are used from the middleware's tasks; some of those are cancelled."""
    with httpx.Client(base_url=juggler.url, timeout=DEADLINE, trust_env=False) as client:
        for _ in range(10):
            answer = client.get("/fan-out")
            assert answer.json() == {str(number): number * number for number in range(5)}
            assert answer.headers["x-outer"] == "seen"
            assert client.get("/first-wins").text == "fast"


def test_body_read_by_middleware(juggler: Server) -> None:
    """R1, R4: the middleware reads the body, the endpoint reads it again, and nobody waits for more."""
    with httpx.Client(base_url=juggler.url, timeout=DEADLINE, trust_env=False) as client:
        for size in (0, 1, 1_000_000):
            answer = client.post("/double", content=b"x" * size)
            assert (answer.text, answer.headers["x-size"]) == (str(2 * size), str(size))


def test_client_leaves_a_stream_behind_middleware(juggler: Server) -> None:
    """R4, A7: the application learns of it and ends; that is no error."""
    mark = juggler.mark()
    with RawClient(juggler.port) as client:
        client.send(request_bytes("GET", "/endless"))
        assert client.read_head().status == 200
    juggler.wait_line("stream: ended", after=mark)
    with RawClient(juggler.port) as client:
        assert client.request("GET", "/first-wins").body == b"fast"
    assert not [line for line in juggler.lines(mark) if " error " in line or "Traceback" in line]


def test_failure_in_a_task_group(juggler: Server) -> None:
    """A6"""
    mark = juggler.mark()
    with RawClient(juggler.port) as client:
        assert client.request("GET", "/group-failure").status == 500
    juggler.wait_line("ValueError: inside the group", after=mark)
