"""The fork server: one for each generation of workers, between the arbiter and its workers.

The arbiter starts it as a fresh interpreter, so it sees the code, the environment and the settings file as they are at
that moment, however long the arbiter has been running. It reads the settings (the arbiter's throw-away process for a
broken file), prepares what all workers share, and forks a worker whenever the arbiter asks for one. It runs no
application code itself, unless `preload` has it import the application.

Messages from the arbiter: `config` (once, first, but for a `prepare` where this process is started before its
generation is asked for), `spawn` with two descriptors, `stop_listening`. To the arbiter: `settings` or `failed`, then
`forked` and `exited`. When the arbiter is gone, workers notice by themselves; this
one waits for them, kills those that do not end in time, and goes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from apphost.bytecode import distrust_stale_bytecode
from apphost.errors import ApphostError, ExitCode, SettingsError
from apphost.forks import Forks, end_daemons, forget_children
from apphost.logfiles import open_access_sink, open_own_log
from apphost.logs import Log
from apphost.messages import DUMP_SIGNAL, PROTOCOL_VERSION, Channel, Message, is_cut
from apphost.peers import is_of_parent, take_channels
from apphost.prctl import SET_PDEATHSIG, prctl
from apphost.privileges import Account, become, check_readable, resolve
from apphost.settings import Settings, keep_fixed, restart_needed
from apphost.sockets import Listener
from apphost.sources import Source

if TYPE_CHECKING:
    from apphost.access import Sink
    from apphost.worker.certificates import Certificates
    from apphost.worker.logconfig import LogConfig
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
    arbiter = os.getppid()
    sock = socket.socket(fileno=fd)
    if not is_of_parent(sock):
        _end_at_once(ExitCode.INTERNAL)  # the arbiter is gone, or it is none of ours
    channel = Channel(sock)
    try:
        child = ForkServer(channel, arbiter).run()
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
    end_daemons()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it may have put anything in their place
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

    def __init__(self, channel: Channel, arbiter: int) -> None:
        """`arbiter`: its pid."""
        self._channel = channel
        self._arbiter = arbiter
        self._wakeup = self._make_wakeup()
        self._children: dict[int, int] = {}  # pid to wid
        self._generation = 0
        self._settings = Settings()
        self._listeners: list[Listener] = []
        self._log = Log()
        self._access_log: Sink | None = None
        self._log_config: LogConfig | None = None
        self._app: Any = None  # preloaded
        self._code: Message | None = None  # the fingerprint of that
        self._certificates: Certificates | None = None
        self._room = 0  # for connections of each worker
        self._forks = Forks(lambda: [channel.fileno(), self._wakeup, *(each.fileno() for each in self._listeners)])

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
        """Workers drain when the arbiter is gone, all but those that are stuck, and nobody else is left to end them.
        Those that still import the application hear of nothing but the signal, and go at once: the port is wanted."""
        for listener in self._listeners:
            listener.close()
        deadline = time.monotonic() + self._settings.graceful_timeout + ORPHAN_GRACE
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        self._reap()
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
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
        if message["t"] == "prepare":
            _preimport(str(message["http"]), str(message["loop"]))
        elif message["t"] == "config":
            self._configure(message)
        elif message["t"] == "spawn":
            return self._spawn(message, fds)
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
        failure = message.get("failure")  # of the generation before: this one has nothing to do but to show it
        loaded = source.load(os.environ).settings if failure is None else _settings_to_show(message)
        # A file that has lost its `user` by now must not make root of the workers: that is fixed at the start.
        running = Settings.from_wire(message["running"]) if "running" in message else loaded
        self._settings = settings = keep_fixed(running, loaded)
        self._listeners = [Listener(fileno=fd) for fd in message["listeners"]]
        for listener in self._listeners:
            listener.set_inheritable(False)
            listener.plain = listener.fileno() in message.get("plain", ())
        directory = enter(settings, source.cwd, self._prepare_as_root)
        if self._certificates is not None:
            _see_whether_watched(settings, self._certificates, self._log)
        self._log_config = _read_log_config(settings, directory)
        self._room = _make_room(settings, self._log)
        if failure is None:
            self._app, self._code = _prepare_workers(settings, self._log_config, self._log, self._arbiter)
        else:
            self._app = _error_page(settings, failure)
        ignored = restart_needed(running, loaded)
        self._channel.send({"t": "settings", "settings": settings.to_wire(), "ignored": ignored})

    def _prepare_as_root(self, directory: str, account: Account | None) -> None:
        """The last things that are done so: what follows is the application's, or may run code of it."""
        settings = self._settings
        self._log = open_own_log(settings, directory, account)
        self._access_log = open_access_sink(settings, directory, account, self._log)
        self._certificates = _load_certificates(settings, directory, self._log)

    def _spawn(self, order: Message, fds: list[int]) -> tuple[Assignment, Channel] | None:
        if is_cut(order, fds):
            raise ApphostError("a process has no descriptors left for the channel of a worker (ulimit -n)")
        channel_fd, dump_fd = fds
        channels = take_channels([channel_fd], self._channel.sock)
        if channels is None:
            raise ApphostError("an order came with a channel that the arbiter has not made")
        wid = int(order["wid"])
        # Until a child has handlers of its own no signal may reach it: ours would be silently swallowed.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with self._forks.ours():
            pid = os.fork()
        if pid == 0:
            return self._become_worker(wid, channels[0], dump_fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._children[pid] = wid
        channels[0].close()
        os.close(dump_fd)
        self._channel.send({"t": "forked", "wid": wid, "pid": pid})
        return None

    def _become_worker(self, wid: int, channel: socket.socket, dump_fd: int) -> tuple[Assignment, Channel]:
        from apphost.worker.main import Assignment

        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)
        self._wakeup = -1
        self._channel.close()
        forget_children()
        assignment = Assignment(
            wid, self._generation, self._settings, self._listeners, dump_fd, self._log, self._room, self._access_log,
            self._app, self._certificates, self._log_config, self._code,
        )  # fmt: skip
        return assignment, Channel(channel)


def enter(settings: Settings, cwd: str, before: Callable[[str, Account | None], None] | None = None) -> str:
    """Be where the application is, as who it is: umask, user, group, directory, `sys.path`. The directory.

    Raises `ApphostError`.

    before: what must be done while this process is still who it was; it gets the directory, and who it becomes.
    """
    if settings.umask is not None:
        os.umask(settings.umask)
    directory = os.path.join(cwd, settings.chdir) if settings.chdir else cwd
    account = resolve(settings.user, settings.group)
    if before is not None:
        before(directory, account)
    if account is not None:
        _drop_privileges(account)
    _change_directory(directory)
    sys.path[:0] = [os.path.join(directory, path) for path in (*settings.pythonpath, "")]
    distrust_stale_bytecode()
    return directory


def _change_directory(directory: str) -> None:
    """To that of the application, named with symlinks as the user wrote them."""
    try:
        os.chdir(directory)
    except OSError as exc:
        raise SettingsError(f"cannot change to the directory {directory}: {exc.strerror}") from None
    os.environ["PWD"] = directory


def _drop_privileges(account: Account) -> None:
    become(account)
    # What is imported from here on is read by that user.
    check_readable(os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker", "main.py"), account)


def _load_certificates(settings: Settings, directory: str, log: Log) -> Certificates | None:
    """While keys that only root may read can be read. `directory`: where relative names begin, which is entered later.

    Raises `SettingsError`.
    """
    if not settings.tls_certfile:
        return None
    from apphost.worker.certificates import load

    certificates = load(settings, directory)
    for warning in certificates.warnings if certificates is not None else ():
        log.warning(warning)
    return certificates


def _see_whether_watched(settings: Settings, certificates: Certificates, log: Log) -> None:
    from apphost.worker.certificates import unreadable

    hidden = unreadable(settings)
    certificates.watched = not hidden
    if hidden and settings.tls_watch_interval:
        log.info(
            f"user {settings.user or os.getuid()} may not read {', '.join(hidden)}: the workers cannot see when "
            "certificates are renewed, so send USR1 then"
        )


def _make_room(settings: Settings, log: Log) -> int:
    from apphost.worker.descriptors import make_room

    return make_room(settings.limit_connections, log)


def _read_log_config(settings: Settings, directory: str) -> LogConfig | None:
    """As the user of the workers, as it names files that they open. Raises `SettingsError`."""
    if not settings.log_config:
        return None
    from apphost.worker.logconfig import LogConfig, read

    return LogConfig(settings.log_config, read(settings.log_config, directory))


def _prepare_workers(
    settings: Settings, log_config: LogConfig | None, log: Log, arbiter: int
) -> tuple[Any, Message | None]:
    """Import what every worker will need, once; then keep the garbage collector from touching, and so copying, it.

    With `preload` that includes the application, which is returned with its fingerprint: taken here once, because to
    look at all modules writes to the memory that each is in, so that each worker would get a copy of it. Raises
    `ApphostError`.
    """
    from apphost.worker.loading import load_application

    _preimport(settings.http, settings.loop)
    importlib.invalidate_caches()  # this process may be older than what it is to import
    set_title(settings.proc_name, "worker")
    app = code = None
    if settings.preload:
        from apphost.worker import fingerprint

        if log_config is not None:
            log_config.apply(log)
        with _ending_with(arbiter):
            app = load_application(settings.app, settings.factory)
        code = fingerprint.here(settings.app)
    gc.collect()
    gc.freeze()
    return app, code


@contextlib.contextmanager
def _ending_with(arbiter: int) -> Iterator[None]:
    """While code of the application runs, for ever perhaps, nobody here would hear of the arbiter's end. On Linux the
    kernel does, and kills; it forgets that when a process becomes another user, so this comes after. To it a parent is
    a thread: the arbiter has but one."""
    held = prctl(SET_PDEATHSIG, signal.SIGKILL)
    if held and os.getppid() != arbiter:
        os._exit(ExitCode.INTERNAL)
    try:
        yield
    finally:
        if held:
            prctl(SET_PDEATHSIG, 0)


def _preimport(http: str, loop: str) -> None:
    from apphost.worker.loading import preimport

    preimport(http, loop)


def _settings_to_show(message: Message) -> Settings:
    """The settings of a generation that shows a failure: those that run, since new ones may be what has failed."""
    from apphost.worker.error_page import settings_for

    return settings_for(Settings.from_wire(message["running"]))


def _error_page(settings: Settings, failure: Message) -> Any:
    """The application of such a generation, in place of the user's."""
    from apphost.worker.error_page import ErrorPage

    _preimport(settings.http, settings.loop)
    set_title(settings.proc_name, "worker")
    return ErrorPage(str(failure["message"]), str(failure["detail"]), int(failure["generation"]))


def set_title(name: str, role: str) -> None:
    """How `ps` shows this process, where setproctitle is installed and `name` is set."""
    if name:
        try:
            from setproctitle import setproctitle
        except ModuleNotFoundError:
            return
        setproctitle(f"{name}: {role}")
