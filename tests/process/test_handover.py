"""Connections move from old workers to new ones, in real processes: no client sees an end or a foreign answer."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.load import INTERFACES, Answer, Load, announces_close, check, site
from tests.support import DEADLINE, Address, RawClient, Server, alive, request_bytes, wait_for, write_app

FLAVOURS = [
    ("asgi", "httptools", "uvloop"),
    ("asgi", "h11", "asyncio"),
    ("wsgi", "h11", "uvloop"),
    ("wsgi", "httptools", "asyncio"),
]

each_flavour = pytest.mark.parametrize("flavour", FLAVOURS, ids="-".join)
fast_flavours = pytest.mark.parametrize("flavour", [FLAVOURS[0], FLAVOURS[3]], ids="-".join)

# A stream in 40 pieces, `delay` seconds between them; everything else goes to the site.
_STREAM = {
    "asgi": """
plain = app
async def app(scope, receive, send):
    if scope["type"] != "http" or not scope["path"].startswith("/stream/"):
        return await plain(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(40):
        await send({"type": "http.response.body", "body": b"%03d " % number * 100, "more_body": True})
        await asyncio.sleep(float(scope["path"][8:]))
    await send({"type": "http.response.body", "body": b"end"})
""",
    "wsgi": """
plain = app
def app(environ, start_response):
    if not environ["PATH_INFO"].startswith("/stream/"):
        return plain(environ, start_response)
    start_response("200 OK", [])
    return stream(float(environ["PATH_INFO"][8:]))
def stream(delay):
    for number in range(40):
        yield b"%03d " % number * 100
        time.sleep(delay)
    yield b"end"
""",
}
STREAMED = b"".join(b"%03d " % number * 100 for number in range(40)) + b"end"

# At its first offer, the first worker of this code does something to itself, with a signal.
_SABOTAGE = """
import signal
from apphost.worker.handover import Receiver
prepare = Receiver._prepare
def sabotaged(self, message, fds):
    try:
        os.close(os.open("sabotaged", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return prepare(self, message, fds)
    os.write(1, b"sabotaged %d\\n" % os.getpid())  # in one piece: print writes several, between which others write
    os.kill(os.getpid(), signal.{name})
    prepare(self, message, fds)
Receiver._prepare = sabotaged
"""


@contextlib.contextmanager
def serving(
    folder: Path, flavour: Sequence[str], *args: str, kind: str = "tcp", prefix: Sequence[str] = ()
) -> Iterator[tuple[Server, Address]]:
    """A server for the site with streams, and its address; it must stop with 0 in the end."""
    interface, parser, loop = flavour
    write_app(folder, "app", site(interface, extra=_STREAM[interface]))
    bind = ("--bind", f"unix:{folder}/s") if kind == "unix" else ("--bind", "127.0.0.1:0")
    with Server("app:app", *bind, "--http", parser, "--loop", loop, *args, cwd=folder, prefix=prefix) as server:
        yield server, f"{folder}/s" if kind == "unix" else server.port
        assert server.stop() == 0


def deploy(server: Server, flavour: Sequence[str], version: str, extra: str = "", wait: bool = True) -> None:
    write_app(server.cwd, "app", site(flavour[0], version, _STREAM[flavour[0]] + extra))
    server.reload(wait)


def ask(client: RawClient, body: bytes = b"") -> Answer:
    """A request on a connection that is to live on."""
    response = client.request("POST" if body else "GET", "/", (), body)
    assert not announces_close(response), "the server wants to end the connection"
    return check(response, body)


def only(server: Server, count: int) -> list[int]:
    """The workers, once the newest generation that was begun serves, and nothing but `count` workers are left."""

    def settled() -> list[int]:
        newest = max(int(number) for number in re.findall(r"gen (\d+) booting", server.log))
        pids = server.worker_pids()
        return pids if len(pids) == count and f"generation {newest} is serving" in server.log else []

    return wait_for(settled, what="old workers to go")


class Crowd:
    """Connections of every kind that can move: idle, not read yet, with half a head."""

    def __init__(self, address: Address, idle: int, unread: int, half: int) -> None:
        self.body = b"some body\r\n\r\n"
        self.request = request_bytes("POST", "/", (), self.body)
        self.idle = [RawClient(address) for _ in range(idle)]
        for client in self.idle:
            ask(client)
        self.unread = [RawClient(address) for _ in range(unread)]
        self.half = [RawClient(address) for _ in range(half)]
        for number, client in enumerate(self.half):
            client.send(self.request[: self._cut(number)])

    def _cut(self, number: int) -> int:
        return 1 + number % (len(self.request) - len(self.body) - 2)

    def ask(self) -> list[Answer]:
        """The answers to one request on every connection."""
        for client in (*self.idle, *self.unread):
            client.send(self.request)
        for number, client in enumerate(self.half):
            client.send(self.request[self._cut(number) :])
        answers = []
        for client in (*self.idle, *self.unread, *self.half):
            response = client.read_response("POST")
            assert not announces_close(response)
            answers.append(check(response, self.body))
        return answers

    def close(self) -> None:
        for client in (*self.idle, *self.unread, *self.half):
            client.close()


@contextlib.contextmanager
def crowd(address: Address, idle: int = 120, unread: int = 40, half: int = 40) -> Iterator[Crowd]:
    people = Crowd(address, idle, unread, half)
    try:
        yield people
    finally:
        people.close()


# ---------------------------------------------------------------------------------------------- nothing in progress


@each_flavour
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_two_hundred_silent_connections_survive_three_reloads(
    tmp_path: Path, flavour: tuple[str, str, str], kind: str
) -> None:
    args = ("--workers", "2", "--request-header-timeout", "120")
    with serving(tmp_path, flavour, *args, kind=kind) as (server, address), crowd(address) as people:
        for number in range(3):
            deploy(server, flavour, f"v{number}")
        pids = only(server, 2)
        answers = people.ask()
        assert {answer.version for answer in answers} == {"v2"}
        # Not necessarily both: one old worker may have had all of them, and it may have been the first to drain.
        assert {answer.pid for answer in answers} <= set(pids)


SOFT_1024 = ("sh", "-c", 'ulimit -S -n 1024; exec "$@"', "sh")


@contextlib.contextmanager
def descriptors(wanted: int) -> Iterator[None]:
    """So many for this process and for the servers that it starts, of which each worker wants them, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < wanted:
        pytest.skip(f"this machine allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_thousand_idle_connections_are_alive_after_a_reload(tmp_path: Path, interface: str) -> None:
    """Also where the soft limit of the server is the usual 1024, which one worker needs for its connections alone."""
    flavour = (interface, "httptools", "uvloop")
    with (
        descriptors(3000),
        serving(tmp_path, flavour, prefix=SOFT_1024) as (server, address),
        crowd(address, 1010, 20, 20) as people,
    ):
        deploy(server, flavour, "two")
        (pid,) = only(server, 1)
        assert {(answer.version, answer.pid) for answer in people.ask()} == {("two", pid)}


@each_flavour
@pytest.mark.parametrize("workers", [1, 2])
def test_a_connection_that_is_silent_over_a_reload_is_answered(
    tmp_path: Path, flavour: tuple[str, str, str], workers: int
) -> None:
    """The one that no server in Python could: connect, reload, say nothing for 200 ms, then ask."""
    with serving(tmp_path, flavour, "--workers", str(workers)) as (server, address), RawClient(address) as client:
        with RawClient(address) as used:
            assert ask(used).version == "one"
            deploy(server, flavour, "two")
            time.sleep(0.2)  # the silence is what is tested
            assert ask(client, b"late").version == "two"
            assert ask(used, b"later").version == "two"
        only(server, workers)


@fast_flavours
def test_scaling_down_moves_connections(tmp_path: Path, flavour: tuple[str, str, str]) -> None:
    with serving(tmp_path, flavour, "--workers", "3") as (server, address), crowd(address, 60, 10, 10) as people:
        before = server.worker_pids()
        for left in (2, 1):
            server.signal(signal.SIGTTOU)
            only(server, left)
        answers = people.ask()
        assert {answer.pid for answer in answers} == set(server.worker_pids()) < set(before)


# ----------------------------------------------------------------------------------------------- requests in progress


@each_flavour
@pytest.mark.parametrize("workers", [1, 2])
def test_a_request_in_progress_ends_where_it_is_and_then_its_connection_moves(
    tmp_path: Path, flavour: tuple[str, str, str], workers: int
) -> None:
    with serving(tmp_path, flavour, "--workers", str(workers)) as (server, address), RawClient(address) as client:
        old = ask(client)
        client.send(request_bytes("GET", "/wait/go"))
        server.wait_line("/wait/go in progress")
        deploy(server, flavour, "two")
        (tmp_path / "go").touch()
        response = client.read_response()
        assert not announces_close(response)
        assert check(response) == old
        new = ask(client, b"next")
        assert new.version == "two"
        assert new.pid in only(server, workers)
        wait_for(lambda: not alive(old.pid))


@each_flavour
def test_a_slow_upload_and_a_long_stream_go_on_over_a_reload(tmp_path: Path, flavour: tuple[str, str, str]) -> None:
    body = bytes(range(256)) * 400
    with (
        serving(tmp_path, flavour, "--workers", "2") as (server, address),
        RawClient(address) as upload,
        RawClient(address) as stream,
    ):
        data = request_bytes("POST", "/", (), body)
        upload.send(data[:2000])
        stream.send(request_bytes("GET", "/stream/0.1"))
        head = stream.read_head()
        deploy(server, flavour, "two")
        for start in range(2000, len(data), 20_000):
            upload.send(data[start : start + 20_000])
            time.sleep(0.05)
        response = upload.read_response("POST")
        assert not announces_close(response)
        assert check(response, body).version == "one"
        assert b"".join(stream.read_body(head)) == STREAMED
        assert not announces_close(head)
        assert {ask(upload).version, ask(stream).version} == {"two"}
        only(server, 2)


@fast_flavours
@pytest.mark.parametrize("ready", [False, True], ids=["then asks", "has asked"])
def test_a_stream_that_outlives_three_generations_ends_at_the_newest(
    tmp_path: Path, flavour: tuple[str, str, str], ready: bool
) -> None:
    """Its worker learns of every successor, and does not begin what its client has `ready` at the end of the stream."""
    with serving(tmp_path, flavour, "--workers", "2") as (server, address), RawClient(address, 30.0) as stream:
        stream.send(request_bytes("GET", "/stream/0.1"))
        head = stream.read_head()
        for version in ("two", "three", "four"):
            deploy(server, flavour, version)
        if ready:
            stream.send(request_bytes("GET", "/"))
        assert b"".join(stream.read_body(head)) == STREAMED
        assert not announces_close(head)
        response = stream.read_response("GET") if ready else stream.request("GET", "/", (), b"")
        assert not announces_close(response)
        assert check(response, b"").version == "four"
        only(server, 2)


@fast_flavours
def test_pipelined_bursts_are_answered_in_order_over_reloads(tmp_path: Path, flavour: tuple[str, str, str]) -> None:
    stop = threading.Event()
    troubles: list[str] = []
    versions: set[str] = set()

    def burst(address: Address) -> None:
        with RawClient(address) as client:
            number = 0
            while not stop.is_set():
                bodies = [b"%d-%d" % (number, index) for index in range(20)]
                client.send(b"".join(request_bytes("POST", "/", (), body) for body in bodies))
                for body in bodies:
                    response = client.read_response("POST")
                    assert not announces_close(response)
                    versions.add(check(response, body).version)
                number += 1
                stop.wait(0.005)

    def guarded(address: Address) -> None:
        try:
            burst(address)
        except (OSError, AssertionError) as exc:
            troubles.append(repr(exc))

    with serving(tmp_path, flavour, "--workers", "2") as (server, address):
        threads = [threading.Thread(target=guarded, args=(address,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in range(3):
                deploy(server, flavour, f"v{number}")
            only(server, 2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert troubles == []
    assert versions >= {"one", "v0", "v1"}


# ------------------------------------------------------------------------------------------------- often, and again


@fast_flavours
def test_recycled_workers_hand_their_clients_on(tmp_path: Path, flavour: tuple[str, str, str]) -> None:
    with serving(tmp_path, flavour, "--workers", "2", "--max-requests", "50") as (_, address):
        with Load(address, clients=6) as load:
            load.wait(1000, timeout=60)
        report = load.report
        assert report.lost == []
        assert (report.announced, report.connections) == (0, 6)
        assert len(report.pids) > 4


@fast_flavours
@pytest.mark.parametrize("workers", [1, 2])
def test_a_storm_of_reloads_ends_no_connection(tmp_path: Path, flavour: tuple[str, str, str], workers: int) -> None:
    with serving(tmp_path, flavour, "--workers", str(workers), "--request-header-timeout", "120") as (server, address):
        with Load(address, clients=6) as load, crowd(address, 30, 10, 0) as people:
            for number in range(25):
                write_app(server.cwd, "app", site(flavour[0], f"v{number}"))
                server.signal(signal.SIGUSR1)
                load.wait(100)
            wait_for(lambda: "v24" in load.report.versions)
            only(server, workers)
            assert {answer.version for answer in people.ask()} == {"v24"}
        report = load.report
        assert report.lost == []
        assert (report.announced, report.connections) == (0, 6)


# ------------------------------------------------------------------------------------------- successors that fail


@fast_flavours
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_what_a_successor_does_not_live_to_take_is_served_on(
    tmp_path: Path, flavour: tuple[str, str, str], name: str
) -> None:
    """It ends, or stops for good, at the first offer: nothing was committed, so nothing may be lost."""
    with (
        serving(tmp_path, flavour, "--workers", "2", "--timeout", "8") as (server, address),
        crowd(address, 30, 10, 0) as people,
        RawClient(address, 30.0) as client,
    ):
        ask(client)
        deploy(server, flavour, "two", _SABOTAGE.format(name=name), wait=False)
        pid = int(server.wait_line(r"sabotaged (\d+)")[1])
        for other in (*people.idle, *people.unread, client):
            other.send(people.request)
        for other in (*people.idle, *people.unread, client):
            other.sock.settimeout(DEADLINE)
            check(other.read_response("POST"), people.body)
        wait_for(lambda: not alive(pid))
        server.wait_line("generation 2 is serving")


@fast_flavours
def test_successors_that_are_killed_at_any_moment_lose_nothing_but_what_they_had(
    tmp_path: Path, flavour: tuple[str, str, str]
) -> None:
    """Each connection is answered, rightly, or has ended; none hangs, and what stayed with the old worker lives."""
    dice = random.Random(7)
    with serving(tmp_path, flavour, "--workers", "1") as (server, address):
        for number in range(4):
            people = Crowd(address, 40, 10, 10)
            mark = server.mark()
            deploy(server, flavour, f"v{number}", wait=False)
            generation = int(server.wait_line(r"worker \d+ gen (\d+) booting", after=mark)[1])
            pid = int(server.wait_line(rf"gen {generation} booting, pid (\d+)", after=mark)[1])
            server.wait_line(rf"gen {generation} ready", after=mark)
            time.sleep(dice.random() * 0.02)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(AssertionError, OSError):
                people.ask()
            answered = _ask_each(people)
            assert answered <= 60
            people.close()
            server.wait_line(rf"gen {generation} gone", after=mark)
            wait_for(lambda: _serves(address, f"v{number}"))  # noqa: B023


def _ask_each(people: Crowd) -> int:
    """How many of the idle connections are answered; the others must be at their end."""
    answered = 0
    for client in people.idle:
        try:
            client.send(people.request)
            check(client.read_response("POST"), people.body)
            answered += 1
        except (AssertionError, OSError) as exc:
            if "nothing came within" in str(exc):
                raise
    return answered


def _serves(address: Address, version: str) -> bool:
    with contextlib.suppress(OSError, AssertionError), RawClient(address) as client:
        return ask(client).version == version
    return False
