"""Applications that fork: their children have nothing of the server's, and end when they are told to."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import RawClient, Server, alive, request_bytes, wait_for, write_app

DAEMON = """
import multiprocessing, os, time

def work():
    time.sleep(600)

def start():
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    os.write(1, f"child {child.pid}\\n".encode())  # in one piece, among the lines of other processes
    return child
"""
IN_LIFESPAN = (
    DAEMON
    + """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"good"})
"""
)
AT_IMPORT = (
    DAEMON
    + """
start()

def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "4")])
    return [b"good"]
"""
)


def pids(server: Server) -> list[int]:
    """Of the children that applications have started."""
    return [int(line.split()[1]) for line in server.log.splitlines() if line.startswith("child ")]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("source", "preload"), [(IN_LIFESPAN, ()), (IN_LIFESPAN, ("--preload",)), (AT_IMPORT, ("--preload",))]
)
def test_daemons_of_multiprocessing_go_with_their_generation(
    tmp_path: Path, loop: str, source: str, preload: tuple[str, ...]
) -> None:
    """And hold up neither a drain nor the port."""
    pytest.importorskip(loop)
    write_app(tmp_path, "app", source)
    options = (*preload, "--loop", loop, "--graceful-timeout", "30", "--stop-timeout", "20")
    with Server("app:app", *options, cwd=tmp_path) as server:
        port = server.port
        server.wait_line("^child ")
        old = server.worker_pids()
        server.reload()
        wait_for(lambda: not set(old) & set(server.worker_pids()), what="the old worker to go")
        wait_for(lambda: not alive(pids(server)[0]), what="its child to go")
        assert alive(pids(server)[1])
        with RawClient(port) as client:
            client.send(request_bytes("GET", "/"))
            assert client.read_response().body == b"good"
        assert server.stop() == 0
        wait_for(lambda: not any(map(alive, pids(server))), what="all children to go")
        assert "is killed" not in server.log
        assert "Traceback" not in server.log
        with Server("app:app", "--bind", f"127.0.0.1:{port}", cwd=tmp_path) as successor:
            assert successor.stop() == 0


IN_REQUEST = """
import multiprocessing, os, signal, time

LEFT = []

def wait():
    time.sleep(600)

def note(number, frame):
    pass

def tell_handler():
    # That it is there, not by a signal: Python 3.13 does not always call it in a child of a child of a thread.
    os._exit(7 if signal.getsignal(signal.SIGTERM) is note else 1)

def parent():
    # Its handlers are its own business, and so are those of its children.
    signal.signal(signal.SIGTERM, note)
    child = multiprocessing.get_context("fork").Process(target=tell_handler)
    child.start()
    child.join(30)
    os._exit(child.exitcode)

def app(environ, start_response):
    body = b"good"
    if environ["PATH_INFO"] == "/terminate":
        child = multiprocessing.get_context("fork").Process(target=wait)
        child.start()
        child.terminate()
        child.join(30)
        body = str(child.exitcode).encode()
    if environ["PATH_INFO"] == "/grandchild":
        child = multiprocessing.get_context("fork").Process(target=parent)
        child.start()
        child.join(30)
        body = str(child.exitcode).encode()
    if environ["PATH_INFO"] == "/leave":
        LEFT.append(multiprocessing.get_context("fork").Process(target=wait, daemon=True))
        LEFT[-1].start()
        start_response("200 OK", [("Connection-Note", "closes")])
        return iter([b"the ", b"end"])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_child_of_a_request(tmp_path: Path, loop: str) -> None:
    """What ends it does not reach the worker, and it keeps no connection open."""
    pytest.importorskip(loop)
    write_app(tmp_path, "app", IN_REQUEST)
    with Server("app:app", "--loop", loop, cwd=tmp_path) as server:
        workers = server.worker_pids()
        with RawClient(server.port) as idle:
            for _ in range(3):
                with RawClient(server.port) as client:
                    client.send(request_bytes("GET", "/terminate"))
                    assert client.read_response().body == b"%d" % -signal.SIGTERM
            with RawClient(server.port) as client:
                client.send(request_bytes("GET", "/grandchild"))
                assert client.read_response().body == b"7"
            with RawClient(server.port) as client:
                client.send(b"GET /leave HTTP/1.0\r\n\r\n")
                assert client.read_response().body == b"the end"
                assert client.eof()
            idle.send(request_bytes("GET", "/"))
            assert idle.read_response().body == b"good"
        assert server.worker_pids() == workers
        assert "draining" not in server.log
        assert server.stop() == 0
