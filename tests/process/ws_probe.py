"""An ASGI application whose WebSockets do what their client tells them to, and a client that sees every single frame.

The query of the WebSocket `/script` is as with `probe.py`, which also has the ordinary requests (`/records`, `/set`).
`/echo` sends back what comes; every other path sends its scope and closes.
"""

from __future__ import annotations

import ast
import asyncio
import enum
import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests.process import probe
from tests.rawhttp import DEADLINE, Address, RawClient, Response, request_bytes

CONTINUED, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
MASK = b"\x9a\x03\xc5\x7e"

# ------------------------------------------------------------------------------------------------- the application


async def app(*args: Any) -> Any:
    scope, receive, send = args
    if scope["type"] != "websocket":
        return await probe.app(*args)
    if scope["path"] == "/script":
        key, steps = ast.literal_eval(unquote(scope["query_string"].decode("latin-1")))
        return await Socket(scope, receive, send, probe.records.setdefault(key, [])).run(steps)
    if scope["path"] == "/echo":
        return await Socket(scope, receive, send, []).run([("accept",), ("echo",)])
    told = probe.dump(scope)
    if scope["path"] == "/mutate":
        probe.mutate(scope)
        scope["subprotocols"].append("leaked")
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": told})
    return await send({"type": "websocket.close"})


class Code(enum.IntEnum):
    LEAVING = 1001


class Socket(probe.Run):
    """One call of the application that follows a script."""

    async def accept(self) -> None:
        assert await self._receive() == {"type": "websocket.connect"}
        await self._send({"type": "websocket.accept"})

    async def say(self, *messages: str | bytes) -> None:
        for message in messages:
            await self._send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})

    async def shout(self, message: str, times: int) -> None:
        await self.say(message * times)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def closing(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.close()

    async def close_with_an_enum(self) -> None:
        await self.attempt({"type": "websocket.close", "code": Code.LEAVING})

    async def echo(self) -> None:
        """Until the end, which is noted."""
        while (event := await self._receive())["type"] == "websocket.receive":
            await self._send({**event, "type": "websocket.send"})
        self.record.append(event)

    async def measure(self) -> None:
        """One message; its type, its size and its digest are noted."""
        event = await self._receive()
        data = event["bytes"] if event["text"] is None else event["text"].encode()
        self.record.append(("bytes" if event["text"] is None else "text", len(data), hashlib.sha256(data).hexdigest()))

    async def tally(self, pause: float = 0.0) -> None:
        """Until the end: how many messages, and of what size, is noted; then the end. `pause`: s after each."""
        count = size = 0
        while (event := await self._receive())["type"] == "websocket.receive":
            count += 1
            size += len(event["text"] if event["bytes"] is None else event["bytes"])
            if pause:
                await asyncio.sleep(pause)
        self.record += [(count, size), event]

    async def several(self, count: int) -> None:
        """So many messages; their sizes are noted."""
        self.record.append([len((await self._receive())["bytes"] or b"") for _ in range(count)])

    async def stream(self, total: int, piece: int, pause: float = 0.0) -> None:
        """`total` bytes in messages of random data; how many have been taken is the last entry of the record. The end
        of it, if there is one, is noted behind that."""
        data = os.urandom(piece)
        self.record.append(0)
        try:
            for _ in range(total // piece):
                await self._send({"type": "websocket.send", "bytes": data})
                self.record[-1] += piece
                if pause:
                    await asyncio.sleep(pause)
        except Exception as exc:
            self.record.append([kind.__name__ for kind in type(exc).__mro__])

    async def pour(self, piece: int) -> None:
        """Messages until `send` raises, which is noted; nothing else is waited for."""
        await self.stream(2**50, piece)

    async def tell(self, name: str, step: Sequence[Any]) -> None:
        """One step, and what has been noted by then goes into the server's log."""
        await self.step(*step)
        print(f"{name}: {self.record!r}", flush=True)

    async def block(self, seconds: float, name: str) -> None:
        """Keep the event loop from running."""
        print(f"{name}: blocking", flush=True)
        time.sleep(seconds)


# ------------------------------------------------------------------------------------------------------ the client


class Frame(NamedTuple):
    opcode: int
    payload: bytes
    fin: bool = True
    rsv: int = 0


def frame(
    opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, mask: bytes = MASK, form: int = 0
) -> bytes:
    """The bytes of a frame of a client. rsv: the three reserved bits. mask: b"" for none. form: 126 or 127 for a length
    in that form, though a shorter one would do."""
    size = len(payload)
    form = form or (size if size < 126 else 126 if size < 65536 else 127)
    head = bytes((fin << 7 | rsv << 4 | opcode, bool(mask) << 7 | form))
    if form > 125:
        head += struct.pack("!H" if form == 126 else "!Q", size)
    return head + mask + (masked(payload, mask) if mask else payload)


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def fragments(opcode: int, *pieces: bytes, rsv: int = 0) -> bytes:
    """A message in fragments."""
    last = len(pieces) - 1
    return b"".join(
        frame(CONTINUED if number else opcode, piece, number == last, 0 if number else rsv)
        for number, piece in enumerate(pieces)
    )


def close_frame(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455, 1.3, and its answer
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
ASKING: tuple[tuple[str, str], ...] = (
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", KEY),
    ("Sec-WebSocket-Version", "13"),
)


def handshake(target: str = "/", headers: Sequence[tuple[str, str]] = ()) -> bytes:
    return request_bytes("GET", target, [*ASKING, *headers])


class WsClient(RawClient):
    """A connection that has asked for a WebSocket; `opened` when that is granted. Frames are read strictly.

    target: "" leaves the handshake to the test. early: sent together with the handshake.
    """

    def __init__(
        self,
        address: Address,
        target: str = "/",
        headers: Sequence[tuple[str, str]] = (),
        early: bytes = b"",
    ) -> None:
        super().__init__(address)
        self.response: Response | None = None
        if target:
            self.send(handshake(target, headers) + early)

    @classmethod
    def ask(cls, address: Address, request: bytes) -> WsClient:
        """One whose handshake is, or ends with, `request`."""
        client = cls(address, "")
        client.send(request)
        return client

    def __enter__(self) -> WsClient:
        return self

    def opened(self) -> WsClient:
        try:
            self.response = response = self.read_head()
            assert response.status == 101, response
            assert (response.header(b"upgrade"), response.header(b"connection")) == (b"websocket", b"Upgrade")
            assert response.header(b"sec-websocket-accept") == ACCEPT
        except BaseException:
            self.close()
            raise
        return self

    def say(self, *messages: str | bytes) -> None:
        for message in messages:
            text = isinstance(message, str)
            self.send(frame(TEXT if text else BINARY, message.encode() if isinstance(message, str) else message))

    def hear(self) -> str | bytes:
        """The next message, which must be whole and uncompressed, and nothing else must come before it."""
        got = self.read_frame()
        assert got.opcode in (TEXT, BINARY), got
        assert (got.fin, got.rsv) == (True, 0)
        return got.payload.decode() if got.opcode == TEXT else got.payload

    def read_frame(self) -> Frame:
        first, second = self._exactly(2)
        assert second < 128, "a masked frame from the server"
        size = second
        if size > 125:
            (size,) = struct.unpack("!H" if size == 126 else "!Q", self._exactly(2 if size == 126 else 8))
            assert size > (125 if second == 126 else 65535), "a length in a longer form than needed"
        got = Frame(first & 15, self._exactly(size), first > 127, first >> 4 & 7)
        assert got.opcode in (CONTINUED, TEXT, BINARY, CLOSE, PING, PONG), got
        assert got.opcode < CLOSE or (got.fin and not got.rsv and size < 126), got
        return got

    def closed(self) -> tuple[int | None, str]:
        """Code and reason of the server's close frame, which must come next."""
        got = self.read_frame()
        assert got.opcode == CLOSE, got
        if not got.payload:
            return None, ""
        return struct.unpack("!H", got.payload[:2])[0], got.payload[2:].decode()

    def ended(self) -> tuple[int | None, str]:
        """`closed`, and nothing comes after it but the end of the connection."""
        said = self.closed()
        assert self.eof()
        return said

    def part(self, code: int | None = 1000, reason: bytes = b"") -> tuple[int | None, str]:
        """Close, and what the server says to it before it ends the connection."""
        self.send(close_frame(code, reason))
        return self.ended()

    def frames(self) -> Iterator[Frame]:
        """All frames up to the end of the connection."""
        while self._buffer or not self.eof():
            yield self.read_frame()

    def silent(self) -> bool:
        """Whether the server has sent nothing that was not read."""
        self.sock.setblocking(False)
        try:
            return not self._buffer and not self._fill() and not self._at_end
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(DEADLINE)

    def _exactly(self, size: int) -> bytes:
        return b"".join(self._counted(size))
