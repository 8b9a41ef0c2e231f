"""The arbiter's handles on its processes: fork servers, workers, and what a worker leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from apphost.errors import ExitCode
from apphost.forkserver import COMMAND
from apphost.messages import PROTOCOL_VERSION, Channel, Message
from apphost.prctl import SET_CHILD_SUBREAPER, prctl
from apphost.settings import Settings
from apphost.sockets import Listener
from apphost.sources import Source

LAST_WORDS_MAX = 65536  # bytes read of a worker's last words: the stacks of some hundred threads
_CRASH = "Fatal Python error: "  # how faulthandler begins when a process dies of a signal


@dataclass(slots=True)
class Failure:
    """Why a process could not do its work, in its own words."""

    message: str
    detail: str
    code: int

    @classmethod
    def told(cls, message: Message) -> Failure:
        """As a fork server or a worker has told it in `failed`."""
        code = message.get("code")
        if code is None or code == ExitCode.OK or code not in list(ExitCode):
            code = ExitCode.APPLICATION
        return cls(message["message"], message["detail"], int(code))


@dataclass(slots=True)
class ForkServer:
    generation: int
    pid: int
    channel: Channel
    dump: int  # descriptor of the file for its last words
    settings: Settings | None = None  # once it has read them, and imported what it preloads
    failure: Failure | None = None
    ignored: list[str] = field(default_factory=list)  # settings that have changed and need a restart


@dataclass(slots=True)
class WorkerProcess:
    wid: int
    generation: int
    channel: Channel
    dump: int  # descriptor of the file for its last words
    born: float
    pid: int = 0  # 0: not forked yet; as its fork server says
    parent: int = 0  # the pid of its fork server
    ready_at: float | None = None
    names: dict[str, str] = field(default_factory=dict)  # interface, parser, loop
    requests: int = 0
    errors: int = 0  # of the requests, those answered 5xx
    connections: int = 0
    active: int = 0
    beat_at: float | None = None  # when it last beat
    oldest: list[Any] | None = None  # of its requests in progress: s that it took at the last beat, and which it is
    measures: dict[str, list[int]] = field(default_factory=dict)  # where there is an admin listener
    code: dict[str, Any] = field(default_factory=dict)  # the fingerprint of what it has imported
    failure: Failure | None = None
    lost_at: float | None = None  # when its channel ended, by the arbiter's clock
    expected: bool = False  # it was told to go, or said that it goes
    successors: list[int] = field(default_factory=list)  # the workers that it can hand its connections to
    killed: bool = False
    dumped: bool = False  # its stacks were asked for while it served on: not all in its dump file are last words

    @property
    def name(self) -> str:
        return f"worker {self.wid} gen {self.generation}"

    def take_beat(self, message: Message, now: float) -> None:
        self.beat_at = now
        self.requests = int(message["requests"])
        self.errors = int(message.get("errors", 0))
        self.connections = int(message["connections"])
        self.active = int(message["active"])
        self.oldest = message.get("oldest")
        self.measures = message.get("measures", self.measures)

    def last_words(self) -> str:
        """What it wrote when it crashed, or when it was killed for being stuck."""
        text = read_last_words(self.dump)
        if not self.dumped or self.failure is not None:
            return text
        _, crash, rest = text.partition(_CRASH)
        return crash + rest

    def signal(self, number: int) -> None:
        """Send it a signal, if the process with its pid is a child of its fork server, or by now of ours.

        The pid is what the fork server says, which may be of another user and preload the application: no word of it
        makes us signal a stranger, nor does a pid that was given out again.
        """
        if os.path.exists("/proc/self/stat") and _parent(self.pid) not in (self.parent, os.getpid()):
            return
        kill(self.pid, number)


def start_fork_server(source: Source, listeners: list[Listener]) -> ForkServer:
    """Start a fresh interpreter as a fork server. It waits for its generation and `configure_fork_server`."""
    fds = [listener.fileno() for listener in listeners]
    pid, channel, dump = start_process(COMMAND, source.cwd, fds)
    return ForkServer(0, pid, channel, dump)


def configure_fork_server(
    server: ForkServer, source: Source, listeners: list[Listener], running: Settings, extra: Message
) -> None:
    """Have it read the settings anew, but for those that need a restart: they stay as they are in `running`."""
    fds = [listener.fileno() for listener in listeners]
    plain = [listener.fileno() for listener in listeners if listener.plain]
    config = {"protocol": PROTOCOL_VERSION, "generation": server.generation, "source": source.to_wire()}
    server.channel.send(
        {"t": "config", **config, "listeners": fds, "plain": plain, "running": running.to_wire(), **extra}
    )


def start_process(command: str, cwd: str, fds: list[int]) -> tuple[int, Channel, int]:
    """A fresh interpreter that runs `command` with the descriptors of its channel and of the file for its last words.

    It keeps `fds`. Returns its pid, our end of the channel, and the descriptor of that file. Raises `OSError`, and
    leaves no descriptor behind.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        dump = -1
        try:
            dump = make_dump_file()
            return spawn_python(cwd, command, [theirs.fileno(), dump], fds), Channel(ours), dump
        except OSError:  # tried again and again while the system has no processes left
            ours.close()
            if dump >= 0:
                os.close(dump)
            raise


def spawn_python(
    cwd: str, command: str, arguments: list[int], inherited: Sequence[int] = (), own_group: bool = False
) -> int:
    """Start a fresh interpreter that runs `command`; its pid. Raises `OSError`.

    arguments: descriptors that it inherits, which it is told; inherited: others. own_group: in a new process group.
    Signals are blocked until it has handlers of its own: nothing that is sent meanwhile is lost, and nothing kills it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become_python(cwd, command, arguments, inherited, own_group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # those that wait until the arbiter runs wait on
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
    import tempfile  # brings nine modules, which nobody needs who has memfd_create

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read_last_words(fd: int, start: int = 0) -> str:
    """What a worker wrote when it crashed, or when it was asked for its stacks."""
    try:
        return os.pread(fd, LAST_WORDS_MAX, start).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def forget_dump(fd: int) -> None:
    """Begin a dump file anew; its writer shares the position with us."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)


def become_subreaper() -> bool:
    """On Linux, have orphaned descendants become our children, so that a fork server's death loses no exit status."""
    return prctl(SET_CHILD_SUBREAPER, 1)


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


def _parent(pid: int) -> int:
    """The parent of a process, 0 when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
