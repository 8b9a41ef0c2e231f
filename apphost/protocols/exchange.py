"""One request and its response on an HTTP/1.1 connection: the `Stream` that interfaces drive."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from apphost.protocols.base import Handler, Headers, RequestHead, ResponseError, Stream
from apphost.protocols.body import BodyDecoder
from apphost.protocols.response import Framing, ResponseHead, decide_framing, finish_head, wrong_length

if TYPE_CHECKING:
    from apphost.protocols.http1 import Connection

HIGH_WATER = 65536  # bytes of a body that wait for the application before reading pauses: one socket read more or less
COPY_MAX = 16384  # bytes of a body that are cheaper to copy behind the head than to write separately
PIECES_MAX = 64  # pieces that those may be in: a piece of two bytes takes forty
DISCARD_MAX = 65536  # bytes of an unread body that are worth reading to keep the connection


class Progress(enum.Enum):
    """How far a response is."""

    NONE = enum.auto()  # nothing from the application yet
    HELD = enum.auto()  # its head is known and held back, so that an error can still become a 500
    BODY = enum.auto()  # the head is on the wire
    DONE = enum.auto()  # finished, well or badly: nothing more goes out


# Looking a member up in its enum costs 0.1 us before Python 3.12.
_NOTHING, _HELD, _BODY, _DONE = Progress.NONE, Progress.HELD, Progress.BODY, Progress.DONE
_LENGTH, _CHUNKED, _NO_BODY, _CLOSE = Framing.LENGTH, Framing.CHUNKED, Framing.NONE, Framing.CLOSE


class _Nobody:
    """The handler of what is done: nothing on the wire concerns the application any more."""

    def body_arrived(self) -> None:
        pass

    def disconnected(self) -> None:
        pass

    def write_resumed(self) -> None:
        pass

    def describe(self) -> str:
        return "a finished request"


NOBODY = _Nobody()


class Exchange(Stream):
    """See `Stream`. Owned by its connection, which feeds it the body and takes the connection back when it is done."""

    __slots__ = (
        "_chunks",
        "_framing",
        "_remaining",
        "_response",
        "buffered",
        "called_at",
        "client",
        "connection",
        "context",
        "decoder",
        "expect",
        "handler",
        "head",
        "keep_alive",
        "opening",
        "progress",
        "scheme",
        "sent",
        "server",
        "started_at",
        "status",
    )

    fields: tuple[tuple[bytes, bytes], ...] = ()  # of each response to it, also of the server's own
    handler: Handler
    _response: ResponseHead
    _framing: Framing
    _remaining: int  # of the declared length

    def __init__(self, connection: Connection, head: RequestHead, decoder: BodyDecoder | None) -> None:
        self.connection = connection
        self.context = connection.context
        self.scheme = connection.scheme
        self.client = connection.client
        self.server = connection.server
        self.head = head
        self.decoder = decoder
        self.expect = head.expect
        self.keep_alive = head.keep_alive
        self.progress = _NOTHING
        self.status = 0
        self.sent = 0
        self.started_at = 0.0
        if decoder is not None:
            self._chunks: list[bytes] = []
            self.buffered = 0

    def note_call(self) -> None:
        self.called_at = time.perf_counter()

    # -- request body

    def feed(self, data: bytes) -> bytes:
        """Take bytes off the wire; what is left over after the end of the body. Raises `BadRequest`."""
        decoder = self.decoder
        assert decoder is not None
        body, rest = decoder.feed(data)
        self.expect = False
        if body and self.progress is not _DONE:
            chunks = self._chunks
            chunks.append(body)
            if len(chunks) > PIECES_MAX:
                chunks[:] = [b"".join(chunks)]
        self.buffered += len(body)
        return rest

    def take_body(self) -> tuple[bytes, bool]:
        decoder = self.decoder
        if decoder is None:
            return b"", False
        chunks = self._chunks
        if chunks:
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            self.buffered = 0
            self.connection.body_taken()
            return data, not decoder.done
        if decoder.done:
            return b"", False
        if self.expect:
            if self.started:  # the client may keep its body by now (RFC 9110, 10.1.1), so it is not late
                return b"", True
            self.expect = False
            self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.connection.body_taken()
        return b"", True

    @property
    def body_complete(self) -> bool:
        return self.decoder is None or self.decoder.done

    # -- response

    @property
    def writable(self) -> bool:
        return not self.connection.write_paused

    @property
    def connected(self) -> bool:
        return self.connection.connected

    @property
    def started(self) -> bool:
        return self.progress is _BODY or self.progress is _DONE

    @property
    def complete(self) -> bool:
        return self.progress is _DONE

    def start(self, head: ResponseHead) -> None:
        if self.progress is _BODY or self.progress is _DONE:
            if not self.connection.connected:
                return
            raise ResponseError("the response has started already")
        self._response = head
        self.status = head.status
        self.progress = _HELD

    def write(self, data: bytes, more: bool) -> None:
        progress = self.progress
        size = len(data)
        if progress is _HELD:
            response = self._response
            head = self.head
            # What most responses are: all in one piece, and nothing special about the head, the request or the
            # connection. All that `_decide` and `_finish_head` would find out is known then.
            if (
                not more
                and response.plain
                and (response.content_length is None or response.content_length == size)
                and self.keep_alive
                and self.decoder is None
                and size <= COPY_MAX
                and head.version == "1.1"
                and head.method != "HEAD"
                and not self.context.draining
            ):
                self._write_whole(response, data, size)
                return
            known = None if more else size
            self._decide(known)
        elif progress is not _BODY:
            raise self._out_of_order()
        if self._framing is _LENGTH and self.head.method != "HEAD":
            remaining = self._remaining - size
            if remaining < 0 or (remaining and not more):
                raise wrong_length(remaining)
            self._remaining = remaining
        out = b""
        if progress is _HELD:
            out = self._finish_head(known)
            self.progress = _BODY
        if self._framing is _NO_BODY or self.head.method == "HEAD":
            if out:
                self.connection.write(out)
        else:
            self._write_body(out, data, size, more)
        if not more:
            self._done()

    def _write_whole(self, response: ResponseHead, data: bytes, size: int) -> None:
        if response.content_length is None:
            out = b"%bcontent-length: %d\r\n%b%b" % (response.text, size, self.context.server_fields.end, data)
        else:
            out = response.text + self.context.server_fields.end + data
        self.sent = size
        self.connection.transport.write(out)
        self._done()

    def _done(self) -> None:
        self.progress = _DONE
        self.handler = NOBODY  # they refer to each other: without this every request would wait for the collector
        self.connection.response_done(self)

    def _out_of_order(self) -> ResponseError:
        if self.progress is _NOTHING:
            return ResponseError("the response body came before the response start")
        return ResponseError("the response is complete already")

    def _decide(self, known: int | None) -> None:
        response = self._response
        self._framing = framing = decide_framing(self.head.version == "1.1", response, known)
        if framing is _LENGTH:
            declared = response.content_length
            self._remaining = declared if declared is not None else known or 0

    def _finish_head(self, known: int | None) -> bytes:
        response = self._response
        context = self.context
        modern = self.head.version == "1.1"
        self.keep_alive = keep_alive = (
            self.keep_alive
            and not response.close
            and not (context.closing or (context.draining and self.connection.fixed))
            and self._framing is not _CLOSE
            and response.status >= 200
            and (self.decoder is None or self.decoder.done or self._worth_discarding())
        )
        if self.head.method == "HEAD" and known == 0:
            known = None  # nothing says that GET would have an empty body too
        extra = context.server_fields.missing(response)
        return finish_head(response, self._framing, modern, known, keep_alive, extra)

    def _worth_discarding(self) -> bool:
        """Whether the rest of an unread body is small enough to read it for the sake of the connection.

        A client that still waits for `100 Continue` may or may not send the body now, so where the next request
        begins cannot be told (RFC 9110, 10.1.1).
        """
        declared = self.head.content_length
        return not self.expect and (declared is None or declared <= DISCARD_MAX + self.buffered)

    def _write_body(self, out: bytes, data: bytes, size: int, more: bool) -> None:
        self.sent += size
        after = b""
        if self._framing is _CHUNKED:
            if size:
                out += b"%x\r\n" % size
                after = b"\r\n" if more else b"\r\n0\r\n\r\n"
            elif not more:
                after = b"0\r\n\r\n"
        if out or size or after:
            self.connection.write_framed(out, data, after)

    def with_fields(self, headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
        """`headers` of an answer to the handshake of a WebSocket, with `fields`."""
        return headers

    def go_on(self, headers: Headers) -> None:
        """It is a WebSocket that another worker has had, with these header fields of its request."""

    def become_websocket(self) -> None:
        """It has been answered with a WebSocket; nothing of the connection is its business any more."""
        self.status = 101
        self.progress = _DONE
        self.handler = NOBODY

    def lend_socket(self, head: ResponseHead, count: int) -> tuple[int, bytes] | None:
        connection = self.connection
        if not connection.connected or self.started or self.head.method == "HEAD":
            return None
        fd = connection.lendable_socket()
        if fd is None:
            return None
        self.start(head)
        self._decide(count)
        self._remaining = count
        out = self._finish_head(count)
        self.progress = _BODY
        return fd, out

    def return_socket(self, count: int) -> None:
        if self.progress is _BODY:
            self.sent += count
            self._done()

    def fail(self) -> None:
        self._end_early(self.connection.response_failed)

    def abandon(self) -> None:
        self._end_early(self.connection.response_abandoned)

    def _end_early(self, tell: Callable[[Exchange, bool], None]) -> None:
        """`tell`: what the connection does, told whether the head is on the wire."""
        if self.progress is _DONE:
            return
        started = self.progress is _BODY
        self.progress = _DONE
        self.handler = NOBODY
        tell(self, started)

    @property
    def ends_with_connection(self) -> bool:
        """Whether the client takes the end of the connection for the end of the body; asked once the head is out."""
        return self._framing is _CLOSE

    # -- for the connection

    def client_gone(self) -> None:
        """Nothing reaches the client any more."""
        self.progress = _DONE
        handler = self.handler
        self.handler = NOBODY
        handler.disconnected()
