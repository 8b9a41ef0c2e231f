"""ASGI lifespan against real servers: start-up, failure, hang, state, shutdown after the drain (CONFORMANCE L1 to L8).

One application; what it does in its lifespan is named by the environment variable LIFESPAN. It waits only for files
that a test makes, so that nothing here depends on timing.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from apphost.errors import ExitCode
from tests.support import DEADLINE, RawClient, Server, request_bytes, wait_for, write_app

APP = """
import asyncio, json, os, pathlib, sys, time

DOES = os.environ.get("LIFESPAN", "")
here = pathlib.Path(__file__).parent
told = {}


def say(what):
    sys.stdout.write(f"app {os.getpid()} {what}\\n")  # in one piece: print writes two, and two workers print


async def file(name):
    while not (here / name).exists():
        await asyncio.sleep(0.01)


async def lifespan(scope, receive, send):
    say("scope " + json.dumps({**scope, "state": sorted(scope["state"])}, sort_keys=True))
    if DOES == "raise":
        raise RuntimeError("no lifespan here")
    if DOES == "assert":
        assert scope["type"] == "http"
    if DOES == "return":
        return
    event = await receive()
    say("event " + event["type"])
    if DOES == "raise in startup":
        raise RuntimeError("startup went wrong")
    if DOES == "exit in startup":
        raise SystemExit(0)
    if DOES in ("fail", "fail and raise"):
        await send({"type": "lifespan.startup.failed", "message": "the database is away"})
        if DOES == "fail and raise":
            raise RuntimeError("as Starlette does")
        return
    if DOES == "fail silently":
        await send({"type": "lifespan.startup.failed"})
        return
    if DOES == "hang":
        await asyncio.Event().wait()
    if DOES == "block":
        time.sleep(600)
    if DOES == "nonsense":
        for bad in ({"type": "lifespan.nonsense"}, {"type": "lifespan.shutdown.complete"}):
            try:
                await send(bad)
            except RuntimeError as exc:
                say(f"refused {exc}")
    if DOES == "wait":
        await file("go")
    told["loop"] = asyncio.get_running_loop()
    scope["state"].update(number=1, shared=[])
    await send({"type": "lifespan.startup.complete"})
    say("startup complete")
    if DOES == "nonsense":
        try:
            await send({"type": "lifespan.startup.complete"})
        except RuntimeError as exc:
            say(f"refused {exc}")
    if DOES == "raise later":
        raise RuntimeError("after startup")
    if DOES == "return later":
        return
    event = await receive()
    say("event " + event["type"])
    if DOES == "shutdown fails":
        await send({"type": "lifespan.shutdown.failed", "message": "the cache is stuck"})
        return
    if DOES == "shutdown raises":
        raise RuntimeError("in shutdown")
    if DOES == "shutdown hangs":
        await asyncio.Event().wait()
    await asyncio.sleep(0.05)
    await send({"type": "lifespan.shutdown.complete"})
    await asyncio.sleep(0.05)
    say("left its lifespan")


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(scope, receive, send)
    say("request " + scope["path"])
    if scope["path"] == "/slow":
        await file("finish")
    body = {"pid": os.getpid(), "loop": asyncio.get_running_loop() is told.get("loop"), "state": None}
    if "state" in scope:
        body["state"] = dict(scope["state"], shared=list(scope["state"].get("shared", [])))
        scope["state"]["new"] = 1
        scope["state"]["number"] = 2
        scope["state"]["shared"].append(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
    say("answered " + scope["path"])
"""

Start = Callable[..., Server]


@pytest.fixture
def start(serve: Start, tmp_path: Path) -> Start:
    """`start(does, *options, until=...)`: a server whose application does that in its lifespan."""
    write_app(tmp_path, "app", APP)

    def start(does: str, *options: str, **named: object) -> Server:
        return serve("app:app", *options, cwd=tmp_path, env={"LIFESPAN": does}, **named)

    return start


def get(server: Server, path: str = "/") -> dict[str, object]:
    with RawClient(server.port) as client:
        answer = client.request("GET", path)
    assert answer.status == 200, answer
    return json.loads(answer.body)  # type: ignore[no-any-return]


def order(server: Server, *patterns: str) -> None:
    """The first line that matches each pattern comes after the first line of the pattern before."""
    places = [next((n for n, line in enumerate(server.lines()) if re.search(p, line)), -1) for p in patterns]
    assert -1 not in places, dict(zip(patterns, places, strict=True))
    assert places == sorted(places), dict(zip(patterns, places, strict=True))


# ------------------------------------------------------------------------------------------------------------- startup


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_whole_life(start: Start, loop_name: str, mode: str) -> None:
    """L1, L4, L5: its own scope, once per worker, ready after it, in the loop of the requests, shutdown at the end."""
    server = start("", "--lifespan", mode, "--loop", loop_name, "--workers", "2", "--log-level", "debug")
    scope = json.loads(server.wait_line(r"app \d+ scope (.*)")[1])
    assert scope == {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": []}
    assert get(server)["loop"] is True
    assert server.stop() == 0
    pids = set(re.findall(r"app (\d+) scope", server.log))
    assert len(pids) == 2
    for pid in pids:
        events = [f"app {pid} event lifespan.startup", f"app {pid} startup complete",
                  f"app {pid} event lifespan.shutdown", f"app {pid} left its lifespan"]  # fmt: skip
        order(server, *events)
        assert all(server.log.count(event) == 1 for event in events)
    order(server, "startup complete", r"worker \d gen 1 ready", "generation 1 is serving")


def test_nothing_is_served_before_startup_is_complete(start: Start, tmp_path: Path, loop_name: str) -> None:
    """L1: a client that comes early waits in the backlog; the worker takes it when its application is ready."""
    server = start("wait", "--loop", loop_name, until="listening")
    server.wait_line("event lifespan.startup")
    with RawClient(server.port) as client:
        client.send(request_bytes("GET", "/early"))
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        client.sock.settimeout(DEADLINE)
        (tmp_path / "go").touch()
        assert client.read_response().status == 200
    server.wait_line("ready in")
    order(server, "startup complete", "request /early")


@pytest.mark.parametrize("does", ["raise", "assert", "return", "raise in startup", "exit in startup"])
def test_auto_serves_without(start: Start, loop_name: str, does: str) -> None:
    """L2: an application without lifespan is served, without a state; nothing of it in the log but at debug level."""
    server = start(does, "--loop", loop_name)
    assert get(server)["state"] is None
    assert server.stop() == 0
    assert "error" not in server.log
    assert "Traceback" not in server.log
    assert "event lifespan.shutdown" not in server.log


@pytest.mark.parametrize(
    ("does", "message"),
    [("raise", "raised RuntimeError in its lifespan startup"), ("raise in startup", "raised RuntimeError"),
     ("return", "returned from its lifespan without an answer, but the setting lifespan is on"),
     ("exit in startup", "raised SystemExit")],
)  # fmt: skip
def test_on_requires_it(start: Start, does: str, message: str) -> None:
    """L2, L3: with `on`, an application that does not take part is one that cannot start."""
    server = start(does, "--lifespan", "on", until=None)
    assert server.wait_exit() == ExitCode.APPLICATION
    assert re.search(f"could not boot: .*{message}", server.log)
    assert ("no lifespan here" in server.log) == (does == "raise")  # the user's traceback
    assert server.log.count(" booting, pid ") == 1


@pytest.mark.parametrize("does", ["raise", "fail", "hang"])
def test_off_does_not_call_it(start: Start, does: str) -> None:
    """L2"""
    server = start(does, "--lifespan", "off")
    assert get(server)["state"] is None
    assert server.stop() == 0
    assert "scope" not in server.log


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize(
    ("does", "message"),
    [("fail", "the database is away"), ("fail and raise", "the database is away"), ("fail silently", "no message")],
)
def test_startup_failed(start: Start, mode: str, does: str, message: str) -> None:
    """L3: its message, exit code 3, no other try; what it raises after that is no news."""
    server = start(does, "--lifespan", mode, until=None)
    assert server.wait_exit() == ExitCode.APPLICATION == 3
    assert server.log.count(f"the lifespan startup of the application failed: {message}") == 1
    assert server.log.count(" booting, pid ") == 1
    assert "Traceback" not in server.log
    assert "as Starlette does" not in server.log


def test_startup_failed_in_many_workers(start: Start) -> None:
    """L3: said once, however many workers there are to be."""
    server = start("fail", "--workers", "3", until=None)
    assert server.wait_exit() == 3
    assert server.log.count("the database is away") == 1


@pytest.mark.parametrize("does", ["hang", "block"])
def test_startup_hangs(start: Start, does: str) -> None:
    """L7: ended after boot_timeout, with the stacks that show where."""
    server = start(does, "--boot-timeout", "6", until=None)  # in which the fork server must start, too
    assert server.wait_exit() == 3
    assert "not ready within boot_timeout, 6 s" in server.log
    if does == "block":
        assert re.search(r'File ".*app\.py", line \d+ in lifespan', server.log)


def test_events_out_of_order(start: Start) -> None:
    """L1, A5: unknown, early and repeated events raise in the application; the server goes on."""
    server = start("nonsense")
    assert get(server)["loop"] is True
    assert server.stop() == 0
    refused = re.findall(r"refused (.*)", server.log)
    assert len(refused) == 3
    assert "unknown event type 'lifespan.nonsense'" in refused[0]
    assert all("sent twice or out of order" in text for text in refused[1:])


# --------------------------------------------------------------------------------------------------------------- state


def test_state(start: Start, loop_name: str) -> None:
    """L5, H12: every request has a shallow copy of what startup has left."""
    server = start("", "--loop", loop_name)
    first, second = get(server, "/a"), get(server, "/b")
    assert first["state"] == {"number": 1, "shared": []}
    assert second["state"] == {"number": 1, "shared": ["/a"]}


def test_state_is_of_one_worker(start: Start) -> None:
    """L5, L8: the next generation starts with its own."""
    server = start("")
    get(server, "/a")
    server.reload()
    assert get(server, "/b")["state"] == {"number": 1, "shared": []}


# ------------------------------------------------------------------------------------------------------------- shutdown


def busy(server: Server, path: str = "/slow") -> RawClient:
    client = RawClient(server.port)
    client.send(request_bytes("GET", path))
    server.wait_line(f"request {path}")
    return client


def test_shutdown_comes_after_the_drain_on_stop(start: Start, tmp_path: Path, loop_name: str) -> None:
    """L4: not while a request is in progress, and not while connections are accepted."""
    server = start("", "--loop", loop_name)
    port = server.port
    with busy(server) as client:
        server.signal(signal.SIGTERM)
        server.wait_line("draining")
        wait_for(lambda: refused(port), what="the listener is closed")
        assert "event lifespan.shutdown" not in server.log
        (tmp_path / "finish").touch()
        assert client.read_response().status == 200
    assert server.wait_exit() == 0
    order(server, "draining", "answered /slow", "event lifespan.shutdown", "left its lifespan", r"gone: exit 0")


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionError:
        return True
    return False


def test_shutdown_comes_after_the_drain_on_reload(start: Start, tmp_path: Path, loop_name: str) -> None:
    """L8, L4: the new worker's startup, then the old one's drain, then the old one's shutdown."""
    server = start("", "--loop", loop_name)
    old = get(server)["pid"]
    with busy(server) as client:
        server.reload()
        new = get(server, "/new")["pid"]
        assert new != old
        assert f"app {old} event lifespan.shutdown" not in server.log
        (tmp_path / "finish").touch()
        assert json.loads(client.read_response().body)["pid"] == old
    server.wait_line("worker 1 gen 1 gone: exit 0")
    order(server, f"app {new} startup complete", "worker 1 gen 1 draining", f"app {old} answered /slow",
          f"app {old} event lifespan.shutdown", f"app {old} left its lifespan", "worker 1 gen 1 gone")  # fmt: skip
    assert f"app {new} event lifespan.shutdown" not in server.log


def test_new_worker_that_cannot_start(start: Start, tmp_path: Path) -> None:
    """L3, L8: the old one keeps serving, and has no shutdown."""
    server = start("")
    old = get(server)["pid"]
    write_app(tmp_path, "app", APP.replace('os.environ.get("LIFESPAN", "")', '"fail"'))
    server.signal(signal.SIGUSR1)
    server.wait_line("generation 2 given up: .*the database is away")
    assert get(server)["pid"] == old
    assert "event lifespan.shutdown" not in server.log
    assert server.log.count(" booting, pid ") == 2


@pytest.mark.parametrize(
    ("does", "message"),
    [("shutdown fails", "the lifespan shutdown of the application failed: the cache is stuck"),
     ("shutdown raises", "the application raised RuntimeError in its lifespan")],
)  # fmt: skip
def test_shutdown_fails(start: Start, does: str, message: str) -> None:
    """L4: logged, and then the worker ends as ever."""
    server = start(does)
    assert server.stop() == 0
    assert server.log.count(message) == 1
    assert "gone: exit 0" in server.log


def test_shutdown_hangs(start: Start) -> None:
    """L4: not for longer than a stop may take."""
    server = start("shutdown hangs", "--stop-timeout", "1")
    assert server.stop() == 0
    assert "event lifespan.shutdown" in server.log
    assert re.search(r"the lifespan shutdown took longer than .* and was cancelled|is killed", server.log)


@pytest.mark.parametrize("does", ["raise later", "return later"])
def test_lifespan_that_ends_early(start: Start, does: str) -> None:
    """L4: after its startup it may go, badly or well; requests are served, the stop waits for nobody."""
    server = start(does)
    assert get(server)["state"] == {"number": 1, "shared": []}
    assert server.stop() == 0
    assert ("raised RuntimeError in its lifespan" in server.log) == (does == "raise later")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_signal_during_startup(start: Start, tmp_path: Path, number: int) -> None:
    """L6: what startup has opened is closed by a shutdown, also when the worker never serves."""
    server = start("wait", until="listening")
    server.wait_line("event lifespan.startup")
    server.signal(number)
    server.wait_line("received")
    (tmp_path / "go").touch()
    assert server.wait_exit() == 0
    order(server, "startup complete", "event lifespan.shutdown", "left its lifespan")
    assert not re.search("draining(.|\n)*ready in", server.log)


def test_ready_and_told_to_leave_at_once(start: Start, tmp_path: Path) -> None:
    """L6: an arbiter that reads of both at a time does not call ready who leaves, whichever it reads first."""
    server = start("wait", until="listening")
    server.wait_line("event lifespan.startup")
    server.signal(signal.SIGSTOP)
    (tmp_path / "go").touch()
    assert get(server)["pid"] != server.pid  # the worker serves: its arbiter has yet to hear of it
    server.signal(signal.SIGTERM)
    server.signal(signal.SIGCONT)
    assert server.wait_exit() == 0
    assert "event lifespan.shutdown" in server.log
    assert not re.search("draining(.|\n)*ready in", server.log)
