"""Moving connections from a draining worker to its successors, without their clients noticing.

    sender                                       receiver
    stops reading, MOVE + descriptor   ----->    keeps the descriptor, does not touch it
                                       <-----    PREPARED, or REFUSED: then the sender reads on
    COMMIT, closes its descriptor      ----->    reads and serves

CANCEL in place of COMMIT takes the offer back.

What holds at every moment, whoever dies:
- a byte is parsed by exactly one worker: the sender reads nothing after MOVE unless it has the connection back, the
  receiver nothing before COMMIT;
- at least one process holds the socket: the sender's descriptor is closed only after COMMIT has left, not while it
  waits for the receiver to read;
- the receiver writes nothing before the sender has written everything: only a connection without unsent bytes moves.

When the receiver dies before COMMIT, or does not answer, the sender still owns the connection and serves on. When the
sender dies before COMMIT, the receiver closes what it was given. What one successor refuses (it is full, or drains
itself) is offered to the next one at once, and half a second later to all again; what cannot move is drained the
ordinary way.

Each goes to the successor that has the fewest connections, as its last answer has told; so the first new worker of a
reload does not end up with most of them. Ten thousand move a few at a time, with turns for the others in between.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError
from apphost.protocols.capsule import Capsule, CapsuleError
from apphost.protocols.context import Context
from apphost.protocols.http1 import Connection
from apphost.protocols.proxied import new_connection
from apphost.protocols.wire import Phase

IN_FLIGHT_MAX = 64  # moves that wait for an answer, for each successor: bounds descriptors and what a death undoes
BATCH = 32  # moves in one turn of the loop: some 2 ms, for which requests wait
SLOW_AFTER = 0.25  # s without an answer after which a successor gets nothing more until it has answered
ANSWER_TIMEOUT = 5.0  # s for a successor's answer; its loop answers in milliseconds unless it is stuck


@dataclass(eq=False, slots=True)
class _Offer:
    connection: Connection
    capsule: Capsule
    since: float  # loop time

    @property
    def holds(self) -> bool:
        """Whether the successor knows all there is to know: no byte has come in spite of the pause."""
        return self.connection.phase is Phase.MOVING and len(self.connection.buffer) == len(self.capsule.data)


@dataclass(eq=False, slots=True)
class _Successor:
    channel: Channel
    in_flight: dict[int, _Offer] = field(default_factory=dict)  # not answered yet
    prepared: deque[tuple[int, _Offer]] = field(default_factory=deque)  # answered; COMMIT must wait for the channel
    leaving: _Offer | None = None  # its COMMIT is in the channel's queue, the last thing there
    resting: bool = False  # it has refused something, or is slow: it is asked again only after the next tick
    holds: int | None = None  # connections, as of its last answer; None: it has not answered yet

    @property
    def free(self) -> bool:
        return not self.resting and not self.channel.blocked and len(self.in_flight) < IN_FLIGHT_MAX

    @property
    def load(self) -> int:
        """Connections that it has, or is about to have."""
        return (self.holds or 0) + len(self.in_flight)

    @property
    def known(self) -> bool:
        """Whether it can be compared with others. It gets one connection at first, and answers how many it has."""
        return self.holds is not None or not self.in_flight

    @property
    def offers(self) -> list[_Offer]:
        """All that are still ours, the oldest first."""
        ours = [*(offer for _, offer in self.prepared), *self.in_flight.values()]
        return ours if self.leaving is None else [self.leaving, *ours]


class Sender:
    """The draining worker's side. Event loop only. `on_failed` is called when nothing can be moved any more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Log, name: str, on_failed: Callable[[], None]) -> None:
        self._loop = loop
        self._log = log
        self._name = name
        self._on_failed = on_failed
        self._successors: list[_Successor] = []
        self._queue: OrderedDict[Connection, None] = OrderedDict()  # in turn, each once
        self._rest: Iterator[Connection] = iter(())  # those that come after them, and were not looked at yet
        self._pumps = False  # it goes on in the next turn of the loop
        self._refused: set[Connection] = set()  # by all; until the next tick
        self._next_id = 1
        self.moved = 0

    def add(self, sock: socket.socket) -> None:
        """A channel to one more successor."""
        successor = _Successor(Channel(sock))
        self._successors.append(successor)
        self._loop.add_reader(successor.channel.fileno(), self._readable, successor)
        self._queue.update(dict.fromkeys(self._refused))
        self._refused.clear()
        self._pump()

    @property
    def able(self) -> bool:
        """Whether there is a successor left to move anything to."""
        return bool(self._successors)

    def offer(self, connection: Connection) -> None:
        """Move `connection` as soon as there is room, if it can be moved then."""
        if _can_ever_move(connection):
            connection.tell_when_flushed()
            self._queue[connection] = None
            self._pump()

    def offer_all(self, connections: Iterable[Connection]) -> None:
        """The same for all there are, each of which is looked at when its turn has come."""
        self._rest = iter(list(connections))
        self._pump()

    def tick(self, now: float) -> None:
        """Give up a successor that does not answer, offer again what was refused. About twice a second."""
        for successor in list(self._successors):
            if any(now - offer.since > ANSWER_TIMEOUT for offer in successor.offers[:1]):
                self._lose(successor, f"did not answer for {ANSWER_TIMEOUT:.0f} s")
        for successor in self._successors:
            successor.resting = any(now - offer.since > SLOW_AFTER for offer in successor.offers[:1])
        self._queue.update(dict.fromkeys(self._refused))
        self._refused.clear()
        self._pump()

    def close(self) -> None:
        for successor in self._successors:
            self._loop.remove_reader(successor.channel.fileno())
            self._loop.remove_writer(successor.channel.fileno())
            successor.channel.close()
        self._successors.clear()

    # -- moves

    def _pump(self) -> None:
        """Move what can be moved now, a batch in each turn of the loop."""
        if self._pumps:
            return
        for _ in range(BATCH):
            successor = self._free_successor()
            connection = self._next() if successor is not None else None
            if successor is None or connection is None:
                return
            if connection.movable and not self._move(connection, connection.pack(), successor):
                return
        self._pumps = True
        self._loop.call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._pumps = False
        self._pump()

    def _next(self) -> Connection | None:
        if self._queue:
            return self._queue.popitem(last=False)[0]
        connection = next(self._rest, None)
        if connection is not None and _can_ever_move(connection):
            connection.tell_when_flushed()
        return connection

    def _free_successor(self) -> _Successor | None:
        """The one with the fewest connections, None while that has enough to answer, or one has yet to tell."""
        if len(self._successors) == 1:
            return self._successors[0] if self._successors[0].free else None
        able = [each for each in self._successors if not each.resting and not each.channel.blocked]
        if not all(each.known for each in able):
            return None
        successor = min(able, key=_load, default=None)
        return successor if successor is not None and successor.free else None

    def _move(self, connection: Connection, capsule: Capsule, successor: _Successor) -> bool:
        number = self._next_id
        self._next_id += 1
        message = {"t": "move", "id": number, **capsule.to_wire()}
        try:
            sent = successor.channel.send(message, [connection.fileno()])
        except OSError as exc:  # no descriptor for the copy that travels
            self._log.debug(f"{self._name}: a connection cannot move now: {exc.strerror}")
            self._keep(connection)
            return True
        if not sent and not successor.channel.gone:
            self._log.debug(f"{self._name}: a connection cannot move now: there is no room for it in the channel")
            self._keep(connection)
            return True
        successor.in_flight[number] = _Offer(connection, capsule, self._loop.time())
        if not sent:
            self._lose(successor, "is gone")
            return False
        self._watch_writing(successor)
        return True

    def _keep(self, connection: Connection) -> None:
        """It stays here for now."""
        connection.stay()
        self._refused.add(connection)

    def _watch_writing(self, successor: _Successor) -> None:
        if successor.channel.blocked:
            self._loop.add_writer(successor.channel.fileno(), self._writable, successor)

    def _writable(self, successor: _Successor) -> None:
        if not successor.channel.flush():
            self._lose(successor, "is gone")
        elif not successor.channel.blocked:
            self._loop.remove_writer(successor.channel.fileno())
            self._see_off(successor)
            self._commit(successor)
            self._pump()

    def _readable(self, successor: _Successor) -> None:
        try:
            messages = successor.channel.receive()
        except ProtocolError as exc:
            self._lose(successor, f"sent nonsense ({exc})")
            return
        if messages is None:
            self._lose(successor, "is gone")
            return
        for message, fds in messages:
            _close_all(fds)
            self._answer(successor, message)
        self._pump()

    def _answer(self, successor: _Successor, message: Message) -> None:
        number = message.get("id")
        if message["t"] not in ("prepared", "refused") or type(number) is not int:
            return
        offer = successor.in_flight.pop(number, None)
        if offer is None:
            return
        told = message.get("connections")
        successor.holds = told if type(told) is int else (successor.holds or 0) + 1
        if message["t"] == "prepared":
            successor.prepared.append((number, offer))
            self._commit(successor)
            return
        successor.resting = True
        other = min((each for each in self._successors if each.free), key=_load, default=None)
        if other is not None and offer.holds:
            # At once, because a client with its next request at hand may never be idle when the tick comes.
            self._move(offer.connection, offer.capsule, other)
        else:
            self._keep(offer.connection)

    def _commit(self, successor: _Successor) -> None:
        """Send what is due, one at a time: whether a COMMIT has left decides whose the connection is."""
        while successor.prepared and not successor.channel.blocked:
            number, offer = successor.prepared.popleft()
            if not offer.holds:
                successor.channel.send({"t": "cancel", "id": number})
                self._keep(offer.connection)
            elif not successor.channel.send({"t": "commit", "id": number}):
                self._keep(offer.connection)  # the end of the channel will be read next
            else:
                successor.leaving = offer
                self._see_off(successor)
        self._watch_writing(successor)

    def _see_off(self, successor: _Successor) -> None:
        """Let go of a connection once its COMMIT has left."""
        if successor.leaving is not None and not successor.channel.blocked:
            self.moved += 1
            successor.leaving.connection.let_go()
            successor.leaving = None

    def _lose(self, successor: _Successor, why: str) -> None:
        """A successor that cannot take anything any more: what it was offered stays here."""
        if successor not in self._successors:
            return
        self._successors.remove(successor)
        self._loop.remove_reader(successor.channel.fileno())
        self._loop.remove_writer(successor.channel.fileno())
        successor.channel.close()
        staying = [offer.connection for offer in successor.offers]
        if staying:
            self._log.warning(f"{self._name}: a successor {why}; {len(staying)} connections stay here for now")
        if not self._successors:
            self._on_failed()
        for connection in staying:
            connection.stay()
            self._queue[connection] = None
        self._pump()


def _load(successor: _Successor) -> int:
    return successor.load


def _can_ever_move(connection: Connection) -> bool:
    return connection.phase is not Phase.CLOSED and not connection.fixed


class Receiver:
    """A successor's side of one channel. Event loop only. `has_room` tells whether one more connection is welcome."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        context: Context,
        sock: socket.socket,
        has_room: Callable[[], bool],
        on_end: Callable[[Receiver], None],
    ) -> None:
        self._loop = loop
        self._log = log
        self._context = context
        self._channel = Channel(sock)
        self._has_room = has_room
        self._on_end = on_end
        self._prepared: dict[int, tuple[int, Capsule]] = {}
        self._opening: set[asyncio.Task[None]] = set()
        loop.add_reader(self._channel.fileno(), self._readable)

    @property
    def coming(self) -> int:
        """Connections on their way to this worker."""
        return len(self._prepared) + len(self._opening)

    def _readable(self) -> None:
        try:
            messages = self._channel.receive()
        except ProtocolError as exc:
            self._log.warning(f"the hand-over from another worker ends: {exc}")
            messages = None
        if messages is None:
            self.close()
            self._on_end(self)
            return
        for message, fds in messages:
            if message["t"] == "move":
                self._prepare(message, fds)
                continue
            _close_all(fds)
            if message["t"] == "commit":
                self._commit(message)
            elif message["t"] == "cancel":
                prepared = self._take(message)
                _close_all([prepared[0]] if prepared is not None else [])

    def _take(self, message: Message) -> tuple[int, Capsule] | None:
        """What was prepared under the number that `message` names."""
        number = message.get("id")
        return self._prepared.pop(number, None) if type(number) is int else None

    def _prepare(self, message: Message, fds: list[int]) -> None:
        number = message.get("id")
        why = ""
        try:
            capsule = Capsule.from_wire(message)
        except CapsuleError as exc:
            why = f"not understood: {exc}"
        if len(fds) != 1 or type(number) is not int or number in self._prepared:
            why = why or "one descriptor and a new number are needed"
        if not why and capsule.socket is not None and self._context.websockets is None:
            why = "WebSockets are not served any more"
        if not why and not self._has_room():
            why = "no room"
        if why:
            _close_all(fds)
            self._log.debug(f"a connection was not taken over: {why}")
        else:
            assert isinstance(number, int)
            self._prepared[number] = (fds[0], capsule)
        held = len(self._context.connections) + self.coming
        self._send({"t": "refused" if why else "prepared", "id": number, "connections": held})

    def _send(self, message: Message) -> None:
        self._channel.send(message)
        if self._channel.blocked:
            self._loop.add_writer(self._channel.fileno(), self._writable)

    def _writable(self) -> None:
        self._channel.flush()
        if not self._channel.blocked:
            self._loop.remove_writer(self._channel.fileno())

    def _commit(self, message: Message) -> None:
        prepared = self._take(message)
        if prepared is not None:
            self._context.adopted += 1
            task = self._loop.create_task(self._open(*prepared))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, fd: int, capsule: Capsule) -> None:
        try:
            sock = socket.socket(fileno=fd)
        except OSError:  # it is no socket
            os.close(fd)
            return
        sock.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: new_connection(self._context, None, capsule), sock)
        except OSError as exc:
            self._log.debug(f"a connection ended while it moved: {exc.strerror}")
            sock.close()

    def close(self) -> None:
        """The sender is gone or done: what it did not commit was never ours."""
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self._channel.close()
        _close_all([fd for fd, _ in self._prepared.values()])
        self._prepared.clear()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
