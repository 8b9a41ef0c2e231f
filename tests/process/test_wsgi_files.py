"""`wsgi.file_wrapper` (G18) against a real server on both parsers and both loops.

The probe counts calls of `os.sendfile`, so that a test can tell the kernel's way from the ordinary one.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.process.test_wsgi_conformance import PAIRS, ask, no_complaint, target
from tests.support import DEADLINE, RawClient, Response, Server, raw, request_bytes, wait_for

CONTENT = b"".join(b"Line %07d\n" % number for number in range(200_000))  # 2.6 MB: more than buffers hold at first
SMALL = CONTENT[:1000]
BIG_SIZE = 64 * 2**20
_numbers = count(1)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def probe(request: pytest.FixtureRequest) -> Iterator[Server]:
    parser, loop = request.param
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    options = ("--threads", "4", "--http", parser, "--loop", loop)
    with Server("tests.process.wsgi_probe:app", *options) as server:
        yield server
        assert server.stop() == 0
        assert server.log.count(" booting, pid ") == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "content").write_bytes(CONTENT)
    (folder / "small").write_bytes(SMALL)
    (folder / "empty").write_bytes(b"")
    (folder / "packed").write_bytes(gzip.compress(SMALL))
    with open(folder / "big", "wb") as big:
        big.truncate(BIG_SIZE)
    return folder


@pytest.fixture
def key() -> str:
    return f"f{next(_numbers)}f"


def sendfiles(server: Server) -> int:
    return int(str(ask(server, "/progress", key="sendfile")))


def fetch(server: Server, path: Path, key: str, method: str = "GET", **query: object) -> tuple[Response, int]:
    """The response, and how many calls of sendfile it took; the connection and the file must be in order after it."""
    before = sendfiles(server)
    with RawClient(server.port) as client:
        client.send(request_bytes(method, target("/file", path=path, key=key, **query)))
        answer = client.read_response(method)
        if answer.header(b"connection") != b"close":
            assert client.request("GET", "/pid").status == 200
    wait_closed(server, key)
    return answer, sendfiles(server) - before


def wait_closed(server: Server, key: str) -> None:
    wait_for(lambda: ask(server, "/closed", key=key), what="the server closes the file")


@pytest.mark.parametrize("kind", ["buffered", "raw", "temporary"])
@pytest.mark.parametrize("name", ["content", "small"])
def test_real_file(probe: Server, files: Path, key: str, kind: str, name: str) -> None:
    """G18: by the kernel, with a length, closed."""
    answer, sent = fetch(probe, files / name, key, kind=kind)
    expected = (files / name).read_bytes()
    assert answer.body == expected
    assert answer.header(b"content-length") == b"%d" % len(expected)
    assert sent > 0


def test_on_one_connection(probe: Server, files: Path, key: str) -> None:
    """G18: files and ordinary responses in turn, pipelined too."""
    path = target("/file", path=files / "small", key=key)
    with RawClient(probe.port) as client:
        client.send(3 * (request_bytes("GET", path) + request_bytes("GET", "/lazy")))
        bodies = [client.read_response().body for _ in range(6)]
    assert bodies == 3 * [SMALL, b"lazy body"]


@pytest.mark.parametrize("kind", ["buffered", "raw", "bytesio"])
@pytest.mark.parametrize("offset", [1, 500, 999])
def test_offset(probe: Server, files: Path, key: str, kind: str, offset: int) -> None:
    """G18: from where the application has read to, which the descriptor of a buffered file does not know."""
    answer, _ = fetch(probe, files / "small", key, kind=kind, offset=offset)
    assert answer.body == SMALL[offset:]


@pytest.mark.parametrize("kind", ["buffered", "bytesio"])
@pytest.mark.parametrize("name", ["empty", "small"])
def test_nothing_left(probe: Server, files: Path, key: str, kind: str, name: str) -> None:
    """G18: an empty file, and one that has been read to its end."""
    offset = {"offset": len(SMALL)} if name == "small" else {}
    answer, sent = fetch(probe, files / name, key, kind=kind, **offset)
    assert (answer.status, answer.body, sent) == (200, b"", 0)


@pytest.mark.parametrize("kind", ["buffered", "bytesio"])
@pytest.mark.parametrize("length", [0, 1, 999, 1000])
def test_length_within_the_file(probe: Server, files: Path, key: str, kind: str, length: int) -> None:
    """G16, G18: exactly as much as Content-Length says."""
    answer, _ = fetch(probe, files / "small", key, kind=kind, length=length)
    assert answer.all(b"content-length") == [b"%d" % length]
    assert answer.body == SMALL[:length]


def test_length_with_offset(probe: Server, files: Path, key: str) -> None:
    """G18: a range, as frameworks make it."""
    answer, sent = fetch(probe, files / "content", key, offset=1_000_000, length=500_000, status="206 Partial Content")
    assert (answer.status, answer.body) == (206, CONTENT[1_000_000:1_500_000])
    assert sent > 0


@pytest.mark.parametrize("kind", ["buffered", "bytesio"])
def test_length_beyond_the_file(probe: Server, files: Path, key: str, kind: str) -> None:
    """G16, G18: never a complete response of the wrong length."""
    mark = probe.mark()
    data = raw(probe.port, request_bytes("GET", target("/file", path=files / "small", key=key, length=2000, kind=kind)))
    assert data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert data.endswith(SMALL)
    probe.wait_line("shorter than its Content-Length", after=mark)
    wait_closed(probe, key)


@pytest.mark.parametrize("kind", ["bytesio", "pipe", "gzip"])
def test_no_plain_file(probe: Server, files: Path, key: str, kind: str) -> None:
    """G18: read in the ordinary way: no descriptor, one that cannot be sent, one that holds other bytes."""
    answer, sent = fetch(probe, files / ("packed" if kind == "gzip" else "small"), key, kind=kind)
    assert answer.body == (b"through a pipe" if kind == "pipe" else SMALL)
    assert sent == 0


def test_object_with_a_read(probe: Server, files: Path, key: str) -> None:
    """G18: read() and close() are all that a file-like object needs; read in blocks of the wanted size."""
    mark = probe.mark()
    with RawClient(probe.port) as client:
        assert client.request("GET", target("/file", path=files / "small", key=key, kind="noted")).body == SMALL
    assert int(probe.wait_line(rf"probe {key} file closed after (\d+) reads", after=mark)[1]) == 2


def test_behind_middleware(probe: Server, files: Path, key: str) -> None:
    """G18: a wrapper is an iterable like any other once something is wrapped around it."""
    answer, sent = fetch(probe, files / "small", key, wrapped=1)
    assert (answer.body, sent) == (SMALL.lower(), 0)


def test_after_write(probe: Server, files: Path, key: str) -> None:
    """G8, G18: what was written comes first, and the file is not sent past it."""
    answer, sent = fetch(probe, files / "small", key, written="written first, ")
    assert (answer.body, sent) == (b"written first, " + SMALL, 0)


@pytest.mark.parametrize(
    ("method", "status"),
    [("HEAD", "200 OK"), *((method, status) for method in ("HEAD", "GET") for status in ("204 None", "304 Same"))],
)
def test_no_body_allowed(probe: Server, files: Path, key: str, method: str, status: str) -> None:
    """G17, G18"""
    answer, sent = fetch(probe, files / "small", key, method, status=status)
    assert (answer.status, answer.body, sent) == (int(status[:3]), b"", 0)


def test_http10(probe: Server, files: Path, key: str) -> None:
    """G18: the length is known, so even an HTTP/1.0 connection can go on."""
    path = target("/file", path=files / "small", key=key)
    with RawClient(probe.port) as client:
        for _ in range(2):
            client.send(f"GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
            answer = client.read_response()
            assert (answer.body, answer.header(b"connection")) == (SMALL, b"keep-alive")


def narrow(server: Server) -> socket.socket:
    """A connection whose own buffer is small, so that the server soon waits for its reader."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.settimeout(DEADLINE)
    sock.connect(("127.0.0.1", server.port))
    return sock


def test_slow_reader(probe: Server, files: Path, key: str) -> None:
    """G18: the server waits for the client; meanwhile its loop and its other threads serve others."""
    with narrow(probe) as sock:
        sock.sendall(request_bytes("GET", target("/file", path=files / "content", key=key), [("Connection", "close")]))
        parts = [sock.recv(4096)]
        for _ in range(5):
            ask(probe, "/pid")
            parts.append(sock.recv(4096))
        while part := sock.recv(65536):
            parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert body == CONTENT
    wait_closed(probe, key)


@pytest.mark.parametrize("reads", [1, 100_000])
def test_client_leaves(probe: Server, files: Path, key: str, reads: int) -> None:
    """G14, G18: the file is closed, the thread free, and nothing in the log: nobody did anything wrong."""
    mark = probe.mark()
    with narrow(probe) as sock:
        sock.sendall(request_bytes("GET", target("/file", path=files / "big", key=key)))
        taken = 0
        while taken < reads:
            taken += len(sock.recv(65536))
    wait_closed(probe, key)
    assert no_complaint(probe, mark)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_client_that_does_not_read(files: Path, key: str, pair: tuple[str, str]) -> None:
    """G18: after write_timeout the connection is cut and the file closed, as with any response."""
    parser, loop = pair
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    options = ("--threads", "4", "--http", parser, "--loop", loop, "--write-timeout", "1")
    with Server("tests.process.wsgi_probe:app", *options) as server:
        with narrow(server) as sock:
            sock.sendall(request_bytes("GET", target("/file", path=files / "big", key=key)))
            wait_closed(server, key)
            assert taken_until_the_end(sock) < BIG_SIZE
        assert no_complaint(server, 0)
        assert server.stop() == 0


def taken_until_the_end(sock: socket.socket) -> int:
    total = 0
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            total += len(part)
    return total


def test_half_closed_client(probe: Server, files: Path, key: str) -> None:
    """G18: a client that has ended its side still gets its file."""
    data = raw(probe.port, request_bytes("GET", target("/file", path=files / "content", key=key)), half_close=True)
    assert data.endswith(CONTENT)


def test_missing_file(probe: Server, files: Path, key: str) -> None:
    """G19: an error of the application before its start."""
    with RawClient(probe.port) as client:
        assert client.request("GET", target("/file", path=files / "missing", key=key)).status == 500
