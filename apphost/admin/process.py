"""The admin process: told by the arbiter on a channel, it answers at the admin listeners, and does nothing else.

It speaks HTTP with the same connections as a worker, and with the parser that is always there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

from apphost.admin.site import Site
from apphost.errors import ApphostError, ExitCode
from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError
from apphost.peers import is_of_parent
from apphost.privileges import become, resolve
from apphost.protocols.context import Context, Timeouts
from apphost.protocols.h11_parser import H11Parser
from apphost.protocols.strict import Limits
from apphost.sockets import Listener
from apphost.worker.acceptor import Acceptor

TICK = 0.5  # s between two looks at time-outs
CONNECTIONS_MAX = 256  # of scrapers, probes and people
# Nobody here is a browser with megabytes of cookies, nor far away, and nothing here takes a body.
LIMITS = Limits(request_line=2048, fields=64, field_size=4096, head=16384, body=1024, pipelined=16384)
# The next request may take as long as a usual scrape interval.
TIMEOUTS = Timeouts(keep_alive=20.0, request_header=5.0, request_body=5.0, write=10.0, linger=1.0)

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
        os._exit(ExitCode.INTERNAL)  # the arbiter is gone, or it is none of ours
    loop = asyncio.new_event_loop()
    process = Process(loop, Channel(sock))
    loop.run_forever()
    sys.stderr.flush()
    os._exit(process.code)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


class Process:
    """All that there is in it. Event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
        self.code = ExitCode.OK
        self._loop = loop
        self._channel = channel
        self._site = Site(loop.time)
        self._context: Context | None = None
        self._acceptors: list[Acceptor] = []
        loop.add_reader(channel.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            messages = self._channel.receive()
            for message, _ in messages or ():
                self._obey(message)
        except ProtocolError:
            messages = None
        except ApphostError as exc:
            Log().error(f"the admin process cannot start: {exc.message}")
            self.code, messages = exc.exit_code, None
        if messages is None:
            self._loop.remove_reader(self._channel.fileno())
            self._loop.stop()

    def _obey(self, message: Message) -> None:
        if message["t"] == "config":
            self._configure(message)
        elif message["t"] == "snapshot":
            self._site.take(message["snapshot"])

    def _configure(self, message: Message) -> None:
        """Raises `ApphostError`."""
        account = resolve(message["user"], message["group"])
        if account is not None:
            become(account)
        log = Log(message["log_level"], message["log_format"])
        self._context = context = Context(self._loop, H11Parser(), log, limits=LIMITS, timeouts=TIMEOUTS)
        context.interface = self._site
        for fd in message["listeners"]:
            listener = Listener(fileno=fd)
            listener.set_inheritable(False)
            acceptor = Acceptor(self._loop, listener, context, log, self._has_room)
            self._acceptors.append(acceptor)
            acceptor.start()
        context.on_closed = self._connection_closed
        self._tick()

    def _has_room(self) -> bool:
        assert self._context is not None
        opening = sum(len(acceptor.opening) for acceptor in self._acceptors)
        return len(self._context.connections) + opening < CONNECTIONS_MAX

    def _connection_closed(self) -> None:
        for acceptor in self._acceptors:
            acceptor.start()

    def _tick(self) -> None:
        assert self._context is not None
        self._loop.call_later(TICK, self._tick)
        self._context.tick(self._loop.time())
