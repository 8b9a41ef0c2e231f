"""The smallest useful ASGI application for each case: what is measured is the server."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

PIECE = b"x" * 65536  # what web frameworks read of a file at once
CHUNK = b"x" * 1024
CHUNKS = 100


def start(length: int | None, kind: bytes = b"text/plain; charset=utf-8") -> dict[str, Any]:
    fields = [(b"content-type", kind)]
    if length is not None:
        fields.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": fields}


def fixed(body: bytes) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Answers with ``body``, in one event."""
    head, end = start(len(body)), {"type": "http.response.body", "body": body}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send(head)
        await send(end)

    return answer


async def in_pieces(scope: Scope, receive: Receive, send: Send) -> None:
    """50 MiB of known length, as a file would be sent."""
    await send(start(800 * len(PIECE), b"application/octet-stream"))
    for _ in range(800):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
    await send({"type": "http.response.body"})


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    """100 chunks of 1 KiB."""
    await send(start(None))
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body"})


async def echo_json(scope: Scope, receive: Receive, send: Send) -> None:
    event = await receive()
    body = event["body"]
    while event.get("more_body"):
        event = await receive()
        body += event["body"]
    answer = json.dumps(json.loads(body)).encode()
    await send(start(len(answer), b"application/json"))
    await send({"type": "http.response.body", "body": answer})


async def upload(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes that came."""
    size, more = 0, True
    while more:
        event = await receive()
        size += len(event.get("body", b""))
        more = event.get("more_body", False)
    answer = str(size).encode()
    await send(start(len(answer)))
    await send({"type": "http.response.body", "body": answer})


async def pid(scope: Scope, receive: Receive, send: Send) -> None:
    await fixed(b"%d" % os.getpid())(scope, receive, send)


PATHS = {
    "/": fixed(b"Hello, world!"),
    "/10k": fixed(b"x" * (10 << 10)),
    "/1m": fixed(b"x" * (1 << 20)),
    "/50m": in_pieces,
    "/stream": stream,
    "/json": echo_json,
    "/upload": upload,
    "/pid": pid,
}


async def echo(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": event["bytes"]})


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses lifespan, as the ASGI specification allows; a WebSocket echoes."""
    if scope["type"] == "http":
        await PATHS[scope["path"]](scope, receive, send)
    elif scope["type"] == "websocket":
        await echo(receive, send)
    else:
        raise NotImplementedError(scope["type"])
