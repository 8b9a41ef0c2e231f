"""TLS between a plain transport and a connection: to the one a protocol, to the other a transport.

The loops have an implementation of their own, and it is not used. In it bytes that wait below TLS do not count as
unsent, so a client that stops reading is never noticed; the time that it gives to the end of a connection includes
what is still being sent, so a slow download is cut; what is read after our close_notify is an error, which drops what
waits to be sent; no alert follows a failed handshake, and a client that ends its side gets no answer. Here a
connection over TLS behaves as a plain one does. What is encrypted how is OpenSSL's business, through `ssl`.

    HANDSHAKE --> OPEN --> ENDED    our close_notify is said: what still comes is thrown away
    any -----------------> LOST     the transport below is gone
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from collections.abc import Callable, Iterable
from typing import Any, cast

from apphost.logs import Log
from apphost.protocols.capsule import Capsule
from apphost.protocols.context import Context
from apphost.protocols.exchange import Exchange
from apphost.protocols.http1 import Connection
from apphost.protocols.response import error_response

_RECORD = 16384  # bytes of plain text that a TLS record holds at most (RFC 8446, 5.1)
_LAST_WORD = 1.0  # s for the alert after a failed handshake to go out: it is one small write


# What is read from a socket is copied to OpenSSL before anything else is read, so one buffer does for all connections
# of a worker. 64 KiB: four records; asyncio reads 256 KiB otherwise, and would allocate that each time.
_BUFFER = memoryview(bytearray(65536))


class ServerContext(ssl.SSLContext):
    """An `SSLContext` that knows what it serves: `certificate` in PEM, `suites` from OpenSSL's name to the number."""

    certificate: str | None = None
    suites: dict[str, int] = {}  # noqa: RUF012 - replaced, never changed


class Stage(enum.Enum):
    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()
    LOST = enum.auto()


_HANDSHAKE, _OPEN, _ENDED, _LOST = Stage.HANDSHAKE, Stage.OPEN, Stage.ENDED, Stage.LOST


class TlsTransport(asyncio.BufferedProtocol, asyncio.Transport):
    """See above. Event loop only.

    `make` is called when the handshake is done, for the protocol to talk to. `patience`: seconds for the handshake.
    `settled` has a result once the handshake has ended, well or badly; a bad end is logged in one line.
    """

    __slots__ = (
        "_incoming",
        "_log",
        "_make",
        "_object",
        "_outgoing",
        "_patience",
        "_paused",
        "_peer_ended",
        "_protocol",
        "_raw",
        "_stage",
        "_timer",
        "_unheard",
        "settled",
    )

    _raw: asyncio.Transport
    _timer: asyncio.TimerHandle

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext,
        make: Callable[[], asyncio.Protocol],
        log: Log,
        patience: float,
    ) -> None:
        super().__init__()
        self._make = make
        self._log = log
        self._patience = patience
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._protocol: asyncio.Protocol | None = None
        self._stage = _HANDSHAKE
        self._paused = False
        self._peer_ended = False
        self._unheard = False  # the peer has ended, and the protocol, which does not want to read, has not heard of it
        self.settled: asyncio.Future[None] = loop.create_future()

    # -- the handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._timer = self.settled.get_loop().call_later(self._patience, self._too_slow)

    def give_up(self) -> None:
        """End the handshake unless it is over."""
        if self._stage is _HANDSHAKE:
            self._fail("the worker goes", "debug")

    def _too_slow(self) -> None:
        self._fail(f"it took longer than {self._patience:g} s")

    def _shake_hands(self) -> None:
        try:
            self._object.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._flush()
            return
        except (ssl.SSLError, ValueError) as exc:  # the latter for a name that is no name (SNI)
            self._flush()  # the alert that says what was wrong
            if getattr(exc, "reason", None) == "HTTP_REQUEST":
                self._raw.write(error_response(400, "this port speaks TLS: the scheme is https", b""))
            self._fail(explain(exc))
            return
        self._flush()
        self._timer.cancel()
        self._stage = _OPEN
        self._protocol = self._make()
        self._protocol.connection_made(self)
        self._settle()

    def _fail(self, why: str, level: str = "info") -> None:
        self._log.write(level, f"the TLS handshake with {self._peer()} has failed: {why}")
        self._stage = _ENDED
        self._raw.close()
        self._timer.cancel()
        # Who does not read what is left to send to it has no more time, either.
        self._timer = self.settled.get_loop().call_later(_LAST_WORD, self._raw.abort)

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def _peer(self) -> str:
        address = self._raw.get_extra_info("peername")
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unix"

    # -- the side below

    def get_buffer(self, _sizehint: int) -> memoryview:
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(_BUFFER[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        stage = self._stage
        if stage is _OPEN:
            self._incoming.write(data)
            self._read()
        elif stage is _HANDSHAKE:
            self._incoming.write(data)
            self._shake_hands()
            if self._stage is _OPEN and self._incoming.pending:
                self._read()

    def _read(self) -> None:
        incoming, tls = self._incoming, self._object
        chunks: list[bytes] = []
        ended = False
        broken: ssl.SSLError | None = None
        try:
            while chunk := tls.read(_RECORD):
                chunks.append(chunk)
                if not incoming.pending and not tls.pending():
                    break
            else:
                ended = True
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        except ssl.SSLError as exc:
            broken = exc
        if self._outgoing.pending:
            self._flush()
        if chunks:
            assert self._protocol is not None
            self._protocol.data_received(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if broken is not None:
            self._break(broken)
        elif ended:
            self._end_of_peer()

    def _break(self, exc: ssl.SSLError) -> None:
        """What came is no TLS, or was changed on its way: nothing more can be said."""
        self._log.debug(f"the TLS connection of {self._peer()} has failed: {explain(exc)}")
        self._stage = _ENDED
        self._raw.abort()

    def _end_of_peer(self) -> None:
        """Its close_notify, or the end of its stream without one: a request says itself whether it is complete."""
        if self._peer_ended:
            return
        self._peer_ended = True
        if self._paused:
            self._unheard = True
        elif self._protocol is not None:
            self._protocol.eof_received()

    def eof_received(self) -> bool:
        if self._stage is _HANDSHAKE:
            self._fail("the client has left", "debug")
        else:
            self._end_of_peer()
        return True  # we close it

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stage is _HANDSHAKE:
            self._log.debug(f"the TLS handshake with {self._peer()} has failed: the client has left")
        self._stage = _LOST
        self._timer.cancel()
        self._settle()
        protocol = self._protocol
        self._protocol = None  # they refer to each other
        if protocol is not None:
            protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    # -- the side above

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self._raw.write(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if data:
            self.writelines((data,))

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        if self._stage is not _OPEN:
            return
        try:
            for data in pieces:
                sent = self._object.write(data) if data else 0
                while sent < len(data):
                    data = memoryview(data)[sent:]
                    sent = self._object.write(data)
        except ssl.SSLError as exc:
            self._break(exc)
            return
        self._raw.write(self._outgoing.read())

    def can_write_eof(self) -> bool:
        return self._raw.can_write_eof()

    def write_eof(self) -> None:
        """Our close_notify, and the end of our stream behind it. Nothing that comes afterwards is looked at."""
        self._say_last()
        self._raw.write_eof()

    def _say_last(self) -> None:
        if self._stage is not _OPEN:
            return
        self._stage = _ENDED
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # it wants to read the other's last word, for which nobody has to wait (RFC 8446, 6.1)
        if not self._raw.is_closing():  # it has failed, and the loop has not said so yet; uvloop would raise
            self._flush()

    def close(self) -> None:
        self._say_last()
        self._raw.close()

    def abort(self) -> None:
        """Without close_notify: the peer can tell that something is missing."""
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def pause_reading(self) -> None:
        self._paused = True
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._paused = False
        self._raw.resume_reading()
        if self._unheard:
            self._unheard = False
            self.settled.get_loop().call_soon(self._hear)

    def _hear(self) -> None:
        self._peer_ended = False
        self._end_of_peer()

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._object
        return self._raw.get_extra_info(name, default)


def explain(exc: Exception) -> str:
    """What OpenSSL says, in words: `unsupported protocol`, `http request`."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the client's certificate is not accepted: {exc.verify_message}"
    return str(getattr(exc, "reason", None) or exc).replace("_", " ").lower()


# ------------------------------------------------------------------------------------------------- HTTP/1.1 over it


class TlsExchange(Exchange):
    """A request that has come over TLS."""

    __slots__ = ()

    def extensions(self) -> dict[str, dict[str, Any]]:
        facts = cast(TlsConnection, self.connection).facts()
        return {"tls": {**facts, "client_cert_chain": [*facts["client_cert_chain"]]}}


class TlsConnection(Connection):
    """A connection over TLS. It cannot move: keys and counters are inside OpenSSL, which does not give them away."""

    __slots__ = ("_facts", "_tls")

    fixed = True
    exchange_type = TlsExchange

    def __init__(self, context: Context, capsule: Capsule | None = None) -> None:
        super().__init__(context, capsule)
        self._facts: dict[str, Any] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.scheme = "https"
        self._tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        super().connection_made(transport)

    def facts(self) -> dict[str, Any]:
        """What the ASGI extension `tls` (version 0.2) says; the same for all requests of the connection."""
        if self._facts is None:
            self._facts = describe_tls(self._tls)
        return self._facts


def describe_tls(tls: ssl.SSLObject) -> dict[str, Any]:
    """The ASGI extension `tls`, version 0.2. A client certificate that is not valid ends the handshake, so there is
    never an error to tell."""
    context = cast(Any, tls.context)
    cipher = tls.cipher()
    leaf = tls.getpeercert(binary_form=True)
    subject = cast(Any, tls.getpeercert() or {}).get("subject", ()) if leaf else ()
    ours = isinstance(context, ServerContext)
    return {
        "server_cert": context.certificate if ours else None,
        "client_cert_chain": [ssl.DER_cert_to_PEM_cert(each) for each in _chain(tls, leaf)] if leaf else [],
        "client_cert_name": rfc4514(subject) if leaf else None,
        "client_cert_error": None,
        "tls_version": _VERSIONS.get(tls.version() or ""),
        "cipher_suite": context.suites.get(cipher[0]) if ours and cipher else None,
    }


_VERSIONS = {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}  # RFC 8446, 4.2.1


def _chain(tls: ssl.SSLObject, leaf: bytes) -> list[bytes]:
    """What the client has sent, its own certificate first. Of a resumed session only that one is known."""
    if hasattr(tls, "get_unverified_chain"):  # Python 3.13
        return list(tls.get_unverified_chain()) or [leaf]
    try:
        found = cast(Any, tls)._sslobj.get_unverified_chain()  # what the public method above calls
        return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in found or ()] or [leaf]
    except (AttributeError, TypeError, ValueError):
        return [leaf]


# Descriptors of RFC 4514, section 3, and RFC 4519; OpenSSL and so `getpeercert` have the long names.
_DESCRIPTORS = {
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET", "domainComponent": "DC",
    "userId": "UID", "surname": "sn",
}  # fmt: skip
_SPECIAL = frozenset('"+,;<>\\')


def rfc4514(subject: Iterable[Iterable[tuple[str, str]]]) -> str:
    """A distinguished name as text, the last part first (RFC 4514); `subject` is that of `getpeercert`."""
    parts = ["+".join(f"{_descriptor(name)}={_value(name, value)}" for name, value in part) for part in subject]
    return ",".join(reversed(parts))


def _descriptor(name: str) -> str:
    return _DESCRIPTORS.get(name, name)


def _value(name: str, value: str) -> str:
    if name[:1].isdigit():  # an attribute without a name: RFC 4514, 2.4, wants the encoded value
        data = value.encode("utf-8", "surrogateescape")
        length = bytes([len(data)]) if len(data) < 128 else b"\x82" + len(data).to_bytes(2, "big")
        return "#" + (b"\x0c" + length + data).hex()  # UTF8String
    text = "".join("\\00" if char == "\0" else f"\\{char}" if char in _SPECIAL else char for char in value)
    if text[:1] in (" ", "#"):
        text = f"\\{text}"
    if text.endswith(" ") and len(value) > 1:
        text = text[:-1] + "\\ "
    return text
