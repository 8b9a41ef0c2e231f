"""One open WebSocket: messages for the application, control frames for us, the closing handshake (RFC 6455, 5 to 7).

    OPEN --> LEAVING --> RESTING <--> OFFERED         its way to another worker
    OPEN, LEAVING -----------> CLOSING --> CLOSED     our close frame is out; the client's ends it, or its time is up
    OPEN, LEAVING, RESTING --> DISMISSED --> CLOSED   the same, because the worker goes: the application knows already
    any ---------------------> CLOSED                 the client's close frame came first, or the connection was lost

The connection gives it bytes and time-outs; the interface takes messages and sends. It owns the limits: of messages
that wait for the application, of work in one turn, of the wait for a pong and for the end.
"""

from __future__ import annotations

import enum
import fnmatch
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apphost.lifecycle import Policy
from apphost.protocols.base import Handler
from apphost.protocols.capsule import HEAD_MAX, SOCKET_MAX, Socket
from apphost.protocols.deadlines import NEVER
from apphost.protocols.deflate import Deflate
from apphost.protocols.exchange import HIGH_WATER, NOBODY
from apphost.protocols.frames import (
    PING,
    PONG,
    Broken,
    Close,
    Ping,
    Pong,
    Reader,
    close_frame,
    control_frame,
    message_frame,
)
from apphost.protocols.masking import Unmask, unmask

if TYPE_CHECKING:
    from apphost.protocols.opening import Opening
    from apphost.protocols.wire import Wire

# bytes that a waiting message counts besides its content, about what the object takes: a million empty ones are no
# small thing
MESSAGE_COST = 64

_LONG = 10 * 365 * 86400.0  # s; "never" in a number that can travel


class Life(enum.Enum):
    OPEN = enum.auto()  # the application has it
    LEAVING = enum.auto()  # the application has to finish, so that another worker's can go on
    RESTING = enum.auto()  # it has finished: the socket can be offered to another worker
    OFFERED = enum.auto()  # which has not answered yet; nothing is read or sent
    CLOSING = enum.auto()  # we have said the last word; the client may still send
    DISMISSED = enum.auto()  # the same, but the application was told of the end, whatever the client still says
    CLOSED = enum.auto()  # nothing reaches the client any more


# Where a socket may go from where it is. What is asked of it too late, or twice, is not in here and changes nothing.
TRANSITIONS: dict[Life, frozenset[Life]] = {
    Life.OPEN: frozenset({Life.LEAVING, Life.CLOSING, Life.DISMISSED, Life.CLOSED}),
    Life.LEAVING: frozenset({Life.RESTING, Life.CLOSING, Life.DISMISSED, Life.CLOSED}),
    Life.RESTING: frozenset({Life.OFFERED, Life.DISMISSED, Life.CLOSED}),
    Life.OFFERED: frozenset({Life.RESTING, Life.CLOSED}),
    Life.CLOSING: frozenset({Life.CLOSED}),
    Life.DISMISSED: frozenset({Life.CLOSED}),
    Life.CLOSED: frozenset(),
}


OnReload = Sequence[tuple[Callable[[str], object], Policy]]


def read_on_reload(entries: Iterable[str]) -> OnReload:
    """From `PATTERN=POLICY` (shell wildcards; `*` also matches slashes) or only `POLICY`, for all paths."""
    rules = []
    for entry in entries:
        pattern, equals, policy = entry.rpartition("=")
        rules.append((re.compile(fnmatch.translate(pattern if equals else "*")).match, Policy(policy)))
    return rules


_OPEN, _LEAVING, _RESTING, _OFFERED = Life.OPEN, Life.LEAVING, Life.RESTING, Life.OFFERED
_CLOSING, _DISMISSED, _CLOSED = Life.CLOSING, Life.DISMISSED, Life.CLOSED
_MOVING = frozenset((_LEAVING, _RESTING, _OFFERED))
# In these our last word is not said. Asked behind `is _OPEN` where it matters: to look a member up takes 0.2 us.
_ALIVE = _MOVING | {_OPEN}


@dataclass(frozen=True, slots=True)
class WebSocketOptions:
    """What holds for every socket. Durations in seconds, 0 for no pings; `message`: bytes of one, inflated."""

    ping_interval: float = 20.0
    ping_timeout: float = 20.0
    close_timeout: float = 10.0  # for the client's half of the closing handshake
    message: int = 16 * 2**20
    compression: bool = True
    on_reload: OnReload = ()
    unmask: Unmask = unmask

    def policy(self, path: str) -> Policy:
        """What becomes of a socket of this path when its worker goes: the first pattern that matches decides."""
        return next((policy for matches, policy in self.on_reload if matches(path)), Policy.CLOSE)


class WebSocket:
    """See above. Event loop only. `handler` is told of what happens on the wire, as with a request."""

    __slots__ = (
        "_choked",
        "_due",
        "_more",
        "_ping",
        "_state",
        "_time_to_move",
        "_turn",
        "code",
        "connection",
        "deflate",
        "handler",
        "head",
        "life",
        "messages",
        "offered",
        "options",
        "policy",
        "reader",
        "reason",
        "subprotocol",
        "waiting",
    )

    handler: Handler

    def __init__(
        self,
        connection: Wire,
        options: WebSocketOptions,
        deflate: Deflate | None,
        opening: Opening,
        subprotocol: str | None,
    ) -> None:
        self.connection = connection
        self.options = options
        self.deflate = deflate
        self.head = opening.head
        self.policy = opening.policy
        self.offered = opening.subprotocols
        self.subprotocol = subprotocol
        self.reader = Reader(options.message, deflate, options.unmask)
        self.life = _OPEN
        self.code = 1006  # how it ended (RFC 6455, 7.1.5); 1006 until anything better is known
        self.reason = ""
        self.messages: deque[str | bytes] = deque()  # not taken by the application yet
        self.waiting = 0  # about the bytes that those take
        self._ping = b""  # the payload of ours that was not answered yet
        self._more = False  # the rest of what was read waits for its turn
        self._turn = False  # and has its turn soon
        self._choked = False  # the client asks for pongs and does not read them
        # -- on the way to another worker
        self._state: bytes | None = None  # what the application leaves
        self._due = 0.0  # seconds to the next ping, or to the end of the time for an answer
        self._time_to_move = 0.0

    # -- the application's side

    @property
    def open(self) -> bool:
        """Whether a message may still reach the client. The transport knows of a failed write before the loop does."""
        return (self.life is _OPEN or self.life in _ALIVE) and not self.connection.transport.is_closing()

    @property
    def moving(self) -> bool:
        """Whether another worker is to go on with it: `messages` are for the application there."""
        return self.life in _MOVING

    @property
    def ended(self) -> bool:
        """Whether no more messages will come: after the last of `messages`, `code` and `reason` say how it ended."""
        return self.life is not _OPEN and self.life is not _CLOSING

    @property
    def writable(self) -> bool:
        return not self.connection.write_paused

    def take(self) -> str | bytes:
        """The oldest message; IndexError when there is none."""
        message = self.messages.popleft()
        self.waiting -= len(message) + MESSAGE_COST
        if self.connection.read_paused or self._more:
            self._flow()
        return message

    def send(self, data: str | bytes) -> None:
        """Send one message. Only while open."""
        self.connection.write_framed(*message_frame(data, self.deflate))

    def close(self, code: int, reason: str = "") -> None:
        """Say the last word, and wait for the client's, for a while. Nothing happens unless it is open."""
        last = close_frame(code, reason)  # first, as it raises for a reason that is no text
        if self._enter(_CLOSING):
            self._say_last(last)
            self.messages.clear()
            self.waiting = 0

    def _enter(self, life: Life) -> bool:
        """Go there, if it may from where it is; whether it has."""
        may = life in TRANSITIONS[self.life]
        if may:
            self.life = life
        return may

    def _say_last(self, last: bytes) -> None:
        self.connection.write(last)
        self._arm(self.options.close_timeout)
        self._flow()

    def dismiss(self, code: int, why: str) -> None:
        """The worker goes: close, and tell the application at once. `why` is for the log."""
        if self._enter(_DISMISSED):
            self.connection.context.log.debug(f"the WebSocket of {self.connection.peer} is closed with {code}: {why}")
            self._say_last(close_frame(code))
            self.code = code
            self.handler.disconnected()

    # -- moving to another worker

    def leave(self, patience: float, time_to_move: float) -> None:
        """Have the application finish, within `patience` seconds, so that another worker's goes on with the socket,
        which must be taken within `time_to_move` seconds then.

        It gets a disconnect with 1012 in place of further messages; those, and what is still in the kernel, are for
        the one after it.
        """
        if not self._enter(_LEAVING):
            return
        self.connection.context.log.debug(f"the WebSocket of {self.connection.peer} is to move")
        self.code = 1012
        # Pings may be off.
        self._due = min(self.connection.read_deadline - self.connection.context.loop.time(), _LONG)
        self._time_to_move = time_to_move
        self._arm(patience)
        self._flow()
        self.handler.disconnected()

    def part(self, state: bytes | None) -> None:
        """The application has finished, and leaves `state`."""
        self.handler = NOBODY
        if self._enter(_RESTING):
            self._state = state
            self._arm(self._time_to_move)
            self._offer()

    @property
    def movable(self) -> bool:
        """Whether the application is done with it, and no message is half read."""
        return self.life is _RESTING and self.reader.at_boundary

    @property
    def portable(self) -> bool:
        """Whether what there is of it fits into a capsule."""
        head = sum(map(len, itertools.chain(*self.head.headers, (self.head.target,))))
        data = sum(len(each.encode() if isinstance(each, str) else each) + MESSAGE_COST for each in self.messages)
        alone = self.deflate is None or not self.deflate.keep_theirs
        return alone and head <= HEAD_MAX and data + len(self.reader.buffer) <= SOCKET_MAX

    def _offer(self) -> None:
        context = self.connection.context
        if not self.movable:
            return
        if not self.portable:
            self.dismiss(1012, "more waits for the application than can travel")
        elif context.on_idle is not None:
            context.on_idle(self.connection)  # type: ignore[arg-type]

    def pack(self) -> tuple[float, bytes, Socket]:
        """Seconds to the next time-out, what was read and not parsed, and all the rest."""
        self._enter(_OFFERED)
        self._more = False
        deflate = self.deflate
        data, self.reader.buffer = self.reader.buffer, b""
        return self._due, data, Socket(
            target=self.head.target,
            headers=self.head.headers,
            offered=self.offered,
            subprotocol=self.subprotocol,
            window=None if deflate is None else (deflate.ours, deflate.theirs, deflate.keep_ours),
            messages=list(self.messages),
            ping=self._ping,
            state=self._state,
        )  # fmt: skip

    def stay(self, data: bytes) -> None:
        """No other worker has taken it; `data` is what `pack` gave, and what came since."""
        self._enter(_RESTING)
        self.reader.buffer = data
        self._more = bool(data)

    def unpack(self, socket: Socket, data: bytes, left: float) -> None:
        """Go on where another worker has stopped."""
        if self.life is not _OPEN:  # the application would not have it
            return
        self.messages.extendleft(reversed(socket.messages))
        self.waiting = sum(len(message) + MESSAGE_COST for message in self.messages)
        self._ping = socket.ping
        most = self.options.ping_timeout if self._ping else self.options.ping_interval
        self._arm(min(left, most or left))  # the settings may be new ones
        self._take_later(data)
        if self.messages:
            self.handler.body_arrived()

    # -- the wire's side

    def begin(self, early: bytes) -> None:
        """`early`: what the client has sent behind its handshake, which may not wait for more to come."""
        self._arm(self.options.ping_interval)
        self._take_later(early)

    def _take_later(self, data: bytes) -> None:
        """Bytes that are there before anybody is ready for them."""
        if data:
            self.reader.buffer = data
            self._more = True
        self._flow()

    def feed(self, data: bytes) -> None:
        """Bytes of the client."""
        events, self._more = self.reader.feed(data)
        replies = b""
        came = False
        for event in events:
            if type(event) is bytes or type(event) is str:
                if self.life is _OPEN or self.life in _ALIVE:
                    self.messages.append(event)
                    self.waiting += len(event) + MESSAGE_COST
                    came = True
            else:
                replies += self._answer(event)  # type: ignore[arg-type]  # mypy does not narrow by type()
        if replies:
            self.connection.write(replies)
            self._choked = self.connection.write_paused
        if self.life is _CLOSED:
            self._end()
            return
        if self._ping and (self.reader.buffer or not self.reader.at_boundary):
            self._await_pong()  # the client is alive, and no pong can stand within a frame
        if self._more or self._choked or self.life is not _OPEN or self.waiting > HIGH_WATER:
            self._flow()
        if self.life is _RESTING:
            self._offer()
        elif came:
            self.handler.body_arrived()

    def _go_on(self) -> None:
        self._turn = False
        if self._more:
            self.feed(b"")
            self._flow()
            if self.connection.eof and self.life is not _CLOSED:
                self.eof()

    def _answer(self, event: Ping | Pong | Close | Broken) -> bytes:
        """What a control frame changes, and the frame to send for it."""
        alive = self.life in _ALIVE
        if type(event) is Ping:
            return control_frame(PONG, event.payload) if alive else b""
        if type(event) is Pong:
            if event.payload == self._ping and self._ping and alive:
                self._ping = b""
                self._due = self.options.ping_interval or _LONG
                if self.life is _OPEN:
                    self._arm(self.options.ping_interval)
            return b""
        assert type(event) is Close or type(event) is Broken
        if self.life is not _DISMISSED:
            self.code, self.reason = event.code, event.reason
        self._enter(_CLOSED)
        return close_frame(event.code, event.reason) if alive else b""

    def _end(self) -> None:
        """Both have said their last word, or there is nothing more to wait for."""
        self._more = False
        self.connection.linger()
        self._tell()

    def eof(self) -> None:
        """The client has ended its side. One that does so without a closing handshake is gone for good."""
        if not self._more:
            self.connection.close()
            self.lost()

    def lost(self) -> None:
        """The connection has ended."""
        self._enter(_CLOSED)
        self._more = False
        self._tell()

    def _tell(self) -> None:
        """No more events for the application."""
        handler = self.handler
        self.handler = NOBODY  # they refer to each other: without this every socket would wait for the collector
        handler.disconnected()

    # -- time-outs and flow

    def timed_out(self) -> None:
        if self.moving:
            why = "the application has not parted in time" if self.life is _LEAVING else "nobody has taken it"
            self.dismiss(1012, why)
        elif self.life is not _OPEN:
            self.connection.close()
            self.lost()
        elif self._ping and not self.connection.read_paused:
            self._enter(_CLOSED)
            self.code, self.reason = 1011, "no answer to a ping"
            self.connection.write(close_frame(self.code, self.reason))
            self._end()
        elif self._ping:  # the answer may be there, but we do not read: the application is slow, not the client
            self.connection.look_at_client()
            self._await_pong()
        else:
            self._ping = os.urandom(4)
            self.connection.write(control_frame(PING, self._ping))
            self._await_pong()

    def _await_pong(self) -> None:
        if self.life is _OPEN:
            self._arm(self.options.ping_timeout)

    def _arm(self, seconds: float) -> None:
        self.connection.expect_within(seconds if seconds else NEVER)

    def write_resumed(self) -> None:
        self._choked = False
        self._flow()
        self.handler.write_resumed()
        self._offer()

    def _flow(self) -> None:
        """Read or do not read, go on with what was read or do not, as things are."""
        # Nobody takes messages from one that moves, but the one that is half read must be read to its end.
        moving = self.moving
        high = SOCKET_MAX if moving else HIGH_WATER
        crowded = self.life in _ALIVE and (self._choked or self.waiting > high)
        ready = not crowded and not (moving and self.reader.at_boundary)
        if ready and self._ping and self.connection.read_paused:
            self._await_pong()  # the answer may wait in the kernel
        self.connection.read_on(ready and not self._more)
        if ready and self._more and not self._turn:
            self._turn = True
            self.connection.context.loop.call_soon(self._go_on)
