"""Where the admin process begins: it becomes `user`, and only then imports what it serves with, as fork servers do."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

from apphost.errors import ApphostError, ExitCode
from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError
from apphost.peers import is_of_parent
from apphost.privileges import become, resolve

CONFIG_TIMEOUT = 10.0  # s for the first message, which the arbiter has sent before this process began

_FOR_THE_ARBITER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT,
                    signal.SIGTTIN, signal.SIGTTOU)  # fmt: skip


def main(fd: int) -> NoReturn:
    """Serve until the channel `fd` ends. The listeners that `config` names are open already, as descriptors."""
    os.set_inheritable(fd, False)
    for number in _FOR_THE_ARBITER:
        signal.signal(number, _nothing)  # what a terminal sends to everybody; our end is that of the channel
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    sock = socket.socket(fileno=fd)
    if not is_of_parent(sock):
        _end(ExitCode.INTERNAL)  # the arbiter is gone, or it is none of ours
    channel = Channel(sock)
    try:
        messages = _first_messages(channel)
        if not messages:
            _end(ExitCode.OK)
        config, *rest = messages
        account = resolve(config["user"], config["group"])
        if account is not None:
            become(account)
        from apphost.admin.serving import serve

        serve(channel, config, rest)
    except (ApphostError, ProtocolError) as exc:
        Log().error(f"the admin process ends: {exc}")
        _end(exc.exit_code if isinstance(exc, ApphostError) else ExitCode.INTERNAL)
    _end(ExitCode.OK)


def _first_messages(channel: Channel) -> list[Message]:
    """`config`, and what came with it; nothing when the arbiter is gone. Raises `ProtocolError`."""
    while select.select([channel], [], [], CONFIG_TIMEOUT)[0]:
        received = channel.receive()
        if received is None:
            return []
        if received:
            return [message for message, _ in received]
    return []


def _end(code: ExitCode) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass
