"""A worker that says what no worker says: the arbiter, which may be root, closes its channel and goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import RawClient, Server, linux, write_app

# It writes what it is asked to on the channel to the arbiter, or has the fork server say it.
APP = """
import os, socket, stat

def tell(what):
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as sock:
                if sock.family == socket.AF_UNIX and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                    if int.from_bytes(credentials[:4], "little") == int(open("pid").read()):
                        sock.send(what)
        except OSError:
            pass

if os.path.exists("preloaded"):
    tell(open("preloaded", "rb").read())

def app(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length:
        tell(environ["wsgi.input"].read(length))
    start_response("200 OK", [])
    return [b"hello"]
"""


@linux
@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b'{"t":"beat"}\n', "message 'beat' without a proper 'requests'"),
        (b"\x1b[2Jnonsense\n", r"not a message: b'\\x1b\[2Jnonsense'"),
    ],
)
def test_a_worker(tmp_path: Path, said: bytes, why: str) -> None:
    """It is replaced, and what it said does nothing else, not even to a terminal that shows the log."""
    write_app(tmp_path, "hostile", APP)
    pid = ("--pidfile", str(tmp_path / "pid"))
    with Server("hostile:app", *pid, "--graceful-timeout", "200ms", cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            assert client.request("POST", "/", body=said).body == b"hello"
        server.wait_line(f"error a channel is closed: {why}")
        server.wait_line("worker 1 gen 1 gone")
        server.wait_line("worker 2 gen 1 ready")
        with RawClient(server.port) as client:
            assert client.request("GET", "/").body == b"hello"
        assert server.stop() == 0
        assert "\x1b" not in server.log


@linux
def test_a_fork_server(tmp_path: Path) -> None:
    """With `preload` it runs code of the application: its generation is given up, the one before serves on."""
    write_app(tmp_path, "hostile", APP)
    pid = ("--pidfile", str(tmp_path / "pid"))
    with Server("hostile:app", "--preload", *pid, cwd=tmp_path) as server:
        (tmp_path / "preloaded").write_bytes(b'{"t":"settings","settings":{"workers":1000000,"log_format":"x"}}\n')
        mark = server.mark()
        server.signal(signal.SIGUSR1)
        server.wait_line("error a channel is closed: message 'settings' without a proper 'settings'", after=mark)
        server.wait_line("generation 2 given up", after=mark)
        with RawClient(server.port) as client:
            assert client.request("GET", "/").body == b"hello"
        (tmp_path / "preloaded").unlink()
        assert server.reload() == 3
        assert server.stop() == 0
