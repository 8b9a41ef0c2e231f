"""The lower half of a connection: transport, flow, time-outs, ends, and what it takes to move to another worker."""

from __future__ import annotations

import asyncio
import enum
import os
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from apphost.protocols.capsule import BYTES_MAX, Capsule
from apphost.protocols.context import Context
from apphost.protocols.deadlines import NEVER, RESOLUTION
from apphost.protocols.exchange import COPY_MAX, Exchange
from apphost.protocols.kernel import Peer, look_at_peer, taken
from apphost.protocols.response import error_response
from apphost.protocols.websocket import WebSocket

# That of asyncio has no back-pressure before 3.12.9 and 3.13.2 (CVE-2024-12254), and up to 3.14.0 it writes on after
# the connection was lost.
_BROKEN_WRITELINES = (3, 12) <= sys.version_info < (3, 14, 1)

LOOK = 2.0  # s between two looks at a client that is not read from: its end would not be heard

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER, on, 0 s: close sends RST


class Phase(enum.Enum):
    WAITING = "waiting"  # for the first byte of a request
    HEAD = "head"  # a head is half received
    BUSY = "busy"  # a request is being answered
    UPGRADED = "upgraded"  # it is a WebSocket now
    DISCARDING = "discarding"  # answered, but the rest of its body must come before the next request can
    MOVING = "moving"  # offered to another worker; nothing is read until it is gone or has come back
    LINGERING = "lingering"  # the last word is said; reading on, so that it is not lost to a reset (RFC 9112, 9.6)
    CLOSED = "closed"


# Looking a member up in its enum costs 0.1 us before Python 3.12.
_WAITING, _HEAD, _MOVING = Phase.WAITING, Phase.HEAD, Phase.MOVING
_LINGERING, _CLOSED = Phase.LINGERING, Phase.CLOSED


class Wire(asyncio.Protocol, ABC):
    """What every connection has, whatever is spoken on it. Event loop only."""

    __slots__ = (
        "anonymous",
        "buffer",
        "client",
        "context",
        "eof",
        "exchange",
        "made_at",
        "phase",
        "read_deadline",
        "read_paused",
        "requests",
        "scanned",
        "scheme",
        "server",
        "slot",
        "taken",
        "transport",
        "unsent",
        "websocket",
        "write_deadline",
        "write_paused",
    )

    fixed = False  # True: it can never move, because there is more to it than its socket

    transport: asyncio.Transport
    exchange: Exchange | None
    websocket: WebSocket | None
    client: tuple[str, int] | None
    server: tuple[str, int | None]

    def __init__(self, context: Context) -> None:
        self.context = context
        self.made_at = context.loop.time()
        self.phase = _WAITING
        self.buffer = b""
        self.scanned = 0  # bytes of `buffer` in which the end of a head was looked for in vain
        self.exchange = None
        self.websocket = None
        self.requests = 0
        self.anonymous = False  # a proxy has not told who the client is, so nothing that it says is believed
        self.eof = False  # the client has ended its side
        self.read_paused = False
        self.write_paused = False
        self.read_deadline = NEVER
        self.write_deadline = NEVER
        # How things were when the client's time to read was last counted: bytes that the transport had left, and what
        # the client had taken of those that the kernel has.
        self.unsent = 0
        self.taken = 0
        self.slot = 0
        self.scheme = "http"

    @property
    def peer(self) -> str:
        """The client for logs: `127.0.0.1:4711`, or `unix`."""
        return f"{self.client[0]}:{self.client[1]}" if self.client else "unix"

    def fileno(self) -> int:
        return int(self.transport.get_extra_info("socket").fileno())

    # -- bytes for the client

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def write_many(self, pieces: list[bytes]) -> None:
        if _BROKEN_WRITELINES and isinstance(self.context.loop, asyncio.SelectorEventLoop):
            self.transport.write(b"".join(pieces))
        else:
            self.transport.writelines(pieces)

    def write_framed(self, before: bytes, data: bytes, after: bytes = b"") -> None:
        """`data` with its framing around it: copied together where it is small, else as it is."""
        if len(data) > COPY_MAX:
            self.write_many([piece for piece in (before, data, after) if piece])
        else:
            self.transport.write(before + data + after)

    def pause_writing(self) -> None:
        self.write_paused = True
        self._note_unsent()
        self.write_deadline = self.context.loop.time() + self.context.timeouts.write
        self.context.deadlines.watch(self)

    def _note_unsent(self) -> None:
        self.unsent = self.transport.get_write_buffer_size()
        if self.unsent:
            self.taken = taken(self.transport.get_extra_info("socket"))

    def _reads_on(self) -> bool:
        """Whether the client has taken anything since `_note_unsent`: only not as fast as we wrote."""
        left = self.transport.get_write_buffer_size()
        return left < self.unsent or taken(self.transport.get_extra_info("socket")) > self.taken

    # -- ends

    def _answer(self, status: int, why: str, method: str, fields: Sequence[tuple[bytes, bytes]] = ()) -> None:
        response = error_response(status, why, self.context.server_fields.both, fields)
        if method == "HEAD":
            response = response[: response.index(b"\r\n\r\n") + 4]
        self.transport.write(response)
        self.linger()

    def _cut(self, exchange: Exchange) -> None:
        """End the connection so that the client sees that the response is incomplete."""
        if exchange.ends_with_connection:
            self.abort()
        else:
            self.linger()

    def _lose(self, exchange: Exchange) -> None:
        """The client gets no more of this answer."""
        exchange.client_gone()
        if self.context.access_log is not None:
            self.context.access_log.write(exchange, cut=True)

    def close(self) -> None:
        """Close after what is written has gone out."""
        self.exchange = None
        self.phase = _CLOSED
        self._note_unsent()
        self._arm(self.context.loop.time() + self.context.timeouts.write)
        self.transport.close()

    def overdue(self) -> None:
        """Closed long ago: abort, unless the client still reads what is left."""
        if self.write_paused or self._reads_on():  # the former has a time-out of its own
            self._note_unsent()
            self._arm(self.context.loop.time() + self.context.timeouts.write)
        else:
            self.abort()

    def linger(self) -> None:
        """Say that nothing more comes, and read on for a while: closing with unread bytes would send a reset, and a
        reset can destroy the answer on its way (RFC 9112, 9.6)."""
        self.exchange = None
        self.buffer = b""
        if self.eof or self.transport.is_closing() or not self.transport.can_write_eof():
            self.close()
            return
        self.phase = _LINGERING
        timeouts = self.context.timeouts
        patience = timeouts.linger_draining if self.context.draining else timeouts.linger
        self._arm(self.context.loop.time() + patience)
        try:
            self.transport.write_eof()
        except OSError:  # the client has reset the connection, and the loop has not heard of it yet
            self.phase = _CLOSED
            self.transport.abort()
            return
        self._resume()

    def abort(self) -> None:
        """End at once, with a reset."""
        self.exchange = None
        self.phase = _CLOSED
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            except OSError:
                pass  # macOS: the client is gone already, and with it who would see the reset
        self.transport.abort()

    # -- time-outs

    @property
    def deadline(self) -> float:
        return self.read_deadline if self.read_deadline < self.write_deadline else self.write_deadline

    def _arm(self, deadline: float) -> None:
        self.read_deadline = deadline
        if not self.slot or deadline < self.slot * RESOLUTION - RESOLUTION:
            self.context.deadlines.watch(self)

    def expect_within(self, seconds: float) -> None:
        """Time out after this, in place of what was set before."""
        self._arm(self.context.loop.time() + seconds)

    # -- flow of the client's bytes

    def read_on(self, wanted: bool) -> None:
        """Read, or leave what comes in the kernel."""
        if wanted:
            self._resume()
        else:
            self._pause()

    def _pause(self) -> None:
        if not self.read_paused and not self.eof:
            self.read_paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self.read_paused:
            self.read_paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def pause_again(self) -> None:
        if self.read_paused and not self.transport.is_closing():
            self.transport.pause_reading()

    def look_at_client(self) -> Peer:
        """How it is, while nothing is read from it. A lost one is done with, as when the loop finds out."""
        peer = look_at_peer(self.transport.get_extra_info("socket"))
        if peer is Peer.LOST:
            self.transport.abort()
        return peer

    def lendable_socket(self) -> int | None:
        """A duplicate of the socket's descriptor for writing past the transport, None when that cannot be done."""
        transport = self.transport
        sock = transport.get_extra_info("socket")
        if sock is None or self.fixed or transport.get_write_buffer_size():
            return None
        return os.dup(sock.fileno())

    @abstractmethod
    def timed_out(self, now: float) -> None:
        """Its deadline has passed."""

    # -- moving to another worker

    @property
    def movable(self) -> bool:
        """Whether nothing of this connection is in anybody's hands: no request in progress, nothing left to write."""
        transport = self.transport
        return (
            (self.phase is _WAITING or self.phase is _HEAD or self._at_rest)
            and not self.fixed
            and not self.eof
            and not self.write_paused
            and len(self.buffer) <= BYTES_MAX
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )

    @property
    def _at_rest(self) -> bool:
        websocket = self.websocket
        return self.phase is Phase.UPGRADED and websocket is not None and websocket.movable

    def tell_when_flushed(self) -> None:
        """Have `resume_writing` called only when nothing at all is left to write: then it can move."""
        self.transport.set_write_buffer_limits(high=0)

    def pack(self) -> Capsule:
        """Stop reading, and say all that another worker must know. `stay` or `let_go` must follow."""
        left = self.read_deadline - self.context.loop.time()
        half = self.phase is _HEAD
        socket = None
        if self.websocket is not None:
            left, self.buffer, socket = self.websocket.pack()
        self._pause()
        self.phase = _MOVING
        ends = self.client, self.server, self.scheme
        return Capsule(*ends, self.requests, left, half, self.buffer, socket, self.anonymous)

    def let_go(self) -> None:
        """It belongs to another worker now: close our descriptor, which the client does not notice."""
        if self.phase is _MOVING:
            self.buffer = b""
            self.phase = _CLOSED
            self.transport.abort()


def addresses(transport: asyncio.BaseTransport) -> tuple[tuple[str, int] | None, tuple[str, int | None]]:
    """Client and server in the form of the ASGI scope: (host, port), two items for IPv6 too; a Unix socket has no
    client, and its server is (path, None)."""
    own = own_address(transport.get_extra_info("sockname"))
    peer = transport.get_extra_info("peername") if own[1] is not None else None
    return (peer[0], peer[1]) if isinstance(peer, tuple) else None, own


def own_address(name: Any) -> tuple[str, int | None]:
    """What `getsockname` says, in that form."""
    if isinstance(name, tuple):
        return name[0], name[1]
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name or "", None
