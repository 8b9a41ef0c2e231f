"""Compression of WebSocket messages, W14: what is agreed on, and what is read and written then."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from itertools import chain, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import NegotiationError
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.headers import parse_extension

from apphost.protocols.base import RequestHead
from apphost.protocols.deflate import FINALS_MAX, SMALLEST, Deflate, TooBig, negotiate
from apphost.protocols.frames import (
    BINARY,
    HOLD_MAX,
    INFLATED_PER_TURN,
    PING,
    TEXT,
    Ping,
    Reader,
    message_frame,
)
from apphost.protocols.handshake import Offer, read_handshake
from tests.test_body import singly, split
from tests.test_frames import (
    FIRST_BYTES,
    FIRST_TEXT,
    KEY,
    LAST,
    LIMIT,
    MIDDLE,
    Failure,
    Seen,
    damaged,
    deliver,
    fragments,
    frame,
    header,
    moved,
    peak_of,
    read,
    reference,
    streams,
    turns,
)

RSV1 = 0x40
TAIL = b"\x00\x00\xff\xff"
PMD = "permessage-deflate"
HELLO = bytes.fromhex("f248cdc9c90700")  # RFC 7692, 7.2.3.1
FINAL = bytes.fromhex("f348cdc9c90700")  # the same, in a final block


class Client:
    """The other end's compression, with the whole of zlib to choose from."""

    def __init__(self, bits: int = 15, keep: bool = True, level: int = 6) -> None:
        self.keep, self.bits, self.level = keep, bits, level
        self.begin()

    def begin(self) -> None:
        self.stream = zlib.compressobj(self.level, zlib.DEFLATED, -self.bits)

    def pack(self, data: bytes) -> bytes:
        packed = self.stream.compress(data) + self.stream.flush(zlib.Z_SYNC_FLUSH)
        if not self.keep:
            self.begin()
        return packed[:-4]


def make(limit: int = LIMIT, theirs: int = 15, keep_theirs: bool = True) -> Deflate:
    return Deflate(limit, 12, theirs, True, keep_theirs)


def packed(*wire: bytes, limit: int = LIMIT, theirs: int = 15, keep: bool = True) -> list[Seen]:
    """What is seen in frames of a client that has agreed to compression, however they are cut."""
    return read(*wire, limit=limit, make=lambda: make(limit, theirs, keep))


# -- what is agreed on


def offers(value: str) -> list[Offer]:
    head = RequestHead("GET", b"/", "1.1", [
        (b"sec-websocket-version", b"13"),
        (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
        (b"sec-websocket-extensions", value.encode()),
    ])  # fmt: skip
    head.content_length, head.chunked = None, False
    return read_handshake(head).offers


TABLE = """
    offer                                             | answer
    -                                                 | server_max_window_bits=12
    client_max_window_bits                            | server_max_window_bits=12; client_max_window_bits=12
    client_max_window_bits=15                         | server_max_window_bits=12; client_max_window_bits=12
    client_max_window_bits=12                         | server_max_window_bits=12; client_max_window_bits=12
    client_max_window_bits=9                          | server_max_window_bits=12; client_max_window_bits=9
    client_max_window_bits=8                          | server_max_window_bits=12; client_max_window_bits=8
    client_max_window_bits="10"                       | server_max_window_bits=12; client_max_window_bits=10
    server_max_window_bits=15                         | server_max_window_bits=12
    server_max_window_bits=12                         | server_max_window_bits=12
    server_max_window_bits=9                          | server_max_window_bits=9
    server_no_context_takeover                        | server_max_window_bits=12; server_no_context_takeover
    client_no_context_takeover                        | server_max_window_bits=12; client_no_context_takeover
    server_max_window_bits=8                          | no
    server_max_window_bits                            | no
    server_max_window_bits=7                          | no
    server_max_window_bits=16                         | no
    server_max_window_bits=09                         | no
    server_max_window_bits=010                        | no
    server_max_window_bits=1                          | no
    server_max_window_bits=100                        | no
    server_max_window_bits=+9                         | no
    server_max_window_bits=9.0                        | no
    server_max_window_bits=x                          | no
    client_max_window_bits=7                          | no
    client_max_window_bits=16                         | no
    client_max_window_bits=08                         | no
    client_max_window_bits=-9                         | no
    server_no_context_takeover=1                      | no
    server_no_context_takeover=true                   | no
    client_no_context_takeover=0                      | no
    unknown                                           | no
    unknown=1                                         | no
    Client_Max_Window_Bits                            | no
    client_max_window_bits; client_max_window_bits    | no
    client_max_window_bits; client_max_window_bits=9  | no
    server_max_window_bits=9; server_max_window_bits=9 | no
    client_no_context_takeover; client_no_context_takeover | no
    server_no_context_takeover; server_no_context_takeover | no
    client_max_window_bits; unknown                   | no
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()[1:]]


@pytest.mark.parametrize("row", ROWS, ids=" -> ".join)
def test_offers(row: list[str]) -> None:
    """W14: RFC 7692, 7.1; what is not understood to the last word is declined."""
    offer, answer = row
    deflate, told = negotiate(offers(PMD if offer == "-" else f"{PMD}; {offer}"), LIMIT)
    assert told.decode() == ("" if answer == "no" else f"{PMD}; {answer}")
    assert (deflate is None) is (answer == "no")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("", ""),
        ("x-webkit-deflate-frame", ""),
        ("permessage-bzip2; client_max_window_bits", ""),
        ("Permessage-Deflate", ""),
        (f"x-other; a=b, {PMD}", f"{PMD}; server_max_window_bits=12"),
        (f"{PMD}; unknown, {PMD}; server_max_window_bits=10", f"{PMD}; server_max_window_bits=10"),
        (f"{PMD}; server_max_window_bits=8, {PMD}", f"{PMD}; server_max_window_bits=12"),
        (f"{PMD}; server_max_window_bits=10, {PMD}; server_max_window_bits=11", f"{PMD}; server_max_window_bits=10"),
        (f"{PMD}; unknown, {PMD}; client_max_window_bits=16", ""),
    ],
)
def test_the_first_offer_that_can_be_met(value: str, answer: str) -> None:
    """W14: RFC 7692, 5.1 and 7.1.3: fallbacks are in the client's order."""
    assert negotiate(offers(value), LIMIT)[1].decode() == answer


def test_a_window_that_cannot_travel_is_declined() -> None:
    """W14 W16: legal also where the client did not offer it (RFC 7692, 7.1.1.2)."""
    deflate, told = negotiate(offers(PMD), LIMIT, keep_theirs=False)
    assert told.decode() == f"{PMD}; server_max_window_bits=12; client_no_context_takeover"
    assert deflate is not None
    assert (deflate.keep_ours, deflate.keep_theirs) == (True, False)


# -- the websockets library at the other end


def agree(factory: ClientPerMessageDeflateFactory, keep_theirs: bool) -> tuple[Deflate, PerMessageDeflate] | None:
    """Both sides of an agreement; None where we decline."""
    request = Offer(PMD, tuple(factory.get_request_params()))
    ours, told = negotiate([request], LIMIT, keep_theirs)
    if ours is None:
        return None
    ((name, parameters),) = parse_extension(told.decode())
    assert name == PMD
    return ours, factory.process_response_params(parameters, [])


def sent_to(client: PerMessageDeflate, message: str | bytes, deflate: Deflate) -> str | bytes:
    """What the client makes of a message that we send it."""
    head, payload = message_frame(message, deflate)
    assert head == header(head[0], len(payload), masked=0)
    got = client.decode(Frame(Opcode(head[0] & 0x0F), payload, rsv1=bool(head[0] & RSV1)))
    return bytes(got.data).decode() if got.opcode is Opcode.TEXT else bytes(got.data)


def sent_by(client: PerMessageDeflate, pieces: list[bytes]) -> list[bytes]:
    """The frames of a message of the client's."""
    frames = []
    for index, piece in enumerate(pieces):
        opcode = Opcode.CONT if index else Opcode.BINARY
        made = client.encode(Frame(opcode, piece, fin=index == len(pieces) - 1))
        frames.append(frame(made.opcode | made.fin << 7 | made.rsv1 << 6, bytes(made.data)))
    return frames


NOISE = random.Random(7).randbytes(600)
TALK = [b"", b"x", b"abc" * 100, NOISE, b"abc" * 100, NOISE[300:] + b"abc", b"z" * SMALLEST, NOISE]


@pytest.mark.parametrize("keep_theirs", [True, False])
@pytest.mark.parametrize("server_bits", [None, 8, 9, 11, 12, 13, 15])
@pytest.mark.parametrize("client_bits", [None, True, 9, 11, 12, 13, 15])
def test_agreements(client_bits: Any, server_bits: int | None, keep_theirs: bool) -> None:
    """W14: the client takes each answer, and each reads the other."""
    for no_server, no_client in product([False, True], repeat=2):
        factory = ClientPerMessageDeflateFactory(no_server, no_client, server_bits, client_bits)
        both = agree(factory, keep_theirs)
        assert (both is None) is (server_bits == 8)
        if both is None:
            continue
        ours, client = both
        reader = Reader(LIMIT, ours)
        for message in TALK:
            assert sent_to(client, message, ours) == message
            frames = sent_by(client, [message]) + sent_by(client, [message[:50], b"", message[50:]])
            assert deliver(reader, frames) == [message, message]


def test_the_client_refuses_what_it_did_not_ask_for() -> None:
    """W14: or else the test above would say nothing."""
    for answer in ("client_max_window_bits=12", "server_max_window_bits=16", "server_max_window_bits", "unknown"):
        with pytest.raises(NegotiationError):
            ClientPerMessageDeflateFactory(client_max_window_bits=None).process_response_params(
                parse_extension(f"{PMD}; {answer}")[0][1], []
            )


# -- what we send


@pytest.mark.parametrize("size", [0, 1, SMALLEST - 1, SMALLEST, 1000, 70000])
def test_small_messages_are_not_compressed(size: int) -> None:
    """W14: they are sent as they are, which is always allowed."""
    deflate = make()
    for data, first in ((b"x" * size, BINARY), ("x" * size, TEXT)):
        head, payload = message_frame(data, deflate)
        assert head[0] == (first | RSV1 if size >= SMALLEST else first)
        assert (len(payload) == size) is (size < SMALLEST)


@pytest.mark.parametrize("bits", range(9, 16))
def test_our_window(bits: int) -> None:
    """W14: no more than was agreed on; kept from message to message, or not."""
    far = NOISE[:64] + bytes(2**bits) + NOISE[:64]
    for keep in (True, False):
        deflate = Deflate(LIMIT, bits, 15, keep, True)
        client = zlib.decompressobj(-bits)
        sizes = []
        for message in (far, NOISE[:200], NOISE[:200]):
            data = deflate.deflate(message)
            assert client.decompress(data + TAIL) == message
            assert keep or zlib.decompress(data + TAIL + b"\x03\x00", -bits) == message
            sizes.append(len(data))
        assert sizes[2] < 20 if keep else sizes[1] == sizes[2] > 200


# -- what we read


@pytest.mark.parametrize(
    ("payloads", "text"),
    [
        (["f248cdc9c90700"], "Hello"),
        (["f248cdc9c90700", "f200110000"], "HelloHello"),
        (["f248cdc9c90700", "f248cdc9c90700"], "HelloHello"),
        (["000500faff48656c6c6f00"], "Hello"),
        (["f348cdc9c9070000"], "Hello"),
        (["f248050000 00ffff cac9c90700"], "Hello"),
        (["00"], ""),
        (["", "f248cdc9c90700"], "Hello"),
    ],
)
def test_the_examples_of_the_rfc(payloads: list[str], text: str) -> None:
    """W14: RFC 7692, 7.2.3: blocks of all kinds, and the window that two messages share."""
    messages = [bytes.fromhex(payload) for payload in payloads]
    seen = packed(*[frame(TEXT | RSV1, message) for message in messages])
    assert "".join(map(str, seen)) == text
    assert len(seen) == len(messages)
    in_pieces = [each for message in messages for each in fragments(TEXT | RSV1, singly(message) or [b""])]
    assert packed(*in_pieces) == seen


def test_the_fragments_of_the_rfc() -> None:
    """W14: 7.2.3.1"""
    wire = [frame(FIRST_TEXT | RSV1, HELLO[:3]), frame(PING, b"p"), frame(LAST, HELLO[3:])]
    assert packed(*wire, *wire) == [Ping(b"p"), "Hello"] * 2


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("ending", ["", "00"])
def test_final_blocks(keep: bool, ending: str) -> None:
    """W14: they end a stream, also where the empty block behind them is missing; the next message begins another."""
    one = FINAL + bytes.fromhex(ending)
    whole, two = frame(TEXT | RSV1, one), fragments(TEXT | RSV1, [one[:4], one[4:]])
    assert packed(whole, *two, whole, frame(TEXT | RSV1, HELLO), whole, keep=keep) == ["Hello"] * 5
    assert packed(*fragments(TEXT | RSV1, [FINAL] * 3), keep=keep) == ["Hello" * 3]


def test_final_blocks_are_counted() -> None:
    """W14: each takes two bytes and costs a new stream; of a frame, and not of a message or a socket."""
    many = b"\x03\x00" * FINALS_MAX
    allowed = [frame(BINARY | RSV1, many), *fragments(BINARY | RSV1, [many] * 3)] * 2
    assert packed(*allowed) == [b""] * 4
    assert packed(frame(BINARY | RSV1, many + FINAL)) == [1007]
    assert packed(*fragments(BINARY | RSV1, [many, many + FINAL])) == [1007]
    assert packed(frame(BINARY | RSV1, many * 4096), limit=2**20) == [1007]


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_at_all_is_an_empty_message(keep: bool) -> None:
    """W14: a sloppy client's empty message leaves the window as it was."""
    client = Client(keep=keep)
    nothing = [frame(TEXT | RSV1), *fragments(BINARY | RSV1, [b"", b""])]
    hello = [frame(TEXT | RSV1, client.pack(b"Hello, hello")) for _ in range(3)]
    assert packed(*nothing, hello[0], *nothing, hello[1], *nothing, hello[2], keep=keep) == [
        "", b"", "Hello, hello", "", b"", "Hello, hello", "", b"", "Hello, hello"
    ]  # fmt: skip


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("keep", [True, False])
def test_the_window_of_a_client(bits: int, keep: bool) -> None:
    """W14: as large as was agreed on, kept or not."""
    client = Client(bits, keep)
    far = NOISE[:64] + bytes(2**bits - 400) + NOISE[:64]
    wire = [frame(BINARY | RSV1, client.pack(message)) for message in (far, NOISE, far, NOISE[9:])]
    assert packed(*wire, limit=2**16, theirs=bits, keep=keep) == [far, NOISE, far, NOISE[9:]]


def test_a_client_that_refers_to_more_than_was_agreed_on() -> None:
    """W14: 1007, for too large a window, and for one that is not kept."""
    client = Client(15)
    far = frame(BINARY | RSV1, client.pack(NOISE[:64] + bytes(2000)))
    again = frame(BINARY | RSV1, client.pack(NOISE[:64]))
    assert packed(far, again, limit=9999) == [NOISE[:64] + bytes(2000), NOISE[:64]]
    assert packed(far, again, limit=9999, theirs=9)[1:] == [1007]
    assert packed(far, again, limit=9999, keep=False)[1:] == [1007]


def test_compressed_and_other_messages() -> None:
    """W14: what is not compressed does not enter the window."""
    client = Client()
    one, two = (frame(BINARY | RSV1, client.pack(NOISE)) for _ in range(2))
    plain = [frame(BINARY, HELLO), *fragments(BINARY, [HELLO, b"x"]), frame(TEXT, b"text")]
    assert len(two) < 30
    assert packed(one, *plain, two, *plain) == [*[NOISE, HELLO, HELLO + b"x", "text"] * 2]


@pytest.mark.parametrize("rsv", range(0x10, 0x80, 0x10))
def test_the_bit_stands_on_first_frames_only(rsv: int) -> None:
    """W13 W14: else 1002, from the header alone; where nothing was agreed on, always."""
    for first in sorted(FIRST_BYTES):
        wire = header(rsv | first, 9) + KEY
        legal = rsv == RSV1 and first & 0x0F in (1, 2)
        assert packed(wire) == ([] if legal else [1002])
        assert packed(frame(FIRST_TEXT, b"a"), wire) == [1002]
        assert packed(frame(FIRST_TEXT | RSV1, HELLO[:3]), wire) == [1002]
        assert read(wire) == [1002]


@pytest.mark.parametrize("payload", [HELLO, b"\xff" * 9, b"\0" * 9])
def test_fragments_out_of_order(payload: bytes) -> None:
    """W13 W14: 1002, whatever could be said of their payload."""
    message = fragments(TEXT | RSV1, [HELLO[:3], HELLO[3:]])
    assert packed(*message, frame(LAST, payload)) == ["Hello", 1002]
    assert packed(message[0], frame(TEXT | RSV1, payload)) == packed(message[0], frame(BINARY, payload)) == [1002]


@pytest.mark.parametrize(
    "payload",
    [b"\x07", b"\xff\xff\xff\xff", b"\x00\x05\x00\x00\x00Hello\x00", b"Hello, hello", b"\xf2\x00\x11\x00\x00",
     HELLO + b"\x06", b"\x05\xe0\x81\x08\0\0\0\0\0\x40"],
)  # fmt: skip
@pytest.mark.parametrize("keep", [True, False])
def test_what_cannot_be_inflated(payload: bytes, keep: bool) -> None:
    """W14: 1007"""
    assert packed(frame(BINARY | RSV1, payload), frame(PING), keep=keep) == [1007]
    assert packed(*fragments(BINARY | RSV1, [payload, b"", b""]), keep=keep) == [1007]
    assert packed(*fragments(BINARY | RSV1, [*singly(payload), b""]), keep=keep)[-1:] == [1007]


@pytest.mark.parametrize("data", [b"\xff", b"a\xed\xa0\x80", b"\xe2\x82", b"a" * 200 + b"\xc3"])
def test_compressed_text_is_utf8(data: bytes) -> None:
    """W13 W14: 1007"""
    client = Client(keep=False)
    assert packed(frame(TEXT | RSV1, client.pack(data))) == [1007]
    assert packed(*fragments(TEXT | RSV1, singly(client.pack(data)))) == [1007]


# -- the limit


def bomb(size: int) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(2**20)
    return b"".join(stream.compress(zeros) for _ in range(size // 2**20)) + stream.flush(zlib.Z_SYNC_FLUSH)


BOMB = bomb(80 * 2**20)


@pytest.mark.parametrize(
    "wire",
    [
        frame(TEXT | RSV1, BOMB[:17000]),
        frame(BINARY | RSV1, BOMB),
        header(TEXT | RSV1, HOLD_MAX + 1) + frame(0, BOMB)[-len(BOMB) - 4 :],
        b"".join(fragments(TEXT | RSV1, [BOMB[i : i + 300] for i in range(0, 17000, 300)])),
    ],
    ids=["frame", "large frame", "larger frame", "fragments"],
)
@pytest.mark.parametrize("step", [1024, 2**20])
def test_bombs(wire: bytes, step: int) -> None:
    """W14: 1009, with not much more than the limit in memory."""
    limit = 2**17
    reader = Reader(limit, make(limit))
    pieces = [wire[i : i + step] for i in range(0, len(wire), step)]
    seen: list[Seen] = []
    assert peak_of(lambda: seen.extend(deliver(reader, pieces))) < 6 * limit + len(wire)
    assert seen == [1009]
    assert reader.buffer == b""


@pytest.mark.parametrize("limit", [0, 1, 100, LIMIT, 70000])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_the_limit_is_that_of_the_inflated_message(limit: int, level: int) -> None:
    """W14: exactly at it is fine, also where compression has made the message larger."""
    for make_data in (bytes, random.Random(limit).randbytes):
        data, longer = make_data(limit), make_data(limit + 1)
        client = Client(keep=False, level=level)
        wire = frame(BINARY | RSV1, client.pack(data))
        two = fragments(BINARY | RSV1, [client.pack(data)[:9], client.pack(data)[9:]])
        assert packed(wire, *two, wire, limit=limit) == [data] * 3
        assert packed(wire, frame(BINARY | RSV1, client.pack(longer)), limit=limit) == [data, 1009]
        pieces = client.pack(longer)
        assert packed(*two, *fragments(BINARY | RSV1, [pieces[:9], pieces[9:]]), limit=limit) == [data, 1009]


def test_the_limit_holds_before_the_payload_comes() -> None:
    """W14: nothing that is so much larger than the limit can become small enough; what is not compressed may not be
    larger at all."""
    too_much = 2 * LIMIT + 65
    assert packed(header(BINARY | RSV1, too_much), KEY) == [1009]
    assert packed(frame(FIRST_TEXT | RSV1), header(LAST, too_much), KEY) == [1009]
    assert packed(header(BINARY, LIMIT + 1), KEY) == [1009]
    assert packed(frame(TEXT | RSV1, HELLO), frame(FIRST_TEXT), header(MIDDLE, LIMIT + 1), KEY) == ["Hello", 1009]


def test_inflate_stops_at_the_limit() -> None:
    """W14"""
    deflate = make(LIMIT)
    with pytest.raises(TooBig):
        deflate.inflate(BOMB)
    assert deflate.work == LIMIT + 1


def test_a_turn_inflates_no_more_than_it_may() -> None:
    """W14 W15: hundreds of messages in one read must not become hundreds of megabytes at once."""
    size = 100_000
    client = Client()
    wire = b"".join(frame(BINARY | RSV1, client.pack(bytes(size))) for _ in range(50)) + frame(PING)
    taken = list(turns(Reader(size, make(size)), wire))
    assert [*chain(*taken)] == [bytes(size)] * 50 + [Ping(b"")]
    assert max(map(len, taken)) == INFLATED_PER_TURN // size + 1


# -- streams


@given(st.data(), st.sampled_from([9, 12, 15]), st.booleans())
@settings(max_examples=50)
def test_legal_streams_in_any_pieces(data: st.DataObject, bits: int, keep: bool) -> None:
    """W6 W7 W14"""
    wire, said = data.draw(streams(Client(bits, keep).pack))
    for pieces in ([wire], singly(wire), data.draw(split(wire))):
        assert deliver(Reader(LIMIT, make(LIMIT, bits, keep)), pieces) == said


@given(st.data())
@settings(max_examples=50)
def test_a_socket_moves_at_any_boundary(data: st.DataObject) -> None:
    """W14 W16: without the client's window, `buffer` is all that another reader needs."""
    wire, said = data.draw(streams(Client(12, keep=False).pack))
    assert moved(wire, data.draw(split(wire)), lambda: Reader(LIMIT, make(LIMIT, 12, False)))[0] == said


class Slow:
    """Inflates byte by byte; for `reference`."""

    def __init__(self, limit: int, bits: int, keep: bool) -> None:
        self.limit, self.bits, self.keep = limit, bits, keep
        self.stream = zlib.decompressobj(-bits)
        self.size = self.finals = 0
        self.unended = False

    def __call__(self, data: bytes, begins: bool, ends: bool) -> bytes:
        self.size = 0 if begins else self.size
        self.finals = 0
        out = self.inflate(data)
        if ends:
            out += self.inflate(TAIL) if self.unended else b""
            self.unended = False
            if not self.keep:
                self.stream = zlib.decompressobj(-self.bits)
        return out

    def inflate(self, data: Iterable[int]) -> bytes:
        out = b""
        for byte in data:
            try:
                piece = self.stream.decompress(bytes([byte]), self.limit - self.size + 1)
            except zlib.error:
                raise Failure(1007) from None
            out += piece
            self.size += len(piece)
            if self.size > self.limit:
                raise Failure(1009)
            self.unended = not self.stream.eof
            if self.stream.eof:
                self.stream = zlib.decompressobj(-self.bits)
                self.finals += 1
                if self.finals > FINALS_MAX:
                    raise Failure(1007)
        return out


@given(st.data(), st.booleans(), st.sampled_from([60, LIMIT]))
@settings(max_examples=70)
def test_damaged_streams(data: st.DataObject, keep: bool, limit: int) -> None:
    """W13 W14: the same messages, and the same failure, as a slow reader has."""
    wire = data.draw(damaged(data.draw(streams(Client(15, keep).pack))[0]))
    expected = reference(wire, limit, Slow(limit, 15, keep))
    for pieces in ([wire], singly(wire), data.draw(split(wire))):
        assert deliver(Reader(limit, make(limit, 15, keep)), pieces) == expected
