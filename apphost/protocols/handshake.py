"""The opening handshake of a WebSocket (RFC 6455, section 4): what the request must say, what the answer says. Pure."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from apphost.protocols.base import BadRequest, Headers, RequestHead
from apphost.protocols.response import ResponseHead, ServerFields
from apphost.protocols.strict import TOKEN

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")  # 16 bytes in base64

_TCHAR = TOKEN.removesuffix(b"+")
_SPACE = rb"[ \t]*"
_TOKEN_ONLY = re.compile(TOKEN)
# RFC 6455, 9.1; a quoted value must be a token, too, once it is unquoted.
_PARAMETER = re.compile(
    _SPACE + rb";" + _SPACE + rb"(" + TOKEN + rb")"
    rb"(?:" + _SPACE + rb"=" + _SPACE + rb"(?:(" + TOKEN + rb')|"((?:\\?' + _TCHAR + rb')+)"))?'
)  # fmt: skip
# RFC 9110, 5.6.1.2: elements of a list may be empty
_EXTENSION = re.compile(rb"[ \t,]*(" + TOKEN + rb")((?:" + _PARAMETER.pattern + rb")*)" + _SPACE + rb"(?:,|\Z)")

# What an application may not put into its answer: the fields that the handshake itself consists of.
_OURS = frozenset(
    (b"upgrade", b"sec-websocket-accept", b"sec-websocket-extensions", b"sec-websocket-protocol",
     b"sec-websocket-version")
)  # fmt: skip


class Offer(NamedTuple):
    """An extension that the client offers, with its parameters in order; a parameter without a value has None."""

    name: str
    parameters: tuple[tuple[str, str | None], ...]


class Handshake(NamedTuple):
    """What a client asks for, besides the request itself."""

    key: bytes
    subprotocols: list[str]
    offers: list[Offer]


def read_handshake(head: RequestHead) -> Handshake:
    """Check a request that asks for a WebSocket. Raises `BadRequest`: 400, and 426 for another version than 13."""
    fields: dict[bytes, bytes] = {}
    for name, value in head.headers:
        if name.startswith(b"sec-websocket-"):
            fields[name] = fields[name] + b"," + value if name in fields else value
    if head.version != "1.1":
        raise BadRequest(400, "a WebSocket needs HTTP/1.1")
    if head.has_body:
        raise BadRequest(400, "the handshake of a WebSocket has no body")
    version = fields.get(b"sec-websocket-version", b"")
    if not version:
        raise BadRequest(400, "the field Sec-WebSocket-Version is missing")
    if version != b"13":
        # RFC 6455, 4.4, and RFC 9110, 15.5.22
        told = ((b"sec-websocket-version", b"13"), (b"upgrade", b"websocket"))
        raise BadRequest(426, "the only version of WebSocket spoken here is 13", told)
    key = fields.get(b"sec-websocket-key", b"")
    if _KEY.fullmatch(key) is None:
        raise BadRequest(400, "the Sec-WebSocket-Key is not 16 bytes in base64")
    subprotocols = _read_subprotocols(fields.get(b"sec-websocket-protocol", b""))
    return Handshake(key, subprotocols, _read_extensions(fields.get(b"sec-websocket-extensions", b"")))


def _read_subprotocols(value: bytes) -> list[str]:
    names = [name for each in value.split(b",") if (name := each.strip(b" \t"))]
    if not all(map(_TOKEN_ONLY.fullmatch, names)):
        raise BadRequest(400, "the Sec-WebSocket-Protocol is malformed")
    return [name.decode("ascii") for name in names]


def _read_extensions(value: bytes) -> list[Offer]:
    offers = []
    position = 0
    value = value.strip(b" \t,")
    while position < len(value):
        match = _EXTENSION.match(value, position)
        if match is None:
            raise BadRequest(400, "the Sec-WebSocket-Extensions is malformed")
        parameters = tuple(
            (name.decode("ascii"), (token or quoted.replace(b"\\", b"")).decode("ascii") or None)
            for name, token, quoted in _PARAMETER.findall(match[2])
        )
        offers.append(Offer(match[1].decode("ascii"), parameters))
        position = match.end()
    return offers


def accept_key(key: bytes) -> bytes:
    """The value of Sec-WebSocket-Accept (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def accept_response(
    handshake: Handshake,
    subprotocol: str | None,
    headers: Iterable[tuple[bytes, bytes]],
    extension: bytes,
    server_fields: ServerFields,
) -> bytes:
    """The 101 that opens the socket. `extension`: the value of Sec-WebSocket-Extensions, empty for none.

    Raises `ValueError` or `TypeError` for what the application may not say: a subprotocol that was not offered, a field
    of the handshake itself, or anything that may not stand in a head.
    """
    given: Headers = [(name, value) for name, value in headers]
    for name, _ in given:
        if isinstance(name, bytes) and name.lower() in _OURS:
            raise ValueError(f"{name!r} belongs to the handshake, which is the server's")
    fields = [(b"upgrade", b"websocket"), (b"sec-websocket-accept", accept_key(handshake.key))]
    if subprotocol is not None:
        if subprotocol not in handshake.subprotocols:
            raise ValueError(f"the client has not offered the subprotocol {subprotocol!r}")
        fields.append((b"sec-websocket-protocol", subprotocol.encode("ascii")))
    if extension:
        fields.append((b"sec-websocket-extensions", extension))
    head = ResponseHead(101, [*fields, *given])
    return b"%bconnection: Upgrade\r\n%b\r\n" % (head.text, server_fields.missing(head))
