"""What travels with a connection from one worker to another, besides its descriptor. Pure.

A connection between two requests has no application state, so this is all there is of it: who is at the other end, how
much has been served, how much time is left, and the bytes that were read and belong to requests not begun yet. Those
bytes are parsed by the receiver and by nobody else. A WebSocket whose application has agreed to it takes along what its
handshake said, the messages that nobody has received, and what the application leaves for its successor.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

VERSION = 1
HTTP, WEBSOCKET = "http1", "websocket"
# bytes: what a connection buffers is at most the default of limit_pipelined and two reads of asyncio, of 256 KiB each;
# one with more waits until it has less
BYTES_MAX = 65536 + 2 * 262144
STATE_MAX = 65536  # bytes that an application may leave; what is larger belongs into a database
# bytes of a WebSocket's messages and frames, and of its head, the default limit of one. With a third more for base64,
# and up to twice the head for the list of subprotocols, a capsule stays below the 1 MiB of a message between processes.
SOCKET_MAX = 524288
HEAD_MAX = 65536


class CapsuleError(Exception):
    """What came is no capsule of this version: the connection stays where it is."""


@dataclass(frozen=True, slots=True)
class Socket:
    """What a WebSocket is besides its connection. The window of neither direction's compression travels.

    target, headers: of its handshake. offered: subprotocols. window: bits of ours and of the client's, None when
    nothing is compressed. messages: whole ones that the application has not received, oldest first. ping: the payload
    of one that is not answered yet. state: what the application leaves.
    """

    target: bytes
    headers: list[tuple[bytes, bytes]]
    offered: list[str]
    subprotocol: str | None
    window: tuple[int, int, bool] | None
    messages: list[str | bytes]
    ping: bytes
    state: bytes | None

    def to_wire(self) -> dict[str, Any]:
        return {
            "target": _pack(self.target),
            "headers": _pack(b"".join(b"%b:%b\n" % field for field in self.headers)),
            "offered": self.offered,
            "subprotocol": self.subprotocol,
            "window": self.window,
            "messages": [_pack_message(message) for message in self.messages],
            "ping": _pack(self.ping),
            "state": None if self.state is None else _pack(self.state),
        }

    @classmethod
    def from_wire(cls, wire: Any) -> Socket:
        window = wire["window"]
        state = wire["state"]
        return cls(
            target=_bytes(wire["target"]),
            headers=[_field(line) for line in _bytes(wire["headers"]).split(b"\n")[:-1]],
            offered=[_typed(name, str) for name in wire["offered"]],
            subprotocol=None if wire["subprotocol"] is None else _typed(wire["subprotocol"], str),
            window=None if window is None else (_bits(window[0]), _bits(window[1]), _typed(window[2], bool)),
            messages=[_message(kind, data) for kind, data in wire["messages"]],
            ping=_bytes(wire["ping"]),
            state=None if state is None else _bytes(state),
        )


@dataclass(frozen=True, slots=True)
class Capsule:
    """A connection that is waiting for a request, in the middle of a head (`half`), or a WebSocket (`socket`).

    client, server, scheme: as in the ASGI scope; those that a PROXY header has told. requests: served so far. left:
    seconds until its time-out, or its next ping. data: what was read and not parsed. anonymous: a proxy has not
    told who the client is, so what it says is not the proxy's word.
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None]
    scheme: str
    requests: int
    left: float
    half: bool
    data: bytes
    socket: Socket | None = None
    anonymous: bool = False

    def to_wire(self) -> dict[str, Any]:
        wire = {
            "v": VERSION,
            "kind": HTTP if self.socket is None else WEBSOCKET,
            "client": self.client,
            "server": self.server,
            "scheme": self.scheme,
            "requests": self.requests,
            "left": self.left,
            "half": self.half,
            "data": _pack(self.data),
        }
        if self.anonymous:
            wire["anonymous"] = True
        if self.socket is not None:
            wire["socket"] = self.socket.to_wire()
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Capsule:
        """Raises `CapsuleError` for anything that `to_wire` of this version did not make."""
        version, kind = wire.get("v"), wire.get("kind")
        if type(version) is not int or version != VERSION or kind not in (HTTP, WEBSOCKET):
            raise CapsuleError(f"version {str(version)[:20]}, kind {str(kind)[:20]}")
        try:
            return cls(
                client=_client(wire["client"]),
                server=_server(wire["server"]),
                scheme=_typed(wire["scheme"], str),
                requests=_typed(wire["requests"], int),
                left=_seconds(wire["left"]),
                half=_typed(wire["half"], bool),
                data=_bytes(wire["data"]),
                socket=Socket.from_wire(wire["socket"]) if kind == WEBSOCKET else None,
                anonymous=_typed(wire.get("anonymous", False), bool),
            )
        except (LookupError, TypeError, ValueError, OverflowError, binascii.Error) as exc:
            raise CapsuleError(f"{type(exc).__name__}: {exc}") from None


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is not {kind}")
    return value


def _client(value: Any) -> tuple[str, int] | None:
    if value is None:
        return None
    host, port = value
    return _typed(host, str), _typed(port, int)


def _server(value: Any) -> tuple[str, int | None]:
    host, port = value
    return _typed(host, str), None if port is None else _typed(port, int)


def _seconds(value: Any) -> float:
    seconds = float(_typed(value, (int, float)))
    if not math.isfinite(seconds):  # a clock does not take it
        raise ValueError(f"{seconds} seconds")
    return seconds


def _bytes(value: Any) -> bytes:
    data = base64.b64decode(_typed(value, str), validate=True)
    if len(data) > BYTES_MAX:
        raise ValueError(f"{len(data)} bytes")
    return data


def _pack(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _pack_message(message: str | bytes) -> tuple[str, str]:
    return ("text", _pack(message.encode())) if isinstance(message, str) else ("bytes", _pack(message))


def _message(kind: Any, data: Any) -> str | bytes:
    if kind not in ("text", "bytes"):
        raise ValueError(f"a message of kind {str(kind)[:20]}")
    return _bytes(data).decode() if kind == "text" else _bytes(data)


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon:
        raise ValueError("a header field without a colon")
    return name, value


def _bits(value: Any) -> int:
    bits = _typed(value, int)
    if not 9 <= bits <= 15:
        raise ValueError(f"a window of {bits} bits")
    return int(bits)
