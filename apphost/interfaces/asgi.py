"""ASGI 3: calls the application with scope, receive and send, for each request and for each WebSocket."""

from __future__ import annotations

import asyncio
from typing import Any

from apphost.interfaces.asgi_http import Application, AsgiRequest
from apphost.interfaces.asgi_websocket import AsgiWebSocket
from apphost.logs import Log
from apphost.protocols.base import Stream


class AsgiInterface:
    """Serves streams with an ASGI application. `state`: the lifespan's state, None where lifespan is not supported."""

    name = "asgi"
    websockets = True
    lifespan = True
    request_type = AsgiRequest
    websocket_type = AsgiWebSocket

    def __init__(
        self,
        app: Application,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        active: set[Any],
        *,
        root_path: str = "",
        state: dict[str, Any] | None = None,
        worker: str = "worker",
    ) -> None:
        self.app = app
        self.loop = loop
        self.log = log
        self.active = active
        self.root_path = root_path
        self.state = state
        self.worker = worker

    def handle(self, stream: Stream) -> AsgiRequest:
        return self.websocket_type(self, stream) if stream.head.upgrade else self.request_type(self, stream)
