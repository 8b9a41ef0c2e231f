"""From the command line to a running arbiter, and back to an exit code."""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import socket
import time

import apphost
from apphost.arbiter.activation import Passed
from apphost.arbiter.admin import Admin, open_admin
from apphost.arbiter.arbiter import Arbiter
from apphost.arbiter.control import Control, open_control
from apphost.arbiter.history import Historian, History
from apphost.arbiter.hooks import ArbiterHooks
from apphost.arbiter.pidfile import PidFile
from apphost.arbiter.reports import counted
from apphost.arbiter.rotation import Rotation
from apphost.arbiter.services import Happening, What
from apphost.arbiter.state import StateError
from apphost.arbiter.systemd import Manager, Notifier, NotifySocket
from apphost.arbiter.upgrade import Upgrade, open_inherited, open_nothing, read_state, take_over
from apphost.arbiter.vocabulary import Event, ReloadAsked, Tick
from apphost.errors import ApphostError, ExitCode
from apphost.forkserver import set_title
from apphost.logfiles import open_own_log
from apphost.logs import Log, open_log
from apphost.privileges import find_group, find_user, parse_owner, resolve
from apphost.settings import Settings
from apphost.sockets import Access, Identity, Listener, describe, identify, open_listeners, parse_bind, unlink_own
from apphost.sources import Loaded, Source


def run(loaded: Loaded, source: Source) -> int:
    """Serve until told to stop; the exit code. Raises `ApphostError` for what is in the way of starting."""
    settings = loaded.settings
    manager = Manager.take(os.environ, os.getpid())
    passed = Passed.take(os.environ, os.getpid())
    if settings.umask is not None:
        os.umask(settings.umask)
    log = _open_log(settings, source)
    access = _access(settings)
    set_title(settings.proc_name, "arbiter")
    pidfile = PidFile(settings.pidfile) if settings.pidfile else None
    own: dict[str, Identity] = {}
    try:
        listeners = _listen(loaded, access, own, passed)
        control = open_control(settings, own, log)
        _say_hello(loaded, listeners, log)
        admin = open_admin(settings, access, own, log)
        passed.close_rest(log)
        arbiter = Arbiter(loaded, source, listeners, log)
        return _run(arbiter, source, own, pidfile, control, admin, History(time.monotonic()), manager)
    finally:
        _clean_up(own, pidfile)


def resume(word: str) -> int:
    """Go on as the arbiter whose program this one has replaced (USR2); the exit code. `word`: of `RESUME_VARIABLE`.

    When it is only to be tried: read the state as if, and say by the exit code whether that went well.
    """
    trial = word.endswith("?")
    fd = int(word.rstrip("?"))
    manager = Manager.take(os.environ, os.getpid())
    try:
        state = read_state(fd, open_nothing if trial else open_inherited)
    except StateError as exc:
        Log("error", "text").error(f"apphost {apphost.__version__} cannot go on where another program stopped: {exc}")
        return ExitCode.INTERNAL
    os.close(fd)
    settings = state.settings
    source = Source.from_wire(state.source)
    log = _open_log_again(settings, source)
    if trial:
        take_over(Arbiter(Loaded(settings, {}), source, [], log), state)
        return ExitCode.OK
    for fd in state.descriptors:
        os.set_inheritable(fd, False)
    set_title(settings.proc_name, "arbiter")
    pidfile = PidFile.adopt(*state.pidfile) if state.pidfile is not None else None
    own = state.own_sockets
    listeners = [Listener(fileno=fd) for fd in state.listeners]
    for listener in listeners:
        listener.plain = listener.fileno() in state.plain
    try:
        arbiter = Arbiter(Loaded(settings, {}), source, listeners, log)
        take_over(arbiter, state)
        log.info(
            f"upgraded: apphost {apphost.__version__} on Python {platform.python_version()} goes on with "
            f"{counted(len(arbiter.workers), 'worker')}, pid {os.getpid()}"
        )
        # An arbiter that knew of no control sockets has handed over none.
        control = socket.socket(fileno=state.control) if state.control >= 0 else open_control(settings, own, log)
        admin = [Listener(fileno=fd) for fd in state.admin]
        history = History.from_wire(state.history, time.monotonic())
        return _run(arbiter, source, own, pidfile, control, admin, history, manager, ReloadAsked())
    finally:
        _clean_up(own, pidfile)


def _run(
    arbiter: Arbiter,
    source: Source,
    own: dict[str, Identity],
    pidfile: PidFile | None,
    listener: socket.socket | None,
    admins: list[Listener],
    history: History,
    manager: Manager,
    first: Event = Tick(),  # noqa: B008
) -> int:
    """`first`: Tick at a start, ReloadAsked of a program that has taken the place of another one."""
    locked = (pidfile.path, pidfile.fileno()) if pidfile is not None else None
    control = Control(arbiter, listener, history) if listener is not None else None
    admin = Admin(arbiter, admins, history) if admins else None
    arbiter.upgrade = Upgrade(arbiter, own, locked, control, admin, history, manager.environment)
    services = (Historian(arbiter, history), arbiter.upgrade, control, admin)
    arbiter.services += [service for service in services if service is not None]
    if arbiter.settings.error_log:
        arbiter.services.append(Rotation(arbiter.log, lambda: _open_log(arbiter.settings, source)))
    hooks = ArbiterHooks(arbiter)
    arbiter.services.append(hooks)
    resumed = isinstance(first, ReloadAsked)
    if not resumed:
        hooks.begin()
    if manager.address:
        notifier = Notifier(arbiter, manager.watchdog, NotifySocket(manager.address, arbiter.log).send)
        arbiter.services.append(notifier)
        notifier.begin(resumed)
    if arbiter.settings.reload:
        from apphost.arbiter.development import Development  # a server in production need not carry it

        arbiter.services.append(Development(arbiter))
    code = arbiter.run(first)
    arbiter.log.info(f"stopped, exit {code}")
    return code


def _open_log(settings: Settings, source: Source) -> Log:
    """Raises `PrivilegesError`."""
    return open_own_log(settings, os.path.join(source.cwd, settings.chdir), resolve(settings.user, settings.group))


def _open_log_again(settings: Settings, source: Source) -> Log:
    """As above, of an arbiter that must go on in any case: on standard error when the file cannot be opened."""
    try:
        return _open_log(settings, source)
    except ApphostError as exc:
        log = Log(settings.log_level, settings.log_format, open_log("/dev/stderr"))
        log.error(f"{exc.message}; the log goes to standard error until the next reload")
        return log


def _clean_up(own: dict[str, Identity], pidfile: PidFile | None) -> None:
    for path, inode in own.items():
        unlink_own(path, inode)
    if pidfile is not None:
        pidfile.remove()


def check(loaded: Loaded, source: Source) -> int:
    """Load the application as a worker would, in a process of its own; 0 when it could serve, else what `run` gives."""
    _access(loaded.settings)
    log = Log("error", loaded.settings.log_format)
    Manager.take(os.environ, os.getpid())  # a unit may check before it starts; what is checked is not the service
    alone = Loaded(dataclasses.replace(loaded.settings, workers=1, reload=False), loaded.origins)
    arbiter = Arbiter(alone, source, [], log)
    arbiter.services.append(_Check(loaded.settings.app))
    return arbiter.run()


class _Check:
    """The service of `apphost check`: it says so when a worker is ready, and that is all."""

    deadline: float | None = None

    def __init__(self, app: str) -> None:
        self._app = app
        self._started = time.monotonic()

    def expire(self, now: float) -> None:
        pass

    def notice(self, happening: Happening) -> None:
        if happening.what is not What.READY or happening.worker is None:
            return
        names = happening.worker.names
        seconds = time.monotonic() - self._started
        print(
            f"{self._app} can be served: interface {names['interface']}, parser {names['parser']}, "
            f"loop {names['loop']}; ready in {seconds:.2f} s",
            flush=True,
        )
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        pass


def _access(settings: Settings) -> Access:
    """Who may connect to Unix sockets. Raises `PrivilegesError`, also for a user that the workers cannot become."""
    account = resolve(settings.user, settings.group)
    user, group = parse_owner(settings.unix_socket_owner)
    uid, gid = (account.uid, account.gid) if account is not None and not (user or group) else (-1, -1)
    return Access(settings.unix_socket_mode, find_user(user) if user else uid, find_group(group) if group else gid)


def _listen(loaded: Loaded, access: Access, own: dict[str, Identity], passed: Passed) -> list[Listener]:
    """Open every listener, all or none; `own` notes the Unix sockets that were made, for removal at the end.

    What a service manager has passed is enough: without a word about `bind`, its default does not count then.
    """
    if passed and loaded.origins.get("bind", "default") == "default":
        return passed.open_all()
    listeners: list[Listener] = []
    for text in loaded.settings.bind:
        address = parse_bind(text)
        if address.name or address.fd >= 0:
            listeners += passed.open(address)
            continue
        listeners += open_listeners(address, loaded.settings.backlog, access)
        if address.path:
            own[address.path] = identify(address.path)
    return listeners


def _say_hello(loaded: Loaded, listeners: list[Listener], log: Log) -> None:
    settings = loaded.settings
    log.info(
        f"apphost {apphost.__version__} on Python {platform.python_version()} starts {settings.app} with "
        f"{counted(settings.workers, 'worker')}, pid {os.getpid()}"
    )
    for warning in loaded.warnings:
        log.warning(warning)
    for listener in listeners:
        address = describe(listener, bool(settings.tls_certfile))
        log.info(f"listening at {address}", address=address)
