"""Request heads through h11: pure Python, nothing to compile, the default where httptools is not installed."""

from __future__ import annotations

from collections.abc import Callable

import h11

from apphost.protocols.base import BadRequest, Headers
from apphost.protocols.strict import split_fields

_NORMALISED = frozenset((b"content-length", b"transfer-encoding"))

Reader = Callable[[bytes], object]  # a head to h11's event; raises `h11.ProtocolError`


def read_with_connection(head: bytes) -> object:
    """By h11's documented way. A fresh connection per head is cheaper than taking one through its states."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head))
    connection.receive_data(head)
    return connection.next_event()


def best_reader() -> Reader:
    """The reader inside h11's connection, where this h11 has it as we know it.

    The connection spends as long again on its state machine, which would follow one message: that is the business of
    our connection, and of the strict layer. Not documented by h11, so whatever is not as expected means the other way.
    """
    try:
        from h11._readers import maybe_read_from_IDLE_client
        from h11._receivebuffer import ReceiveBuffer

        def read(head: bytes) -> object:
            buffer = ReceiveBuffer()
            buffer += head
            return maybe_read_from_IDLE_client(buffer)

        event = read(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
    except Exception:
        return read_with_connection
    return read if type(event) is h11.Request and event.target == b"/x" else read_with_connection


class H11Parser:
    """A `HeadParser` on h11, which is used for parsing alone: writing a response through it costs more than parsing."""

    __slots__ = ("_read",)

    def __init__(self, reader: Reader | None = None) -> None:
        self._read = reader or best_reader()

    def parse(self, head: bytes) -> Headers:
        try:
            event = self._read(head)
        except h11.ProtocolError as error:
            raise BadRequest(error.error_status_hint, "the request head is malformed") from None
        if type(event) is not h11.Request:
            raise BadRequest(400, "the request head is malformed")
        headers = [(name.lower(), value) for name, value in event.headers.raw_items()]
        if not _NORMALISED.isdisjoint(dict(headers)):
            # h11 makes one value of a list or repetition of equal lengths; the strict layer must judge what was sent.
            headers = split_fields(head)
        return headers
