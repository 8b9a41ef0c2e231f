"""WebSocket frames (RFC 6455, section 5): bytes to messages, messages to bytes. Pure.

wsproto's frame layer is the judge of what a client sends. In front of it, this cuts the stream into frames: so a
message is refused for its size before it is buffered, what belongs to a frame not yet complete stays as it came (and
can move to another process), and the most common frames, control frames and whole messages that are all there, are read
in one step.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, NamedTuple

from wsproto.frame_protocol import CloseReason, FrameProtocol, ParseFailed

from apphost.protocols.deflate import SMALLEST, Deflate, TooBig
from apphost.protocols.masking import Unmask, unmask

HOLD_MAX = 65536  # bytes of a frame that wait for the rest of it; a larger frame is read piece by piece
FRAMES_PER_TURN = 256  # a client that sends thousands of tiny frames at once must let others have their turn
INFLATED_PER_TURN = 262144  # bytes; and so must one whose frames inflate to more than asyncio reads at once
REASON_MAX = 123  # bytes: what is left of a control frame's 125 (RFC 6455, 5.5) beside the code

TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A  # first bytes of frames that are whole messages
_COMPRESSED = 0x40  # RSV1: the first frame of a compressed message has it
_CONTROL = 0x08
_MASKED = 0x80
_FIRST_BYTES = frozenset((0x00, 0x80, 0x01, TEXT, 0x02, BINARY, CLOSE, PING, PONG))
_WHOLE = frozenset((TEXT, BINARY))
_WITH_DEFLATE = frozenset((TEXT | _COMPRESSED, BINARY | _COMPRESSED, 0x01 | _COMPRESSED, 0x02 | _COMPRESSED))
_WHOLE_WITH_DEFLATE = _WHOLE | {TEXT | _COMPRESSED, BINARY | _COMPRESSED}

_SHORT = {first: [bytes((first, size)) for size in range(126)] for first in (*_WHOLE_WITH_DEFLATE, PING, PONG, CLOSE)}


class Ping(NamedTuple):
    payload: bytes


class Pong(NamedTuple):
    payload: bytes


class Close(NamedTuple):
    """The client's close frame; code 1005 when it gave none (RFC 6455, 7.1.5)."""

    code: int
    reason: str


class Broken(NamedTuple):
    """The client broke the protocol: the socket must be closed with `code`. Nothing after it is read."""

    code: int
    reason: str


Event = str | bytes | Ping | Pong | Close | Broken


class Reader:
    """What one client sends, as events: `str` and `bytes` are its messages.

    limit: bytes of a message, inflated.
    """

    __slots__ = ("_left", "_message", "_protocol", "_room", "_unmask", "buffer", "deflate", "done", "limit", "open")

    def __init__(self, limit: int, deflate: Deflate | None = None, unmask: Unmask = unmask) -> None:
        self.limit = limit
        self.deflate = deflate
        self._unmask = unmask
        self.buffer = b""  # what has not been looked at: less than a frame, or more than one turn's worth of them
        self.open = False  # a message has begun and not ended
        self.done = False  # a close frame or a broken one was read
        self._left = 0  # bytes of the current frame that have not come, while it is read piece by piece
        self._room = 0  # bytes that the open message may still have, as they come
        self._message: io.BytesIO | None = None  # what there is of the open message
        self._protocol: FrameProtocol | None = None  # made when it is needed: most sockets do without

    @property
    def at_boundary(self) -> bool:
        """Whether `buffer` is all that there is: no message has begun."""
        return not self.open and not self._left

    def feed(self, data: bytes) -> tuple[list[Event], bool]:
        """Take bytes off the wire: the events, and whether another call, with b"", will give more."""
        buffer = self.buffer + data if self.buffer else data
        whole = _WHOLE if self.deflate is None else _WHOLE_WITH_DEFLATE
        events: list[Event] = []
        position = 0
        more = False
        deflate = self.deflate
        if deflate is not None:
            deflate.work = 0
        for _ in range(FRAMES_PER_TURN):
            if self.done:
                break
            if deflate is not None and deflate.work > INFLATED_PER_TURN:
                more = True
                break
            if self._left:
                piece = buffer[position : position + self._left]
                if not piece:
                    break
                position += len(piece)
                self._left -= len(piece)
                self._judge(piece, events)
                continue
            header, length, regular = _measure(buffer, position)
            if not header:
                break
            first = buffer[position]
            end = position + header + length
            if regular and not self.open and first in whole and end <= len(buffer) and length <= self.limit:
                start = position + header
                self._take_whole(first, self._unmask(buffer[start:end], buffer[start - 4 : start]), events)
            elif not regular or not self._may_come(first, length):
                self._judge(buffer[position:end], events)  # which ends it: there are words for everything
            elif (refusal := self._refuse(first, length)) is not None:
                self._break(*refusal, events)
            elif end > len(buffer) and length <= HOLD_MAX:
                break
            elif first & _CONTROL:
                self._take_control(first, buffer[position + 2 : end], events)
            else:
                self._begin(length, end - len(buffer))
                self._judge(buffer[position:end], events)
            position = end
        else:
            more = True
        self.buffer = b"" if self.done else buffer[position:]
        return events, more and bool(self.buffer)

    def _may_come(self, first: int, length: int) -> bool:
        """Whether nothing is wrong with the header of a frame by itself."""
        if first & _CONTROL and length > 125:
            return False
        return first in _FIRST_BYTES or (self.deflate is not None and first in _WITH_DEFLATE)

    def _refuse(self, first: int, length: int) -> tuple[int, str] | None:
        """What is wrong with a frame where it stands, its header being right by itself; before its payload comes."""
        if first & _CONTROL:
            return None
        if self.open is bool(first & 0x0F):
            return CloseReason.PROTOCOL_ERROR, "a frame is out of order"
        if not self.open:
            # Deflate makes hardly anything larger, but each fragment may cost some bytes more.
            self._room = 2 * self.limit + 64 if first & _COMPRESSED else self.limit
        return self._too_big() if length > self._room else None

    def _too_big(self) -> tuple[int, str]:
        return CloseReason.MESSAGE_TOO_BIG, f"a message has more than {self.limit} bytes"

    def _take_whole(self, first: int, payload: bytes, events: list[Event]) -> None:
        """A message in one frame that is all there."""
        try:
            if first & _COMPRESSED:
                assert self.deflate is not None
                payload = self.deflate.inflate(payload)
            events.append(payload.decode() if first & 0x0F == 1 else payload)
        except TooBig:
            self._break(*self._too_big(), events)
        except UnicodeDecodeError:
            self._break(CloseReason.INVALID_FRAME_PAYLOAD_DATA, "a text message is not UTF-8", events)
        except zlib.error:
            self._break(CloseReason.INVALID_FRAME_PAYLOAD_DATA, "a message cannot be inflated", events)

    def _take_control(self, first: int, masked: bytes, events: list[Event]) -> None:
        payload = self._unmask(masked[4:], masked[:4])
        if first == PING:
            events.append(Ping(payload))
        elif first == PONG:
            events.append(Pong(payload))
        else:
            self.done = True
            events.append(_read_close(payload))

    def _begin(self, length: int, missing: int) -> None:
        """A data frame that wsproto reads, piece by piece while `missing` bytes of it have not come."""
        self._left = max(missing, 0)
        self._room -= length
        self.open = True

    def _judge(self, data: bytes, events: list[Event]) -> None:
        if self._protocol is None:
            self._protocol = FrameProtocol(client=False, extensions=[self.deflate] if self.deflate else [])
        self._protocol.receive_bytes(data)
        try:
            for frame in self._protocol.received_frames():
                self._take_piece(frame.payload, frame.message_finished, events)
        except ParseFailed as exc:
            self._break(exc.code, _WHY.get(exc.code, str(exc)), events)

    def _take_piece(self, piece: Any, last: bool, events: list[Event]) -> None:
        """A piece of a message; they are kept as bytes, because thousands may have a character each."""
        if self._message is None:
            self._message = io.BytesIO()
        self._message.write(piece.encode() if isinstance(piece, str) else piece)
        if last:
            whole = self._message.getvalue()
            events.append(whole.decode() if isinstance(piece, str) else whole)
            self._message = None
            self.open = False

    def _break(self, code: int, why: str, events: list[Event]) -> None:
        self.done = True
        events.append(Broken(int(code), why))


# Of wsproto's failures that only have a code.
_WHY = {
    CloseReason.MESSAGE_TOO_BIG: "a message is too large, once inflated",
    CloseReason.INVALID_FRAME_PAYLOAD_DATA: "a message is not UTF-8, or cannot be inflated",
}


def _read_close(payload: bytes) -> Close | Broken:
    """RFC 6455, 5.5.1 and 7.4."""
    if not payload:
        return Close(1005, "")
    code = int.from_bytes(payload[:2], "big")
    if not may_be_sent(code):  # one byte makes no code, either
        return Broken(1002, "a close frame has a code that may not be sent")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError:
        return Broken(1007, "the reason of a close frame is not UTF-8")


def _measure(buffer: bytes, position: int) -> tuple[int, int, bool]:
    """Bytes of the header and of the payload of the frame at `position`, and whether it is masked and says its length
    in the shortest way and without the highest bit, as it must (RFC 6455, 5.1 and 5.2). Zeros while the header is not
    complete."""
    available = len(buffer) - position
    if available < 2:
        return 0, 0, False
    second = buffer[position + 1]
    length = second & 0x7F
    if length < 126:
        if available < 6 and second >= _MASKED:
            return 0, 0, False
        return (6, length, True) if second >= _MASKED else (2, length, False)
    size = 2 if length == 126 else 8
    header = 2 + size + (4 if second >= _MASKED else 0)
    if available < header:
        return 0, 0, False
    length = int.from_bytes(buffer[position + 2 : position + 2 + size], "big")
    legal = length > 125 if size == 2 else 65535 < length < 2**63
    return header, length, legal and second >= _MASKED


def frame_header(first: int, size: int) -> bytes:
    """The header of a frame from the server, which is never masked: 2 to 10 bytes."""
    if size < 126:
        return _SHORT[first][size]
    return struct.pack("!BBH", first, 126, size) if size < 65536 else struct.pack("!BBQ", first, 127, size)


def message_frame(data: str | bytes, deflate: Deflate | None) -> tuple[bytes, bytes]:
    """Header and payload of a message in one frame."""
    first, payload = (TEXT, data.encode()) if isinstance(data, str) else (BINARY, data)
    if deflate is not None and len(payload) >= SMALLEST:
        first |= _COMPRESSED
        payload = deflate.deflate(payload)
    return frame_header(first, len(payload)), payload


def control_frame(first: int, payload: bytes) -> bytes:
    return frame_header(first, len(payload)) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Code 1005 stands for a close frame without a code. A reason that is too long is cut, between two characters."""
    if code == CloseReason.NO_STATUS_RCVD:
        return control_frame(CLOSE, b"")
    text = reason.encode()
    if len(text) > REASON_MAX:
        text = text[:REASON_MAX].decode(errors="ignore").encode()
    return control_frame(CLOSE, struct.pack("!H", code) + text)


def may_be_sent(code: object) -> bool:
    """Whether this code may stand in a close frame, ours or a client's (RFC 6455, 7.4; the registry ends at 1014)."""
    if not isinstance(code, int) or isinstance(code, bool):
        return False
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
