"""WSGI (PEP 3333): calls the application in a thread beside the event loop.

A request is given to a thread only when its body is there, or so much of it that the client is not a slow one; the rest
is streamed then, and may take no more than half of the threads. So slow uploads cannot take the threads from others. A
response of one block, which most are, comes back to the loop as one message, and its thread is free; one of many blocks
keeps its thread until the client has read nearly all of it, since an application that runs cannot be set aside.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from types import TracebackType
from typing import Any

from apphost.errors import user_traceback
from apphost.interfaces.asgi_http import failure, is_disconnect, raised
from apphost.interfaces.environ import base_environ, request_environ
from apphost.interfaces.threads import ThreadPool
from apphost.interfaces.wsgi_io import BodyInput, ErrorLog, FileWrapper, file_to_send, send_file
from apphost.logs import Log, show_target
from apphost.protocols.base import ClientDisconnected, Headers, ResponseError, Stream
from apphost.protocols.exchange import PIECES_MAX
from apphost.protocols.response import FIELD_MAX, ResponseHead, remember

ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]
Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]

SMALL_BODY = 65536  # bytes; so much of a body is gathered before a thread is taken: what the stream buffers anyway
WINDOW = 65536  # bytes of a response that may wait for the loop before the application's thread waits too

# Fields as applications give them and as bytes: most say the same ones again and again.
_FIELDS: dict[tuple[str, str], tuple[bytes, bytes]] = {}

# RFC 9110, 7.6.1; PEP 3333 forbids them to applications.
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "trailers",
     "transfer-encoding", "upgrade", "proxy-connection")
)  # fmt: skip


class TooLong(ResponseError):
    """The application gave more than its Content-Length says; what fits has been sent, so the client is well."""

    def __init__(self, length: int | None) -> None:
        super().__init__(f"gave more than the {length} bytes of its Content-Length; the rest was dropped")


class WsgiInterface:
    """Serves streams with a WSGI application on the threads of `pool`. `uploads`: shared by all that use the pool."""

    name = "wsgi"
    websockets = False
    request_type: type[WsgiRequest]

    def __init__(
        self,
        app: Application,
        pool: ThreadPool,
        log: Log,
        active: set[Any],
        *,
        root_path: str = "",
        multithread: bool = True,
        multiprocess: bool = False,
        worker: str = "worker",
        uploads: Uploads | None = None,
    ) -> None:
        self.app = app
        self.pool = pool
        self.log = log
        self.active = active
        self.worker = worker
        self.root_path = root_path
        self.errors = ErrorLog(log, worker)
        self.base = base_environ(root_path, self.errors, multithread=multithread, multiprocess=multiprocess)
        self.uploads = uploads or Uploads.of(pool)

    def handle(self, stream: Stream) -> WsgiRequest:
        request = self.request_type(self, stream)
        self.active.add(request)
        if stream.head.has_body:
            request.body_arrived()
        else:
            request.submit()
        return request


class Uploads:
    """Streamed bodies take turns: `most` of them have a thread at a time, as each may wait in it for its client. One
    that is complete before its turn comes needs none."""

    @classmethod
    def of(cls, pool: ThreadPool) -> Uploads:
        return cls(max(1, len(pool.threads) // 2))

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: dict[WsgiRequest, None] = {}  # in order

    def begin(self, request: WsgiRequest) -> None:
        if self._free:
            self._free -= 1
            request.stream_body()
        else:
            self._waiting[request] = None

    def end(self) -> None:
        """One that had a thread does not need it any more."""
        self._free += 1
        if self._waiting:
            request = next(iter(self._waiting))
            del self._waiting[request]
            self.begin(request)

    def leave(self, request: WsgiRequest) -> None:
        self._waiting.pop(request, None)


class WsgiRequest:
    """One call of the application. Methods are of the loop unless they say that they are of the application's thread.

    The two sides share: the body (`input`, with a lock of its own), blocks for the loop (under `_space`), and `gone`.
    """

    __slots__ = (
        "_blocks",
        "_body",
        "_ended",
        "_held",
        "_left",
        "_queued",
        "_space",
        "_unsent",
        "gone",
        "headers_sent",
        "input",
        "interface",
        "response",
        "stream",
        "submitted",
    )

    def __init__(self, interface: WsgiInterface, stream: Stream) -> None:
        self.interface = interface
        self.stream = stream
        self.gone = False  # the client is gone; read by both sides, only ever set
        self.submitted = False
        self.input: BodyInput | None = None
        self._body: list[bytes] = []  # of a body that has no thread yet
        self._held = 0
        self._queued = False  # it is one of those that have turns
        # -- the response
        self.response: ResponseHead | None = None  # from start_response
        self.headers_sent = False
        self._left: int | None = None  # bytes until the declared Content-Length is reached
        self._space: threading.Condition | None = None  # made when a response has more than one block; from here on:
        self._unsent = 0
        self._blocks: list[bytes] = []  # of these, what waits for the loop: `_send_blocks` is posted while there is any
        self._ended = False  # the last of them ends the response

    # -- Handler

    def body_arrived(self) -> None:
        if self.submitted:
            if self.input is not None:
                self.input.arrived()
        elif self.stream.body_complete or not (self._queued or self.stream.head.expect):
            self._gather()
        elif not self._queued:  # the body comes when the application reads
            self._queue()

    def _gather(self) -> None:
        data, more = self.stream.take_body()
        self._body.append(data)
        self._held += len(data)
        if not more:
            self.interface.uploads.leave(self)
            self.submit()
        elif self._held > SMALL_BODY:
            self._queue()
        elif len(self._body) > PIECES_MAX:
            self._body = [b"".join(self._body)]

    def _queue(self) -> None:
        self._queued = True
        self.interface.uploads.begin(self)

    def stream_body(self) -> None:
        """Its turn has come: call the application with what there is of the body, and the rest as it comes."""
        self.input = BodyInput(self, b"".join(self._body))
        self._body = []
        self.submit()

    def disconnected(self) -> None:
        if self.stream.body_complete and self.stream.connected:
            return  # it has only ended its side, and still waits for the answer
        self.gone = True
        if self.input is not None:
            self.input.arrived()
        self._give_space(0)
        if not self.submitted:
            self.interface.uploads.leave(self)
            self.interface.active.discard(self)
            self.stream.fail()

    def write_resumed(self) -> None:
        self._give_space(self._unsent)

    def describe(self) -> str:
        head = self.stream.head
        return f"{head.method} {show_target(head.target)}"

    def submit(self) -> None:
        """Have a thread call the application."""
        self.submitted = True
        self.interface.pool.submit(self.run)

    # -- the application's thread

    def run(self) -> None:
        """Call the application and bring its response to an end, a good one or a visible bad one."""
        interface = self.interface
        try:
            if not self.gone:
                self._call()
        except TooLong as exc:
            self._say(str(exc))
        except BaseException as exc:
            try:
                if not self._is_ours(exc):
                    self._say(failure(exc, self.headers_sent), user_traceback(exc))
            finally:  # the client is answered whatever becomes of the report
                interface.pool.post(self._fail)
        else:
            if self.gone:
                interface.pool.post(self._fail)
        finally:
            if self.input is not None:
                interface.pool.post(interface.uploads.end)
        if interface.errors.unfinished:
            interface.errors.flush()

    def _call(self) -> None:
        interface = self.interface
        body: Any = self.input
        if body is None:
            body = io.BytesIO(b"".join(self._body)) if self._body else io.BytesIO()
        environ = request_environ(interface.base, self.stream, interface.root_path, body)
        result = interface.app(environ, self.start_response)
        try:
            self._respond(result)
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                self._close(close)

    def _close(self, close: Callable[[], object]) -> None:
        """PEP 3333: called once, however the response ended; what it raises cannot change the response any more."""
        try:
            close()
        except BaseException as exc:
            if not self._is_ours(exc):
                self._say(raised(exc, "in the close() of its response"), user_traceback(exc))

    def _is_ours(self, exc: BaseException) -> bool:
        """Whether it is the `ClientDisconnected` that comes back."""
        return (self.gone or self.stream.complete) and is_disconnect(exc)

    def _respond(self, result: Iterable[bytes]) -> None:
        sendable = file_to_send(result, self.headers_sent) if type(result) is FileWrapper else None
        if sendable is not None and send_file(self, sendable, self._started()):
            return
        if (type(result) is list or type(result) is tuple) and len(result) <= 1 and not self.headers_sent:
            self._respond_at_once(result[0] if result else b"")
            return
        for block in result:
            if block or not isinstance(block, bytes):  # the latter for the complaint
                if self._is_whole(block):
                    self._respond_at_once(block)
                else:
                    self.emit(block)
            if self.gone:
                return
        self._finish()

    def _is_whole(self, block: bytes) -> bool:
        """Whether it is all of the body: frameworks wrap the one block that they have."""
        if self.headers_sent or type(block) is not bytes:
            return False
        return self.response is not None and self.response.content_length == len(block)

    def _respond_at_once(self, block: bytes) -> None:
        if not isinstance(block, bytes):
            raise no_bytes(block)
        head = self._started()
        fitting = self._clip(head, block)
        self.headers_sent = True
        self.interface.pool.post(partial(self._send, head, fitting, False))
        if len(fitting) < len(block):
            raise TooLong(head.content_length)

    def _started(self) -> ResponseHead:
        if self.response is None:
            raise AssertionError("the application returned without calling start_response")
        return self.response

    def emit(self, block: bytes) -> None:
        """Send one block; waits while more than a window is on its way. Raises `ClientDisconnected`."""
        if not isinstance(block, bytes):
            raise no_bytes(block)
        response = self._started()
        fitting = self._clip(response, block)
        if self._space is None:
            self._space = threading.Condition()
        self.headers_sent = True
        with self._space:
            self._unsent += len(fitting)
            self._blocks.append(fitting)
            self._ended = self._left == 0
            first = len(self._blocks) == 1
        if first:  # the loop takes all that it finds: one system call for what comes meanwhile
            self.interface.pool.post(self._send_blocks)
        if len(fitting) < len(block):
            raise TooLong(response.content_length)
        if self._unsent > WINDOW:
            with self._space:
                while self._unsent > WINDOW and not self.gone:
                    self._space.wait()
        if self.gone:
            raise ClientDisconnected("the client has closed the connection")

    def _finish(self) -> None:
        if not self.headers_sent:
            self._respond_at_once(b"")
        elif self._left != 0:  # else the last block has ended it
            # On its own: whether the loop has had the last block by now is chance, and the framing must not be.
            self.interface.pool.post(partial(self._send, None, b"", False))

    def _clip(self, head: ResponseHead, block: bytes) -> bytes:
        """What of `block` still fits the Content-Length: PEP 3333 has the server stop there."""
        if head.content_length is None or self.stream.head.method == "HEAD":
            return block
        if self._left is None:
            self._left = head.content_length
        fitting = block[: self._left] if len(block) > self._left else block
        self._left -= len(fitting)
        return fitting

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        """PEP 3333. Raises `TypeError`, `ValueError` or `AssertionError` for what the application got wrong."""
        if exc_info is not None and exc_info[1] is not None:
            try:
                if self.headers_sent:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # or the frames in the traceback would keep each other alive
        elif self.response is not None:
            raise AssertionError("start_response was called a second time without exc_info")
        code, reason = parse_status(status)
        self.response = ResponseHead(code, encode_headers(headers), reason)
        return self.write

    def write(self, data: bytes) -> None:
        """The `write` callable of PEP 3333: sent before whatever the iterable gives."""
        if data:
            self.emit(data)

    # -- back on the loop

    def _send_blocks(self) -> None:
        assert self._space is not None
        with self._space:
            blocks, self._blocks = self._blocks, []
            more = not self._ended
        head = None if self.stream.started else self.response
        self._send(head, blocks[0] if len(blocks) == 1 else b"".join(blocks), more)

    def _send(self, head: ResponseHead | None, block: bytes, more: bool) -> None:
        stream = self.stream
        try:
            if stream.connected and not stream.complete:
                if head is not None:
                    stream.start(head)
                stream.write(block, more)
            elif more:
                self.gone = True
        except Exception as exc:
            self._say(failure(exc, stream.started), user_traceback(exc))
            stream.fail()
            self.gone = True
        if not more:
            self.interface.active.discard(self)
        if self._space is not None and (stream.writable or self.gone or stream.complete):
            self._give_space(len(block))

    def _give_space(self, size: int) -> None:
        """`size` bytes have gone out: the application's thread may go on."""
        if self._space is not None:
            with self._space:
                self._unsent = max(0, self._unsent - size)
                self._space.notify()

    def _fail(self) -> None:
        self.stream.fail()
        self.interface.active.discard(self)

    def _say(self, what: str, detail: str = "") -> None:
        self.interface.log.error(f"{self.interface.worker}: the application {what}, in {self.describe()}", detail)


WsgiInterface.request_type = WsgiRequest


def no_bytes(block: object) -> TypeError:
    return TypeError(f"a block of the response must be bytes, not {type(block).__name__}")


@lru_cache(maxsize=256, typed=True)
def parse_status(status: str) -> tuple[int, bytes]:
    """`"404 Not Found"` to (404, b"Not Found"). Raises `TypeError` or `ValueError` (PEP 3333: three digits first)."""
    if not isinstance(status, str):
        raise TypeError(f"the status must be a str, not {type(status).__name__}")
    code, _, reason = status.partition(" ")
    if len(code) != 3 or not code.isdigit() or not code.isascii():
        raise ValueError(f"not a status: {status!r}")
    # Blanks only: a line break at its end is one that must not be there, and is refused with the head.
    return int(code), reason.strip(" ").encode("latin-1")


def encode_headers(headers: list[tuple[str, str]]) -> Headers:
    """Header fields as bytes. Raises `TypeError` or `ValueError` for what PEP 3333 forbids; what no response may hold,
    CR, LF, NUL or a malformed name, `ResponseHead` refuses for every interface."""
    if type(headers) is not list:
        raise TypeError(f"the headers must be a list, not {type(headers).__name__}")
    known = _FIELDS.get
    try:
        return [known(item) or _encode_field(*item) for item in headers]
    except TypeError:  # something that is no tuple of str; this says what
        return [_encode_field(*item) for item in headers]


def _encode_field(name: str, value: str) -> tuple[bytes, bytes]:
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"a header must be a pair of str: {(name, value)!r}")
    if name.lower() in HOP_BY_HOP:
        raise ValueError(f"{name!r} is a hop-by-hop header: it belongs to the server")
    field = name.encode("latin-1"), value.encode("latin-1")
    if len(name) + len(value) <= FIELD_MAX:
        remember(_FIELDS, (name, value), field)
    return field
