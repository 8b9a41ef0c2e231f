"""The seams of the request path.

    bytes -> Connection -> HeadParser -> strict rules -> Stream <-> Handler (an interface: ASGI, WSGI) -> application

A `HeadParser` turns the bytes of one complete request head into a `RequestHead`. A `Stream` is one request and its
response as an interface sees them, whatever carries them: HTTP/1.1 today, another protocol tomorrow. A `Handler` is
what an interface makes of a stream; the stream tells it what happens on the wire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from apphost.protocols.context import Context
    from apphost.protocols.opening import Opening
    from apphost.protocols.response import ResponseHead

Headers = list[tuple[bytes, bytes]]


class BadRequest(Exception):
    """The client broke a rule. `status` is the answer, `why` its body: our words, never the client's bytes; `fields`
    are header fields that such an answer must have."""

    def __init__(self, status: int, why: str, fields: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(why)
        self.status = status
        self.why = why
        self.fields = fields


class ClientDisconnected(OSError):
    """Raised out of `send` when the client is gone (ASGI 2.4: an OSError subclass), and out of WSGI input and write."""


class ResponseError(RuntimeError):
    """The application broke the rules of a response: an event out of order, more body than announced, a bad header."""


class Fields:
    """The header fields of a request, and what they mean together (`strict.examine_fields`). Requests that say the same
    share one, so it is not changed any more, nor is anything in it.

    version: that of the request, on which the meaning depends. asks: for a WebSocket, if it is a GET. The others: see
    `RequestHead`.
    variables: what the interface for WSGI makes of the fields, None until it has been asked to.
    """

    __slots__ = ("asks", "chunked", "content_length", "expect", "headers", "keep_alive", "variables", "version")

    def __init__(self, version: str, headers: Headers) -> None:
        self.version = version
        self.headers = headers
        self.content_length: int | None = None
        self.chunked = self.expect = self.asks = False
        self.keep_alive = version == "1.1"
        self.variables: dict[str, str] | None = None

    def having(self, headers: Headers) -> Fields:
        """The same meaning with other `headers`."""
        fields = Fields(self.version, headers)
        fields.content_length = self.content_length
        fields.chunked = self.chunked
        fields.expect = self.expect
        fields.asks = self.asks
        fields.keep_alive = self.keep_alive
        return fields


class RequestHead:
    """The head of one request.

    `strict.examine` adds all but the first four, after which the head is not changed any more.

    method: as sent, `str`, a token (RFC 9110, 5.6.2).
    target: as sent, `bytes`, visible ASCII.
    version: "1.0" or "1.1".
    headers: (lower-case name, value without surrounding white space) in order, duplicates kept. Not to be changed:
    other requests may share it.
    fields: where `headers` and their meaning come from.
    raw_path, query: the target split at its first `?`, still encoded; the query is b"" when there is none.
    content_length: bytes, or None when not declared. chunked: the body has chunked framing.
    keep_alive: what the client wishes, where connections are kept. expect: it waits for `100 Continue`. upgrade: it
    asks for a WebSocket.
    """

    __slots__ = (
        "chunked",
        "content_length",
        "expect",
        "fields",
        "headers",
        "keep_alive",
        "method",
        "query",
        "raw_path",
        "target",
        "upgrade",
        "version",
    )

    method: str
    target: bytes
    version: str
    headers: Headers
    fields: Fields
    raw_path: bytes
    query: bytes
    content_length: int | None
    chunked: bool
    keep_alive: bool
    expect: bool
    upgrade: bool

    def __init__(self, method: str, target: bytes, version: str, headers: Headers) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.headers = headers

    def take(self, fields: Fields) -> None:
        """Mean what they mean."""
        self.fields = fields
        self.content_length = fields.content_length
        self.chunked = fields.chunked
        self.keep_alive = fields.keep_alive
        self.expect = fields.expect
        self.upgrade = fields.asks and self.method == "GET"

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.content_length)


class HeadParser(Protocol):
    """Reads the fields out of one complete, raw request head.

    A parser is found by its name in the entry point group `apphost.parsers`; the factory is called without arguments,
    once per worker, and the object serves all connections of that worker, one head at a time.
    """

    def parse(self, head: bytes) -> Headers:
        """The fields of `head`: (lower-case name, value without surrounding white space), in order, all of them.

        It is given request line, field lines and the empty line, all ended by CRLF, and not a byte more.
        `strict.check_raw` has passed it, and has the request line, so syntax, sizes and control bytes are in order; a
        parser that still finds fault raises `BadRequest`, and `strict.split_fields` takes its place. It must not
        keep state between calls: after any outcome the next head stands on its own.
        """
        ...


class Handler(Protocol):
    """What an interface makes of one stream. The stream calls these on the event loop; none may block or raise."""

    def body_arrived(self) -> None:
        """There is more to `take_body`, or the body has ended. Not called for what was there at the start."""

    def disconnected(self) -> None:
        """The client has ended its side or is gone (`connected` tells): no more body will come. May be called again."""

    def write_resumed(self) -> None:
        """`writable` is true again."""

    def describe(self) -> str:
        """The request in a few words, for the log of a stuck worker."""
        ...


class Interface(Protocol):
    """How an application is called; found by name in the entry point group `apphost.interfaces`.

    The factory is called once per worker, as `factory(app, loop, log, active, root_path=..., worker=...)`: the
    application, the event loop, the server's log, the set in which every request in progress stands (a drain waits for
    it to become empty, and it is described in the log of a stuck worker), the setting, and the worker's name. More
    keywords may come. A factory with a true attribute `lifespan` has the application's ASGI lifespan run, and gets
    its `state`.
    """

    name: str
    websockets: bool  # whether it understands a stream that is asked to become one

    def handle(self, stream: Stream) -> Handler:
        """Serve one request. Called on the event loop and must not block it; must not raise."""
        ...


class Stream(ABC):
    """One request and its response, as an interface sees them. Not thread-safe: event loop only.

    The response: `start` once, then `write` until `more` is false. What an application does wrong raises
    `ResponseError`, `ValueError` or `TypeError` and puts nothing on the wire.
    """

    __slots__ = ()
    prefix = ""  # of the path, which a trusted proxy has cut off

    head: RequestHead
    context: Context
    scheme: str
    client: tuple[str, int] | None
    server: tuple[str, int | None]
    opening: Opening  # of a request that asks for a WebSocket (`head.upgrade`), and may get it in place of a response

    # -- request body

    @abstractmethod
    def take_body(self) -> tuple[bytes, bool]:
        """What has arrived of the body and whether more will come; `(b"", True)` when nothing has arrived yet.

        Asking opens the flow: it sends `100 Continue` to a client that waits for it and resumes paused reading.
        """

    @property
    @abstractmethod
    def body_complete(self) -> bool:
        """Whether the whole body has arrived (not: was taken)."""

    # -- response

    @property
    @abstractmethod
    def writable(self) -> bool:
        """False while the client does not read as fast as we write: wait for `write_resumed`."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """False once nothing of this response can reach the client any more: then do without `start` and `write`."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether the head of the response is on the wire: from then on an error can only end the connection."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the response is finished, well or badly."""

    @abstractmethod
    def start(self, head: ResponseHead) -> None:
        """Take the head of the response and hold it until the first `write`, which decides its framing.

        Calling it again before the head is on the wire replaces the held head (WSGI's exc_info needs that).
        """

    @abstractmethod
    def write(self, data: bytes, more: bool) -> None:
        """Send a piece of the body; `more=False` ends the response."""

    def lend_socket(self, head: ResponseHead, count: int) -> tuple[int, bytes] | None:
        """Start a response whose `count` bytes of body the caller sends itself (sendfile), past the stream.

        (a duplicate of the socket's descriptor, the bytes of the head to send first), both for the caller to use from
        any thread; it closes the descriptor and calls `return_socket`, or `fail`. None where it is not possible (TLS,
        unsent bytes, no body wanted): then nothing has happened.
        """
        return None

    def return_socket(self, count: int) -> None:
        """All of the response has gone out through the lent socket."""
        raise ResponseError("no socket was lent")

    @abstractmethod
    def fail(self) -> None:
        """The application failed: answer 500 when the head is not on the wire yet, else cut the connection."""

    @abstractmethod
    def abandon(self) -> None:
        """The application was told that the client is gone, and has left it at that: nobody's failure, and the end."""

    def note_call(self) -> None:  # noqa: B027 - a stream need not know
        """The application is called: for an access log that tells how long that took. From any thread."""

    def extensions(self) -> dict[str, dict[str, Any]]:
        """The ASGI extensions that work on this stream; a new dict each time."""
        return {}
