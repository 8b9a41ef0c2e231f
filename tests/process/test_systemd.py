"""systemd without systemd: a stand-in for its notify socket, and for what it passes to a service (requirement 4)."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from tests.load import Load, ask, serving, site
from tests.rawhttp import RawClient
from tests.support import DEADLINE, Server, linux, wait_for, write_app

pytestmark = linux

ENVIRON = """
import os

async def app(scope, receive, send):
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
    text = ",".join(name for name in names if name in os.environ).encode() or b"none"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text})
"""
NO_LIFESPAN = ("--lifespan", "off")


class Manager:
    """The manager's end of the protocol: every datagram, in order, with the pid of its sender and the time it came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self.pids: set[int] = set()
        self._marks = itertools.count()
        self._news = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Manager:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", str(self.path))
        self._thread.join(DEADLINE)
        self._socket.close()

    def _read(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
            if not data:
                return
            with self._news:
                self.said.append(data.decode())
                self.pids |= {struct.unpack("iii", payload)[0] for _, _, payload in ancillary}
                self._news.notify_all()

    def wait(self, pattern: str, after: int = 0, timeout: float = DEADLINE) -> int:
        """The place behind the first datagram from `after` on in which `pattern` is found."""
        deadline = time.monotonic() + timeout
        at = after
        with self._news:
            while True:
                while at < len(self.said):
                    at += 1
                    if re.search(pattern, self.said[at - 1], re.MULTILINE):
                        return at
                left = deadline - time.monotonic()
                assert left > 0, f"nothing matches {pattern!r} after {after} in {self.said}"
                self._news.wait(left)

    def mark(self) -> int:
        """A place behind all that was sent to it before this call."""
        text = f"mark {next(self._marks)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(text.encode(), str(self.path))
        return self.wait(f"^{text}$")

    def told(self, after: int = 0) -> list[str]:
        """The states that it was told, without status lines and beats."""
        lines = [line for text in self.said[after:] for line in text.split("\n")]
        return [line for line in lines if re.match(r"(READY|RELOADING|STOPPING)=", line)]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path / "notify") as standin:
        yield standin


# --------------------------------------------------------------------------------------------------- being a service


def test_the_life_of_a_service(tmp_path: Path, manager: Manager) -> None:
    """READY, a reload, one that is given up, an upgrade, a stop: what `Type=notify-reload` waits for."""
    env = {"NOTIFY_SOCKET": str(manager.path)}
    with serving(tmp_path, "asgi", "--workers", "2", "--boot-timeout", "50", env=env) as server:
        manager.wait("^STATUS=starting app:app, 0 of 2 workers ready")
        manager.wait("^EXTEND_TIMEOUT_USEC=55000000$")
        ready = manager.wait("^READY=1$")
        manager.wait("^STATUS=serving app:app, 2 of 2 workers ready, generation 1$")

        before = time.monotonic_ns() // 1000
        write_app(tmp_path, "app", site("asgi", "two"))
        server.signal(signal.SIGUSR1)
        reloading = manager.wait("^RELOADING=1$", ready)
        stamp = re.search(r"^MONOTONIC_USEC=(\d+)$", manager.said[reloading - 1], re.MULTILINE)
        assert stamp
        assert before <= int(stamp[1]) <= time.monotonic_ns() // 1000
        again = manager.wait("^READY=1$", reloading)
        assert re.search("^STATUS=serving app:app, 2 of 2 workers ready, generation 2$", manager.said[again - 1], re.M)
        assert ask(server.port).version == "two", "READY is said when the new code serves"

        write_app(tmp_path, "app", "1/0\n")
        server.signal(signal.SIGHUP)
        given_up = manager.wait("^READY=1$", manager.wait("^RELOADING=1$", again))
        assert "generation 3 given up: the application 'app:app' raised ZeroDivisionError" in manager.said[given_up - 1]

        write_app(tmp_path, "app", site("asgi", "four"))
        server.signal(signal.SIGUSR2)
        upgraded = manager.wait(rf"^MAINPID={server.pid}\nRELOADING=1$", given_up)
        back = manager.wait("^READY=1$", upgraded)
        assert ask(server.port).version == "four"
        assert server.reload() == 5, "and on it goes"
        done = manager.wait("^READY=1$", manager.wait("^RELOADING=1$", back))

        assert server.stop() == 0
        manager.wait("^STOPPING=1\nEXTEND_TIMEOUT_USEC=14000000\nSTATUS=stopping app:app$", done)
        assert manager.told() == ["READY=1", *["RELOADING=1", "READY=1"] * 4, "STOPPING=1"]
        assert manager.pids == {server.pid}, "NotifyAccess=main lets nobody else speak"


def test_a_start_that_fails_is_never_ready(tmp_path: Path, manager: Manager) -> None:
    write_app(tmp_path, "app", "1/0\n")
    with Server("app:app", cwd=tmp_path, env={"NOTIFY_SOCKET": str(manager.path)}, until=None) as server:
        assert server.wait_exit() == 3
        manager.wait("^STOPPING=1$")
        assert manager.told() == ["STOPPING=1"]


def test_the_watchdog_watches_the_arbiter(tmp_path: Path, manager: Manager) -> None:
    """It hears of an arbiter whose loop turns, and not of one that has stopped."""
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "200000"}
    with serving(tmp_path, "asgi", env=env) as server:
        at = 0
        for _ in range(5):
            at = manager.wait("^WATCHDOG=1$", at)
        server.signal(signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        quiet = manager.mark()
        with pytest.raises(AssertionError, match="nothing matches"):
            manager.wait("^WATCHDOG=1$", quiet, timeout=0.6)
        server.signal(signal.SIGCONT)
        manager.wait("^WATCHDOG=1$", quiet)
        assert server.stop() == 0


@pytest.mark.parametrize("where", ["nobody/there", "full"])
def test_a_manager_that_does_not_listen(tmp_path: Path, where: str) -> None:
    """It costs nothing but a line at level debug, and never blocks."""
    path = tmp_path / where
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        if where == "full":
            deaf.bind(str(path))
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
                other.setblocking(False)
                while True:
                    other.sendto(b"x", str(path))
        env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "100000"}
        with serving(tmp_path, "asgi", "--log-level", "debug", env=env) as server:
            assert server.reload() == 2
            assert server.stop() == 0
            assert ("debug the service manager cannot be told" in server.log) == (where != "full")


def test_the_variables_reach_no_application(tmp_path: Path, manager: Manager) -> None:
    """A program that the application starts must not speak for the service; also after an upgrade and a reload."""
    write_app(tmp_path, "env_app", ENVIRON)
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "9000000", "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    with Server("env_app:app", *NO_LIFESPAN, cwd=tmp_path, env=env) as server, RawClient(server.port) as client:
        assert client.request("GET", "/").body == b"none"
        ready = manager.wait("^READY=1$")
        server.signal(signal.SIGUSR2)
        manager.wait("^READY=1$", ready)
        assert client.request("GET", "/").body == b"none"


def test_a_check_says_nothing(tmp_path: Path, manager: Manager) -> None:
    """`ExecStartPre=apphost check ...` is not the service."""
    write_app(tmp_path, "env_app", ENVIRON)
    env = {"NOTIFY_SOCKET": str(manager.path)}
    with Server("check", "env_app:app", bind=None, cwd=tmp_path, env=env, until=None) as server:
        assert server.wait_exit() == 0
    assert manager.said == []


# ------------------------------------------------------------------------------------------------- sockets passed on

# What systemd does: the sockets become descriptors 3 and up, and LISTEN_PID the process that the service will be.
ACTIVATE = """
import os, sys
names, fds, *command = sys.argv[1:]
for number, fd in enumerate(map(int, fds.split(","))):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(number + 1))
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execvp(command[0], command)
"""


class Activated(Server):
    """A server with sockets that were opened by this process, which keeps them, as a service manager does."""

    def __init__(self, listeners: list[socket.socket], names: str, *args: str, cwd: Path, **more: object) -> None:
        # High numbers: the ones that they get in the service must not be in use before.
        self._fds = [os.dup2(sock.fileno(), 100 + number) for number, sock in enumerate(listeners)]
        fds = ",".join(map(str, self._fds))
        prefix = (sys.executable, "-c", ACTIVATE, names, fds)
        super().__init__(*args, cwd=cwd, bind=None, prefix=prefix, pass_fds=self._fds, **more)  # type: ignore[arg-type]

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[arg-type]
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]


def port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def test_all_sockets_that_are_passed(tmp_path: Path, listeners: list[socket.socket]) -> None:
    """Without a word about `bind`. They survive reloads, an upgrade and the end; a client that came early is served."""
    path = tmp_path / "passed.sock"
    with socket.socket(socket.AF_UNIX) as unix, RawClient(port(listeners[0])) as early:
        unix.bind(str(path))
        unix.listen()
        early.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        write_app(tmp_path, "app", site("asgi"))
        with Activated([*listeners, unix], "", "app:app", cwd=tmp_path) as server:
            assert len(re.findall("info listening at ", server.log)) == 4
            assert "127.0.0.1:8000" not in server.log
            assert early.read_response().status == 200
            with Load(port(listeners[1]), clients=2, pause=0.01) as load:
                load.wait(10)
                assert server.reload() == 2
                mark = server.mark()
                server.signal(signal.SIGUSR2)
                server.wait_line("generation 3 is serving", after=mark)
                load.wait(10)
            assert load.report.lost == []
            for address in (*map(port, listeners), str(path)):
                assert ask(address).version == "one"
            assert "needs a restart" not in server.log
            assert "settings that need a restart have changed" not in server.log
            assert server.stop() == 0
        assert path.is_socket(), "it was not made by us"
        with socket.create_connection(listeners[0].getsockname(), timeout=5):
            pass  # the manager's own copy listens on


def test_sockets_by_name(tmp_path: Path, listeners: list[socket.socket]) -> None:
    """Two of one name, one of another that nobody wants, beside an ordinary address."""
    write_app(tmp_path, "app", site("asgi"))
    args = ("--bind", "systemd:web", "--bind", "127.0.0.1:0")
    with Activated(listeners, "web:other:web", "app:app", *args, cwd=tmp_path) as server:
        web, other, more_web = listeners
        server.wait_line(r"warning the service manager has passed a socket called other \(descriptor 4\) that no bind")
        assert ask(port(web)).version == ask(port(more_web)).version == "one"
        assert len(re.findall("info listening at ", server.log)) == 3
        for pid in [server.pid, *server.children()]:
            inodes = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            assert f"socket:[{os.fstat(other.fileno()).st_ino}]" not in inodes


def test_a_name_that_was_not_passed(tmp_path: Path, listeners: list[socket.socket]) -> None:
    write_app(tmp_path, "app", site("asgi"))
    with Activated(listeners[:1], "web", "app:app", "-b", "systemd:wbe", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 4
        assert "cannot listen at systemd:wbe: the service manager has passed no socket of that name" in server.log
        assert "those that are left are called web" in server.log


def test_with_the_tool_of_systemd(tmp_path: Path) -> None:
    """systemd-socket-activate opens the sockets, waits for a client, and starts the service."""
    tool = shutil.which("systemd-socket-activate")
    if tool is None:
        pytest.skip("systemd is not installed")
    path = tmp_path / "web.sock"
    write_app(tmp_path, "app", site("asgi"))
    prefix = (tool, "-l", str(path), "--fdname=web")
    options = {"bind": "systemd:web", "cwd": tmp_path, "prefix": prefix, "until": None}
    with Server("app:app", **options) as server:  # type: ignore[arg-type]
        wait_for(path.exists, what="the socket of systemd-socket-activate")
        assert ask(str(path)).version == "one"
        server.wait_line("generation 1 is serving")
        assert "info listening at unix:" in server.log
        assert server.stop() == 0
    assert path.is_socket()
