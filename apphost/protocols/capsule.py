"""What travels with a connection from one worker to another, besides its descriptor. Pure.

A connection between two requests has no application state, so this is all there is of it: who is at the other end, how
much has been served, how much time is left, and the bytes that were read and belong to requests not begun yet. Those
bytes are parsed by the receiver and by nobody else.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

VERSION = 1
KIND = "http1"
# bytes: the most that a connection buffers is BUFFER_MAX of http1.py and two reads of asyncio, of 256 KiB each
BYTES_MAX = 65536 + 2 * 262144


class CapsuleError(Exception):
    """What came is no capsule of this version: the connection stays where it is."""


@dataclass(frozen=True, slots=True)
class Capsule:
    """A connection that is waiting for a request, or in the middle of a head (`half`).

    client, server, scheme: as in the ASGI scope. requests: served so far. left: seconds until its time-out.
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None]
    scheme: str
    requests: int
    left: float
    half: bool
    data: bytes

    def to_wire(self) -> dict[str, Any]:
        return {
            "v": VERSION,
            "kind": KIND,
            "client": self.client,
            "server": self.server,
            "scheme": self.scheme,
            "requests": self.requests,
            "left": self.left,
            "half": self.half,
            "data": base64.b64encode(self.data).decode("ascii"),
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Capsule:
        """Raises `CapsuleError` for anything that `to_wire` of this version did not make."""
        version, kind = wire.get("v"), wire.get("kind")
        if type(version) is not int or version != VERSION or kind != KIND:
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
            )
        except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as exc:
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
