"""The life of a worker process, from the fork to its exit."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from apphost.errors import ApphostError, ExitCode, user_traceback
from apphost.forks import Forks
from apphost.logs import Log, hide_queries
from apphost.messages import DUMP_SIGNAL, Channel, Message
from apphost.settings import Settings
from apphost.sockets import Listener
from apphost.worker.certificates import Certificates
from apphost.worker.hooks import Hooks
from apphost.worker.loading import choose_loop, choose_parser, detect_interface, load_application, modern_asgi
from apphost.worker.server import Server

if TYPE_CHECKING:
    from apphost.access import Sink
    from apphost.worker.logconfig import LogConfig

# These belong to the arbiter; a terminal or a container runtime may send them to everybody.
_NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told at its fork.

    dump: the descriptor of the file for its last words. access_log: where that goes, None for nowhere.
    app: the application, if the fork server has imported it. certificates: for TLS, read before the fork server has
    given its privileges up. log_config: of `logging`, to be applied before the application is imported. code: the
    fingerprint of the application, if the fork server has imported it. room: for so many connections.
    """

    wid: int
    generation: int
    settings: Settings
    listeners: list[Listener]
    dump: int
    log: Log
    room: int
    access_log: Sink | None = None
    app: Any = None
    certificates: Certificates | None = None
    log_config: LogConfig | None = None
    code: Message | None = None

    @property
    def name(self) -> str:
        return f"worker {self.wid} gen {self.generation}"


def run(assignment: Assignment, channel: Channel) -> int:
    """Boot, serve, drain. Returns the exit code; what went wrong has been told to the arbiter."""
    settings = assignment.settings
    log = assignment.log
    hide_queries(not settings.log_query)
    server: list[Server] = []
    _prepare_signals()
    _prepare_dump(assignment.dump, server)
    Forks(lambda: [channel.fileno(), assignment.dump, *(server[0].connected() if server else ())])
    try:
        return _run(assignment, channel, log, server)
    except ApphostError as exc:
        _tell_failure(channel, exc)
        return exc.exit_code
    except BaseException as exc:
        # Also SystemExit out of a task of the application: it must not look like an orderly end.
        what = f"{type(exc).__name__} was raised outside of any request"
        _tell_failure(channel, ApphostError(what, user_traceback(exc)))
        return ExitCode.INTERNAL


def _run(assignment: Assignment, channel: Channel, log: Log, server: list[Server]) -> int:
    started = time.monotonic()
    settings = assignment.settings
    loop_name, loop = choose_loop(settings.loop)
    asyncio.set_event_loop(loop)  # applications look for one while they are imported
    parser_name, parser = choose_parser(settings.http)
    hooks = Hooks.load(assignment, log, loop)
    hooks.start()
    app, interface = _load(assignment)
    server.append(Server(assignment, channel, log, loop, parser, hooks))
    names = {"interface": interface, "parser": parser_name, "loop": loop_name}
    try:
        loop.run_until_complete(server[0].serve(app, interface, names, started))
    finally:
        _finish(loop)
    return ExitCode.OK


def _load(assignment: Assignment) -> tuple[Any, str]:
    """The application and the name of its interface."""
    settings = assignment.settings
    if assignment.log_config is not None:
        assignment.log_config.apply(assignment.log)
    app = assignment.app
    if not settings.preload:
        app = load_application(settings.app, settings.factory)
    interface = settings.interface
    if interface == "auto":
        interface = detect_interface(app)
    elif interface == "asgi" and detect_interface(app) == "asgi2":
        interface = "asgi2"
    if interface == "asgi2":
        return modern_asgi(app), "asgi"
    return app, interface


def _finish(loop: asyncio.AbstractEventLoop) -> None:
    """Leave nothing of the loop behind that would complain at the end of the interpreter."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=0.5))
    loop.run_until_complete(loop.shutdown_asyncgens())
    asyncio.set_event_loop(None)
    loop.close()


def _tell_failure(channel: Channel, exc: ApphostError) -> None:
    channel.send({"t": "failed", "message": exc.message, "detail": exc.detail, "code": int(exc.exit_code)})


def _prepare_signals() -> None:
    """Handlers of Python, not SIG_IGN: a subprocess of the application must not inherit that it ignores signals."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, _nothing)
    # Until the loop takes over: a worker that is still booting serves nobody and may just go.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(ExitCode.OK)


def _prepare_dump(fd: int, server: list[Server]) -> None:
    """On a crash and on the arbiter's request, write all stacks to `fd`, which the arbiter reads after our end.

    The stacks come from C, whatever state Python is in; the requests in progress are added by a Python handler, which
    runs whenever the stuck code is Python or sleeps in a system call.
    """

    def describe(_number: int, _frame: FrameType | None) -> None:
        lines = [f"in progress: {text}\n" for text in (server[0].describe_requests() if server else ())]
        os.write(fd, "".join(lines).encode("utf-8", "replace"))

    faulthandler.enable(file=fd, all_threads=True)
    # The fork server's registration, if it stayed, would pass for ours: its handler is not set a second time.
    faulthandler.unregister(DUMP_SIGNAL)
    signal.signal(DUMP_SIGNAL, describe)
    faulthandler.register(DUMP_SIGNAL, file=fd, all_threads=True, chain=True)
