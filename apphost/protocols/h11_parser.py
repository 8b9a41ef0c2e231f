"""Request heads through h11: pure Python, nothing to compile, the default where httptools is not installed."""

from __future__ import annotations

import h11

from apphost.protocols.base import BadRequest, RequestHead
from apphost.protocols.strict import split_fields


class H11Parser:
    """A `HeadParser` on h11, which is used for parsing alone: writing a response through it costs more than parsing."""

    __slots__ = ()

    def parse(self, head: bytes) -> RequestHead:
        # A fresh connection per head is cheaper than taking one through its states, and cannot carry anything over.
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head))
        connection.receive_data(head)
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise BadRequest(error.error_status_hint, "the request head is malformed") from None
        if type(event) is not h11.Request:
            raise BadRequest(400, "the request head is malformed")
        headers = [(name.lower(), value) for name, value in event.headers.raw_items()]
        if any(name == b"content-length" or name == b"transfer-encoding" for name, _ in headers):
            # h11 makes one value of a list or repetition of equal lengths; the strict layer must judge what was sent.
            headers = split_fields(head)
        return RequestHead(event.method.decode("ascii"), event.target, event.http_version.decode("ascii"), headers)
