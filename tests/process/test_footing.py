"""Signals that come before the arbiter can take them up, and starters that leave things in disorder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from apphost.errors import ExitCode
from tests.support import OWN_CODE, RawClient, Server, descendants, linux, pid_namespace, wait_for, write_app

HELLO = """
import os, sys

def app(environ, start_response):
    print("a word", flush=True)
    print("an error", file=sys.stderr, flush=True)
    start_response("200 OK", [])
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
    return [" ".join(names).encode()]
"""

# What the name server is asked with does not return for a signal.
STUCK_LOOK_UP = """
import ctypes, socket

def getaddrinfo(host, *args, flags=0, **more):
    if flags & socket.AI_NUMERICHOST:
        raise socket.gaierror("no number")
    open("reached", "w").close()
    lock = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)

socket.getaddrinfo = getaddrinfo
"""

# Waits where a start does: `reached` tells that it is there, `go` lets it go on.
WAIT = """
def wait():
    import os, time
    open("reached", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
"""
SLOW_LOOK_UP = """
import socket
real = socket.getaddrinfo

def getaddrinfo(*args, **more):
    wait()
    return real(*args, **more)

socket.getaddrinfo = getaddrinfo
"""
# The first that is imported of ours after what prepares for signals, by the child as well.
SLOW_IMPORT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "apphost.errors":
            wait()
        return super().find_spec(name, path, target)

if "-m" in sys.orig_argv:
    sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@contextlib.contextmanager
def starting(tmp_path: Path, customize: str, *args: str, prefix: Sequence[str] = ()) -> Iterator[Server]:
    """A server that has reached the place where this has it wait."""
    write_app(tmp_path, "hello", HELLO)
    write_app(tmp_path / "site", "sitecustomize", WAIT + customize)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(OWN_CODE.parent)])}
    options = ("--bind", "localhost:0", "--pidfile", str(tmp_path / "pid"), *args)
    with Server("hello:app", *options, cwd=tmp_path, env=env, until=None, prefix=prefix) as server:
        wait_for((tmp_path / "reached").exists, what="the start to get there")
        yield server


# ------------------------------------------------------------------------------------------------- early signals


@pytest.mark.parametrize("where", [SLOW_LOOK_UP, SLOW_IMPORT], ids=["look-up", "import"])
def test_early_orders_wait_until_they_can_be_obeyed(tmp_path: Path, where: str) -> None:
    with starting(tmp_path, where) as server:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN):
            os.killpg(server.pid, number)  # the child that reads the command line gets it as well
        (tmp_path / "go").touch()
        server.wait_line("SIGUSR1 received")
        server.wait_line("SIGHUP received")
        server.wait_line("generation [0-9]+ is serving hello:app with 2 workers")
        server.wait_line("upgraded: apphost")
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130), (signal.SIGQUIT, -signal.SIGQUIT)]
)
@pytest.mark.parametrize("where", [STUCK_LOOK_UP, SLOW_IMPORT], ids=["look-up", "import"])
def test_early_ends(tmp_path: Path, where: str, number: int, code: int) -> None:
    """It leaves no pidfile and says nothing."""
    if where == STUCK_LOOK_UP and not sys.platform.startswith("linux"):
        pytest.skip("the lock that hangs is that of Linux")
    with starting(tmp_path, where) as server:
        os.killpg(server.pid, number)
        assert server.wait_exit() == code
    assert not (tmp_path / "pid").exists()
    assert server.log == ""


@linux
def test_an_early_end_of_pid_1(tmp_path: Path) -> None:
    """The kernel spares it what it does not handle. Its exit code is what the command of the namespace exits with."""
    with starting(tmp_path, STUCK_LOOK_UP, prefix=pid_namespace()) as server:
        (child,) = descendants(server.pid)
        os.kill(child, signal.SIGTERM)
        assert server.wait_exit() == 128 + signal.SIGTERM
    assert not (tmp_path / "pid").exists()


def test_signals_while_it_exits(tmp_path: Path) -> None:
    """The exit code is decided; and Python gives back their default, which kills, to those that have a handler then."""
    tell = "open('left', 'w').write(' '.join(n.name for n in signal.Signals if callable(signal.getsignal(n))))"
    customize = f"import atexit, signal, sys\nif '-m' in sys.orig_argv:\n    atexit.register(lambda: {tell})\n"
    write_app(tmp_path, "hello", HELLO)
    write_app(tmp_path / "site", "sitecustomize", customize)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(OWN_CODE.parent)])}
    with Server("hello:app", cwd=tmp_path, env=env) as server:
        assert server.stop() == 0
    assert (tmp_path / "left").read_text() == "SIGCHLD", "whose default does nothing"


# ------------------------------------------------------------------------------------------- what a starter has left


def shell(script: str) -> tuple[str, ...]:
    """Words before a command to run it so in a shell."""
    return ("sh", "-c", script, "sh")


@linux
@pytest.mark.parametrize(("closed", "fds"), [("<&-", [0]), (">&-", [1]), ("2>&-", [2]), ("<&- >&- 2>&-", [0, 1, 2])])
def test_standard_descriptors_that_are_closed(tmp_path: Path, closed: str, fds: list[int]) -> None:
    """What an application prints gets into none of ours; a worker of uvloop ends as any other."""
    write_app(tmp_path, "hello", HELLO)
    log = tmp_path / "log"
    options = ("--error-log", str(log), "--bind", f"unix:{tmp_path}/http")
    prefix = shell(f'exec "$@" {closed}')
    with Server("hello:app", *options, cwd=tmp_path, until=None, prefix=prefix) as server:
        wait_for(lambda: log.exists() and "is serving" in log.read_text(), what="it to serve")
        for _ in range(3):
            with RawClient(f"{tmp_path}/http") as client:
                names = client.request("GET", "/").body.decode().split()
        assert [names[fd] for fd in fds] == [os.devnull] * len(fds)
        assert server.stop() == 0
    text = log.read_text()
    assert "gone: exit 0" in text
    assert "error" not in text.lower()
    assert "Traceback" not in server.log


@linux
def test_a_command_without_standard_output(tmp_path: Path) -> None:
    with Server("config", cwd=tmp_path, until=None, bind=None, prefix=shell('exec "$@" >&- 2>&-')) as server:
        assert server.wait_exit() == 0


def test_ends_of_children_that_the_starter_ignores(tmp_path: Path) -> None:
    write_app(tmp_path, "hello", HELLO)
    with Server("hello:app", cwd=tmp_path, prefix=ignoring(signal.SIGCHLD)) as server:
        server.reload()
        assert server.stop() == 0
    with Server("check", "hello:app", cwd=tmp_path, until=None, prefix=ignoring(signal.SIGCHLD)) as server:
        assert server.wait_exit() == 0


@pytest.mark.parametrize("how", ["ignored", "blocked"])
def test_signals_that_the_starter_has_turned_off(tmp_path: Path, how: str) -> None:
    """They work, and also before the arbiter takes them up."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    prefix = ignoring(*numbers) if how == "ignored" else blocking(*numbers)
    with starting(tmp_path, SLOW_LOOK_UP, prefix=prefix) as server:
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == -signal.SIGTERM
    (tmp_path / "reached").unlink()
    with starting(tmp_path, SLOW_LOOK_UP, prefix=prefix) as server:
        (tmp_path / "go").touch()
        server.wait_line("generation 1 is serving")
        server.signal(signal.SIGHUP)
        server.wait_line("generation 2 is serving")
        assert server.stop() == 0


def ignoring(*numbers: int) -> tuple[str, ...]:
    return python(*(f"signal.signal({number}, signal.SIG_IGN)" for number in map(int, numbers)))


def blocking(*numbers: int) -> tuple[str, ...]:
    return python(f"signal.pthread_sigmask(signal.SIG_BLOCK, {list(map(int, numbers))})")


def python(*statements: str) -> tuple[str, ...]:
    """Words before a command, to do this first."""
    code = "; ".join(["import os, resource, signal, sys", *statements, "os.execv(sys.argv[1], sys.argv[1:])"])
    return sys.executable, "-c", code


@pytest.mark.parametrize("limit", [5, 8, 12])
def test_too_few_files(tmp_path: Path, limit: int) -> None:
    """A paragraph and no traceback (the harness looks); with a few more it is the first worker that cannot start."""
    write_app(tmp_path, "hello", HELLO)
    prefix = python(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))")
    with Server("hello:app", cwd=tmp_path, until=None, prefix=prefix) as server:
        code = server.wait_exit()
    assert "Traceback" not in server.log
    if limit < 10:
        assert code == ExitCode.PRIVILEGES
        told = f"apphost: error: this process may open only {limit} files, and needs more: raise the limit with "
        assert server.lines()[-1].startswith(told)
    else:
        assert code != 0
        assert "Too many open files" in server.log
