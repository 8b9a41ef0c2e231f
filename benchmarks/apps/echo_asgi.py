"""A WebSocket that sends every message back; over HTTP it greets, as all applications here do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hello_asgi import app as hello


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "websocket":
        await hello(scope, receive, send)
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": event["bytes"]})
