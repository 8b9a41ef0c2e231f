"""A harness for tests against real processes: the server, its log, its children, and waiting without guessing.

Nothing here sleeps for luck: every wait ends with an event or fails at its deadline with the whole log.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pytest

import apphost
from tests.rawhttp import DEADLINE, Address, RawClient, Response, connect, raw, request_bytes

__all__ = [
    "DEADLINE",
    "Address",
    "Process",
    "RawClient",
    "Response",
    "Server",
    "alive",
    "connect",
    "descendants",
    "linux",
    "moment",
    "no_more_descriptors",
    "own_tracebacks",
    "pid_namespace",
    "processes",
    "raw",
    "request_bytes",
    "wait_for",
    "write_app",
]

T = TypeVar("T")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs what only Linux has")

OWN_CODE = Path(apphost.__file__).resolve().parent
STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
# Libraries that run inside apphost's own machinery: an exception that leaves them is ours to handle.
OWN_LIBRARIES = ("h11", "httptools", "uvloop", "wsproto", "click")

_FRAME = re.compile(r'^[\s|+]*File "([^"]+)", line \d+')
_BOOTING = re.compile(r"worker (\d+) gen (\d+) booting, pid (\d+)")
_GONE = re.compile(r"worker (\d+) gen (\d+) (?:gone|could not boot)\b")
_PORT = re.compile(r"listening at https?://\S*:(\d+)")


def refused(port: int) -> bool:
    try:
        connect(port, 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # the last copy of the listener was closed in this moment
        return False
    return False


def wait_for(predicate: Callable[[], T], timeout: float = DEADLINE, what: str = "") -> T:
    """Call `predicate` every 10 ms until it returns something true, and return it; AssertionError after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        if value := predicate():
            return value
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or predicate}"
        time.sleep(0.01)


_mtimes: dict[Path, float] = {}


@contextlib.contextmanager
def no_more_descriptors(spare: int) -> Iterator[None]:
    """Let this process open only `spare` more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probes = [os.open(os.devnull, os.O_RDONLY)]
    while len(probes) <= spare:
        probes.append(os.dup(probes[0]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (probes[-1], hard))
    for fd in probes:
        os.close(fd)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_app(directory: Path | str, name: str, source: str) -> Path:
    """Write the module `name` (dots make packages of folders), in one step as a deploy should, and return its path.

    A rewritten module always gets a later mtime: Python trusts a cached .pyc by whole seconds and size, and a test that
    deploys twice in a second would run old code.
    """
    path = Path(directory).joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(source, encoding="utf-8")
    whole.replace(path)
    if path in _mtimes:
        _mtimes[path] = max(time.time(), _mtimes[path] + 2)
        os.utime(path, (_mtimes[path], _mtimes[path]))
    else:
        _mtimes[path] = path.stat().st_mtime
    return path


# ------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    group: int
    state: str  # as in ps: R, S, D, T, Z ...


def processes() -> list[Process]:
    """All processes of the machine that this user may see."""
    if not os.path.exists("/proc/self/stat"):
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True
        ).stdout
        rows = (line.split() for line in listing.splitlines())
        return [Process(int(pid), int(parent), int(group), state[0]) for pid, parent, group, state in rows]
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended in the meantime
            continue
        state, parent, group = stat.rpartition(")")[2].split()[:3]
        found.append(Process(int(name), int(parent), int(group), state))
    return found


def descendants(pid: int) -> list[int]:
    """The living processes below `pid`, nearest first; zombies do not count."""
    table = processes()
    found: list[int] = []
    parents = [pid]
    while parents:
        parents = [process.pid for process in table if process.parent in parents]
        found += parents
    dead = {process.pid for process in table if process.state == "Z"}
    return [child for child in found if child not in dead]


def alive(pid: int) -> bool:
    """Whether `pid` is a process that is not a zombie."""
    return any(process.pid == pid and process.state != "Z" for process in processes())


def pid_namespace(*extra: str) -> list[str]:
    """The `prefix` that makes a `Server` process 1 of a pid namespace; skips the test where that is not permitted.

    extra: more options of unshare.
    """
    command = ["unshare", "--pid", "--fork", "--kill-child", *extra]
    try:
        permitted = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except OSError:  # there is no unshare
        permitted = False
    if not permitted:
        pytest.skip("no permission for a pid namespace")
    return command


# ------------------------------------------------------------------------------------------------------ the server


def own_tracebacks(log: str) -> list[str]:
    """The tracebacks in `log` in which only apphost, its libraries and the standard library take part.

    One with a frame of an application or of a framework is the application's affair and may be reported by the server.
    """
    found = []
    for block in re.split(r"(?=Traceback \(most recent call last\):)", log)[1:]:
        files = [Path(match[1]) for line in block.splitlines() if (match := _FRAME.match(line))]
        own = [path for path in files if path.resolve().is_relative_to(OWN_CODE)]
        if own and all(path in own or _is_machinery(path) for path in files):
            found.append(block)
    return found


def _is_machinery(path: Path) -> bool:
    if not path.is_absolute():  # "<frozen runpy>", "uvloop/loop.pyx"
        return True
    for root in ("site-packages", "dist-packages"):
        if root in path.parts:
            return path.parts[path.parts.index(root) + 1].removesuffix(".py") in OWN_LIBRARIES
    return path.resolve().is_relative_to(STDLIB)


def moment(line: str) -> float:
    """The time of a line of the log, in seconds: what the server did when, however late a test looks."""
    return datetime.fromisoformat(" ".join(line.split()[:2])).timestamp()


class Server:
    """`python -m apphost ARGS` as a context manager: started, watched through its log, stopped, and cleaned up.

    args: the command line.
    bind: added as `--bind` unless `args` has one; None leaves it to the environment or a settings file.
    cwd: where it runs, and where the application is imported from; a fresh folder, removed at the end, by default.
    env: variables to set; a value of None removes one. APPHOST_* of the test run itself never reach the server.
    until: what `start` waits for: "serving" (default), "listening", or None for a server that is expected to fail.
    allow_errors: otherwise the test fails on an `internal error` or a traceback of apphost's own code in the log, and
    on processes that are left behind by a server that has ended.
    prefix: words of a command before the interpreter, as of `pid_namespace`; `pid` is that command's then.
    pass_fds: descriptors that it inherits, with the same numbers.
    """

    def __init__(
        self,
        *args: str,
        bind: str | None = "127.0.0.1:0",
        cwd: Path | str | None = None,
        env: Mapping[str, str | None] | None = None,
        until: str | None = "serving",
        timeout: float = DEADLINE,
        allow_errors: bool = False,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        bound = bind is None or any(re.match(r"-b|--bind(=|$)", arg) for arg in args)
        self.args = [*args] if bound else [*args, "--bind", bind]
        self._own_cwd = cwd is None
        self.cwd = Path(tempfile.mkdtemp(prefix="apphost-test-")) if cwd is None else Path(cwd)
        self.env = self._environment(env or {})
        self.until = until
        self.timeout = timeout
        self.allow_errors = allow_errors
        self.prefix = prefix
        self.pass_fds = pass_fds
        self.process: subprocess.Popen[bytes] | None = None
        self.exit_code: int | None = None  # once the test has asked for it, with `stop` or `wait_exit`
        self._lines: list[str] = []
        self._rest = b""  # of the log: a line that is not whole yet
        self._ended = False  # the log has come to its end: no process holds it open any more
        self._news = threading.Condition(threading.RLock())
        self._reader = threading.Thread(target=self._read, daemon=True)

    @staticmethod
    def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("APPHOST_")}
        for name in ("PORT", "WEB_CONCURRENCY"):  # apphost reads these, too
            env.pop(name, None)
        env["PYTHONUNBUFFERED"] = "1"  # what an application prints is part of the log, in order
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OWN_CODE.parent), env.get("PYTHONPATH", "")]))
        for name, value in changes.items():
            env.pop(name, None)
            if value is not None:
                env[name] = value
        return env

    # -- life

    def __enter__(self) -> Server:
        try:
            return self.start()
        except BaseException:
            self._clean_up()
            raise

    def start(self) -> Server:
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "apphost", *self.args],
            cwd=self.cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=self.pass_fds,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._reader.start()
        if self.until == "serving":
            self.wait_line(r"generation \d+ is serving", self.timeout)
        elif self.until == "listening":
            self.wait_line(r"listening at ", self.timeout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self._exited()
        left = self._left_behind() if ended else []
        self._clean_up()
        print(self.log)  # pytest shows it with a failed test
        if kind is None and not self.allow_errors:
            self.check_log()
            assert not left, f"the server ended and left processes {left} behind\n{self.log}"

    def stop(self, timeout: float = DEADLINE) -> int:
        """TERM; the exit code, negative for a death by signal."""
        if not self._exited():
            self.signal(signal.SIGTERM)
        return self.wait_exit(timeout)

    def wait_exit(self, timeout: float = DEADLINE) -> int:
        """Wait until the arbiter has ended by itself; its exit code, negative for a death by signal."""
        process = self._started()
        try:
            wait_for(self._exited, timeout)
        except AssertionError:
            raise AssertionError(f"still running after {timeout} s\n{self.log}") from None
        assert process.returncode is not None
        if process.returncode >= 0:
            # Its last words may not be read yet. One that was killed leaves workers, which go on.
            self._reader.join(DEADLINE)
        self.exit_code = process.returncode
        return self.exit_code

    def check_log(self) -> None:
        """Fail if the log tells of a defect of apphost itself."""
        assert "internal error" not in self.log.lower(), f"internal error in the log\n{self.log}"
        own = own_tracebacks(self.log)
        assert not own, f"apphost's own traceback in the log\n{self.log}"

    def _started(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "the server was not started"
        return self.process

    def _exited(self) -> bool:
        return self._started().poll() is not None

    def _group(self) -> list[int]:
        """The living members of the process group that this server's start created."""
        group = [process for process in processes() if process.group == self.pid]
        if self._exited() and any(process.pid == self.pid for process in group):
            return []  # the group had died out, and its number went to a stranger
        return [process.pid for process in group if process.state != "Z"]

    def _left_behind(self) -> list[int]:
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self._group(), DEADLINE)
        return self._group()

    def _clean_up(self) -> None:
        if (process := self.process) is not None:
            if self._group():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._reader.join(DEADLINE)
            # Closing it under a reader would wait for the reader.
            assert not self._reader.is_alive(), "a process outside of the server's group holds its log open"
            assert process.stdout is not None
            process.stdout.close()
        if self._own_cwd:
            shutil.rmtree(self.cwd, ignore_errors=True)

    # -- the log

    def _read(self) -> None:
        stream = self._started().stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not self._ended:
                selector.select()
                self._take()

    def _take(self) -> None:
        """Take what the pipe holds now. A test that asks for the log gets all that was written before it asked: what a
        request printed is there when its answer is.
        """
        stream = self._started().stdout
        assert stream is not None
        with self._news:
            while not self._ended:
                try:
                    piece = os.read(stream.fileno(), 65536)
                except BlockingIOError:
                    break
                *whole, self._rest = (self._rest + piece).split(b"\n")
                if not piece:
                    self._ended = True
                    whole = [self._rest] if self._rest else []
                self._lines += [line.decode("utf-8", "replace") for line in whole]
                self._news.notify_all()

    @property
    def log(self) -> str:
        """All that the server and its application have written so far, standard output and standard error together."""
        return "\n".join(self.lines())

    def lines(self, after: int = 0) -> list[str]:
        with self._news:
            if self.process is not None:
                self._take()
            return self._lines[after:]

    def mark(self) -> int:
        """A place in the log, for `after=`: only lines written from now on."""
        return len(self.lines())

    def wait_line(self, pattern: str, timeout: float = DEADLINE, after: int = 0) -> re.Match[str]:
        """The first match of `pattern` in a line of the log from `after` on, waiting up to `timeout` s for it.

        AssertionError with the whole log if it does not come in time, or can no longer come.
        """
        regex = re.compile(pattern)
        deadline = time.monotonic() + timeout
        position = after
        with self._news:
            while True:
                while position < len(self._lines):
                    if match := regex.search(self._lines[position]):
                        return match
                    position += 1
                remaining = deadline - time.monotonic()
                if self._ended or remaining <= 0:
                    break
                self._news.wait(remaining)
            why = "the log ended" if self._ended else f"not within {timeout} s"
            raise AssertionError(f"{why}: no line matches {pattern!r}\n" + "\n".join(self._lines))

    # -- what the log and the system tell

    @property
    def pid(self) -> int:
        """The arbiter's."""
        return self._started().pid

    @property
    def port(self) -> int:
        """Of the first TCP listener."""
        return int(self.wait_line(_PORT.pattern)[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def worker_pids(self) -> list[int]:
        """Of the workers that the log has seen booting and not yet gone, oldest first."""
        pids: dict[tuple[str, str], int] = {}
        for line in self.lines():
            if match := _BOOTING.search(line):
                pids[match[1], match[2]] = int(match[3])
            elif match := _GONE.search(line):
                pids.pop((match[1], match[2]), None)
        return list(pids.values())

    def children(self) -> list[int]:
        """All living processes below the arbiter: fork servers and workers."""
        return descendants(self.pid)

    # -- orders

    def signal(self, number: int) -> None:
        """Send a signal to the arbiter alone."""
        os.kill(self.pid, number)

    def reload(self, wait: bool = True, timeout: float = DEADLINE) -> int:
        """USR1. With `wait`, until the new generation serves; its number (0 without `wait`)."""
        mark = self.mark()
        self.signal(signal.SIGUSR1)
        if not wait:
            return 0
        match = self.wait_line(r"generation (\d+) (is serving|given up)", timeout, mark)
        assert match[2] == "is serving", f"the reload was given up\n{self.log}"
        return int(match[1])
