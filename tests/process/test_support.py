"""The harness itself: a check that cannot fail would let every other test pass."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import (
    OWN_CODE,
    STDLIB,
    RawClient,
    Server,
    alive,
    own_tracebacks,
    raw,
    request_bytes,
    wait_for,
    write_app,
)

HELLO = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"GENERATION"})
"""


@contextmanager
def answering(data: bytes) -> Iterator[RawClient]:
    """A client whose server has sent `data` and closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener, RawClient(listener.getsockname()[1]) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(data)
        yield client


def test_responses_in_every_framing() -> None:
    wire = (
        b"HTTP/1.1 100 Continue\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-A: 1\r\nX-A:  2 \r\n\r\none"
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
        b"HTTP/1.1 204 No Content\r\n\r\n"
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n2\r\ntw\r\n1\r\no\r\n0\r\nX-T: t\r\n\r\n"
        b"HTTP/1.0 404 Not Found\r\n\r\nrest"
    )
    with answering(wire) as client:
        one = client.read_response()
        head = client.read_response("HEAD")
        nothing = client.read_response()
        two = client.read_response()
        assert not client.eof()
        rest = client.read_response()
        assert client.eof()
    assert (one.body, [i.status for i in one.interim], one.all(b"x-a")) == (b"one", [100], [b"1", b"2"])
    assert (head.body, nothing.body) == (b"", b"")
    assert (two.body, two.reason, two.trailers) == (b"two", "", [(b"x-t", b"t")])
    assert (rest.version, rest.status, rest.reason, rest.body) == ("HTTP/1.0", 404, "Not Found", b"rest")


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : 1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: 1\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n1",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_malformed_responses_are_refused(wire: bytes) -> None:
    with answering(wire) as client, pytest.raises(AssertionError):
        client.read_response()


def test_a_reset_is_not_a_close() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, RawClient(listener.getsockname()[1]) as client:
        server, _ = listener.accept()
        client.send(b"never read")
        assert server.recv(1) == b"n"
        server.close()
        with pytest.raises(ConnectionResetError):
            client.eof()


OWN = OWN_CODE / "worker" / "server.py"
APP = "/srv/site/app.py"
FRAMEWORK = "/venv/lib/python3.12/site-packages/starlette/routing.py"
PARSER = "/venv/lib/python3.12/site-packages/h11/_connection.py"


@pytest.mark.parametrize(
    ("files", "own"),
    [
        ([OWN], True),
        ([OWN, PARSER], True),
        ([STDLIB / "asyncio/events.py", "uvloop/loop.pyx", OWN], True),
        ([APP], False),
        ([OWN, APP], False),
        ([OWN, FRAMEWORK, OWN], False),
        ([STDLIB / "threading.py"], False),
        (["<frozen importlib._bootstrap>", APP], False),
    ],
)
def test_whose_traceback(files: list[str | Path], own: bool) -> None:
    frames = "".join(f'  File "{file}", line 1, in f\n    f()\n' for file in files)
    other = f'Traceback (most recent call last):\n  File "{APP}", line 2, in g\nKeyError: 1\n'
    log = f"2026 [1] error failed\nTraceback (most recent call last):\n{frames}ValueError: no\n{other}"
    assert len(own_tracebacks(log)) == own


def test_a_rewritten_module_is_newer_by_whole_seconds(tmp_path: Path) -> None:
    times = [int(write_app(tmp_path, "site.app", f"x = {n}").stat().st_mtime) for n in range(4)]
    assert times == sorted(set(times))
    assert (tmp_path / "site" / "app.py").read_text() == "x = 3"


def test_wait_for_fails_at_its_deadline() -> None:
    with pytest.raises(AssertionError, match="the moon"):
        wait_for(lambda: False, 0.05, "the moon")


def test_a_server_from_start_to_stop(tmp_path: Path) -> None:
    write_app(tmp_path, "app", HELLO)
    with Server("app:app", "--workers", "2", cwd=tmp_path) as server:
        get = request_bytes("GET", "/", [("Connection", "close")])
        assert raw(server.port, get).endswith(b"GENERATION")
        first = server.worker_pids()
        assert len(first) == 2
        assert set(first) <= set(server.children())

        write_app(tmp_path, "app", HELLO.replace("GENERATION", "generation"))
        assert server.reload() == 2
        assert raw(server.port, get).endswith(b"generation")
        wait_for(lambda: len(server.worker_pids()) == 2, what="the old workers to go")
        assert not set(first) & set(server.worker_pids())
        assert server.stop() == 0


def test_leaving_ends_the_whole_group(tmp_path: Path) -> None:
    write_app(tmp_path, "app", HELLO)
    with Server("app:app", cwd=tmp_path) as server:
        pids = [server.pid, *server.children()]
        assert len(pids) >= 2
    wait_for(lambda: not any(alive(pid) for pid in pids))  # killed at once, but they die when they get to it


def test_a_server_that_cannot_start_fails_at_once_with_its_log(tmp_path: Path) -> None:
    write_app(tmp_path, "app", "raise RuntimeError('no database')")
    with pytest.raises(AssertionError, match="the log ended") as failure, Server("app:app", cwd=tmp_path, timeout=60):
        pass
    assert "no database" in str(failure.value)
    with Server("app:app", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3


def test_apphosts_own_traceback_fails_the_test(tmp_path: Path) -> None:
    """An application that prints one stands for a defect of the server."""
    printed = f'Traceback (most recent call last):\n  File "{OWN}", line 1, in f\nValueError: no\n'
    write_app(tmp_path, "app", f"{HELLO}\nprint({printed!r}, flush=True)")
    with pytest.raises(AssertionError, match="own traceback"), Server("app:app", cwd=tmp_path):
        pass
    with Server("app:app", cwd=tmp_path, allow_errors=True):
        pass


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the surrounding shell never reach the server; those of the test do."""
    monkeypatch.setenv("APPHOST_WORKERS", "many")
    monkeypatch.setenv("WEB_CONCURRENCY", "many")
    monkeypatch.setenv("SURROUNDING", "kept")
    write_app(tmp_path, "app", f"{HELLO}\nimport os; print(os.environ.get('SURROUNDING'), os.environ.get('HOME'))")
    with Server("app:app", cwd=tmp_path, bind=None, env={"APPHOST_BIND": f"unix:{tmp_path}/s", "HOME": None}) as server:
        server.wait_line("^kept None$")
        server.wait_line(f"listening at unix:{tmp_path}/s")
        assert raw(os.path.join(tmp_path, "s"), b"GET / HTTP/1.0\r\n\r\n").endswith(b"GENERATION")
