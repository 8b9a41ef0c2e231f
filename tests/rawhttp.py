"""A strict HTTP/1.1 client over a plain socket, for tests that care about single bytes."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Seconds that a test waits for what must come. What comes costs nothing; only a failure takes so long. A machine that
# is busy with other things may well need ten times what it needs alone.
DEADLINE = 60.0

Address = int | str | tuple[str, int]  # a port of 127.0.0.1, the path of a Unix socket, or (host, port)


@dataclass
class Response:
    version: str
    status: int
    reason: str
    headers: list[tuple[bytes, bytes]]  # lower-case name, value, in the order of the wire
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    interim: list[Response] = field(default_factory=list)  # the 1xx answers before this one

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    def header(self, name: bytes) -> bytes | None:
        """The value of a field that may come once at most."""
        values = self.all(name)
        assert len(values) <= 1, f"{name!r} came {len(values)} times"
        return values[0] if values else None


def connect(
    address: Address, timeout: float = DEADLINE, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> socket.socket:
    """A connected socket; with `tls`, after the handshake with `host`, and an end without close_notify is an error."""
    if tls is not None:
        plain = connect(address, timeout)
        try:
            return tls.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False)
        except BaseException:
            plain.close()
            raise
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(address)
        return sock
    sock = socket.create_connection(("127.0.0.1", address) if isinstance(address, int) else address, timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def raw(address: Address, data: bytes, *, timeout: float = DEADLINE, half_close: bool = False) -> bytes:
    """Send `data`, then read until the server closes. `half_close` ends our direction after sending."""
    with connect(address, timeout) as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
        return b"".join(parts)


_STATUS_LINE = re.compile(rb"(HTTP/1\.[01]) ([1-9][0-9]{2}) ([\t \x21-\x7e\x80-\xff]*)")
_FIELD = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*"
    rb"((?:[\x21-\x7e\x80-\xff](?:[\t \x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class RawClient:
    """A connection that sends what it is told, and reads responses strictly (RFC 9112); what is left over is kept.

    A malformed response, a connection that ends in the middle of one, and a timeout are AssertionErrors.
    """

    def __init__(
        self, address: Address, timeout: float = DEADLINE, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.sock = connect(address, timeout, tls, host)
        self._buffer = b""
        self._at_end = False

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, method: str, target: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b"") -> Response:
        """Send a plain HTTP/1.1 request and read its response."""
        self.send(request_bytes(method, target, headers, body))
        return self.read_response(method)

    def read_response(self, method: str = "GET") -> Response:
        """The next whole response, to a request with `method`; 1xx answers before it go to `.interim`."""
        response = self.read_head()
        parts = list(self.read_body(response, method))
        response.body = b"".join(parts)
        return response

    def read_head(self) -> Response:
        """The next final head; then read `read_body` to its end before anything else."""
        interim: list[Response] = []
        while True:
            match = _STATUS_LINE.fullmatch(line := self._line())
            assert match, f"bad status line {line!r}"
            response = Response(match[1].decode(), int(match[2]), match[3].decode("latin-1"), self._fields())
            if response.status >= 200 or response.status == 101:
                response.interim = interim
                return response
            assert not response.all(b"content-length"), "Content-Length in a 1xx"
            assert not response.all(b"transfer-encoding"), "Transfer-Encoding in a 1xx"
            interim.append(response)

    def read_body(self, response: Response, method: str = "GET") -> Iterator[bytes]:
        """The body in pieces: one for each chunk, or as they arrive."""
        length, coding = response.header(b"content-length"), response.header(b"transfer-encoding")
        assert length is None or coding is None, "both Content-Length and Transfer-Encoding"
        assert length is None or length.isdigit(), f"Content-Length {length!r}"
        if response.status in (101, 204) or response.status < 200:
            assert length is None, f"Content-Length in a {response.status}"
            assert coding is None, f"Transfer-Encoding in a {response.status}"
            return
        if method == "HEAD" or response.status == 304:
            return
        if coding is not None:
            assert coding.lower() == b"chunked", f"Transfer-Encoding {coding!r}"
            assert response.version == "HTTP/1.1", "chunked in an HTTP/1.0 response"
            yield from self._chunks(response)
        elif length is not None:
            yield from self._counted(int(length))
        else:
            while piece := self._take_some():
                yield piece

    def eof(self, timeout: float | None = None) -> bool:
        """True if the server closes the connection before it sends anything more; False if more comes."""
        if timeout is not None:
            self.sock.settimeout(timeout)
        return not self._buffer and not self._fill()

    # -- bytes

    def _fill(self) -> bool:
        if self._at_end:
            return False
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            raise AssertionError(f"nothing came within {self.sock.gettimeout()} s; have {self._buffer!r}") from None
        self._buffer += data
        self._at_end = not data
        return bool(data)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            assert self._fill(), f"the connection ended within {self._buffer!r}"
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        assert b"\n" not in line, f"bare line feed in {line!r}"
        return line

    def _fields(self) -> list[tuple[bytes, bytes]]:
        found = []
        while line := self._line():
            match = _FIELD.fullmatch(line)
            assert match, f"bad field line {line!r}"
            found.append((match[1].lower(), match[2]))
        return found

    def _take_some(self, limit: int | None = None) -> bytes:
        if not self._buffer:
            self._fill()
        piece, self._buffer = self._buffer[:limit], self._buffer[len(self._buffer[:limit]) :]
        return piece

    def _counted(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self._take_some(length)
            assert piece, f"the connection ended {length} bytes too early"
            length -= len(piece)
            yield piece

    def _chunks(self, response: Response) -> Iterator[bytes]:
        while True:
            line = self._line()
            assert _CHUNK_SIZE.fullmatch(line), f"bad chunk size {line!r}"
            if not (size := int(line, 16)):
                response.trailers = self._fields()
                return
            chunk = b"".join(self._counted(size))
            end = self._line()
            assert end == b"", f"{end!r} after a chunk"
            yield chunk


def request_bytes(method: str, target: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b"") -> bytes:
    """An HTTP/1.1 request; Host and Content-Length are added where `headers` has neither them nor Transfer-Encoding."""
    names = {name.lower() for name, _ in headers}
    lines = [f"{method} {target} HTTP/1.1"]
    if "host" not in names:
        lines.append("Host: 127.0.0.1")
    lines += [f"{name}: {value}" for name, value in headers]
    if body and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
