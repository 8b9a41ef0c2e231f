"""WebSocket frames both ways: W6 to W9, W13 and W15; fed whole, byte by byte, and in any other pieces."""

from __future__ import annotations

import codecs
import operator
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from itertools import cycle, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.speedups import apply_mask
from wsproto.frame_protocol import FrameProtocol

from apphost.protocols.deflate import Deflate
from apphost.protocols.frames import (
    BINARY,
    CLOSE,
    FRAMES_PER_TURN,
    HOLD_MAX,
    PING,
    PONG,
    TEXT,
    Broken,
    Close,
    Event,
    Ping,
    Pong,
    Reader,
    close_frame,
    control_frame,
    frame_header,
    may_be_sent,
    message_frame,
)
from apphost.protocols.masking import Unmask, fastest, unmask
from tests.test_body import singly, split

FIRST_TEXT, FIRST_BINARY, MIDDLE, LAST = 0x01, 0x02, 0x00, 0x80
KEY = b"\x37\xfa\x21\x3d"  # RFC 6455, 5.7
LIMIT = 1000

Seen = str | bytes | Ping | Pong | Close | int  # the code alone of what is broken
Pieces = Callable[[bytes], Iterable[bytes]]


MASKS = [pytest.param(unmask, id="in Python"), pytest.param(fastest(), id="compiled")]


def naive(payload: bytes, key: bytes) -> bytes:
    return bytes(map(operator.xor, payload, cycle(key)))


def header(first: int, size: int, *, masked: int = 0x80) -> bytes:
    """The header of a client's frame, without the key."""
    if size < 126:
        return bytes((first, masked | size))
    if size < 65536:
        return bytes((first, masked | 126)) + size.to_bytes(2, "big")
    return bytes((first, masked | 127)) + size.to_bytes(8, "big")


def frame(first: int, payload: bytes = b"", key: bytes = KEY) -> bytes:
    return header(first, len(payload)) + key + naive(payload, key)


def fragments(first: int, pieces: list[bytes]) -> list[bytes]:
    """The frames of a message; `first`: TEXT or BINARY, with or without RSV1."""
    numbered = enumerate(pieces)
    return [frame((0 if i else first & 0x7F) | (0x80 if i == len(pieces) - 1 else 0), piece) for i, piece in numbered]


def turns(reader: Reader, piece: bytes) -> Iterator[list[Event]]:
    events, more = reader.feed(piece)
    yield events
    while more:
        events, more = reader.feed(b"")
        yield events


def deliver(reader: Reader, pieces: Iterable[bytes]) -> list[Seen]:
    events = [event for piece in pieces for turn in turns(reader, piece) for event in turn]
    return [event.code if isinstance(event, Broken) else event for event in events]


def cuttings(wire: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte unless it is long, and in pieces of other sizes, among them such as end within headers."""
    for size in (max(len(wire), 1), 1, 2, 7, 1021, HOLD_MAX + 9):
        if len(wire) <= 4000 * size:
            yield [wire[i : i + size] for i in range(0, len(wire), size)]


def read(*wire: bytes, limit: int = LIMIT, make: Callable[[], Deflate] | None = None) -> list[Seen]:
    """What is seen in the frames, the same however they are cut."""
    whole = b"".join(wire)
    results = [deliver(Reader(limit, make() if make else None), pieces) for pieces in cuttings(whole)]
    assert all(result == results[0] for result in results[1:])
    return results[0]


# -- framing


@pytest.mark.parametrize("size", [0, 1, 2, 125, 126, 127, 128, 512, 513, 65535, 65536, 65537, 300_001])
@pytest.mark.parametrize("first", [TEXT, BINARY])
def test_payload_sizes(first: int, size: int) -> None:
    """W6: empty ones, and those on both sides of each way to say a length; another frame follows."""
    payload = (b"0123456789\r\n" * (size // 12 + 1))[:size]
    message: Seen = payload.decode() if first == TEXT else payload
    assert read(frame(first, payload), frame(PING, b"x"), limit=size) == [message, Ping(b"x")]


def test_the_example_of_the_rfc() -> None:
    """W6"""
    assert read(bytes.fromhex("818537fa213d7f9f4d5158")) == ["Hello"]


@pytest.mark.parametrize("first", [TEXT, BINARY, FIRST_TEXT, PING, CLOSE])
@pytest.mark.parametrize("size", [0, 5, 125, 126, 65536])
def test_unmasked_frames(first: int, size: int) -> None:
    """W13: 1002, whether or not the payload has come, and also where it would be too large."""
    start = header(first, size, masked=0)
    assert read(start) == read(start, bytes(size)) == [1002]


@pytest.mark.parametrize("first", [TEXT, BINARY, FIRST_BINARY, PING])
@pytest.mark.parametrize(
    "length",
    [b"\xfe\0\0", b"\xfe\0\x7d", b"\xff" + bytes(8), b"\xff" + (125).to_bytes(8, "big"),
     b"\xff" + (126).to_bytes(8, "big"), b"\xff" + (65535).to_bytes(8, "big"), b"\xff\x80" + bytes(7),
     b"\xff\x80" + bytes(5) + b"\x01\0", b"\xff" * 9],
)  # fmt: skip
def test_lengths_that_are_not_right(first: int, length: bytes) -> None:
    """W13: 1002 for what is not minimal and for the highest bit, from the header alone."""
    assert read(bytes((first,)) + length + KEY) == [1002]


FIRST_BYTES = {0x00, 0x80, 0x01, 0x81, 0x02, 0x82, 0x88, 0x89, 0x8A}


@pytest.mark.parametrize("high", range(0, 256, 16))
def test_reserved_bits_opcodes_and_fragmented_control_frames(high: int) -> None:
    """W13: 1002, before and within a message, from the header alone."""
    for first, size in product(set(range(high, high + 16)) - FIRST_BYTES, (0, 5, 70000)):
        assert read(header(first, size), KEY) == [1002]
        assert read(frame(TEXT, b"before"), header(first, size), KEY) == ["before", 1002]
        assert read(frame(FIRST_TEXT, b"before"), header(first, size), KEY) == [1002]


def test_an_incomplete_frame_says_nothing() -> None:
    """W6 W13: and nothing of it is lost."""
    wire = frame(TEXT, b"x" * 126) + frame(PING, b"p")
    for cut in range(len(wire)):
        reader = Reader(LIMIT)
        early = deliver(reader, [wire[:cut]])
        assert early == (["x" * 126] if cut >= 134 else [])
        assert early + deliver(reader, [wire[cut:]]) == ["x" * 126, Ping(b"p")]


# -- control frames


@pytest.mark.parametrize("size", [0, 1, 4, 124, 125])
def test_pings_and_pongs(size: int) -> None:
    """W7: with their payload, in order, also between fragments."""
    ping, pong = frame(PING, bytes(range(size))), frame(PONG, b"\xff" * size)
    seen = [Ping(bytes(range(size))), Pong(b"\xff" * size)]
    assert read(ping, pong, ping) == [*seen, seen[0]]
    assert read(frame(FIRST_TEXT, b"a"), ping, pong, frame(MIDDLE), ping, frame(LAST, b"b")) == [*seen, seen[0], "ab"]


@pytest.mark.parametrize("first", [PING, PONG, CLOSE])
@pytest.mark.parametrize("size", [126, 127, 65535, 65536])
def test_control_frames_that_are_too_long(first: int, size: int) -> None:
    """W13: 1002, from the header alone."""
    assert read(header(first, size), KEY) == [1002]
    assert read(frame(FIRST_TEXT, b"a"), header(first, size), KEY) == [1002]


# -- fragments


@pytest.mark.parametrize("first", [TEXT, BINARY])
@pytest.mark.parametrize(
    "pieces", [["", ""], ["a", ""], ["", "a"], ["", "", "a", "", ""], ["a", "b"], ["a" * 126, "b" * 300, "c"], [""] * 9]
)
def test_fragments(first: int, pieces: list[str]) -> None:
    """W6: reassembled, empty ones too; the next message begins anew."""
    text = "".join(pieces)
    frames = fragments(first, [piece.encode() for piece in pieces])
    message: Seen = text if first == TEXT else text.encode()
    assert read(*frames, *frames, frame(TEXT, b"x")) == [message, message, "x"]


@pytest.mark.parametrize(
    ("wire", "seen"),
    [
        ([frame(LAST, b"a")], []),
        ([frame(MIDDLE, b"a")], []),
        ([frame(LAST)], []),
        ([frame(TEXT, b"a"), frame(LAST, b"b")], ["a"]),
        ([*fragments(TEXT, [b"a", b"b"]), frame(LAST, b"c")], ["ab"]),
        ([frame(FIRST_TEXT, b"a"), frame(TEXT, b"b")], []),
        ([frame(FIRST_TEXT, b"a"), frame(BINARY, b"b")], []),
        ([frame(FIRST_BINARY, b"a"), frame(FIRST_BINARY, b"b")], []),
        ([frame(FIRST_BINARY), frame(MIDDLE), frame(PING, b"p"), frame(TEXT)], [Ping(b"p")]),
        ([frame(FIRST_TEXT, b"a"), header(TEXT, 70000) + KEY], []),
        ([header(LAST, 70000) + KEY], []),
    ],
)
def test_fragments_out_of_order(wire: list[bytes], seen: list[Seen]) -> None:
    """W13: 1002 for a continuation of nothing and for a new message within another, from the header alone."""
    assert read(*wire) == [*seen, 1002]
    *before, last = wire
    assert read(*before, last[: 14 if len(last) > 12 else 6]) == [*seen, 1002]


def test_text_fragments_keep_their_line_ends() -> None:
    """W6"""
    assert read(*fragments(TEXT, singly(b"a\r\nb\rc\n\r\n"))) == ["a\r\nb\rc\n\r\n"]


def peak_of(act: Callable[[], object]) -> int:
    """The most bytes that were allocated at any moment of it."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("first", [TEXT, BINARY])
def test_many_tiny_fragments_take_little_memory(first: int) -> None:
    """W13 W15: about what the message has, and not an object for each piece."""
    count = 4_000
    wire = b"".join(fragments(first, [b"xy"] * count))
    pieces = [wire[i : i + 4096] for i in range(0, len(wire), 4096)]
    reader = Reader(2 * count)
    seen: list[Seen] = []
    peak = peak_of(lambda: seen.extend(deliver(reader, pieces)))
    assert seen == ["xy" * count if first == TEXT else b"xy" * count]
    assert peak < 20 * count


# -- UTF-8

VALID = ["", "\0", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\ufffd", "\ufffe", "\uffff", "\U00010000",
         "\U0010ffff", "\ufeffa", "κόσμε", "Hello-µ@ßöäüàá-UTF-8!!", "\U0001d4b3" * 40]  # fmt: skip

INVALID = [
    b"\x80", b"\xbf", b"\xff", b"\xfe", b"a\xffb", b"\xce\xba\xff",  # not of UTF-8 at all, or without a beginning
    b"\xc0\x80", b"\xc0\xaf", b"\xc1\xbf", b"\xe0\x80\xaf", b"\xe0\x9f\xbf", b"\xf0\x80\x80\xaf", b"\xf0\x8f\xbf\xbf",
    b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80",  # overlong, and the sequences of five and six of old
    b"\xed\xa0\x80", b"\xed\xaf\xbf", b"\xed\xb0\x80", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80",  # surrogates
    b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf7\xbf\xbf\xbf",  # beyond U+10FFFF
    b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3\x28", b"\xe2\x28\xa1", b"\xe2\x82\x28", b"\xf0\x28\x8c\xbc",  # cut
]  # fmt: skip


@pytest.mark.parametrize("text", VALID)
def test_valid_utf8(text: str) -> None:
    """W6: a character may be split over fragments, and over what is read at once."""
    data = text.encode()
    assert read(frame(TEXT, data)) == [text]
    assert read(*fragments(TEXT, singly(data) or [b"", b""])) == [text]
    long = b"a" * HOLD_MAX + data
    assert read(frame(TEXT, long), limit=len(long)) == [long.decode()]


@pytest.mark.parametrize("data", INVALID)
def test_invalid_utf8(data: bytes) -> None:
    """W13: 1007, in one frame, in fragments, and in a frame that is read piece by piece."""
    assert read(frame(TEXT, data), frame(PING)) == [1007]
    for cut in range(len(data) + 1):
        assert read(*fragments(TEXT, [b"a" + data[:cut], data[cut:]]), frame(PING)) == [1007]
    assert read(*fragments(TEXT, [*singly(data), b""])) == [1007]
    long = b"a" * HOLD_MAX + data
    assert read(frame(TEXT, long), limit=len(long)) == [1007]
    assert read(frame(BINARY, data)) == [data]


def test_invalid_utf8_is_told_before_the_message_ends() -> None:
    """W13"""
    assert read(frame(FIRST_TEXT, b"\xed\xa0\x80")) == [1007]
    assert read(frame(FIRST_TEXT, b"\xf4"), frame(PING), frame(MIDDLE, b"\x90")) == [Ping(b""), 1007]


# -- close frames

CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
EDGES = {0, 1, 255, 256, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 32768, 65535}


def test_close_codes() -> None:
    """W8 W13: what may not be sent is answered with 1002."""
    for code in {*range(990, 1030), *EDGES, *range(2990, 3010), *range(4990, 5010)}:
        wire = frame(CLOSE, code.to_bytes(2, "big") + b"bye")
        assert read(wire) == ([Close(code, "bye")] if code in CODES else [1002])


@pytest.mark.parametrize(
    ("payload", "seen"),
    [
        (b"", Close(1005, "")),
        (b"\x03", 1002),
        (b"\x03\xe8", Close(1000, "")),
        (b"\x03\xe8" + "κ".encode(), Close(1000, "κ")),
        (b"\x03\xe8" + b"x" * 123, Close(1000, "x" * 123)),
        (b"\x03\xe8\xff", 1007),
        (b"\x03\xe8a\xed\xa0\x80", 1007),
        (b"\x03\xe8\xce", 1007),
        (b"\x03\xed\xff", 1002),
    ],
)
def test_close_frames(payload: bytes, seen: Seen) -> None:
    """W8 W13: also within a message; nothing after it is read."""
    assert read(frame(CLOSE, payload), frame(TEXT, b"late"), b"\xff") == [seen]
    assert read(frame(FIRST_TEXT, b"a"), frame(CLOSE, payload), frame(LAST, b"b")) == [seen]


@pytest.mark.parametrize("wire", [frame(CLOSE), frame(0x83), header(BINARY, LIMIT + 1) + KEY, frame(TEXT, b"\xff")])
def test_nothing_is_read_after_the_end(wire: bytes) -> None:
    """W8 W13: and nothing is kept."""
    reader = Reader(LIMIT)
    reader.feed(wire + frame(TEXT, b"late"))
    assert reader.done
    assert reader.feed(frame(TEXT, b"later")) == ([], False)
    assert reader.buffer == b""


def test_codes_are_plain_numbers() -> None:
    """W8: they go to the application as they are."""
    for wire in (frame(CLOSE), frame(CLOSE, b"\x03\xe8"), frame(0x83), frame(TEXT, b"\xff"), frame(TEXT, bytes(9999))):
        (event,) = Reader(LIMIT).feed(wire)[0]
        assert isinstance(event, Close | Broken)
        assert type(event.code) is int


# -- the limit


@pytest.mark.parametrize("limit", [0, 1, 125, 126, LIMIT, 65535, HOLD_MAX, HOLD_MAX + 1])
@pytest.mark.parametrize("first", [TEXT, BINARY])
def test_the_limit_of_a_message(first: int, limit: int) -> None:
    """W13: exactly at it is fine; beyond, 1009 from the header alone."""
    full = b"x" * limit
    message: Seen = full.decode() if first == TEXT else full
    whole, two = frame(first, full), fragments(first, [full[:1], full[1:]])
    assert read(whole, *two, whole, *two, limit=limit) == [message] * 4
    assert read(whole, *two, header(first, limit + 1), KEY, limit=limit) == [message] * 2 + [1009]
    assert read(whole, two[0], frame(MIDDLE, full[1:]), header(LAST, 1), KEY, limit=limit) == [message, 1009]


@pytest.mark.parametrize("size", [LIMIT + 1, 65535, 65536, 2**31, 2**32, 2**63 - 1])
def test_too_large_is_told_from_the_header(size: int) -> None:
    """W13: before anything is buffered, of a whole message and of any fragment of one."""
    assert read(header(BINARY, size), KEY) == read(header(FIRST_TEXT, size), KEY) == [1009]
    assert read(frame(FIRST_TEXT, b"a"), header(MIDDLE, size), KEY) == [1009]
    assert read(frame(FIRST_TEXT, b"a"), header(LAST, size - 1), KEY) == [1009]


def test_control_frames_and_empty_fragments_do_not_count() -> None:
    """W13"""
    ping = frame(PING, bytes(125))
    wire = [frame(FIRST_BINARY, bytes(LIMIT)), *[ping] * 20, *[frame(MIDDLE)] * 20, frame(LAST)]
    assert read(*wire) == [Ping(bytes(125))] * 20 + [bytes(LIMIT)]


def test_a_large_message_is_not_copied_many_times() -> None:
    """W13 W15: what came, what is read of it, and what is made of that."""
    size = 2**20
    pieces = [header(TEXT, size) + KEY, *[naive(bytes(4096), KEY)] * (size // 4096)]
    assert peak_of(lambda: deliver(Reader(size), pieces)) < 3 * size


# -- turns


@pytest.mark.parametrize("count", [1, FRAMES_PER_TURN - 1, FRAMES_PER_TURN, FRAMES_PER_TURN + 1, 3 * FRAMES_PER_TURN])
def test_a_turn_ends(count: int) -> None:
    """W15: what is left comes with the next turns, in order, before what is fed later."""
    numbers = [b"%d" % number for number in range(count)]
    reader = Reader(LIMIT)
    events, more = reader.feed(b"".join(frame(PING, number) for number in numbers))
    assert len(events) == min(count, FRAMES_PER_TURN)
    assert more is (count > FRAMES_PER_TURN)
    later = deliver(reader, [frame(TEXT, b"later")])
    assert [*events, *later] == [*map(Ping, numbers), "later"]


def test_a_turn_that_ends_within_a_message() -> None:
    """W15"""
    wire = [*fragments(TEXT, [b"x"] * (2 * FRAMES_PER_TURN + 1)), frame(PING), frame(CLOSE), frame(TEXT)]
    taken = [len(turn) for turn in turns(Reader(LIMIT), b"".join(wire))]
    assert taken == [0, 0, 3]


# -- streams

MESSAGES = st.one_of(st.text(max_size=40), st.binary(max_size=40), st.binary(min_size=120, max_size=300))
CONTROLS = st.lists(st.one_of(st.builds(Ping, st.binary(max_size=20)), st.builds(Pong, st.binary(max_size=125))))


@st.composite
def streams(draw: st.DrawFn, pack: Callable[[bytes], bytes] | None = None) -> tuple[bytes, list[Seen]]:
    """A legal stream, and what it says. pack: compresses a message."""
    wire = b""
    said: list[Seen] = []
    for message in draw(st.lists(MESSAGES, max_size=4)):
        data = message.encode() if isinstance(message, str) else message
        first = TEXT if isinstance(message, str) else BINARY
        if pack is not None and draw(st.booleans()):
            first, data = first | 0x40, pack(data)
        for each in fragments(first, draw(split(data))):
            for control in draw(CONTROLS) if draw(st.integers(0, 3)) == 0 else []:
                said.append(control)
                wire += frame(PING if isinstance(control, Ping) else PONG, control.payload)
            wire += each
        said.append(message)
    if draw(st.booleans()):
        wire += frame(CLOSE, b"\x0f\xa0end")
        said.append(Close(4000, "end"))
    return wire, said


@given(streams(), st.data())
@settings(max_examples=60)
def test_legal_streams_in_any_pieces(stream: tuple[bytes, list[Seen]], data: st.DataObject) -> None:
    """W6 W7 W8"""
    wire, said = stream
    for pieces in ([wire], singly(wire), data.draw(split(wire))):
        assert deliver(Reader(LIMIT), pieces) == said
    assert reference(wire, LIMIT) == said


def moved(wire: bytes, pieces: Iterable[bytes], make: Callable[[], Reader]) -> tuple[list[Event], int]:
    """What is seen when a new reader goes on from each boundary, and how often that was."""
    reader = make()
    seen: list[Event] = []
    moves = 0
    for piece in pieces:
        more, rest = True, piece
        while more:
            events, more = reader.feed(rest)
            seen += events
            rest = b""
            if reader.at_boundary and not reader.done:
                moves += 1
                buffer, reader = reader.buffer, make()
                reader.buffer = buffer
    return seen, moves


@given(streams(), st.data())
@settings(max_examples=60)
def test_a_socket_moves_at_any_boundary(stream: tuple[bytes, list[Seen]], data: st.DataObject) -> None:
    """W16: `buffer` is all that another reader needs, also in the middle of a frame."""
    wire, said = stream
    assert moved(wire, data.draw(split(wire)), lambda: Reader(LIMIT))[0] == said
    assert moved(wire, singly(wire), lambda: Reader(LIMIT))[0] == said


def test_a_socket_moves_between_turns() -> None:
    """W16: with all the frames that have had no turn."""
    wire = frame(TEXT, b"x") * (3 * FRAMES_PER_TURN + 1) + frame(TEXT, b"y" * 200)[:-1]
    assert moved(wire, [wire], lambda: Reader(LIMIT)) == (["x"] * (3 * FRAMES_PER_TURN + 1), 4)


@pytest.mark.parametrize(
    ("wire", "boundary"),
    [
        (b"", True),
        (frame(BINARY, bytes(126))[:-1], True),
        (frame(TEXT), True),
        (frame(FIRST_TEXT), False),
        (frame(FIRST_TEXT) + frame(PING), False),
        (frame(FIRST_TEXT) + frame(MIDDLE), False),
        (frame(FIRST_TEXT) + frame(LAST), True),
        (header(BINARY, HOLD_MAX) + KEY + bytes(HOLD_MAX - 1), True),
        (header(BINARY, HOLD_MAX + 1) + KEY, False),
        (header(BINARY, HOLD_MAX + 1) + KEY + bytes(HOLD_MAX), False),
        (header(BINARY, HOLD_MAX + 1) + KEY + bytes(HOLD_MAX + 1), True),
    ],
)
def test_boundaries(wire: bytes, boundary: bool) -> None:
    """W16"""
    reader = Reader(2 * HOLD_MAX)
    deliver(reader, [wire])
    assert reader.at_boundary is boundary


# -- a second reader, of which the first must not differ


class Failure(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


Inflate = Callable[[bytes, bool, bool], bytes]  # (data, whether it begins a message, whether it ends it)


def reference(wire: bytes, limit: int, inflate: Inflate | None = None) -> list[Seen]:
    seen: list[Seen] = []
    try:
        seen.extend(slowly(wire, limit, inflate, seen))
    except Failure as failure:
        seen.append(failure.code)
    return seen


def slowly(wire: bytes, limit: int, inflate: Inflate | None, seen: list[Seen]) -> list[Seen]:
    """RFC 6455, section 5, one sentence after the other. Raises `Failure`."""
    kind, compressed, content, room = 0, False, b"", 0
    while len(wire) >= 2:
        fin, rsv, opcode = wire[0] >> 7, wire[0] >> 4 & 7, wire[0] & 15
        size = {126: 2, 127: 8}.get(wire[1] & 127, 0)
        start = 2 + size + (4 if wire[1] & 128 else 0)
        if len(wire) < start:
            break
        length = int.from_bytes(wire[2 : 2 + size], "big") if size else wire[1] & 127
        minimal = {0: True, 2: length > 125, 8: 65535 < length < 2**63}[size]
        begins = opcode in (1, 2)
        control = opcode in (8, 9, 10)
        rsv_is_right = rsv == 0 or (rsv == 4 and begins and inflate is not None)
        if not (wire[1] & 128 and minimal and rsv_is_right and opcode in (0, 1, 2, 8, 9, 10)):
            raise Failure(1002)
        if (control and not (fin and length <= 125)) or (not control and begins is bool(kind)):
            raise Failure(1002)
        if begins:
            compressed, content = rsv == 4, b""
            room = 2 * limit + 64 if compressed else limit
        if not control and length > room:
            raise Failure(1009)
        if len(wire) < start + length:
            break
        payload = naive(wire[start : start + length], wire[start - 4 : start])
        wire = wire[start + length :]
        if opcode == 8:
            seen.append(closed(payload))
            break
        if control:
            seen.append(Ping(payload) if opcode == 9 else Pong(payload))
            continue
        kind = opcode or kind
        room -= length
        content += inflate(payload, begins, bool(fin)) if compressed and inflate else payload
        if kind == 1:
            check_utf8(content, bool(fin))
        if fin:
            seen.append(content.decode() if kind == 1 else content)
            kind = 0
    return []


def check_utf8(data: bytes, final: bool) -> None:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final)
    except UnicodeDecodeError:
        raise Failure(1007) from None


def closed(payload: bytes) -> Close:
    code = int.from_bytes(payload[:2], "big")
    if payload and code not in CODES:
        raise Failure(1002)
    check_utf8(payload[2:], True)
    return Close(code if payload else 1005, payload[2:].decode())


@st.composite
def damaged(draw: st.DrawFn, wire: bytes) -> bytes:
    """With some bytes changed, left out, put in or moved, and perhaps cut off."""
    data = bytearray(wire)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@given(streams(), st.sampled_from([50, 150, LIMIT]), st.data())
@settings(max_examples=60)
def test_damaged_streams(stream: tuple[bytes, list[Seen]], limit: int, data: st.DataObject) -> None:
    """W6 W8 W13: the same messages, and the same failure."""
    wire = data.draw(damaged(stream[0]))
    expected = reference(wire, limit)
    for pieces in ([wire], singly(wire), data.draw(split(wire))):
        assert deliver(Reader(limit), pieces) == expected


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.binary(max_size=12)), max_size=5))
@settings(max_examples=60)
def test_any_bytes(frames: list[tuple[int, int, bytes]]) -> None:
    """W13: no exception, and the same in any pieces."""
    wire = b"".join(bytes((first, second)) + rest for first, second, rest in frames)
    assert read(wire) == reference(wire, LIMIT)


# -- what we send


@pytest.mark.parametrize("unmask", MASKS)
@given(payload=st.binary(max_size=40), key=st.binary(min_size=4, max_size=4))
def test_unmask(unmask: Unmask, payload: bytes, key: bytes) -> None:
    """W6"""
    assert unmask(payload, key) == naive(payload, key)


@pytest.mark.parametrize("unmask", MASKS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 510, 511, 512, 513, 514, 515, 516, 1021, 4099])
@pytest.mark.parametrize("key", [b"\0\0\0\0", b"\0\xff\x01\x80", KEY, b"\xff\xff\xff\xff"])
def test_unmask_of_all_sizes(unmask: Unmask, size: int, key: bytes) -> None:
    """W6"""
    payload = bytes(value * 7 & 0xFF for value in range(size))
    assert unmask(payload, key) == naive(payload, key)
    assert unmask(unmask(payload, key), key) == payload


def test_fastest_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test requirements have it; where it is not installed it is that in Python, which all others here use."""
    assert fastest() is apply_mask
    assert sys.modules["websockets.speedups"].apply_mask is apply_mask, "what is imported already is left as it is"
    monkeypatch.setitem(sys.modules, "websockets.speedups", None)
    assert fastest() is unmask


_ALONE = """
import sys
from apphost.protocols import masking
from apphost.worker import server
before = set(sys.modules)
fast = masking.fastest()
print(fast is not masking.unmask, fast(b"abcdef", b"1234") == masking.unmask(b"abcdef", b"1234"))
print(sorted(name for name in sys.modules if name.startswith("websockets")))
import websockets.speedups
print(websockets.speedups.apply_mask(b"abcdef", b"1234") == fast(b"abcdef", b"1234"))
"""


def test_the_compiled_one_comes_without_its_package() -> None:
    """And an application may import that as ever."""
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n[]\nTrue\n"


@pytest.mark.parametrize("size", [0, 5, 125, 126, 4000, 65536])
def test_messages_with_the_compiled_one(size: int) -> None:
    """W6"""
    said: list[Seen] = [bytes(size), Ping(b"one"), "ä" * size]
    wire = frame(BINARY, bytes(size)) + frame(PING, b"one") + frame(TEXT, ("ä" * size).encode())
    for pieces in cuttings(wire):
        assert deliver(Reader(2 * size, None, fastest()), pieces) == said


def received(wire: bytes) -> list[tuple[int, Any]]:
    """What a client of wsproto's makes of it: opcodes and payloads."""
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(wire)
    return [(0x80 | frame.opcode, frame.payload) for frame in client.received_frames() if frame.message_finished]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_message_frames(size: int) -> None:
    """W6: in one frame with the shortest header; empty ones too."""
    data = b"x" * size
    for message, first in ((data, BINARY), (data.decode(), TEXT)):
        head, payload = message_frame(message, None)
        assert head == frame_header(first, size) == header(first, size, masked=0)
        assert received(head + payload) == [(first, message)]


def test_text_that_is_not_unicode() -> None:
    """W6 A5: raises, so that nothing is sent."""
    assert message_frame("κ\U0010ffff", None) == (b"\x81\x06", "κ\U0010ffff".encode())
    with pytest.raises(ValueError, match="surrogates"):
        message_frame("\ud800", None)


@pytest.mark.parametrize("first", [PING, PONG])
@pytest.mark.parametrize("payload", [b"", b"x", bytes(125)])
def test_control_frames(first: int, payload: bytes) -> None:
    """W7"""
    assert received(control_frame(first, payload)) == [(first, payload)]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("", ""),
        ("going", "going"),
        ("x" * 123, "x" * 123),
        ("x" * 124, "x" * 123),
        ("x" * 122 + "é", "x" * 122),
        ("x" * 121 + "é", "x" * 121 + "é"),
        ("x" * 121 + "€", "x" * 121),
        ("x" * 120 + "\U0001d4b3", "x" * 120),
        ("é" * 62, "é" * 61),
    ],
)
def test_a_long_reason_is_cut_between_characters(reason: str, told: str) -> None:
    """W9"""
    assert close_frame(1000, reason) == control_frame(CLOSE, b"\x03\xe8" + told.encode())
    assert received(close_frame(4999, reason)) == [(CLOSE, (4999, told))]


@given(st.integers(3000, 4999), st.text(max_size=150))
def test_any_reason(code: int, reason: str) -> None:
    """W9: as much of it as fits."""
    ((first, (seen, told)),) = received(close_frame(code, reason))
    assert (first, seen) == (CLOSE, code)
    assert reason.startswith(told)
    assert told == reason or len(told.encode()) > 119


def test_close_frames_without_a_code() -> None:
    """W8: there is no room for a reason, either."""
    assert close_frame(1005) == close_frame(1005, "why") == b"\x88\x00"
    assert close_frame(1000) == b"\x88\x02\x03\xe8"


class Code(IntEnum):
    GONE = 1001
    SECRET = 1006


def test_codes_that_may_be_sent() -> None:
    """W9: the same as those that may be received."""
    assert {code for code in range(-2, 70000) if may_be_sent(code)} == CODES
    assert may_be_sent(Code.GONE)
    assert not may_be_sent(Code.SECRET)
    for other in (None, True, "1000", 1000.0, b"\x03\xe8"):
        assert not may_be_sent(other)
