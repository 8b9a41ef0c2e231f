"""What one worker bears: `limit_requests`, and clients that end badly, as in the history of waitress (S4)."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load import INTERFACES, serving
from tests.process.conftest import PROBE
from tests.process.probing import ANSWER, Probe, script
from tests.rawhttp import DEADLINE
from tests.support import Server, connect, linux, request_bytes, wait_for, write_app

RESET = struct.pack("ii", 1, 0)
GET = request_bytes("GET", "/")


def test_requests_beyond_the_limit_are_turned_away(serve: Callable[..., Server]) -> None:
    """503 for all but those in progress; the log says why, and all is well again when they have their answers."""
    probe = Probe(serve(PROBE, "--limit-requests", "2"))
    held = [script(("until", "http.disconnect"), *ANSWER), script(("wait", "limit"), *ANSWER)]
    with probe.client() as one, probe.client() as two:
        one.send(request_bytes("GET", held[0].target))
        two.send(request_bytes("POST", held[1].target, body=b"data"))
        with probe.client() as late:
            for _ in range(2):
                wait_for(lambda: probe.request("/").status == 503)
            response = late.request("POST", "/", body=b"data")
            assert (response.status, response.header(b"connection")) == (503, b"close")
            assert response.header(b"retry-after") == b"1"
            assert late.eof()
        probe.server.wait_line(r"as many as limit_requests allows")
        one.close()  # the application notices
        wait_for(lambda: probe.request("/").status == 200)
        probe.set("limit")
        assert two.read_response().body == b"answer"
    assert probe.request("/").status == 200


@linux
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_clients_that_vanish_behind_unread_requests(serve: Callable[..., Server], loop: str) -> None:
    """R4 S14: the place of one that has pipelined more than may wait becomes free."""
    pytest.importorskip(loop)
    probe = Probe(serve(PROBE, "--limit-requests", "1", "--limit-pipelined", "0", "--loop", loop))
    with probe.client() as client:
        client.send(request_bytes("GET", script(("until", "http.disconnect"), *ANSWER).target))
        wait_for(lambda: probe.request("/").status == 503)
        client.send(GET + GET)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    wait_for(lambda: probe.request("/").status == 200)


def test_wsgi_requests_that_wait_for_a_thread_count(tmp_path: Path) -> None:
    """The queue in front of the threads is what grows under load, so the limit is for it, too."""
    write_app(
        tmp_path,
        "app",
        """
import threading
gate = threading.Event()
def app(environ, start_response):
    if environ["PATH_INFO"] == "/held":
        gate.wait(DEADLINE)
    start_response("200 OK", [])
    return [b"ok"]
""",
    )
    options = ("--threads", "1", "--limit-requests", "3")
    with Server("app:app", *options, cwd=tmp_path) as server:
        held = [connect(server.port) for _ in range(3)]
        for sock in held:
            sock.sendall(request_bytes("GET", "/held"))
        assert wait_for(lambda: ask(server) == b"503")
        for sock in held:
            sock.close()


def ask(server: Server) -> bytes:
    with connect(server.port) as sock:
        sock.sendall(GET)
        return sock.recv(65536)[9:12]


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def leave(server: Server, begin: bytes, end: str) -> None:
    """Open a connection, send something, and end it in one of the ways in which clients do."""
    with connect(server.port) as sock:
        sock.sendall(begin)
        if end == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        elif end == "half":
            sock.shutdown(socket.SHUT_WR)


@linux
@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_clients_that_vanish_leave_nothing_behind(tmp_path: Path, interface: str, loop: str) -> None:
    """S4, CVE-2022-31015 and CVE-2024-49769: after a flood of resets and half-closed sockets the worker serves, says
    nothing of it, holds no descriptor of theirs, and its loop is idle."""
    pytest.importorskip(loop)
    begins = [b"", b"G", GET, GET + GET[:9], request_bytes("POST", "/", body=b"d" * 99)[:-1], b"nonsense\r\n\r\n"]
    with serving(tmp_path, interface, "--loop", loop) as server:
        (worker,) = server.worker_pids()
        assert ask(server) == b"200"
        descriptors = len(os.listdir(f"/proc/{worker}/fd"))
        for _ in range(12):
            for begin in begins:
                for end in ("reset", "half", "close"):
                    leave(server, begin, end)
        open_ones = [connect(server.port) for _ in range(20)]
        for sock in open_ones:  # half-closed, and still there
            sock.sendall(GET)
            sock.shutdown(socket.SHUT_WR)
        wait_for(lambda: len(os.listdir(f"/proc/{worker}/fd")) <= descriptors, what="their descriptors")
        for sock in open_ones:
            assert sock.recv(12) == b"HTTP/1.1 200"
            sock.close()
        used, began = cpu(worker), time.monotonic()
        time.sleep(0.5)
        assert cpu(worker) - used < 0.25 * (time.monotonic() - began), "the loop is busy with nothing"
        assert ask(server) == b"200"
        assert "Traceback" not in server.log


_BIG = {"asgi": """
PIECE = bytes(1 << 16)
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % SIZE)]})
    if scope["path"] == "/whole":
        await send({"type": "http.response.body", "body": PIECE * (SIZE // len(PIECE))})
        return
    for left in reversed(range(SIZE // len(PIECE))):
        await send({"type": "http.response.body", "body": PIECE, "more_body": left > 0})
""", "wsgi": """
PIECE = bytes(1 << 16)
with open("file", "wb") as file:
    file.truncate(SIZE)
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", str(SIZE))])
    if environ["PATH_INFO"] == "/whole":
        return environ["wsgi.file_wrapper"](open("file", "rb"))
    return (PIECE for _ in range(SIZE // len(PIECE)))
"""}  # fmt: skip


@linux
@pytest.mark.parametrize(("interface", "loop"), [("asgi", "asyncio"), ("asgi", "uvloop"), ("wsgi", "uvloop")])
def test_clients_that_read_slowly_get_everything(tmp_path: Path, interface: str, loop: str) -> None:
    """S16 G18: `write_timeout`, here 1 s, is for one that has stopped to read; the megabytes that the kernel holds for
    a slow one take it longer than that."""
    pytest.importorskip(loop)
    size = 16 << 20
    write_app(tmp_path, "app", _BIG[interface].replace("SIZE", str(size)))
    asked = [("/pieces", ()), ("/whole", ()), ("/whole", (("Connection", "close"),))]
    options = ("--loop", loop, "--write-timeout", "1")
    with Server("app:app", *options, cwd=tmp_path) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(narrow(server.port)) for _ in asked]
        for client, (path, fields) in zip(clients, asked, strict=True):
            client.sendall(request_bytes("GET", path, fields))
        got = [0] * len(clients)
        until = time.monotonic() + 4
        while time.monotonic() < until:
            for number, client in enumerate(clients):
                got[number] += len(client.recv(8192))
            time.sleep(0.04)  # 200 kB/s: a third of the kernel's buffer takes seconds
        assert max(got) < size // 4
        for number, client in enumerate(clients):
            while got[number] < size and (data := client.recv(1 << 20)):
                got[number] += len(data)
        assert min(got) >= size
    assert "Traceback" not in server.log


def narrow(port: int) -> socket.socket:
    """A connection whose client's side holds little, so that the server's holds the rest."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    sock.settimeout(DEADLINE)
    sock.connect(("127.0.0.1", port))
    return sock
