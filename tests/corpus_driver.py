"""Feeds bytes to the server's connection, with an application that records what it gets, and tells the `Outcome`.

No sockets: the transport is a fake, the event loop, the connection, the parser and the ASGI interface are real.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from apphost.interfaces.asgi import AsgiInterface
from apphost.logs import Log
from apphost.protocols.base import HeadParser
from apphost.protocols.context import Context
from apphost.protocols.h11_parser import H11Parser, read_with_connection
from apphost.protocols.http1 import Connection
from apphost.protocols.strict import Limits
from tests.corpus import Outcome, Response, Seen
from tests.transport import FakeTransport

QUIET_TURNS = 8  # of the event loop without a sign of life: more than any chain of callbacks between two signs
SLOW_TURNS = 12  # that a slow application lets pass before it answers


def make_parser(name: str) -> HeadParser:
    if name == "h11":
        return H11Parser()
    if name == "h11 documented":
        return H11Parser(read_with_connection)
    from apphost.protocols.httptools_parser import HttptoolsParser

    return HttptoolsParser()


class Recorder:
    """The application. `kind` is the `app` of a case."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.seen: list[Seen] = []
        self.told: list[Seen] = []  # of these it was told that the client is gone
        self.signs = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.signs += 1
        query = scope["query_string"]
        seen = Seen(
            scope["method"],
            scope["raw_path"] + b"?" + query if query else scope["raw_path"],
            scope["http_version"],
            list(map(tuple, scope["headers"])),
            path=scope["path"],
            scheme=scope["scheme"],
        )
        number = len(self.seen)
        self.seen.append(seen)
        if self.kind != "early" and not await self._read(seen, receive):
            return
        seen.complete = True
        for _ in range(SLOW_TURNS if self.kind == "slow" else 0):
            self.signs += 1
            await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-number", b"%d" % number)]})
        await send({"type": "http.response.body", "body": b"answer %d" % number})
        self.signs += 1

    async def _read(self, seen: Seen, receive: Any) -> bool:
        while True:
            event = await receive()
            self.signs += 1
            if event["type"] == "http.disconnect":
                self.told.append(seen)
                return False
            seen.body += event["body"]
            if not event["more_body"]:
                return True


class RecordingLog(Log):
    """Keeps errors and warnings: whatever a client sends, it causes none."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[str] = []

    def write(self, level: str, message: str, detail: str = "", **fields: Any) -> None:
        if level in ("warning", "error"):
            self.complaints.append(f"logged as {level}: {message} {detail}".strip())


class Driver:
    """Runs cases on one event loop; a parser lives as long as the driver, as it does in a worker."""

    def __init__(self, parser: str, loop: asyncio.AbstractEventLoop) -> None:
        self.parser = make_parser(parser)
        self.loop = loop

    def run_case(
        self, pieces: Sequence[Sequence[bytes]], *, app: str = "echo", eof: bool = False, max_body: int = 0
    ) -> Outcome:
        """Feed the pieces one by one; between two groups of them the server settles. `eof`: then half-close at once."""
        return self.loop.run_until_complete(self._run(pieces, Recorder(app), eof, Limits(body=max_body)))

    async def _run(self, pieces: Sequence[Sequence[bytes]], app: Recorder, eof: bool, limits: Limits) -> Outcome:
        log = RecordingLog()
        context = Context(self.loop, self.parser, log, limits=limits)
        context.interface = AsgiInterface(app, self.loop, log, context.active)
        connection = Connection(context)
        transport = FakeTransport(self.loop, connection)
        faults = transport.faults
        self.loop.set_exception_handler(lambda _loop, info: faults.append(f"exception: {info}"))
        connection.connection_made(transport)
        for group in pieces:
            await self._feed(connection, transport, app, group)
            if not eof:
                await _settle(transport, app)
        if eof and not transport.closing and not connection.eof_received():
            transport.close()
        await _settle(transport, app)
        closed = transport.closing or transport.eof_written
        if not eof and not transport.closing and not connection.eof_received():
            transport.close()
        await _settle(transport, app)
        ended = transport.closing
        transport.lose()
        await _settle(transport, app)
        if context.active:
            faults.append(f"{len(context.active)} calls of the application never ended")
        if context.connections:
            faults.append("the connection is not forgotten")
        return self._outcome(transport, app, faults + log.complaints, closed, ended)

    async def _feed(
        self, connection: Connection, transport: FakeTransport, app: Recorder, group: Sequence[bytes]
    ) -> None:
        for piece in filter(None, group):
            if transport.paused:
                await _settle(transport, app)
            if transport.closing or transport.paused:
                return
            connection.data_received(piece)
            await asyncio.sleep(0)

    def _outcome(
        self, transport: FakeTransport, app: Recorder, faults: list[str], closed: bool, ended: bool
    ) -> Outcome:
        if any(not seen.complete and seen not in app.told for seen in app.seen):
            faults.append("the application was not told that the rest of a body never comes")
        try:
            responses, interim = read_responses(transport.wire, [s.method for s in app.seen if s.complete], closed)
        except ValueError as exc:
            responses, interim = [], 0
            faults.append(str(exc))
        numbers = [response.all(b"x-number") for response in responses if response.status == 200]
        if numbers != [[b"%d" % n] for n in range(len(numbers))]:
            faults.append(f"answers in the order {numbers}")
        return Outcome(app.seen, responses, closed, ended, transport.aborted, interim, "; ".join(faults))


async def _settle(transport: FakeTransport, app: Recorder) -> None:
    """Until the server has nothing more to do with what it has."""
    before = -1
    while before != transport.signs + app.signs:
        before = transport.signs + app.signs
        for _ in range(QUIET_TURNS):
            await asyncio.sleep(0)


@contextmanager
def driving(parser: str) -> Iterator[Driver]:
    loop = asyncio.new_event_loop()
    try:
        yield Driver(parser, loop)
    finally:
        loop.close()


# -- reading responses

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2}) [\t\x20-\x7e\x80-\xff]*")
_FIELD_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)[ \t]*"
)


def read_responses(wire: bytes, methods: Iterable[str], closed: bool) -> tuple[list[Response], int]:
    """All responses on the wire, and the number of 100 (Continue). `methods` of the requests, in order; when there are
    more responses, the last one is the server's own, to a request that may have been a HEAD. `closed`: the server
    closed. Raises ValueError for anything that is not well-formed.
    """
    responses = []
    interim = 0
    pending = iter(methods)
    method = next(pending, "")
    while wire:
        head, blank, wire = wire.partition(b"\r\n\r\n")
        if not blank:
            raise ValueError(f"a response head without an end: {head[:60]!r}")
        lines = head.split(b"\r\n")
        match = _STATUS_LINE.fullmatch(lines[0])
        fields = [_FIELD_LINE.fullmatch(line) for line in lines[1:]]
        if match is None or None in fields:
            raise ValueError(f"a malformed response head: {head[:200]!r}")
        headers = [(found[1].lower(), found[2]) for found in fields if found]
        response = Response(int(match[1]), headers, b"")
        if response.status == 100:
            interim += 1
            continue
        response.body, wire = _read_body(response, wire, method, closed)
        responses.append(response)
        method = next(pending, "")
    return responses, interim


def _read_body(response: Response, wire: bytes, method: str, closed: bool) -> tuple[bytes, bytes]:
    lengths, codings = response.all(b"content-length"), response.all(b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise ValueError("a response framed twice")
    if len(response.all(b"date")) != 1:
        raise ValueError("a response without one Date")
    refused_head = not method and closed and not wire and response.status >= 400
    if method == "HEAD" or refused_head or response.status in (204, 304) or response.status < 200:
        return b"", wire
    if codings:
        if codings != [b"chunked"]:
            raise ValueError(f"a response with Transfer-Encoding {codings[0]!r}")
        return _read_chunks(wire)
    if lengths:
        if not re.fullmatch(rb"0|[1-9][0-9]*", lengths[0]) or len(wire) < int(lengths[0]):
            raise ValueError(f"a response with Content-Length {lengths[0]!r} and {len(wire)} bytes left")
        return wire[: int(lengths[0])], wire[int(lengths[0]) :]
    if not closed:
        raise ValueError("a response without framing on an open connection")
    return wire, b""


def _read_chunks(wire: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, end, wire = wire.partition(b"\r\n")
        if not end or not re.fullmatch(rb"[0-9a-fA-F]{1,15}", line):
            raise ValueError(f"a malformed chunk size {line[:40]!r}")
        size = int(line, 16)
        if wire[size : size + 2] != b"\r\n":
            raise ValueError("chunk data not followed by CRLF")
        body += wire[:size]
        wire = wire[size + 2 :]
        if not size:
            return body, wire
