"""WebSocket frames that break the rules, compression, limits and back-pressure: W13 to W15, and what they may cost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import connect

from tests.process.probing import WS_APP, WS_PAIRS, Probe, Script, flags, script, serving_websockets, settled
from tests.process.ws_probe import (
    BINARY,
    CLOSE,
    CONTINUED,
    PING,
    PONG,
    TEXT,
    Frame,
    WsClient,
    close_frame,
    fragments,
    frame,
    masked,
)
from tests.support import DEADLINE, Server, linux

KIB, MIB = 2**10, 2**20
LIMIT = MIB  # of a message, on the server of this file
EXTENSIONS = "Sec-WebSocket-Extensions"
DEFLATE = "permessage-deflate"


@pytest.fixture(scope="module", params=WS_PAIRS, ids="-".join)
def ws(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    with serving_websockets(request.param, tmp_path_factory.mktemp("ws"), "--limit-ws-message", "1MiB") as probe:
        yield probe


@pytest.fixture(scope="module", params=WS_PAIRS, ids="-".join)
def impatient(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """A server whose clients must read: of its own, as nothing else shall depend on how fast a test reads."""
    with serving_websockets(request.param, tmp_path_factory.mktemp("ws"), "--write-timeout", "2s") as probe:
        yield probe


def until_the_end(ws: Probe, it: Script) -> tuple[list[str | bytes], int]:
    """The messages that the application has received, and the code of its disconnect."""
    *messages, end = ws.ended(it)
    assert end["type"] == "websocket.disconnect", end
    assert all((event["text"] is None) != (event["bytes"] is None) for event in messages)
    return [event["bytes"] if event["text"] is None else event["text"] for event in messages], end["code"]


LISTENING = (("accept",), ("until", "websocket.disconnect"))

# -- W13: broken frames


def header(first: int, second: int, size: int = 0) -> bytes:
    """The beginning of a frame, byte by byte; `size` in the form that `second` says."""
    form = second & 127
    return bytes((first, second)) + (struct.pack("!H" if form == 126 else "!Q", size) if form > 125 else b"")


def close_with(payload: bytes) -> bytes:
    return frame(CLOSE, payload)


BROKEN: list[tuple[str, bytes, int]] = [
    ("unmasked text", frame(TEXT, b"text", mask=b""), 1002),
    ("unmasked empty text", frame(TEXT, mask=b""), 1002),
    ("unmasked large bytes", frame(BINARY, bytes(70000), mask=b""), 1002),
    ("unmasked ping", frame(PING, b"x", mask=b""), 1002),
    ("unmasked close", frame(CLOSE, b"\x03\xe8", mask=b""), 1002),
    ("the header of something unmasked", header(0x81, 5), 1002),
    *((f"rsv {rsv:03b}", frame(TEXT, b"text", rsv=rsv), 1002) for rsv in range(1, 8)),
    *((f"rsv {rsv:03b} in an empty message", frame(BINARY, rsv=rsv), 1002) for rsv in (1, 2, 4)),
    *((f"rsv {rsv:03b} in a ping", frame(PING, rsv=rsv), 1002) for rsv in (1, 2, 4)),
    *((f"rsv {rsv:03b} in a close", frame(CLOSE, b"\x03\xe8", rsv=rsv), 1002) for rsv in (1, 2, 4)),
    *((f"rsv {rsv:03b} later", frame(TEXT, b"a", False) + frame(CONTINUED, b"b", rsv=rsv), 1002) for rsv in (1, 2, 4)),
    *((f"opcode {opcode:x}", frame(opcode, b"x"), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *((f"opcode {opcode:x}, empty", frame(opcode), 1002) for opcode in (3, 11)),
    *((f"fragment of opcode {opcode:x}", frame(opcode, b"x", False), 1002) for opcode in (3, 15)),
    ("fragmented ping", frame(PING, b"x", False), 1002),
    ("fragmented pong", frame(PONG, b"", False), 1002),
    ("fragmented close", frame(CLOSE, b"\x03\xe8", False), 1002),
    ("ping of 126 bytes", frame(PING, bytes(126)), 1002),
    ("ping of 64 KiB", frame(PING, bytes(65536)), 1002),
    ("close of 126 bytes", frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
    ("ping with a length in two bytes", frame(PING, b"x", form=126), 1002),
    ("ping with a length in eight bytes", frame(PING, b"x", form=127), 1002),
    ("length 0 in two bytes", frame(TEXT, form=126), 1002),
    ("length 125 in two bytes", frame(TEXT, b"x" * 125, form=126), 1002),
    ("length 125 in eight bytes", frame(TEXT, b"x" * 125, form=127), 1002),
    ("length 126 in eight bytes", frame(TEXT, b"x" * 126, form=127), 1002),
    ("length 65535 in eight bytes", frame(TEXT, b"x" * 65535, form=127), 1002),
    ("continuation of nothing", frame(CONTINUED, b"x"), 1002),
    ("empty continuation of nothing", frame(CONTINUED), 1002),
    ("unfinished continuation of nothing", frame(CONTINUED, b"x", False), 1002),
    ("continuation after a message", fragments(TEXT, b"wh", b"ole") + frame(CONTINUED, b"x"), 1002),
    ("text within a message", frame(TEXT, b"a", False) + frame(TEXT, b"b"), 1002),
    ("bytes within a text", frame(TEXT, b"a", False) + frame(BINARY, b"b", False), 1002),
    ("close of one byte", close_with(b"\x03"), 1002),
    *(
        (f"close code {code}", close_with(struct.pack("!H", code)), 1002)
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    ),
    ("close code 1005 with a reason", close_with(b"\x03\xedwhy"), 1002),
    ("reason that is not UTF-8", close_with(b"\x03\xe8\xff"), 1007),
    ("reason that is cut", close_with(b"\x03\xe8" + "€".encode()[:2]), 1007),
    ("text that is not UTF-8", frame(TEXT, b"caf\xe9"), 1007),
    ("text that ends within a character", frame(TEXT, "€".encode()[:2]), 1007),
    ("a surrogate", frame(TEXT, b"\xed\xa0\x80"), 1007),
    ("two surrogates", frame(TEXT, b"\xed\xa0\xbd\xed\xb8\x80"), 1007),
    ("overlong NUL", frame(TEXT, b"\xc0\x80"), 1007),
    ("overlong slash", frame(TEXT, b"\xe0\x80\xaf"), 1007),
    ("beyond Unicode", frame(TEXT, b"\xf4\x90\x80\x80"), 1007),
    ("five bytes of UTF-8", frame(TEXT, b"\xf8\x88\x80\x80\x80"), 1007),
    ("large text that is not UTF-8", frame(TEXT, b"x" * 100000 + b"\xff"), 1007),
    ("fragments that are not UTF-8", fragments(TEXT, b"a", b"\xff", b"b"), 1007),
    ("fragments that end within a character", fragments(TEXT, b"a", "€".encode()[:2]), 1007),
    ("fragments with a broken character", fragments(TEXT, b"a\xe2\x82", b"b"), 1007),
    ("invalid UTF-8 in an unfinished message", frame(TEXT, b"a\xff", False), 1007),
    ("a byte over the limit", frame(BINARY, bytes(LIMIT + 1)), 1009),
    ("the header of a byte over the limit", header(0x82, 0xFF, LIMIT + 1) + b"mask", 1009),
    ("the header of 2**62 bytes", header(0x81, 0xFF, 2**62) + b"mask", 1009),
    ("fragments over the limit", frame(BINARY, bytes(LIMIT), False) + header(0x80, 0x81) + b"mask", 1009),
    ("many fragments over the limit", fragments(TEXT, *[b"x" * 4096] * 256, b"x"), 1009),
]


@pytest.mark.parametrize(("wire", "code"), [pytest.param(*case, id=what) for what, *case in BROKEN])
def test_w13_broken_frames(ws: Probe, wire: bytes, code: int) -> None:
    """W13: closed with this code, for client and application; what came before arrives, what comes after does not."""
    it = script(*LISTENING)
    with WsClient(ws.port, it.target).opened() as client:
        client.send(frame(TEXT, b"before") + frame(PING, b"before") + wire + frame(TEXT, b"after"))
        assert client.read_frame() == Frame(PONG, b"before")
        assert client.ended()[0] == code
    messages, seen = until_the_end(ws, it)
    assert messages in (["before"], ["before", "whole"])
    assert seen == code


SLOWLY = ("unmasked text", "rsv 100", "opcode 3", "fragmented ping", "ping of 126 bytes", "length 125 in two bytes")
SLOWLY += ("close of one byte", "close code 1005", "text that is not UTF-8", "fragments with a broken character")
SLOWLY += ("the header of 2**62 bytes", "text within a message", "length 65535 in eight bytes")


@pytest.mark.parametrize(
    ("wire", "code"), [pytest.param(wire[:40], code, id=what) for what, wire, code in BROKEN if what in SLOWLY]
)
def test_w13_broken_frames_byte_by_byte(ws: Probe, wire: bytes, code: int) -> None:
    """W13: the same where every byte comes alone; a bad header is enough."""
    with WsClient(ws.port, script(*LISTENING).target).opened() as client:
        for byte in wire:
            try:
                client.send(bytes([byte]))
            except ConnectionError:  # it is closed already
                break
        assert client.ended()[0] == code


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_w13_messages_of_the_size_of_the_limit(ws: Probe, size: int, count: int) -> None:
    """W13: are no larger; the limit holds for each message."""
    data = os.urandom(size)
    step = size // count + 1
    pieces = [data[start : start + step] for start in range(0, size, step)]
    with WsClient(ws.port, "/echo").opened() as client:
        for _ in range(3):
            client.send(fragments(BINARY, *pieces))
            assert client.hear() == data


def test_w13_a_limit_of_a_few_bytes(serve: Callable[..., Server]) -> None:
    """W13"""
    port = serve(WS_APP, "--limit-ws-message", "3").port
    for wire in (frame(TEXT, b"four"), fragments(TEXT, b"f", b"our"), fragments(TEXT, b"fou", b"", b"r")):
        with WsClient(port, "/echo").opened() as client:
            client.send(frame(TEXT, "€".encode()) + frame(TEXT))
            assert [client.hear(), client.hear()] == ["€", ""]
            client.send(frame(PING, b"longer") + wire)
            assert client.read_frame() == Frame(PONG, b"longer")
            assert client.ended()[0] == 1009


@linux
def test_w13_a_frame_over_the_limit_is_never_buffered(ws: Probe) -> None:
    """W13: a client may send what it likes after the header that was too much."""
    with Memory(ws) as memory, WsClient(ws.port, script(*LISTENING).target).opened() as client:
        client.send(header(0x82, 0xFF, 2**40) + b"mask")
        push(client, bytes(64 * KIB), 64 * MIB)
        assert client.closed()[0] == 1009
    assert memory.peak < 8 * MIB


# -- W14: what is negotiated


def deflated(data: bytes, bits: int = 15, level: int = 9) -> bytes:
    """The payload of a compressed message that needs no earlier one."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -bits)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Inflater:
    """What a client does with compressed messages of the server."""

    def __init__(self, bits: int = 15, takeover: bool = True) -> None:
        self._bits = bits
        self._takeover = takeover
        self._inflater = zlib.decompressobj(-bits)

    def __call__(self, got: Frame) -> bytes:
        assert got.opcode in (TEXT, BINARY)
        assert got.fin
        if not got.rsv:
            return got.payload
        assert got.rsv == 4
        if not self._takeover:
            self._inflater = zlib.decompressobj(-self._bits)
        return self._inflater.decompress(got.payload + b"\0\0\xff\xff")


def agreed(client: WsClient) -> dict[str, str | None] | None:
    """The parameters of the compression that the server has agreed to, None for none."""
    assert client.response
    value = client.response.header(EXTENSIONS.lower().encode())
    if value is None:
        return None
    name, *parameters = (part.strip() for part in value.decode().split(";"))
    assert name == DEFLATE
    pairs = [parameter.partition("=") for parameter in parameters]
    assert len({key for key, _, _ in pairs}) == len(pairs)
    return {key: text or None for key, _, text in pairs}


OFFERS: list[tuple[str, dict[str, Any] | None]] = [
    ("", {}),
    ("server_no_context_takeover", {"server_no_context_takeover": None}),
    ("client_no_context_takeover", {"client_no_context_takeover": None}),
    ("client_max_window_bits", {}),
    *((f"client_max_window_bits={bits}", {"client": bits}) for bits in range(8, 16)),
    *((f"server_max_window_bits={bits}", {"server": bits}) for bits in range(9, 16)),
    ('client_max_window_bits="10"', {"client": 10}),
    ("server_max_window_bits=15; client_max_window_bits=15", {"server": 15, "client": 15}),
    (
        "client_no_context_takeover; server_no_context_takeover; server_max_window_bits=9; client_max_window_bits=9",
        {"server": 9, "client": 9, "server_no_context_takeover": None, "client_no_context_takeover": None},
    ),
    ("server_max_window_bits", None),
    ("server_max_window_bits=7", None),
    ("server_max_window_bits=16", None),
    ("server_max_window_bits=09", None),
    ("server_max_window_bits=1x", None),
    ("client_max_window_bits=7", None),
    ("client_max_window_bits=16", None),
    ("client_max_window_bits=+9", None),
    ("server_no_context_takeover=1", None),
    ("client_no_context_takeover=true", None),
    ("client_no_context_takeover; client_no_context_takeover", None),
    ("server_max_window_bits=10; server_max_window_bits=10", None),
    ("novelty", None),
    ("novelty=1; client_max_window_bits", None),
]
TEXTS = [json.dumps(list(range(n, n + 2000))).encode() for n in (0, 0, 17)]


@pytest.mark.parametrize(("offer", "wanted"), OFFERS, ids=[offer or "nothing more" for offer, _ in OFFERS])
def test_w14_negotiation(ws: Probe, offer: str, wanted: dict[str, Any] | None) -> None:
    """W14: what the client asks for is promised and kept, an offer that breaks RFC 7692 is declined."""
    value = f"{DEFLATE}; {offer}" if offer else DEFLATE
    with WsClient(ws.port, "/echo", [(EXTENSIONS, value)]).opened() as client:
        got = agreed(client)
        assert (got is None) == (wanted is None)
        if got is None or wanted is None:
            client.say("plain" * 100)
            assert client.hear() == "plain" * 100
            return
        assert got.keys() <= {
            "server_max_window_bits",
            "client_max_window_bits",
            "server_no_context_takeover",
            "client_no_context_takeover",
        }
        ours, theirs = int(got.get("server_max_window_bits") or 15), int(got.get("client_max_window_bits") or 15)
        assert ours <= wanted.get("server", 15)
        assert theirs <= wanted.get("client", 15)
        assert ("client_max_window_bits" in got) <= ("client_max_window_bits" in offer)
        assert ("server_no_context_takeover" in got) >= ("server_no_context_takeover" in offer)
        inflate = Inflater(ours, "server_no_context_takeover" not in got)
        for text in TEXTS:
            client.send(frame(TEXT, deflated(text, max(theirs, 9)), rsv=4))
            answer = client.read_frame()
            assert inflate(answer) == text
            assert len(answer.payload) < len(text)


@pytest.mark.parametrize(
    ("offers", "wanted"),
    [
        ([f"{DEFLATE}; novelty, {DEFLATE}; server_max_window_bits=10"], 10),
        ([f"x-webkit-deflate-frame, {DEFLATE}; server_max_window_bits=9"], 9),
        ([f"{DEFLATE}; server_max_window_bits=7", f"{DEFLATE}; server_max_window_bits=11, {DEFLATE}"], 11),
        (["x-webkit-deflate-frame", "permessage-bzip2"], None),
        (["PERMESSAGE-DEFLATE-NOT"], None),
    ],
)
def test_w14_the_first_offer_that_can_be_met(ws: Probe, offers: list[str], wanted: int | None) -> None:
    """W14: of one list or many."""
    with WsClient(ws.port, "/echo", [(EXTENSIONS, offer) for offer in offers]).opened() as client:
        got = agreed(client)
        assert (got and got["server_max_window_bits"]) == (wanted and str(wanted))


def test_w14_not_without_an_offer(ws: Probe) -> None:
    """W14"""
    with WsClient(ws.port, "/echo").opened() as client:
        assert agreed(client) is None


def test_w14_switched_off(serve: Callable[..., Server]) -> None:
    """W14: RSV1 is an error then."""
    with WsClient(serve(WS_APP, "--no-ws-compression").port, "/echo", [(EXTENSIONS, DEFLATE)]).opened() as client:
        assert agreed(client) is None
        client.send(frame(TEXT, deflated(b"text"), rsv=4))
        assert client.ended()[0] == 1002


# -- W14: messages

HELLO = [  # RFC 7692, 7.2.3: each is "Hello", or two of it
    ("one block", frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4), 1),
    ("two fragments", frame(TEXT, bytes.fromhex("f248cd"), False, 4) + frame(CONTINUED, bytes.fromhex("c9c90700")), 1),
    (
        "a window that is taken over",
        frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4) + frame(TEXT, bytes.fromhex("f200110000"), rsv=4),
        2,
    ),
    ("not compressed", frame(TEXT, bytes.fromhex("000500faff48656c6c6f00"), rsv=4), 1),
    ("a final block", frame(TEXT, bytes.fromhex("f348cdc9c9070000"), rsv=4) * 2, 2),
    ("two blocks", frame(TEXT, bytes.fromhex("f248050000 00ffffcac9c90700".replace(" ", "")), rsv=4), 1),
    ("without RSV1", frame(TEXT, b"Hello") + frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4), 2),
    ("empty fragments", fragments(TEXT, b"", bytes.fromhex("f248cdc9c90700"), b"", b"", rsv=4), 1),
    ("byte by byte", fragments(TEXT, *(bytes([byte]) for byte in bytes.fromhex("f248cdc9c90700")), rsv=4), 1),
    (
        "a ping between fragments",
        frame(TEXT, bytes.fromhex("f248cd"), False, 4)
        + frame(PING, bytes.fromhex("f248"))
        + frame(CONTINUED, bytes.fromhex("c9c90700")),
        1,
    ),
    (
        "a ping between plain fragments",
        frame(TEXT, b"Hel", False) + frame(PING) + frame(CONTINUED, b"lo") + frame(PING),
        1,
    ),
]


@pytest.mark.parametrize(("wire", "count"), [pytest.param(*case, id=what) for what, *case in HELLO])
def test_w14_the_examples_of_the_rfc(ws: Probe, wire: bytes, count: int) -> None:
    """W14 W6: three times, on one socket, so that nothing is left over from one to the next."""
    it = script(*LISTENING)
    with WsClient(ws.port, it.target, [(EXTENSIONS, DEFLATE)]).opened() as client:
        client.send(wire * 3)
        client.send(close_frame())
        assert [got.opcode for got in client.frames()][-1] == CLOSE
    assert until_the_end(ws, it) == (["Hello"] * count * 3, 1000)


def test_w14_empty_messages(ws: Probe) -> None:
    """W14 W6: compressed (RFC 7692, 7.2.3.6) and not, text and bytes."""
    with WsClient(ws.port, "/echo", [(EXTENSIONS, DEFLATE)]).opened() as client:
        inflate = Inflater()
        for opcode, payload, rsv in itertools.product((TEXT, BINARY), (b"\0", b"\2\0"), (4,)):
            client.send(frame(opcode, payload, rsv=rsv) + frame(opcode))
            for _ in range(2):
                got = client.read_frame()
                assert (got.opcode, inflate(got)) == (opcode, b"")


COMPRESSED_BROKEN: list[tuple[str, bytes, int]] = [
    ("no deflate", frame(BINARY, b"\xff\xff\xff\xff", rsv=4), 1007),
    ("deflate that breaks off", frame(TEXT, deflated(b"text" * 100)[:-3] + b"\xff", rsv=4), 1007),
    ("a distance before the beginning", frame(TEXT, bytes.fromhex("f200110000"), rsv=4), 1007),
    ("fragments of no deflate", fragments(BINARY, b"\xff\xff", b"\xff\xff", rsv=4), 1007),
    ("text that is not UTF-8", frame(TEXT, deflated(b"\xff"), rsv=4), 1007),
    ("fragments that are not UTF-8", fragments(TEXT, deflated(b"\xff")[:2], deflated(b"\xff")[2:], rsv=4), 1007),
    ("RSV1 on a continuation", frame(TEXT, b"a", False) + frame(CONTINUED, b"b", rsv=4), 1002),
    ("RSV1 on a later fragment", frame(TEXT, b"\0", False, 4) + frame(CONTINUED, b"\0", rsv=4), 1002),
    ("RSV1 on a ping", frame(PING, b"", rsv=4), 1002),
    ("RSV1 on a close", frame(CLOSE, b"\x03\xe8", rsv=4), 1002),
    ("RSV2", frame(TEXT, b"\0", rsv=6), 1002),
    ("RSV3", frame(TEXT, b"\0", rsv=1), 1002),
    ("a bomb", frame(BINARY, deflated(bytes(64 * MIB)), rsv=4), 1009),
    ("a byte over the limit, inflated", frame(BINARY, deflated(bytes(LIMIT + 1)), rsv=4), 1009),
    ("a text bomb", frame(TEXT, deflated(b"x" * 8 * MIB), rsv=4), 1009),
    ("a bomb in fragments", fragments(BINARY, deflated(bytes(8 * MIB))[:9], deflated(bytes(8 * MIB))[9:], rsv=4), 1009),
    ("over the limit, compressed", frame(BINARY, deflated(os.urandom(LIMIT + 1)), rsv=4), 1009),
]  # fmt: skip


@pytest.mark.parametrize(("wire", "code"), [pytest.param(*case, id=what) for what, *case in COMPRESSED_BROKEN])
def test_w14_w13_broken_compression(ws: Probe, wire: bytes, code: int) -> None:
    """W14 W13: as with frames; a size counts inflated."""
    it = script(*LISTENING)
    with WsClient(ws.port, it.target, [(EXTENSIONS, DEFLATE)]).opened() as client:
        client.send(frame(TEXT, b"before") + wire + frame(TEXT, b"after"))
        assert client.ended()[0] == code
    assert until_the_end(ws, it) == (["before"], code)


def test_w14_messages_of_the_size_of_the_limit(ws: Probe) -> None:
    """W14 W13: inflated; compressed in one frame or in several."""
    it = script(("accept",), ("several", 4))
    payload = deflated(bytes(LIMIT))
    with WsClient(ws.port, it.target, [(EXTENSIONS, f"{DEFLATE}; client_no_context_takeover")]).opened() as client:
        client.send(frame(BINARY, payload, rsv=4) * 2 + fragments(BINARY, payload[:7], payload[7:], rsv=4) * 2)
        assert ws.ended(it) == [[LIMIT] * 4]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"server_no_context_takeover": True},
        {"client_no_context_takeover": True, "client_max_window_bits": None},
        {"server_max_window_bits": 9, "client_max_window_bits": 9},
        {"server_max_window_bits": 15, "client_max_window_bits": 15},
    ],
    ids=repr,
)
def test_w14_another_implementation(ws: Probe, options: dict[str, Any]) -> None:
    """W14: messages of all kinds there and back, with the `websockets` library."""
    messages: list[str | bytes] = ["", b"", "x", "käse" * 10000, os.urandom(100000), b"ab" * 300000, "€" * 63, "y" * 64]
    messages += [json.dumps({"number": number, "text": "the same again"}) for number in range(50)]
    factory = ClientPerMessageDeflateFactory(**options)
    url = f"ws://127.0.0.1:{ws.port}/echo"
    with connect(url, extensions=[factory], compression=None, proxy=None, max_size=None) as client:
        assert len(client.protocol.extensions) == 1
        for message in messages:
            client.send(message)
            assert client.recv(timeout=DEADLINE) == message
        client.send(iter(["in ", "many ", "pieces"]))
        assert client.recv(timeout=DEADLINE) == "in many pieces"
        assert client.ping().wait(DEADLINE)


# -- W14, W15: memory


class Memory:
    """What the worker's memory grows by; `peak` after the block: at its highest within the block."""

    def __init__(self, ws: Probe) -> None:
        self._path = Path(f"/proc/{ws.server.worker_pids()[0]}")
        self._before = 0
        self.peak = 0

    def _read(self, name: str) -> int:
        match = re.search(rf"{name}:\s+(\d+) kB", (self._path / "status").read_text())
        assert match
        return int(match[1]) * KIB

    def __enter__(self) -> Memory:
        (self._path / "clear_refs").write_text("5")  # the peak starts anew
        self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self.growth()

    def growth(self) -> int:
        return self._read("VmHWM") - self._before


def push(client: WsClient, data: bytes, total: int) -> int:
    """Send `data` again and again, up to `total` bytes, until the server takes nothing more for a while, or is gone.
    The number of bytes sent; nothing is read."""
    view, sent = memoryview(data), 0
    client.sock.settimeout(0.4)
    try:
        while sent < total:
            sent += client.sock.send(view[sent % len(data) :])
    except (TimeoutError, ConnectionError):
        pass
    finally:
        client.sock.settimeout(DEADLINE)
    return sent


@linux
def test_w14_a_bomb_costs_no_more_than_the_limit(ws: Probe) -> None:
    """W14: one of 100 MiB, whole or in fragments."""
    payload = deflated(bytes(100 * MIB))
    for wire in (frame(BINARY, payload, rsv=4), fragments(BINARY, payload[:100], payload[100:], rsv=4)):
        with Memory(ws) as memory, WsClient(ws.port, "/echo", [(EXTENSIONS, DEFLATE)]).opened() as client:
            client.send(wire)
            assert client.ended()[0] == 1009
        assert memory.peak < 8 * MIB


@linux
def test_w14_w15_messages_inflate_only_as_they_are_received(ws: Probe) -> None:
    """W14 W15: a few hundred KiB may hold hundreds of messages, each as large as is allowed."""
    flag, count = next(flags), 200
    it = script(("accept",), ("receive",), ("block", 0.5, flag), ("wait", flag), ("several", count))
    with WsClient(ws.port, it.target, [(EXTENSIONS, f"{DEFLATE}; client_no_context_takeover")]).opened() as client:
        client.say("now")
        ws.server.wait_line(f"{flag}: blocking")
        with Memory(ws) as memory:
            client.send(frame(BINARY, deflated(bytes(LIMIT)), rsv=4) * count)  # it is all there when the loop looks
            ws.request("/")
            assert settled(memory.growth) < 32 * MIB
        ws.set(flag)
        assert ws.ended(it)[1] == [LIMIT] * count


FLOODS: list[tuple[str, bytes, int, int]] = [  # bytes for the wire, the messages in them, the bytes of one
    ("large messages", frame(BINARY, bytes(60 * KIB)), 1, 60 * KIB),
    ("messages of the limit", frame(BINARY, bytes(LIMIT)), 1, LIMIT),
    ("small messages", frame(TEXT, b"x" * 50) * 1000, 1000, 50),
    ("empty messages", frame(TEXT) * 10000, 10000, 0),
    ("fragments", fragments(BINARY, *[bytes(100)] * 100), 1, 10000),
]


@linux
@pytest.mark.parametrize(("wire", "messages", "size"), [pytest.param(*case, id=what) for what, *case in FLOODS])
def test_w15_an_application_that_does_not_receive_stops_the_client(
    ws: Probe, wire: bytes, messages: int, size: int
) -> None:
    """W15: its `send` blocks, the server's memory does not grow, and in the end everything arrives. On a Unix socket,
    where the kernel takes little itself; with large messages on TCP, where it takes more."""
    flag = next(flags)
    it = script(("accept",), ("wait", flag), ("tally",))
    with WsClient(ws.port if messages == 1 else ws.socket_path, it.target).opened() as client:
        with Memory(ws) as memory:
            sent = push(client, wire, 64 * MIB)
        assert sent < 32 * MIB
        assert memory.peak < 12 * MIB
        ws.set(flag)
        client.send(wire[sent % len(wire) or len(wire) :])
        assert client.part() == (1000, "")
    count = -(-sent // len(wire)) * messages
    assert ws.ended(it)[0] == (count, count * size)


@linux
def test_w15_a_client_that_never_reads(impatient: Probe) -> None:
    """W15: 200 MiB for it wait in the application, and `write_timeout`, here 2 s, ends it."""
    it = script(("accept",), ("stream", 200 * MIB, 64 * KIB))
    with Memory(impatient) as memory, WsClient(impatient.port, it.target).opened() as client:
        taken, names = impatient.ended(it)
        assert taken < 24 * MIB
        assert "OSError" in names
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while client.sock.recv(MIB):
                pass
    assert memory.peak < 20 * MIB


def test_w15_a_client_that_reads_slowly_gets_everything(ws: Probe) -> None:
    """W15: `send` waits for it."""
    total, piece = 24 * MIB, 256 * KIB
    it = script(("accept",), ("stream", total, piece))
    with WsClient(ws.port, it.target).opened() as client:
        assert len(client.hear()) == piece
        assert ws.records(it)[0] < total
        for _ in range(total // piece - 1):
            assert len(client.hear()) == piece
        assert client.closed() == (1000, "")
    assert ws.ended(it) == [total]


def test_w15_a_client_that_reads_a_large_message_steadily_gets_it(impatient: Probe) -> None:
    """W15: for longer than `write_timeout`, here 2 s, which is for one that has stopped to read."""
    it = script(("accept",), ("shout", "x", 30 * MIB))
    with WsClient(impatient.port, it.target).opened() as client:
        size = 0
        while size < 30 * MIB:
            part = client.sock.recv(MIB)
            assert part, f"the connection ended after {size} bytes"
            size += len(part)
            time.sleep(len(part) / (10 * MIB))  # a network of 80 Mbit/s


@linux
def test_w15_w7_pings_of_a_client_that_never_reads(impatient: Probe) -> None:
    """W15 W7: answers that are not read are not piled up; `write_timeout` ends it."""
    it = script(*LISTENING)
    with Memory(impatient) as memory, WsClient(impatient.port, it.target).opened() as client:
        push(client, frame(PING, b"x" * 125) * 500, 200 * MIB)
        assert impatient.ended(it) == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}]
    assert memory.peak < 8 * MIB


@linux
def test_w15_w9_a_client_that_never_reads_cannot_be_told(impatient: Probe) -> None:
    """W15 W9: the close frame waits behind the rest, but not for ever."""
    it = script(("accept",), ("together", [("stream", 64 * MIB, 64 * KIB), ("closing", 0.1)]), ("receive",))
    with WsClient(impatient.port, it.target).opened():
        *_, end = impatient.ended(it)
        assert end == {"type": "websocket.disconnect", "code": 1006, "reason": ""}


def test_w15_others_have_their_turn(ws: Probe) -> None:
    """W15: a flood of pings and of tiny messages from one client does not starve another one."""
    stop = threading.Event()
    flood = (frame(PING, b"x") + frame(TEXT, b"x") + fragments(BINARY, b"a", b"b")) * 2000

    def read(client: WsClient) -> None:
        with contextlib.suppress(OSError):
            while client.sock.recv(MIB):
                pass

    def write(client: WsClient) -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                client.send(flood)

    with WsClient(ws.port, "/echo").opened() as busy, WsClient(ws.port, "/echo").opened() as client:
        threads = [threading.Thread(target=do, args=(busy,)) for do in (read, write)]
        for thread in threads:
            thread.start()
        slowest = 0.0
        try:
            for number in range(50):
                began = time.monotonic()
                client.say(f"turn {number}")
                assert client.hear() == f"turn {number}"
                slowest = max(slowest, time.monotonic() - began)
        finally:
            stop.set()
            busy.sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
    assert slowest < 10  # s; alone, it is some hundredths


def test_w15_thousands_of_tiny_fragments(ws: Probe) -> None:
    """W15 W6: take a time that is in proportion."""
    count = 50000
    with WsClient(ws.port, "/echo").opened() as client:
        began = time.monotonic()
        client.send(frame(TEXT, b"a", False) + frame(CONTINUED, b"b", False) * count + frame(CONTINUED, b"c"))
        assert client.hear() == "a" + "b" * count + "c"
        assert time.monotonic() - began < 60  # s; a tenth of a second, if it is in proportion


def test_w15_a_message_byte_by_byte(ws: Probe) -> None:
    """W15: a large frame that comes in thousands of pieces takes a time that is in proportion."""
    data = os.urandom(300000)
    wire = frame(BINARY, data)
    with WsClient(ws.port, "/echo").opened() as client:
        began = time.monotonic()
        for position in range(0, len(wire), 30):
            client.send(wire[position : position + 30])
        assert client.hear() == data
        assert time.monotonic() - began < 60  # s; a tenth of a second, if it is in proportion


def test_w13_masks(ws: Probe) -> None:
    """W13: every offset of the mask, in whole frames and in pieces."""
    data = bytes(range(256)) * 2
    with WsClient(ws.port, "/echo").opened() as client:
        for size in (*range(9), 255, 510, 511, 512):
            client.send(frame(BINARY, data[:size], mask=os.urandom(4)))
            assert client.hear() == data[:size]
        large = data * 200
        whole = frame(BINARY, large)
        assert masked(masked(large)) == large
        for cut in (15, 70001, 70002, 70003):
            client.send(whole[:cut])
            ws.request("/")
            client.send(whole[cut:])
            assert client.hear() == large


def test_w13_random_frames_never_break_the_server(ws: Probe) -> None:
    """W13: whatever comes, there is one close frame at most, and then the end; the server goes on."""
    dice = random.Random(7)
    for _ in range(150):
        with WsClient(ws.port, "/echo", [(EXTENSIONS, DEFLATE)] * dice.randrange(2)).opened() as client:
            wire = b""
            for _ in range(dice.randrange(1, 6)):
                payload = dice.randbytes(dice.choice((0, 1, 2, 125, 126, 300)))
                opcode = dice.choice((CONTINUED, TEXT, BINARY, BINARY, CLOSE, PING, PONG, dice.randrange(16)))
                rsv = dice.choice((0, 0, 0, 4, dice.randrange(8)))
                wire += frame(opcode, payload, dice.random() < 0.7, rsv, dice.choice((b"mask", b"mask", b"")))
            client.send(wire[: dice.randrange(1, len(wire) + 1)])
            client.sock.shutdown(socket.SHUT_WR)
            kinds = [got.opcode for got in client.frames()]
            assert CLOSE not in kinds[:-1]
    with WsClient(ws.port, "/echo").opened() as client:
        client.say("fine")
        assert client.hear() == "fine"
    ws.server.check_log()
