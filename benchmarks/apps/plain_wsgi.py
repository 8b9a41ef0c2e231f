"""The smallest useful WSGI application for each case: what is measured is the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

Environ = dict[str, Any]
Start = Callable[..., Any]

CHUNK = b"x" * 1024
CHUNKS = 100
TEXT = ("Content-Type", "text/plain; charset=utf-8")


def fixed(body: bytes) -> Callable[[Environ, Start], Iterable[bytes]]:
    fields = [TEXT, ("Content-Length", str(len(body)))]

    def answer(environ: Environ, start_response: Start) -> Iterable[bytes]:
        start_response("200 OK", list(fields))  # a server may change the list
        return [body]

    return answer


def stream(environ: Environ, start_response: Start) -> Iterable[bytes]:
    """100 chunks of 1 KiB."""
    start_response("200 OK", [TEXT])
    return (CHUNK for _ in range(CHUNKS))


def echo_json(environ: Environ, start_response: Start) -> Iterable[bytes]:
    answer = json.dumps(json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]


def upload(environ: Environ, start_response: Start) -> Iterable[bytes]:
    """Answers with the number of bytes that came."""
    size, left = 0, int(environ["CONTENT_LENGTH"])
    while left > 0 and (piece := environ["wsgi.input"].read(min(left, 65536))):
        size += len(piece)
        left -= len(piece)
    answer = str(size).encode()
    start_response("200 OK", [TEXT, ("Content-Length", str(len(answer)))])
    return [answer]


PATHS = {
    "/": fixed(b"Hello, world!"),
    "/1m": fixed(b"x" * (1 << 20)),
    "/stream": stream,
    "/json": echo_json,
    "/upload": upload,
}


def app(environ: Environ, start_response: Start) -> Iterable[bytes]:
    return PATHS[environ["PATH_INFO"]](environ, start_response)
