"""The arbiter's handles on its processes: fork servers, workers, and what a worker leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from apphost.errors import ExitCode
from apphost.forkserver import COMMAND
from apphost.messages import PROTOCOL_VERSION, Channel, Message
from apphost.settings import Settings
from apphost.sources import Source

LAST_WORDS_MAX = 65536  # bytes read of a worker's last words: the stacks of some hundred threads
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(slots=True)
class Failure:
    """Why a process could not do its work, in its own words."""

    message: str
    detail: str
    code: int

    @classmethod
    def told(cls, message: Message) -> Failure:
        """As a fork server or a worker has told it in `failed`."""
        return cls(str(message["message"]), str(message["detail"]), int(message.get("code", ExitCode.APPLICATION)))


@dataclass(slots=True)
class ForkServer:
    generation: int
    pid: int
    channel: Channel
    dump: int  # descriptor of the file for its last words
    settings: Settings | None = None  # once it has read them, and imported what it preloads
    failure: Failure | None = None


@dataclass(slots=True)
class WorkerProcess:
    wid: int
    generation: int
    channel: Channel
    dump: int  # descriptor of the file for its last words
    born: float
    pid: int = 0  # 0: not forked yet
    ready_at: float | None = None
    names: dict[str, str] = field(default_factory=dict)  # interface, parser, loop
    requests: int = 0
    errors: int = 0  # of the requests, those answered 5xx
    connections: int = 0
    active: int = 0
    failure: Failure | None = None
    lost_at: float | None = None  # when its channel ended
    expected: bool = False  # it was told to go, or said that it goes
    killed: bool = False

    @property
    def name(self) -> str:
        return f"worker {self.wid} gen {self.generation}"


def start_fork_server(generation: int, source: Source, listeners: list[socket.socket]) -> ForkServer:
    """Start a fresh interpreter as the fork server of `generation` and send it its configuration."""
    ours, theirs = socket.socketpair()
    dump = make_dump_file()
    fds = [listener.fileno() for listener in listeners]
    pid = spawn_python(source.cwd, COMMAND, [theirs.fileno(), dump], fds)
    theirs.close()
    channel = Channel(ours)
    config = {"protocol": PROTOCOL_VERSION, "generation": generation, "source": source.to_wire(), "listeners": fds}
    channel.send({"t": "config", **config})
    return ForkServer(generation, pid, channel, dump)


def spawn_python(
    cwd: str, command: str, arguments: list[int], inherited: Sequence[int] = (), own_group: bool = False
) -> int:
    """Start a fresh interpreter that runs `command`; its pid. Raises `OSError`.

    arguments: descriptors that it inherits, which it is told; inherited: others. own_group: in a new process group.
    Signals are blocked until it has handlers of its own: nothing that is sent meanwhile is lost, and nothing kills it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become_python(cwd, command, arguments, inherited, own_group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return pid


def _become_python(cwd: str, command: str, arguments: list[int], inherited: Sequence[int], own_group: bool) -> None:
    """In the child: replace this program. By the names that the user gave, so switched symlinks lead to new code."""
    try:
        try:
            os.chdir(cwd)
        except OSError:
            pass  # the new program finds the words for it
        if own_group:
            os.setpgid(0, 0)
        for fd in (*arguments, *inherited):
            os.set_inheritable(fd, True)
        os.execv(sys.executable, [sys.executable, "-c", command, *map(str, arguments)])  # noqa: S606
    except BaseException as exc:
        os.write(2, f"apphost: cannot start {sys.executable}: {exc}\n".encode())
    finally:
        os._exit(127)


def make_dump_file() -> int:
    """A descriptor of an unnamed file, which outlives the worker that writes to it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("apphost-last-words")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read_last_words(fd: int) -> str:
    """What a worker wrote when it crashed, or when it was asked for its stacks."""
    try:
        return os.pread(fd, LAST_WORDS_MAX, 0).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def become_subreaper() -> bool:
    """On Linux, have orphaned descendants become our children, so that a fork server's death loses no exit status."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def reap() -> list[tuple[int, int]]:
    """(pid, exit code or minus signal) of every child that has ended, strangers included."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, os.waitstatus_to_exitcode(status)))


def kill(pid: int, number: int) -> None:
    """Send a signal to one of ours; it may be gone already."""
    if pid > 0:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
