"""What one worker bears: `limit_requests`, and clients that end badly, as in the history of waitress (S4)."""

from __future__ import annotations

import contextlib
import os
import signal
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
from tests.support import RawClient, Server, connect, linux, request_bytes, wait_for, write_app

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
    """S16 G18: `write_timeout`, here 3 s, is for one that has stopped to read; the megabytes that the kernel holds for
    a slow one take it longer than that."""
    pytest.importorskip(loop)
    size = 16 << 20
    write_app(tmp_path, "app", _BIG[interface].replace("SIZE", str(size)))
    asked = [("/pieces", ()), ("/whole", ()), ("/whole", (("Connection", "close"),))]
    options = ("--loop", loop, "--write-timeout", "3")
    with Server("app:app", *options, cwd=tmp_path) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(narrow(server.port)) for _ in asked]
        for client, (path, fields) in zip(clients, asked, strict=True):
            client.sendall(request_bytes("GET", path, fields))
        got = [0] * len(clients)
        until = time.monotonic() + 8
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


# ----------------------------------------------------------------------------------------------- descriptors run out

NARROW = ("sh", "-c", 'ulimit -n 128; exec "$@"', "sh")

HOARDER = """
import os, stat, time
def take_all():
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError:
        pass
def is_read(fd):
    # As the code that is served, by who tells its hash: that descriptor comes back.
    try:
        found = os.fstat(fd)
    except OSError:
        return True
    return stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR) and found.st_nlink > 0
def app(environ, start_response):
    if environ["PATH_INFO"] == "/hoard":
        take_all()
        while any(map(is_read, range(3, 128))):
            time.sleep(0.001)
            take_all()
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


def test_connections_at_the_limit_of_descriptors_live_on_over_a_reload(tmp_path: Path) -> None:
    """Also while others wait in the backlog, whom the new worker may take first."""
    write_app(tmp_path, "app", HOARDER)
    with Server("app:app", "--workers", "1", cwd=tmp_path, prefix=NARROW) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(96)]
        old = {client.request("GET", "/").body for client in clients}
        server.wait_line(r"a worker takes 96 connections, not the 10000 of limit_connections.*128 descriptors")
        waiting = [stack.enter_context(RawClient(server.port)) for _ in range(5)]
        server.reload()
        server.wait_line("worker 1 gen 1 gone: exit 0")
        (pid,) = server.worker_pids()
        assert old != {b"%d" % pid}
        for client in clients:
            response = client.request("GET", "/")
            assert response.body == b"%d" % pid
            assert response.header(b"connection") != b"close"
        for client in clients[:10]:
            client.close()
        for client in waiting:
            assert client.request("GET", "/").body == b"%d" % pid
        assert "cannot accept" not in server.log
        assert server.stop() == 0


@linux
def test_a_worker_that_has_no_descriptors_left_can_give_its_connections_away(tmp_path: Path) -> None:
    """The channels that come with its orders find room when it has closed its listener."""
    write_app(tmp_path, "app", HOARDER)
    with Server("app:app", cwd=tmp_path, prefix=NARROW) as server, RawClient(server.port) as client:
        (old,) = server.worker_pids()
        assert client.request("GET", "/hoard").body == b"%d" % old
        server.reload()
        server.wait_line("worker 1 gen 1: no descriptors are left")
        server.wait_line("worker 1 gen 1 gone: exit 0")
        assert client.request("GET", "/").body == b"%d" % server.worker_pids()[0]
        assert "nonsense" not in server.log
        assert server.stop() == 0


@linux
def test_a_worker_that_has_no_descriptors_left_refuses_connections_of_others(tmp_path: Path) -> None:
    """These stay where they are, and are served there."""
    write_app(tmp_path, "app", HOARDER)
    args = ("--workers", "2", "--graceful-timeout", "600")
    with (
        Server("app:app", *args, cwd=tmp_path, prefix=NARROW) as server,
        contextlib.ExitStack() as stack,
    ):
        leaving, staying = (b"%d" % pid for pid in server.worker_pids())
        clients: dict[bytes, RawClient] = {}
        while {leaving, staying} - set(clients):
            client = stack.enter_context(RawClient(server.port))
            clients.setdefault(client.request("GET", "/").body, client)
        assert clients[staying].request("GET", "/hoard").body == staying
        server.signal(signal.SIGTTOU)
        server.wait_line("no descriptors are left")
        for pid, client in clients.items():
            assert client.request("GET", "/").body == pid
        stack.close()
        server.wait_line("gen 1 gone: exit 0")
        assert server.worker_pids() == [int(staying)]
        assert "nonsense" not in server.log
        assert server.stop() == 0
