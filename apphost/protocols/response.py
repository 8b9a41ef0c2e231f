"""The head of a response: checked, serialised, and the framing of its body decided. Pure, the same for all parsers."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TypeVar

from apphost.protocols.base import ResponseError
from apphost.protocols.strict import TOKEN

_NAME = re.compile(TOKEN)


class Framing(enum.Enum):
    """How the end of a response's body is told (RFC 9112, 6.3)."""

    NONE = enum.auto()  # there is no body, whatever the application writes: HEAD, 1xx, 204, 304
    LENGTH = enum.auto()  # Content-Length
    CHUNKED = enum.auto()
    CLOSE = enum.auto()  # the end of the connection: HTTP/1.0 without a length


class Field(enum.Enum):
    """Fields of a response that the server itself must understand; PLAIN ones pass as they are."""

    PLAIN = enum.auto()
    CONTENT_LENGTH = enum.auto()
    TRANSFER_ENCODING = enum.auto()
    CONNECTION = enum.auto()
    DATE = enum.auto()
    SERVER = enum.auto()
    UPGRADE = enum.auto()


# Looking a member up in its enum costs 0.1 us before Python 3.12.
_PLAIN, _CONTENT_LENGTH, _CONNECTION, _DATE, _SERVER, _UPGRADE = (
    Field.PLAIN, Field.CONTENT_LENGTH, Field.CONNECTION, Field.DATE, Field.SERVER, Field.UPGRADE
)  # fmt: skip
_NONE, _LENGTH, _CHUNKED, _CLOSE = Framing.NONE, Framing.LENGTH, Framing.CHUNKED, Framing.CLOSE

_SPECIAL = {
    b"content-length": Field.CONTENT_LENGTH,
    b"transfer-encoding": Field.TRANSFER_ENCODING,
    b"connection": Field.CONNECTION,
    b"date": Field.DATE,
    b"server": Field.SERVER,
    b"upgrade": Field.UPGRADE,
}
# RFC 9110, 5.5: CR, LF and NUL split a head; the other controls are no part of a value either, and what recipients
# make of them differs: to some 0x0b, 0x0c and 0x1c to 0x1e end a line. HTAB is fine.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search

# An application says the same few dozen lines again and again: these have been checked.
_KINDS: dict[bytes, Field] = {}
_LINES: dict[tuple[bytes, bytes], bytes] = {}
_TABLE_MAX = 1024
FIELD_MAX = 256  # bytes of a field that is worth keeping: longer ones are cookies and policies

_K = TypeVar("_K")
_V = TypeVar("_V")


def remember(table: dict[_K, _V], key: _K, value: _V) -> None:
    """Keep what was found out about something that an application will say again.

    Bounded, so that one which makes names or values up costs no memory; a full table starts anew, so that what is in
    use comes to stand in it.
    """
    if len(table) >= _TABLE_MAX:
        table.clear()
    table[key] = value


def _learn(name: bytes) -> Field:
    """The kind of a name that has not been seen before. Raises `ValueError` or `TypeError` for what is no name."""
    if not isinstance(name, bytes):
        raise TypeError(f"a header name must be bytes, not {type(name).__name__}")
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not a header name: {name!r}")
    kind = _SPECIAL.get(name.lower(), _PLAIN)
    remember(_KINDS, name, kind)
    return kind


class ResponseHead:
    """What an application gave for the head of its response, checked and serialised as far as it can be yet.

    `text` is the status line and complete field lines, in the application's order and with its Content-Length; its
    `Connection` and `Transfer-Encoding` are left out: framing is the server's business. `plain`: a body goes with it,
    and it has no say in the connection and the server's own fields.
    """

    __slots__ = ("close", "content_length", "has_date", "has_server", "plain", "status", "text", "upgrade")

    def __init__(self, status: int, headers: Iterable[tuple[bytes, bytes]], reason: bytes | None = None) -> None:
        """Raises `TypeError` or `ValueError` for whatever may not stand in a head; nothing was sent then."""
        lines = [status_line(status) if reason is None else custom_status_line(status, reason)]
        self.status = status
        self.content_length: int | None = None
        self.close = self.has_date = self.has_server = self.upgrade = False
        self.plain = status >= 200 and status != 204 and status != 304
        known = _LINES.get
        for item in headers:
            try:
                line = known(item)
            except TypeError:  # the ASGI spec allows any pair of bytes, also a list, which cannot be looked up
                line = None
            lines.append(self._check(*item) if line is None else line)
        self.text = b"".join(lines)

    def _check(self, name: bytes, value: bytes) -> bytes:
        """The line of a field that stands in no table, with its CRLF; b"" when it is not sent."""
        kind = _KINDS.get(name) or _learn(name)
        if kind is _CONTENT_LENGTH:
            return self._take_length(name, value)
        line = b"%b: %b\r\n" % (name, value)
        if _CONTROL(line, len(name) + 2, len(line) - 2) is not None:
            raise ValueError("a header value contains a control, such as CR, LF or NUL")
        if kind is _PLAIN:
            if len(line) <= FIELD_MAX and type(value) is bytes:
                remember(_LINES, (name, value), line)
            return line
        self.plain = False
        if kind is _DATE:
            self.has_date = True
        elif kind is _SERVER:
            self.has_server = True
        elif kind is _UPGRADE:
            self.upgrade = True
        else:  # Connection and Transfer-Encoding are the server's business
            if kind is _CONNECTION and b"close" in bytes(value).lower():
                self.close = True
            return b""
        return line

    def _take_length(self, name: bytes, value: bytes) -> bytes:
        if not value.isdigit():
            value = bytes(value).strip(b" \t")
            if not value.isdigit():
                raise ValueError(f"not a Content-Length: {value!r}")
        length = int(value)
        if self.content_length is not None:
            if self.content_length != length:
                raise ValueError("two different values for Content-Length")
            return b""
        self.content_length = length
        if self.status < 200 or self.status == 204:  # RFC 9110, 8.6: there it must not be sent
            return b""
        return b"%b: %b\r\n" % (name, value)


def decide_framing(modern: bool, head: ResponseHead, known_length: int | None) -> Framing:
    """How the body of a response to anything but HEAD ends; a response to HEAD says the same, and then has no body.

    `known_length` is the size of the body in bytes where the first write is also the last.
    """
    status = head.status
    if status == 204 or status == 304 or status < 200:
        return _NONE
    if head.content_length is not None or known_length is not None:
        return _LENGTH
    return _CHUNKED if modern else _CLOSE


def finish_head(
    head: ResponseHead, framing: Framing, modern: bool, known_length: int | None, keep_alive: bool, extra: bytes
) -> bytes:
    """The bytes of the head. `known_length`: the Content-Length to add if the application gave none; `extra`: complete
    lines for Date and Server."""
    how = b""
    if head.content_length is None:
        if framing is _CHUNKED:
            how = b"transfer-encoding: chunked\r\n"
        elif framing is _LENGTH and known_length is not None:
            how = b"content-length: %d\r\n" % known_length
    options = [b"close"] if not keep_alive else [] if modern else [b"keep-alive"]
    if head.upgrade:
        options.append(b"upgrade")  # RFC 9110, 7.8: who sends the field names it here
    if options:
        how += b"connection: %b\r\n" % b", ".join(options)
    return b"%b%b%b\r\n" % (head.text, how, extra)


_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


def status_line(status: int) -> bytes:
    """The status line, with an empty reason for an unknown code. Raises `TypeError`, `ValueError` (100 to 999)."""
    line = _STATUS_LINES.get(status)
    if line is None or not isinstance(status, int):  # a float may equal a status
        line = custom_status_line(status, b"")
    return line


@lru_cache(maxsize=256, typed=True)
def custom_status_line(status: int, reason: bytes) -> bytes:
    if not isinstance(status, int) or isinstance(status, bool):
        raise TypeError(f"a status must be an int, not {type(status).__name__}")
    if not 100 <= status <= 999:
        raise ValueError(f"not a status: {status}")
    if _CONTROL(reason) is not None:
        raise ValueError("the reason of the status contains a control, such as CR, LF or NUL")
    return b"HTTP/1.1 %d %b\r\n" % (status, reason)


class ServerFields:
    """The lines for Date and Server. `refresh` renders them; the worker calls it about twice a second."""

    __slots__ = ("_date", "_second", "_server", "both", "end")

    def __init__(self, *, date: bool, server: bool) -> None:
        self._date = date
        self._server = b"server: apphost\r\n" if server else b""
        self._second = -1
        self._set(self._server)
        self.refresh(time.time())

    def _set(self, lines: bytes) -> None:
        self.both = lines
        self.end = lines + b"\r\n"  # of a head with both

    def refresh(self, now: float) -> None:
        """`now`: seconds since the epoch."""
        second = int(now)
        if second != self._second and self._date:
            self._second = second
            self._set(b"date: %b\r\n%b" % (formatdate(second, usegmt=True).encode("ascii"), self._server))

    def missing(self, head: ResponseHead) -> bytes:
        """The lines of those two that the application has not given itself (RFC 9110, 6.6.1 and 10.2.4)."""
        if not head.has_date and not head.has_server:
            return self.both
        lines = self.both.splitlines(keepends=True)
        given = ((b"date:", head.has_date), (b"server:", head.has_server))
        return b"".join(line for line in lines if not any(line.startswith(name) and has for name, has in given))


def error_response(status: int, why: str, extra: bytes, fields: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A whole response of the server's own: plain text, our words only, and the end of the connection."""
    body = f"{status} {HTTPStatus(status).phrase}: {why}\n".encode()
    head = ResponseHead(status, [(b"content-type", b"text/plain; charset=utf-8"), *fields])
    return finish_head(head, Framing.LENGTH, True, len(body), False, extra) + body


def wrong_length(missing: int) -> ResponseError:
    """The error for a body that has `missing` bytes less (more, when negative) than its Content-Length says."""
    if missing < 0:
        return ResponseError(f"the response body is longer than its Content-Length: {-missing} bytes too many")
    return ResponseError(f"the response body is shorter than its Content-Length: {missing} bytes missing")
