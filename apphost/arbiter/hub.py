"""What the arbiter waits for: signals, channels and the sockets of services, in one selector."""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType

from apphost.arbiter.hearsay import examine
from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError


class Hub:
    """One selector over the wake-up pipe of the signals, any number of channels, and what services watch.

    Channels are read when they have something and written to when they can take it; nothing here ever blocks but
    `wait`. Descriptors that come with messages are closed: nobody sends the arbiter any.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._selector = selectors.DefaultSelector()
        self._signals: deque[int] = deque()
        self._wakeup, self._waker = os.pipe()
        for fd in (self._wakeup, self._waker):
            os.set_blocking(fd, False)
        self._wakeup_only = select.poll()
        self._wakeup_only.register(self._wakeup, select.POLLIN)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._drain_wakeup)

    # -- signals

    def catch(self, numbers: Iterable[signal.Signals]) -> None:
        """Collect these signals from now on; each ends a `wait`."""
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _drain_wakeup(self, _mask: int) -> None:
        try:
            while os.read(self._wakeup, 4096):
                pass
        except BlockingIOError:
            pass

    def signals(self) -> list[signal.Signals]:
        """The signals that have come since the last call, in order."""
        return [signal.Signals(self._signals.popleft()) for _ in range(len(self._signals))]

    # -- channels

    def wait(self, timeout: float) -> list[Callable[[], None]]:
        """Wait for something, for at most `timeout` seconds. What is to be done about it, for the caller to call."""
        # Whoever is stopped in `select`, beyond its time, is told of nothing that has come: hence the second look.
        found = self._selector.select(timeout) or self._selector.select(0)
        return [lambda key=key, mask=mask: key.data(mask) for key, mask in found]  # type: ignore[misc]

    def gather(self, seconds: float) -> None:
        """Let what comes gather for so long, so that one turn takes up all of it; a signal ends this."""
        self._wakeup_only.poll(seconds * 1000)

    def listen(self, channel: Channel, handle: Callable[[Message], None], at_end: Callable[[], None]) -> None:
        """Have every message of `channel` handled, and its end; after that it is not listened to any more."""

        def ready(mask: int) -> None:
            if not self._listens_to(channel):
                return  # forgotten by what was done just before
            if mask & selectors.EVENT_WRITE:
                channel.flush()
                self._watch(channel, ready)
            if mask & selectors.EVENT_READ and not self._read(channel, handle):
                self._selector.unregister(channel)
                at_end()

        self._selector.register(channel, selectors.EVENT_READ, ready)

    def _read(self, channel: Channel, handle: Callable[[Message], None]) -> bool:
        try:
            messages = channel.receive()
            for _, fds in messages or ():
                for fd in fds:
                    os.close(fd)
            for message, _ in messages or ():
                examine(message)
        except ProtocolError as exc:
            self.log.error(f"a channel is closed: {exc}")
            return False
        if messages is None:
            return False
        for message, _ in messages:
            handle(message)
        return True

    def read_rest(self, channel: Channel, handle: Callable[[Message], None], reads: int) -> None:
        """Handle what a process that has ended said last; at most `reads` reads."""
        for _ in range(reads):
            if not self._read(channel, handle):
                return

    def _watch(self, channel: Channel, ready: Callable[[int], None]) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.blocked else 0)
        self._selector.modify(channel, events, ready)

    def send(self, channel: Channel, message: Message, fds: list[int] | None = None) -> None:
        """Send, or queue; a channel that has ended takes it silently, as its end is told elsewhere."""
        channel.send(message, fds)
        if channel.blocked and self._listens_to(channel):
            self._watch(channel, self._selector.get_key(channel).data)

    def forget(self, channel: Channel) -> None:
        """Stop listening, and close it."""
        if self._listens_to(channel):
            self._selector.unregister(channel)
        channel.close()

    # -- other descriptors

    def watch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Call `ready` with what has come of `events` (of `selectors`), from now on; again: with other events.

        It may be called once more after `unwatch`, when both came in the same turn.
        """
        if sock.fileno() in self._selector.get_map():
            self._selector.modify(sock, events, ready)
        else:
            self._selector.register(sock, events, ready)

    def unwatch(self, sock: socket.socket) -> None:
        """Before it is closed."""
        if sock.fileno() >= 0 and sock.fileno() in self._selector.get_map():
            self._selector.unregister(sock)

    def _listens_to(self, channel: Channel) -> bool:
        # A closed channel has no descriptor, which makes the selector's own look-up raise.
        return channel.fileno() >= 0 and channel in self._selector.get_map()
