"""`wsgi.input` against a real server on both parsers and both loops: small and streamed bodies, slow clients, clients
that go away, `Expect: 100-continue`."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from urllib.parse import urlencode

import pytest

from tests.process.test_wsgi_conformance import PAIRS, ask, no_complaint, standstill, target
from tests.support import DEADLINE, RawClient, Server, refused, request_bytes, wait_for

LINES = b"one\r\ntwo\n\n" + b"x" * 100 + b"\nlast without an end"
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


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def impatient(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server whose clients must go on sending: of its own, as nothing else shall depend on how fast a test is."""
    parser, loop = request.param
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    options = ("--threads", "4", "--http", parser, "--loop", loop, "--request-body-timeout", "1")
    with Server("tests.process.wsgi_probe:app", *options) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def client(probe: Server) -> Iterator[RawClient]:
    with RawClient(probe.port) as made:
        yield made


@pytest.fixture
def key() -> str:
    return f"i{next(_numbers)}i"


def head(framing: str, path: str, size: int, *headers: tuple[str, str]) -> bytes:
    """The head of a POST; its body is up to the test."""
    how = ("Transfer-Encoding", "chunked") if framing == "chunked" else ("Content-Length", str(size))
    return request_bytes("POST", path, [how, *headers])


def framed(framing: str, pieces: list[bytes]) -> list[bytes]:
    """`pieces` as they go on the wire, one message each."""
    if framing == "length":
        return pieces
    return [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece] + [b"0\r\n\r\n"]


def in_python(body: bytes, steps: str) -> list[object]:
    """What Python's own file object answers to the steps of the probe."""
    file, results = io.BytesIO(body), []
    for step in steps.split():
        name, _, text = step.partition(":")
        if name == "iter":
            result: object = list(file)
        elif name == "readinto":
            result = file.read(int(text))
        elif name == "next":
            result = next(file)
        else:
            result = getattr(file, name)(*([None if text == "None" else int(text)] if text else []))
        results.append([line.decode("latin-1") for line in result] if isinstance(result, list)
                       else result.decode("latin-1"))  # type: ignore[attr-defined]  # fmt: skip
    return results


STEPS = [
    "read", "read:-1", "read:None", "read:0 read:4 read:1000 read:1", "read:3 read", "readline readline readline",
    "readline:2 readline:-1 readline:0 readline:None readline:1000 read", "readlines", "readlines:1 read",
    "readlines:6 readlines:0", "readlines:-1", "readlines:None", "iter read", "next readline next read:5 iter",
    "readline read:3 readline readlines", "readinto:4 readinto:500 readinto:1", "read read readline readlines iter",
]  # fmt: skip


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", ["small", "streamed"])
def test_every_method(client: RawClient, key: str, steps: str, framing: str, size: str) -> None:
    """G5: as a file of Python's does it, for a body that is gathered before the call and for one that streams in."""
    body = LINES if size == "small" else LINES * 1000  # 124 KB: more than is gathered
    path = target("/input", steps=steps, key=key)
    middle = len(body) // 3
    client.send(head(framing, path, len(body)) + b"".join(framed(framing, [body[:middle], body[middle:]])))
    answer = client.read_response()
    assert answer.status == 200
    told = json.loads(answer.body)
    assert told == {"results": in_python(body, steps), "terminated": True}
    if answer.header(b"connection") == b"close":  # too much was left unread
        assert client.eof()
    else:
        assert client.request("GET", "/pid").status == 200


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_slow_client(client: RawClient, key: str, framing: str) -> None:
    """G5: lines that arrive in splinters, with Expect so that they stream, are put together."""
    pieces = [bytes([byte]) for byte in LINES]
    path = target("/input", steps="readline readline:2 read:3 iter read", key=key)
    client.send(head(framing, path, len(LINES), ("Expect", "100-continue")))
    for piece in framed(framing, pieces):
        client.send(piece)
        time.sleep(0.001)
    answer = client.read_response()
    assert json.loads(answer.body)["results"] == in_python(LINES, "readline readline:2 read:3 iter read")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_reads_what_is_there(probe: Server, client: RawClient, key: str, framing: str) -> None:
    """G5, R3: the application is called, and reads, before the body is complete; it never waits for more than it asks.

    A body streams once it is too large to be gathered; only its first lines have been sent when the application reads.
    """
    body = b"y" * 70_000 + b"\nfirst\nsecond\n" + b"x" * 100_000
    mark = probe.mark()
    path = target("/input", steps="readline read:3 readline read", key=key)
    first, *rest = framed(framing, [body[:70_021], body[70_021:90_000], body[90_000:]])
    client.send(head(framing, path, len(body)) + first)
    probe.wait_line(f"probe {key} did readline", after=mark)
    probe.wait_line(f"probe {key} did read:3", after=mark)
    for piece in rest:
        client.send(piece)
    answer = client.read_response()
    assert json.loads(answer.body)["results"] == in_python(body, "readline read:3 readline read")


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_072, 3_000_000])
def test_sizes_around_the_limits(client: RawClient, framing: str, size: int) -> None:
    """G5: complete, whether gathered or streamed."""
    body = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    pieces = [body[at : at + 50_000] for at in range(0, size, 50_000)]
    client.send(head(framing, target("/digest", size=10_000), size) + b"".join(framed(framing, pieces)))
    assert json.loads(client.read_response().body) == [size, hashlib.sha256(body).hexdigest()]


def test_body_is_not_read_ahead(probe: Server, key: str) -> None:
    """R7: while the application does not read, the server does not either: the client's writes stand still."""
    size = 64 * 2**20
    with RawClient(probe.port) as client:
        client.send(head("length", target("/digest", size=10_000, key=key), size))
        client.sock.setblocking(False)
        sent = 0

        def push() -> int:
            nonlocal sent
            try:
                sent += client.sock.send(bytes(min(65536, size - sent)))
            except BlockingIOError:
                pass
            return sent

        stuck = standstill(push)
        assert stuck < size // 2
        ask(probe, "/open", key=key)
        client.sock.settimeout(DEADLINE)
        client.send(bytes(size - sent))
        assert json.loads(client.read_response().body)[0] == size


def test_lines_of_a_large_body(client: RawClient) -> None:
    """G5: the time for many short lines grows with the body, not with its square."""
    body = b"a\n" * 2**20
    client.send(head("length", "/lines", len(body)) + body)
    started = time.monotonic()
    assert json.loads(client.read_response().body) == 2**20
    assert time.monotonic() - started < 10  # about 1 s; copying what is left for each line would take minutes


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_slow_small_uploads_cost_no_thread(probe: Server, framing: str) -> None:
    """G5: more slow clients than threads, and others are still served at once."""
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(probe.port)) for _ in range(12)]
        first, *rest = framed(framing, [b"abc", b"def"])
        for client in clients:
            client.send(head(framing, target("/digest", size=10), 6) + first)
        for _ in range(4):
            ask(probe, "/pid")
        for client in clients:
            client.send(b"".join(rest))
            assert json.loads(client.read_response().body) == [6, hashlib.sha256(b"abcdef").hexdigest()]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("sent", [3, 70_000], ids=["a few bytes", "enough to stream"])
def test_slow_large_uploads_leave_threads_to_others(probe: Server, framing: str, sent: int) -> None:
    """G5: the first kind gets no thread at all, the other half of them at most; in the end all are answered."""
    body = b"0123456789" * 10_000
    first, *rest = framed(framing, [body[:sent], body[sent:]])
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(probe.port)) for _ in range(12)]
        for client in clients:
            client.send(head(framing, target("/digest", size=10), len(body)) + first)
        for _ in range(4):
            ask(probe, "/pid")
        for client in clients:
            client.send(b"".join(rest))
        for client in clients:
            assert json.loads(client.read_response().body) == [len(body), hashlib.sha256(body).hexdigest()]


def test_slow_uploads_below_several_prefixes_leave_threads_to_others() -> None:
    """G5: half of the threads are meant in all, however many prefixes a proxy tells of."""
    options = ("--threads", "2", "--trusted-proxies", "127.0.0.1", "--forwarded-fields", "for,prefix")
    with Server("tests.process.wsgi_probe:app", *options) as server, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(4)]
        for number, client in enumerate(clients):
            prefix = ("X-Forwarded-Prefix", f"/p{number}")
            client.send(head("length", target("/digest", size=10), 100_000, prefix) + bytes(70_000))
        for _ in range(4):
            ask(server, "/pid")
        for client in clients:
            client.send(bytes(30_000))
        for client in clients:
            assert json.loads(client.read_response().body) == [100_000, hashlib.sha256(bytes(100_000)).hexdigest()]
        assert server.stop() == 0


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("half", [False, True], ids=["closes", "half-closes"])
def test_client_leaves_a_streamed_upload(probe: Server, key: str, framing: str, half: bool) -> None:
    """G5, R5: an OSError out of read, never an end of the body; no complaint about the application."""
    mark = probe.mark()
    with RawClient(probe.port) as client:
        client.send(head(framing, target("/input", steps="read", key=key), 200_000))
        client.send(framed(framing, [b"z" * 100_000, b""])[0])
        probe.wait_line(f"probe {key} called", after=mark)
        if half:
            client.sock.shutdown(1)
            probe.wait_line(f"probe {key} read raised", after=mark)
    probe.wait_line(f"probe {key} read raised ClientDisconnected, an OSError", after=mark)
    assert no_complaint(probe, mark)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_client_leaves_a_small_upload(probe: Server, key: str, framing: str) -> None:
    """G5, R5: the application is not even called."""
    mark = probe.mark()
    with RawClient(probe.port) as client:
        client.send(head(framing, target("/input", steps="read", key=key), 6) + framed(framing, [b"abc", b"def"])[0])
        ask(probe, "/pid")
    assert no_complaint(probe, mark)
    assert f"probe {key} called" not in probe.log


@pytest.mark.parametrize("size", [6, 200_000], ids=["small", "streamed"])
def test_upload_that_stalls(impatient: Server, key: str, size: int) -> None:
    """G5: 408 after request_body_timeout, and the thread is free again."""
    mark = impatient.mark()
    with RawClient(impatient.port) as client:
        client.send(head("length", target("/input", steps="read", key=key), size) + bytes(size // 2))
        assert client.read_response().status == 408
    if size > 6:
        impatient.wait_line(f"probe {key} read raised ClientDisconnected, an OSError", after=mark)
    assert no_complaint(impatient, mark)


def test_bad_chunk_in_a_streamed_upload(probe: Server, key: str) -> None:
    """G5, P6: 400 to the client, and an OSError, not an end of the body, to the application."""
    mark = probe.mark()
    with RawClient(probe.port) as client:
        first = framed("chunked", [b"z" * 100_000])[0]
        client.send(head("chunked", target("/input", steps="read", key=key), 0) + first)
        probe.wait_line(f"probe {key} called", after=mark)
        client.send(b"nonsense\r\n")
        assert client.read_response().status == 400
    probe.wait_line(f"probe {key} read raised ClientDisconnected, an OSError", after=mark)
    assert no_complaint(probe, mark)


@pytest.mark.parametrize("size", [10, 100_000])
def test_unread_body(client: RawClient, size: int) -> None:
    """R8, G5: what the application leaves is never the next request."""
    evil = b"GET /pid HTTP/1.1\r\nHost: evil\r\n\r\n"
    client.send(head("length", "/ignore", size) + (evil * (size // len(evil) + 1))[:size])
    answer = client.read_response()
    assert (answer.status, answer.body) == (200, b'"ignored"')
    if answer.header(b"connection") == b"close":
        assert client.eof()
    else:
        assert client.request("GET", "/ignore").body == b'"ignored"'


# --------------------------------------------------------------------------------------------------------------- Expect


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_expect_is_answered_at_the_first_read(probe: Server, client: RawClient, key: str, framing: str) -> None:
    """G7, R9: not before the application reads."""
    mark = probe.mark()
    path = target("/input", steps="read", key=key, gate=1)
    client.send(head(framing, path, 5, ("Expect", "100-Continue")))
    probe.wait_line(f"probe {key} called", after=mark)
    client.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)
    client.sock.settimeout(DEADLINE)
    ask(probe, "/open", key=key)
    assert client.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"".join(framed(framing, [b"hello"])))
    answer = client.read_response()
    assert json.loads(answer.body)["results"] == ["hello"]
    assert client.request("GET", "/pid").status == 200


def test_expect_of_an_application_that_does_not_read(client: RawClient) -> None:
    """G7, R9: no 100; and as nobody can know whether the body comes now, the connection ends."""
    client.send(head("length", "/ignore", 5, ("Expect", "100-continue")))
    answer = client.read_response()
    assert (answer.status, answer.interim) == (200, [])
    assert answer.header(b"connection") == b"close"
    assert client.eof()


def test_expect_of_a_client_that_does_not_wait(client: RawClient, key: str) -> None:
    """G7, R9: no 100 for a body that is there already."""
    path = "/input?" + urlencode({"steps": "read", "key": key})
    client.send(head("length", path, 5, ("Expect", "100-continue")) + b"hello")
    answer = client.read_response()
    assert (json.loads(answer.body)["results"], answer.interim) == (["hello"], [])


def test_expect_of_http10(client: RawClient, key: str) -> None:
    """G7, R9: HTTP/1.0 knows no 100."""
    path = "/input?" + urlencode({"steps": "read", "key": key})
    client.send(f"POST {path} HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello".encode())
    answer = client.read_response()
    assert (json.loads(answer.body)["results"], answer.interim) == (["hello"], [])


def test_clients_that_wait_for_continue_leave_threads_to_others(probe: Server) -> None:
    """G7, G5: they get half of the threads at most; those that go while they wait for one are forgotten."""
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(probe.port)) for _ in range(12)]
        for client in clients:
            client.send(head("length", target("/digest", size=10), 5, ("Expect", "100-continue")))
        for _ in range(4):
            ask(probe, "/pid")
        for client in clients[1::2]:
            client.close()
        for client in clients[::2]:
            assert client.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            assert json.loads(client.read_response().body) == [5, hashlib.sha256(b"hello").hexdigest()]


def test_expect_of_a_client_that_leaves(probe: Server, key: str) -> None:
    """G7, R5: the application's read raises."""
    mark = probe.mark()
    with RawClient(probe.port) as client:
        client.send(head("length", target("/input", steps="read", key=key), 5, ("Expect", "100-continue")))
        assert client.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    probe.wait_line(f"probe {key} read raised ClientDisconnected, an OSError", after=mark)
    assert no_complaint(probe, mark)


def test_body_through_a_drain(http_parser: str) -> None:
    """G5: an upload in progress is finished by a worker that is told to stop."""
    with Server("tests.process.wsgi_probe:app", "--http", http_parser) as server, RawClient(server.port) as client:
        body = b"q" * 200_000
        client.send(head("length", target("/digest", size=1000), len(body)) + body[:1000])
        wait_for(lambda: ask(server, "/pid"))
        server.signal(15)
        wait_for(lambda: refused(server.port), what="the worker to have the order")
        client.send(body[1000:])
        answer = client.read_response()
        assert json.loads(answer.body) == [len(body), hashlib.sha256(body).hexdigest()]
        assert answer.header(b"connection") == b"close"
        assert server.wait_exit() == 0
        assert re.search(r"gone: exit 0", server.log)
