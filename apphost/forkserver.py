"""The fork server: one for each generation of workers, between the arbiter and its workers.

The arbiter starts it as a fresh interpreter, so it sees the code, the environment and the settings file as they are at
that moment, however long the arbiter has been running. It reads the settings (the arbiter's throw-away process for a
broken file), prepares what all workers share, and forks a worker whenever the arbiter asks for one. It runs no
application code itself, unless `preload` has it import the application.

Messages from the arbiter: `config` (once, first), `spawn` with two descriptors, `stop_listening`. To the arbiter:
`settings` or `failed`, then `forked` and `exited`. When the arbiter is gone, workers notice by themselves; this
one waits for them, kills those that do not end in time, and goes.
"""

from __future__ import annotations

import faulthandler
import gc
import grp
import os
import pwd
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from apphost.bytecode import distrust_stale_bytecode
from apphost.errors import ApphostError, ExitCode, PrivilegesError, SettingsError
from apphost.messages import DUMP_SIGNAL, PROTOCOL_VERSION, Channel, Message
from apphost.settings import Settings
from apphost.sources import Source

if TYPE_CHECKING:
    from apphost.worker.main import Assignment

# The interpreter is started with this. The directory it is started in must not shadow a module before apphost itself is
# imported, but it may be where apphost is imported from, in a checkout: so it goes to the end of the path.
COMMAND = (
    "import sys; sys.path.append(sys.path.pop(0)); from apphost.forkserver import main; main(*map(int, sys.argv[1:]))"
)

# s after the time for a drain: a worker may need some for the end of its lifespan (`SHUTDOWN_MIN`), and a busy machine.
ORPHAN_GRACE = 2.0

_FOR_THE_ARBITER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT,
                    signal.SIGTTIN, signal.SIGTTOU)  # fmt: skip


def main(fd: int, dump: int) -> NoReturn:
    """Run the fork server on the channel `fd`; in a forked child, run the worker. Ends the process.

    `dump` is the descriptor of the file for its last words, as workers have one.
    """
    _prepare_signals()
    for inherited in (fd, dump):
        os.set_inheritable(inherited, False)  # by us, and not by what an application starts
    faulthandler.enable(file=dump, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file=dump, all_threads=True, chain=True)
    channel = Channel(socket.socket(fileno=fd))
    try:
        child = ForkServer(channel).run()
    except ApphostError as exc:
        channel.send({"t": "failed", "message": exc.message, "detail": exc.detail, "code": int(exc.exit_code)})
        _end_at_once(exc.exit_code)
    if child is None:
        _end_at_once(ExitCode.OK)
    from apphost.worker.main import run

    assignment, worker_channel = child
    _end(run(assignment, worker_channel))


def _end(code: int) -> NoReturn:
    """Leave. On its way out Python restores the default of every signal it handles, which is to kill; not of others."""
    for number in _FOR_THE_ARBITER:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _end_at_once(code: ExitCode) -> NoReturn:
    """End without the exit handlers of a preloaded application: they are for its workers, and threads that it may have
    started must not keep this process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _prepare_signals() -> None:
    """What a terminal or a container sends to everybody is the arbiter's business: our end is that of our channel."""
    for number in _FOR_THE_ARBITER:
        signal.signal(number, _nothing)
    signal.signal(signal.SIGCHLD, _nothing)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


class ForkServer:
    """See the module. `run` returns None at the end, and once in each child with what the child is to do."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._wakeup = self._make_wakeup()
        self._children: dict[int, int] = {}  # pid to wid
        self._generation = 0
        self._settings = Settings()
        self._listeners: list[socket.socket] = []
        self._app: Any = None  # preloaded

    @staticmethod
    def _make_wakeup() -> int:
        """A descriptor that becomes readable when a signal has come."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        return reader

    def run(self) -> tuple[Assignment, Channel] | None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while True:
            poll.poll()
            self._drain_wakeup()
            self._reap()
            messages = self._channel.receive()
            if messages is None:
                self._outlive_arbiter()
                return None
            for message, fds in messages:
                child = self._obey(message, fds)
                if child is not None:
                    return child

    def _outlive_arbiter(self) -> None:
        """Workers drain when the arbiter is gone, all but those that are stuck, and nobody else is left to end them."""
        for listener in self._listeners:
            listener.close()
        deadline = time.monotonic() + self._settings.graceful_timeout + ORPHAN_GRACE
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        self._reap()
        while self._children and (left := deadline - time.monotonic()) > 0:
            poll.poll(1000 * left)
            self._drain_wakeup()
            self._reap()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _drain_wakeup(self) -> None:
        try:
            while os.read(self._wakeup, 4096):
                pass
        except BlockingIOError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            wid = self._children.pop(pid, None)
            if wid is not None:
                self._channel.send({"t": "exited", "wid": wid, "status": os.waitstatus_to_exitcode(status)})

    def _obey(self, message: Message, fds: list[int]) -> tuple[Assignment, Channel] | None:
        if message["t"] == "config":
            self._configure(message)
        elif message["t"] == "spawn":
            return self._spawn(int(message["wid"]), fds)
        elif message["t"] == "stop_listening":
            for listener in self._listeners:
                listener.close()
        return None

    def _configure(self, message: Message) -> None:
        if message["protocol"] != PROTOCOL_VERSION:
            raise SettingsError(
                "the apphost that is installed now cannot talk to the one that is running: restart it to upgrade"
            )
        source = Source.from_wire(message["source"])
        self._generation = int(message["generation"])
        self._settings = settings = source.load(os.environ).settings
        self._listeners = [socket.socket(fileno=fd) for fd in message["listeners"]]
        for listener in self._listeners:
            listener.set_inheritable(False)
        enter(settings, source.cwd)
        self._app = _prepare_workers(settings)
        self._channel.send({"t": "settings", "settings": settings.to_wire()})

    def _spawn(self, wid: int, fds: list[int]) -> tuple[Assignment, Channel] | None:
        channel_fd, dump_fd = fds
        # Until a child has handlers of its own no signal may reach it: ours would be silently swallowed.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = os.fork()
        if pid == 0:
            return self._become_worker(wid, channel_fd, dump_fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._children[pid] = wid
        os.close(channel_fd)
        os.close(dump_fd)
        self._channel.send({"t": "forked", "wid": wid, "pid": pid})
        return None

    def _become_worker(self, wid: int, channel_fd: int, dump_fd: int) -> tuple[Assignment, Channel]:
        from apphost.worker.main import Assignment

        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)
        self._channel.close()
        assignment = Assignment(wid, self._generation, self._settings, self._listeners, dump_fd, self._app)
        return assignment, Channel(socket.socket(fileno=channel_fd))


def enter(settings: Settings, cwd: str) -> None:
    """Be where the application is, as who it is: directory, umask, user, group, `sys.path`. Raises `ApphostError`."""
    directory = _change_directory(settings.chdir, cwd)
    if settings.umask is not None:
        os.umask(settings.umask)
    drop_privileges(settings.user, settings.group)
    sys.path[:0] = [os.path.join(directory, path) for path in (*settings.pythonpath, "")]
    distrust_stale_bytecode()


def _change_directory(chdir: str, cwd: str) -> str:
    """Change to the directory of the application; its name, with symlinks as the user wrote them."""
    directory = os.path.join(cwd, chdir) if chdir else cwd
    try:
        os.chdir(directory)
    except OSError as exc:
        raise SettingsError(f"cannot change to the directory {directory}: {exc.strerror}") from None
    os.environ["PWD"] = directory
    return directory


def _prepare_workers(settings: Settings) -> Any:
    """Import what every worker will need, once; then keep the garbage collector from touching, and so copying, it.

    With `preload` that includes the application, which is returned. Raises `ApplicationError`.
    """
    from apphost.worker.loading import load_application, preimport

    preimport(settings.http, settings.loop)
    _set_title(settings.proc_name)
    app = load_application(settings.app, settings.factory) if settings.preload else None
    gc.collect()
    gc.freeze()
    return app


def _set_title(name: str) -> None:
    if name:
        try:
            from setproctitle import setproctitle
        except ModuleNotFoundError:
            return
        setproctitle(f"{name}: worker")


def drop_privileges(user: str, group: str) -> None:
    """Become `user` and `group` (names or numbers, empty: stay), with the supplementary groups of the user.

    Raises `PrivilegesError`.
    """
    if not user and not group:
        return
    try:
        account = _account(user) if user else None
        gid = _gid(group) if group else account.pw_gid if account else os.getgid()
        if os.geteuid() == 0:
            name = account.pw_name if account else pwd.getpwuid(os.getuid()).pw_name
            os.initgroups(name, gid)
        if gid != os.getgid() or gid != os.getegid():
            os.setgid(gid)
        if account is not None and (account.pw_uid != os.getuid() or account.pw_uid != os.geteuid()):
            os.setuid(account.pw_uid)
    except PermissionError:
        raise PrivilegesError(
            f"cannot become user {user or 'unchanged'}, group {group or 'unchanged'}: only root may change them"
        ) from None


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise PrivilegesError(f"there is no user {user!r}") from None


def _gid(group: str) -> int:
    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise PrivilegesError(f"there is no group {group!r}") from None
