"""The process of one hook of the arbiter: a fresh interpreter, where the application is and as its user, for one call.

It gets one message, `run`, with the settings and the event, and answers `done`; what goes wrong it logs itself.
"""

from __future__ import annotations

import inspect
import os
import select
import signal
import socket
from typing import NoReturn

from apphost.errors import ApphostError, ExitCode, user_traceback
from apphost.forkserver import enter
from apphost.hooks import HookEvent, load_hook
from apphost.logs import Log
from apphost.messages import Channel, Message
from apphost.settings import Settings

# As of the fork server: what is in the directory must not shadow a module.
COMMAND = (
    "import sys; sys.path.append(sys.path.pop(0)); from apphost.hookrunner import main; main(*map(int, sys.argv[1:]))"
)
ORPHAN_GRACE = 1.0  # s after `hook_timeout`, when the arbiter has not killed it, as it is gone or another program


def main(fd: int) -> NoReturn:
    """Run the hook that the message on the channel `fd` names. Ends the process."""
    os.set_inheritable(fd, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    channel = Channel(socket.socket(fileno=fd))
    message = _receive(channel)
    if message is None:
        raise SystemExit(ExitCode.OK)  # the arbiter is gone
    settings = Settings.from_wire(message["settings"])
    signal.setitimer(signal.ITIMER_REAL, settings.hook_timeout + ORPHAN_GRACE)
    log = Log(settings.log_level, settings.log_format)
    code = _run(message, settings, log)
    channel.send({"t": "done"})
    channel.close()
    raise SystemExit(code)


def _receive(channel: Channel) -> Message | None:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        poll.poll()
        messages = channel.receive()
        if messages is None:
            return None
        if messages:
            return messages[0][0]


def _run(message: Message, settings: Settings, log: Log) -> ExitCode:
    event = HookEvent(**message["event"], settings=settings)
    setting = f"on_{event.name}"
    target = str(getattr(settings, setting))
    try:
        enter(settings, str(message["cwd"]))
        result = load_hook(setting, target)(event)
        if inspect.isawaitable(result):
            import asyncio

            asyncio.run(_wait(result))
    except ApphostError as exc:
        log.error(exc.message, exc.detail)
        return ExitCode.APPLICATION
    except BaseException as exc:
        log.error(f"the hook {setting} = {target!r} raised {type(exc).__name__}", user_traceback(exc))
        return ExitCode.APPLICATION
    return ExitCode.OK


async def _wait(result: object) -> None:
    assert inspect.isawaitable(result)
    await result
