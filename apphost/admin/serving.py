"""What the admin process does: the arbiter tells it on a channel how things are, and it answers who asks.

It speaks HTTP with the same connections as a worker, and with the parser that is always there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from apphost.admin.site import Site
from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError
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


def serve(channel: Channel, config: Message, messages: Iterable[Message]) -> None:
    """Until the channel ends. `messages`: what has come behind `config`."""
    loop = asyncio.new_event_loop()
    process = Process(loop, channel, config)
    for message in messages:
        process.obey(message)
    loop.run_forever()


class Process:
    """All that there is in it. Event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel, config: Message) -> None:
        self._loop = loop
        self._channel = channel
        self._site = Site(loop.time)
        log = Log(config["log_level"], config["log_format"])
        self._context = context = Context(loop, H11Parser(), log, limits=LIMITS, timeouts=TIMEOUTS)
        context.interface = self._site
        context.on_closed = self._connection_closed
        listeners = [Listener(fileno=fd) for fd in config["listeners"]]
        for listener in listeners:
            listener.set_inheritable(False)
        self._acceptors = [Acceptor(loop, listener, context, log, self._has_room) for listener in listeners]
        for acceptor in self._acceptors:
            acceptor.start()
        loop.add_reader(channel.fileno(), self._readable)
        self._tick()

    def _readable(self) -> None:
        try:
            messages = self._channel.receive()
        except ProtocolError:
            messages = None
        if messages is None:
            self._loop.remove_reader(self._channel.fileno())
            self._loop.stop()
        for message, _ in messages or ():
            self.obey(message)

    def obey(self, message: Message) -> None:
        if message["t"] == "snapshot":
            self._site.take(message["snapshot"])

    def _has_room(self) -> bool:
        opening = sum(len(acceptor.opening) for acceptor in self._acceptors)
        return len(self._context.connections) + opening < CONNECTIONS_MAX

    def _connection_closed(self) -> None:
        for acceptor in self._acceptors:
            acceptor.start()

    def _tick(self) -> None:
        self._loop.call_later(TICK, self._tick)
        self._context.tick(self._loop.time())
