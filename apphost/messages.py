"""Messages between the processes of one apphost: arbiter, fork servers and workers.

A channel is one end of an `AF_UNIX` stream socketpair (stream, because macOS has no SEQPACKET). A message is one line
of JSON, an object whose key `t` names its kind; file descriptors travel beside the line that announces them with
`fds`: their count. Unknown kinds and unknown keys are ignored by the receiver, so that two versions of apphost can
talk across an upgrade; a line that is not such an object is a `ProtocolError` and ends the channel.

Orders are idempotent: sending one twice does what sending it once does.
"""

from __future__ import annotations

import array
import errno
import json
import os
import signal
import socket
from collections import deque
from typing import Any

PROTOCOL_VERSION = 1

# The one order that is no message: to a process that may be too stuck to read, to write down its stacks.
DUMP_SIGNAL = signal.SIGUSR2

MAX_MESSAGE = 1 << 20  # bytes; the largest real one is a boot failure with its traceback, cut to 64 KiB by its sender
MAX_FDS = 16  # of a message: an order to drain has one for each successor, and 16 are enough to spread connections over
_READ_SIZE = 65536
# The last: more descriptors of this user are under way than RLIMIT_NOFILE allows (unix(7)), until somebody reads some.
_NOT_NOW = (errno.EAGAIN, errno.EINTR, errno.ETOOMANYREFS)

Message = dict[str, Any]


class ProtocolError(Exception):
    """The peer sent something that is not a message, or more than a channel may buffer."""


def encode(message: Message) -> bytes:
    """One line of JSON, without raw newlines inside (JSON escapes them)."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def is_cut(message: Message, fds: list[int]) -> bool:
    """Whether the descriptors of a received message are lost, since this process had no room for all of them."""
    return len(fds) < int(message.get("fds", 0))


class Decoder:
    """Turns bytes and descriptors, in any split, into messages. Pure: performs no I/O.

    Descriptors that no message claims are kept in `fds` for the owner to close. `LOST` among them stands for all those
    of one message.
    """

    LOST = -1

    def __init__(self, rest: bytes = b"") -> None:
        self._buffer = bytearray(rest)
        self.fds: deque[int] = deque()

    def feed(self, data: bytes, fds: list[int]) -> list[tuple[Message, list[int]]]:
        """The messages completed by `data`, each with the descriptors it announced, or with none where they are `LOST`.

        Raises `ProtocolError` for a line that is no JSON object with a text `t`, for one longer than `MAX_MESSAGE`,
        and for a message that announces more descriptors than have come.
        """
        self.fds.extend(fds)
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        if max(map(len, (*lines, rest))) > MAX_MESSAGE:
            raise ProtocolError(f"a message of more than {MAX_MESSAGE} bytes")
        came = list(self.fds)
        try:
            return [self._claim(_parse(bytes(line))) for line in lines]
        except ProtocolError:
            self.fds = deque(came)  # nobody gets the messages before the bad one: theirs too are the owner's to close
            raise

    @property
    def rest(self) -> bytes:
        """What has come of a message whose end has not."""
        return bytes(self._buffer)

    def _claim(self, message: Message) -> tuple[Message, list[int]]:
        count = message.get("fds", 0)
        right = type(count) is int and count >= 0  # to isinstance, a bool is an int
        if right and count and self.fds and self.fds[0] == self.LOST:
            self.fds.popleft()
            return message, []
        if not right or count > len(self.fds):
            raise ProtocolError(f"message {message['t'][:80]!r} announces {str(count)[:20]} fds, {len(self.fds)} came")
        return message, [self.fds.popleft() for _ in range(count)]


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):  # the latter for deep nesting
        raise ProtocolError(f"not a message: {line[:80]!r}") from None
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise ProtocolError(f"not a message: {line[:80]!r}")
    return message


class Channel:
    """One end of a channel: a non-blocking socket, a decoder, and what could not be sent yet.

    `send` and `flush` never block and never raise for a peer that is gone (end of file tells, through `receive`). What
    the peer does not read is kept, up to `MAX_MESSAGE` bytes; beyond that the peer is stuck, and what does not fit is
    not taken.

    gone: sending has found that the peer is.
    """

    def __init__(self, sock: socket.socket, rest: bytes = b"") -> None:
        """`rest`: the beginning of a message, read by whoever had this end before."""
        sock.setblocking(False)
        self.sock = sock
        self.gone = False
        self._decoder = Decoder(rest)
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._unsent_size = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def rest(self) -> bytes:
        """The beginning of a message whose end has not come."""
        return self._decoder.rest

    @property
    def blocked(self) -> bool:
        """Whether something waits for the peer to read: then poll for writing and call `flush`."""
        return bool(self._unsent)

    def send(self, message: Message, fds: list[int] | None = None) -> bool:
        """Send `message`, or keep it until the peer reads; whether it was taken. If not, the peer is `gone`, or there
        is no room. The descriptors stay the caller's: those that are kept are duplicates.
        """
        fds = fds or []
        data = encode({**message, "fds": len(fds)} if fds else message)
        if self._unsent_size + len(data) > MAX_MESSAGE:
            return False
        # What leaves at once needs no duplicates: a process that has no descriptors left can give some away.
        sent = 0 if self._unsent else self._push(data, fds)
        if sent is None:
            return False
        if sent < len(data):
            self._unsent.append((data[sent:], [] if sent else [os.dup(fd) for fd in fds]))
            self._unsent_size += len(data) - sent
        return self.flush()

    def flush(self) -> bool:
        """Send what waits, as far as the peer reads. False when the peer is gone."""
        while self._unsent:
            data, fds = self._unsent[0]
            sent = self._push(data, fds)
            if sent is None:
                self._drop_unsent()
                return False
            if sent == 0:
                return True
            self._unsent.popleft()
            self._unsent_size -= sent
            _close_all(fds)
            if sent < len(data):
                self._unsent.appendleft((data[sent:], []))
        return True

    def _push(self, data: bytes, fds: list[int]) -> int | None:
        """How many bytes the peer has taken, with the first of them the descriptors; None when it is gone."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            return self.sock.sendmsg([data], ancillary)
        except OSError as exc:
            if exc.errno in _NOT_NOW:
                return 0
            self.gone = True
            return None

    def receive(self) -> list[tuple[Message, list[int]]] | None:
        """What has arrived, each message with its descriptors; None at end of file. Raises `ProtocolError`.

        A message comes without any when this process had no descriptors left for them: see `is_cut`.
        """
        try:
            data, fds = _receive(self.sock)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            _close_all(fds)
            return None
        return self._decoder.feed(data, fds)

    def close(self) -> None:
        self._drop_unsent()
        _close_all(list(self._decoder.fds))
        self._decoder.fds.clear()
        self.sock.close()

    def _drop_unsent(self) -> None:
        for _, fds in self._unsent:
            _close_all(fds)
        self._unsent.clear()
        self._unsent_size = 0


# socket.recv_fds ignores its flags argument, so a descriptor would be inherited by every subprocess of the application.
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    numbers = array.array("i")
    space = socket.CMSG_SPACE(MAX_FDS * numbers.itemsize)
    data, ancillary, flags, _address = sock.recvmsg(_READ_SIZE, space, _CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    if not _CLOEXEC:
        for fd in numbers:
            os.set_inheritable(fd, False)
    if flags & socket.MSG_CTRUNC and len(numbers) < MAX_FDS:
        # Not more than may be sent, but more than could be installed (RLIMIT_NOFILE). One read gets the descriptors of
        # one message at most, so these are all of that message.
        _close_all(list(numbers))
        return data, [Decoder.LOST]
    return data, list(numbers)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        if fd != Decoder.LOST:
            os.close(fd)
