"""Errors that are hard to report: the client has its 500, and the worker loses nothing by them (A6, G19, G20)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import RawClient, Server, request_bytes, write_app

ERRORS = """
import asyncio


class Invalid(Exception):
    pass


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit(3)


class Listing(Exception):
    exceptions = ["time-out in shard 3"]


def parse(text, at):
    # As a parser that wraps its errors at each level: of text that is nested too deeply, a chain as long as the stack.
    try:
        if text[at : at + 1] == b"(":
            return parse(text, at + 1)
    except Exception as error:
        raise Invalid(f"in the group at {at}") from error


def retry():
    error = None
    for number in range(3000):
        try:
            raise Invalid(f"attempt {number}")
        except Invalid as exc:
            exc.__context__ = error
            error = exc
    raise error


def misfit():
    raise SyntaxError("odd", ("file", 1, 1, b"no text"))


def unspeakable():
    raise Unspeakable


def listing():
    raise Listing


WAYS = {"/parse": lambda: parse(b"(" * 2000, 0), "/retry": retry, "/misfit": misfit, "/unspeakable": unspeakable,
        "/listing": listing, "/": lambda: None}
"""
ASGI = (
    ERRORS
    + """
async def app(scope, receive, send):
    if scope["type"] == "http":
        WAYS[scope["path"]]()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"good"})
"""
)
WSGI = (
    ERRORS
    + """
def app(environ, start_response):
    WAYS[environ["PATH_INFO"]]()
    start_response("200 OK", [("Content-Length", "4")])
    return [b"good"]
"""
)


@pytest.mark.parametrize(("interface", "source"), [("asgi", ASGI), ("wsgi", WSGI)])
def test_errors_that_are_hard_to_report(tmp_path: Path, interface: str, source: str) -> None:
    """More of each than there are threads: none of them is lost, and the stop has nobody to wait for."""
    write_app(tmp_path, "app", source)
    with Server("app:app", "--threads", "2", "--lifespan", "off", cwd=tmp_path, allow_errors=True) as server:
        workers = server.worker_pids()
        for path in ("/parse", "/retry", "/misfit", "/unspeakable", "/listing"):
            for _ in range(3):
                with RawClient(server.port) as client:
                    client.send(request_bytes("GET", path))
                    assert client.read_response().status == 500, path
            server.wait_line(rf"error worker 1 gen 1: the application raised \w+.*, in GET {path}")
        with RawClient(server.port) as client:
            client.send(request_bytes("GET", "/"))
            assert client.read_response().body == b"good"
        assert server.worker_pids() == workers
        assert server.stop() == 0
    assert "in progress" not in server.log


LATE = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return Late(environ["wsgi.input"], environ["PATH_INFO"])


class Late:
    # Asks for more of the body when the response is complete, as middleware does that drains what is left.
    def __init__(self, body, path):
        self.body, self.path = body, path

    def __iter__(self):
        yield b"ok"
        if self.path == "/iterate":
            self.read()

    def close(self):
        if self.path == "/close":
            self.read()

    def read(self):
        try:
            self.body.read()
        except OSError as error:
            print("late:", error, flush=True)
            raise
"""


@pytest.mark.parametrize("path", ["/iterate", "/close"])
def test_a_read_behind_the_response_blocks_no_thread(tmp_path: Path, path: str) -> None:
    """G5, G14: the client keeps its body back, and has its answer already; the read ends with an error at once."""
    write_app(tmp_path, "app", LATE)
    with Server("app:app", "--threads", "1", cwd=tmp_path) as server:
        for _ in range(2):
            with RawClient(server.port) as client:
                client.send(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" % path.encode())
                client.send(b"x" * 70_000)
                assert client.read_response().body == b"ok"
                with RawClient(server.port) as other:
                    other.send(request_bytes("GET", "/"))
                    assert other.read_response().body == b"ok"
        server.wait_line("late: the response is complete")
        assert server.stop() == 0
    assert " error " not in server.log
