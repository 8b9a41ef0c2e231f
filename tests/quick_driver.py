"""Feeds bytes to the server's connection as `tests/corpus_driver.py` does, twenty times as fast: no event loop of
asyncio and no ASGI, but a queue of callbacks and a handler that answers as soon as it has the body.

The connection, the parser and the strict layer are the real ones. For sweeps and for fuzzing, where each case is fed in
several ways; that everything between the wire and an application is right, the other driver shows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from apphost.protocols.base import Stream
from apphost.protocols.context import Context, Timeouts
from apphost.protocols.http1 import Connection
from apphost.protocols.response import ResponseHead, ServerFields
from apphost.protocols.strict import Limits
from apphost.protocols.websocket import WebSocket, WebSocketOptions
from tests.corpus import Outcome, Seen
from tests.corpus_driver import RecordingLog, make_parser, read_responses
from tests.transport import FakeTransport

CALLS_PER_BYTE = 4  # callbacks of the loop; a connection makes one for each pipelined request, and a few at its end
CALLS_MAX = 64  # besides


class Hang(Exception):
    """The connection keeps the loop busy with nothing."""


class QuickLoop:
    """The part of an event loop that a connection uses; time stands still."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def time(self) -> float:
        return 1000.0

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        self._calls.append((call, args))

    def run(self, most: int) -> None:
        """All that waits, and what that leads to. Raises `Hang` when that takes more than `most` calls."""
        calls = self._calls
        while calls:
            most -= 1
            if most < 0:
                raise Hang
            call, args = calls.popleft()
            call(*args)


class _Echo:
    """The application's side of one request: takes the body as it comes, and answers when that is complete."""

    def __init__(self, driver: QuickDriver, stream: Stream) -> None:
        self.driver = driver
        self.stream = stream
        self.told = False
        head = stream.head
        target = head.raw_path + b"?" + head.query if head.query else head.raw_path
        path = unquote_to_bytes(head.raw_path).decode("utf-8", "replace")
        self.seen = Seen(head.method, target, head.version, head.headers, path=path, scheme=stream.scheme)
        self.number = len(driver.echoes)
        driver.echoes.append(self)
        self.body_arrived()

    def body_arrived(self) -> None:
        if self.seen.complete:
            return
        data, more = self.stream.take_body()
        self.seen.body += data
        if not more:
            self.seen.complete = True
            if self.stream.head.upgrade:
                self._answer_handshake()
                return
            self.stream.start(ResponseHead(200, [(b"x-number", b"%d" % self.number)]))
            self.stream.write(b"answer %d" % self.number, False)

    def _answer_handshake(self) -> None:
        opening = self.stream.opening
        names = opening.subprotocols
        self.driver.socket = opening.accept(self, names[0] if names else None, [])

    def disconnected(self) -> None:
        self.told = True

    def write_resumed(self) -> None:
        pass

    def describe(self) -> str:
        return "a request"


class QuickDriver:
    """Runs cases one after the other; a parser lives as long as the driver, as it does in a worker.

    websockets: serve them; a handshake is accepted with the first subprotocol that is offered, and messages are taken.
    """

    def __init__(self, parser: str, *, websockets: WebSocketOptions | None = None) -> None:
        self.parser = make_parser(parser)
        self.websockets = websockets
        self.echoes: list[_Echo] = []
        self.socket: WebSocket | None = None
        self.wire = b""  # what the last case was answered

    def handle(self, stream: Stream) -> _Echo:
        return _Echo(self, stream)

    def run_case(
        self, pieces: Sequence[Sequence[bytes]], *, eof: bool = False, max_body: int = 0, limits: Limits | None = None
    ) -> Outcome:
        """As `corpus_driver.Driver.run_case`, for the application `echo`. Raises `Hang`."""
        loop = QuickLoop()
        log = RecordingLog()
        context = Context(
            cast(asyncio.AbstractEventLoop, loop),
            self.parser,
            log,
            limits=limits or Limits(body=max_body),
            timeouts=_TIMEOUTS,
            server_fields=_FIELDS,
            websockets=self.websockets,
        )
        context.interface = self  # type: ignore[assignment]
        self.echoes = []
        self.socket = None
        connection = Connection(context)
        transport = FakeTransport(loop, connection)
        connection.connection_made(transport)
        self._feed(loop, connection, transport, pieces)
        if eof:
            self._end(connection, transport)
        loop.run(CALLS_MAX)
        closed = transport.closing or transport.eof_written
        if not eof:
            self._end(connection, transport)
        loop.run(CALLS_MAX)
        ended = transport.closing
        transport.lose()
        loop.run(CALLS_MAX)
        return self._outcome(context, transport, log, closed, ended)

    def _feed(
        self, loop: QuickLoop, connection: Connection, transport: FakeTransport, pieces: Sequence[Sequence[bytes]]
    ) -> None:
        for group in pieces:
            for piece in group:
                if transport.closing or transport.paused:
                    return
                if piece:
                    connection.data_received(piece)
                    # What waits in the buffer may be many requests of some bytes each.
                    loop.run(CALLS_MAX + CALLS_PER_BYTE * (len(piece) + len(connection.buffer)))

    @staticmethod
    def _end(connection: Connection, transport: FakeTransport) -> None:
        if not transport.closing and not connection.eof_received():
            transport.close()

    def _outcome(
        self, context: Context, transport: FakeTransport, log: RecordingLog, closed: bool, ended: bool
    ) -> Outcome:
        faults = transport.faults + log.complaints
        echoes = self.echoes
        self.wire = wire = transport.wire
        if any(not echo.seen.complete and not echo.told for echo in echoes):
            faults.append("the application was not told that the rest of a body never comes")
        if context.connections:
            faults.append("the connection is not forgotten")
        seen = [echo.seen for echo in echoes]
        if self.socket is not None:
            return Outcome(seen, [], closed, ended, transport.aborted, 0, "; ".join(faults))
        try:
            responses, interim = read_responses(wire, [each.method for each in seen if each.complete], closed)
        except ValueError as exc:
            responses, interim = [], 0
            faults.append(str(exc))
        numbers = [response.all(b"x-number") for response in responses if response.status == 200]
        if numbers != [[b"%d" % n] for n in range(len(numbers))]:
            faults.append(f"answers in the order {numbers}")
        return Outcome(seen, responses, closed, ended, transport.aborted, interim, "; ".join(faults))


_TIMEOUTS = Timeouts()
_FIELDS = ServerFields(date=True, server=False)  # one for all, so that answers of different drivers can be compared
