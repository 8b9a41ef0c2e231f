"""A parser and an interface for apphost, as small as they can be: the example of docs/plugins.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from apphost.errors import user_traceback
from apphost.logs import Log
from apphost.protocols.base import BadRequest, Handler, Headers, Stream
from apphost.protocols.response import ResponseHead


class LineParser:
    """Splits lines: what is left to do once the strict layer has passed a head."""

    def parse(self, head: bytes) -> Headers:
        headers: Headers = []
        for line in head.split(b"\r\n")[1:-2]:
            name, colon, value = line.partition(b":")
            if not colon:
                raise BadRequest(400, "a header field has no colon")
            headers.append((name.lower(), value.strip(b" \t")))
        return headers


class TextInterface:
    """Calls `app(path, body) -> text`, on the event loop: such an application must be quick."""

    name = "text"
    websockets = False

    def __init__(
        self,
        app: Callable[[str, bytes], str],
        loop: asyncio.AbstractEventLoop,
        log: Log,
        active: set[Any],
        **_options: object,
    ) -> None:
        self.app = app
        self.loop = loop
        self.log = log
        self.active = active

    def handle(self, stream: Stream) -> Handler:
        return TextRequest(self, stream)


class TextRequest:
    """One request: collects its body, calls the application, answers."""

    def __init__(self, interface: TextInterface, stream: Stream) -> None:
        self.interface = interface
        self.stream = stream
        self.body = b""
        interface.active.add(self)  # a drain waits for what is in here, and names it when it takes too long
        interface.loop.call_soon(self.body_arrived)  # for what is there already, and for no body at all

    def body_arrived(self) -> None:
        if self not in self.interface.active:
            return
        data, more = self.stream.take_body()
        self.body += data
        if len(self.body) > 65536:
            self.answer(413, "too much\n")
        elif not more:
            self.call()

    def call(self) -> None:
        path = self.stream.head.raw_path.decode("ascii")
        try:
            text = self.interface.app(path, self.body)
        except Exception as exc:
            self.interface.log.error(f"{self.describe()}: {type(exc).__name__}", user_traceback(exc))
            self.interface.active.discard(self)
            self.stream.fail()
        else:
            self.answer(200, text)

    def answer(self, status: int, text: str) -> None:
        self.interface.active.discard(self)
        if self.stream.connected:
            self.stream.start(ResponseHead(status, [(b"content-type", b"text/plain; charset=utf-8")]))
            self.stream.write(text.encode(), False)

    def disconnected(self) -> None:
        if not self.stream.connected:
            self.interface.active.discard(self)

    def write_resumed(self) -> None:
        pass  # there is one write, and no waiting for it

    def describe(self) -> str:
        return f"{self.stream.head.method} {self.stream.head.raw_path.decode('ascii')}"
