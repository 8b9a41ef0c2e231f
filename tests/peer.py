"""A connection without a loop and without a socket: a clock that only the test moves, and both of its ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from apphost.logs import Log
from apphost.protocols.base import Stream
from apphost.protocols.context import Context, Timeouts
from apphost.protocols.deadlines import RESOLUTION
from apphost.protocols.h11_parser import H11Parser
from apphost.protocols.http1 import Connection
from apphost.protocols.response import ResponseHead, ServerFields
from apphost.protocols.strict import Limits

TIMEOUTS = Timeouts(keep_alive=40, request_header=10, request_body=20, write=30, linger=5, linger_draining=2)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
LAST_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


def post(length: int, *fields: str) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: a", f"Content-Length: {length}", *fields, "", ""]
    return "\r\n".join(lines).encode()


class FakeLoop:
    """A clock, and the calls that wait for the next turn."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.soon: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        self.soon.append(lambda: call(*args))

    def turn(self) -> None:
        """All that waits, and what that leads to."""
        while self.soon:
            self.soon.pop(0)()


class FakeTransport:
    """Keeps what is written. `sock`, `unsent`: for tests of what the kernel and the transport have not got rid of."""

    def __init__(self) -> None:
        self.wire = b""
        self.sock: Any = None
        self.unsent = 0
        self.paused = self.closed = self.aborted = self.ended = False

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8000), "socket": self.sock}.get(name)

    def write(self, data: bytes) -> None:
        assert not self.ended, "written after the end"
        self.wire += data

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


class Request:
    """A handler: what it is told, and the stream that it was made for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.told: list[str] = []

    def body_arrived(self) -> None:
        self.told.append("body")

    def disconnected(self) -> None:
        self.told.append("disconnected")

    def write_resumed(self) -> None:
        self.told.append("resumed")

    def describe(self) -> str:
        return "a request"

    def answer(self, data: bytes = b"ok", more: bool = False, headers: Any = ()) -> None:
        if not self.stream.started:
            self.stream.start(ResponseHead(200, headers))
        self.stream.write(data, more)


class Peer:
    """A connection and both of its ends."""

    def __init__(self, *, limits: Limits | None = None, timeouts: Timeouts = TIMEOUTS, parser: Any = None) -> None:
        self.loop = FakeLoop()
        self.context = Context(
            cast(asyncio.AbstractEventLoop, self.loop),
            parser or H11Parser(),
            Log("error"),
            limits=limits,
            timeouts=timeouts,
            server_fields=ServerFields(date=False, server=False),
        )
        self.context.interface = self  # type: ignore[assignment]
        self.requests: list[Request] = []
        self.transport = FakeTransport()
        self.connection = Connection(self.context)
        self.connection.connection_made(cast(asyncio.Transport, self.transport))

    def handle(self, stream: Stream) -> Request:
        self.requests.append(Request(stream))
        return self.requests[-1]

    @property
    def last(self) -> Request:
        return self.requests[-1]

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)
        self.loop.turn()

    def end(self) -> None:
        assert self.connection.eof_received()
        self.loop.turn()

    def lose(self) -> None:
        self.connection.connection_lost(None)

    def read(self) -> bytes:
        wire, self.transport.wire = self.transport.wire, b""
        return wire

    def after(self, seconds: float) -> None:
        """Time passes, in the steps of a worker's tick."""
        until = self.loop.now + seconds
        while self.loop.now < until:
            self.loop.now = min(self.loop.now + 0.5, until)
            self.context.tick(self.loop.now)
            self.loop.turn()

    def nearly(self, seconds: float) -> None:
        """Until just before a time-out."""
        self.after(seconds - 0.01)

    def past(self) -> None:
        """From `nearly` on, until the time-out has certainly been seen."""
        self.after(0.01 + RESOLUTION)

    @property
    def open(self) -> bool:
        return not (self.transport.closed or self.transport.ended)

    def status(self) -> int:
        """Of the only response that has come."""
        wire = self.read()
        assert wire.count(b"HTTP/1.1 ") == 1, wire
        return int(wire.split(b" ")[1])
