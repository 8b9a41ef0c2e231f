"""Compression of WebSocket messages, permessage-deflate (RFC 7692).

An extension of wsproto's frame layer, in place of wsproto's own one: that inflates whatever comes to its full size
before anybody can count it. It is for data frames only: `frames.Reader` reads the control frames between them itself.
"""

from __future__ import annotations

import re
import zlib

from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

from apphost.protocols.handshake import Offer

# Windows of 4 KiB and a small hash table take 32 KiB for both directions instead of 300, and chat messages and JSON get
# nearly as small (the websockets library has found the same, and has the same default).
WINDOW_BITS = 12
MEMORY_LEVEL = 5
# Messages below this many bytes fit a packet anyway, and deflate makes many of them larger.
SMALLEST = 64
# Final blocks in a frame (RFC 7692, 7.2.3.4): whoever ends messages with them has one. Each takes two bytes, and costs
# some microseconds.
FINALS_MAX = 16

_TAIL = b"\x00\x00\xff\xff"  # RFC 7692, 7.2.1: every message ends with it, and it is not sent
_BITS = re.compile(r"[89]|1[0-5]")
_NO_RSV = RsvBits(False, False, False)
_MAY_BE_COMPRESSED = RsvBits(True, False, False)


class TooBig(Exception):
    """The message is larger than the limit, once inflated; not more than the limit has been inflated."""


class Deflate(Extension):
    """Both directions of one socket. A memory bomb costs no more than the limit.

    limit: bytes of a message, inflated. keep_ours, keep_theirs: whether the window outlives the message in our and the
    client's direction (context takeover).
    """

    name = "permessage-deflate"

    def __init__(self, limit: int, ours: int, theirs: int, keep_ours: bool, keep_theirs: bool) -> None:
        self.limit = limit
        self.ours = ours  # window bits
        self.theirs = theirs
        self.keep_ours = keep_ours
        self.keep_theirs = keep_theirs
        self._compressor: zlib._Compress | None = None
        self._decompressor: zlib._Decompress | None = None
        self._compressed = False  # the message that is being received
        self._inflated = 0  # bytes of the message so far
        self._finals = 0  # final blocks of the frame so far
        self._unended = False  # what there is of the message does not end with a final block, and is not empty
        self.work = 0  # bytes inflated since whoever wants to know has set it to 0

    # -- whole messages

    def deflate(self, data: bytes) -> bytes:
        compressor = self._compressor
        if compressor is None:
            compressor = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -self.ours, MEMORY_LEVEL)
            if self.keep_ours:
                self._compressor = compressor
        return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]

    def inflate(self, data: bytes) -> bytes:
        """Raises `TooBig` and `zlib.error`."""
        self._inflated = self._finals = 0
        return self._inflate(data) + self._finish()

    # -- pieces of messages

    def _inflate(self, data: bytes) -> bytes:
        pieces = []
        while data:
            if self._decompressor is None:
                self._decompressor = zlib.decompressobj(-self.theirs)
            decompressor = self._decompressor
            # One byte more than is allowed, because without it a full result would not tell whether more follows.
            piece = decompressor.decompress(data, self.limit - self._inflated + 1)
            pieces.append(piece)
            self._inflated += len(piece)
            self.work += len(piece)
            if self._inflated > self.limit:
                raise TooBig
            data = decompressor.unused_data
            self._unended = not decompressor.eof
            if decompressor.eof:  # RFC 7692, 7.2.3.4: a final block ends a stream, not the message
                self._decompressor = None
                self._finals += 1
                if self._finals > FINALS_MAX:
                    raise zlib.error("too many final blocks")
        return b"".join(pieces)

    def _finish(self) -> bytes:
        # Behind nothing at all, or a final block, the tail would be the beginning of a block.
        rest = self._inflate(_TAIL) if self._unended else b""
        self._unended = False
        if not self.keep_theirs:
            self._decompressor = None
        return rest

    # -- wsproto's side

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool:
        return False  # servers do not

    def frame_inbound_header(
        self, _proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, _payload_length: int
    ) -> CloseReason | RsvBits:
        self._finals = 0
        if opcode.iscontrol() or opcode is Opcode.CONTINUATION:
            return _NO_RSV  # RFC 7692, 6: the bit stands on the first frame only
        self._compressed = rsv.rsv1
        self._inflated = 0
        return _MAY_BE_COMPRESSED

    def frame_inbound_payload_data(self, _proto: FrameDecoder | FrameProtocol, data: bytes) -> bytes | CloseReason:
        return self._guarded(data) if self._compressed else data

    def frame_inbound_complete(self, _proto: FrameDecoder | FrameProtocol, fin: bool) -> bytes | CloseReason | None:
        return self._guarded(None) if self._compressed and fin else None

    def _guarded(self, data: bytes | None) -> bytes | CloseReason:
        try:
            return self._finish() if data is None else self._inflate(data)
        except TooBig:
            return CloseReason.MESSAGE_TOO_BIG
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA


def negotiate(offers: list[Offer], limit: int, keep_theirs: bool = True) -> tuple[Deflate | None, bytes]:
    """The compression for a new socket and the value of Sec-WebSocket-Extensions: the first offer that can be met, or
    (None, b"").

    keep_theirs: whether the client may refer to its earlier messages. A socket that is to move to another process does
    without, because the window would have to travel.
    """
    for offer in offers:
        if offer.name == Deflate.name and (accepted := _accept(offer, limit, keep_theirs)) is not None:
            return accepted
    return None, b""


def _accept(offer: Offer, limit: int, keep_theirs: bool) -> tuple[Deflate, bytes] | None:
    """None for an offer that must be declined (RFC 7692, 7.1): unknown, repeated or wrong parameters."""
    asked = dict(offer.parameters)
    if len(asked) != len(offer.parameters) or not all(_is_right(name, value) for name, value in offer.parameters):
        return None
    ours = min(int(asked.get("server_max_window_bits") or WINDOW_BITS), WINDOW_BITS)
    if ours < 9:
        return None  # zlib does not compress with a window of 256 bytes
    keep_ours = "server_no_context_takeover" not in asked
    keep_theirs = keep_theirs and "client_no_context_takeover" not in asked
    theirs = 15
    told = [Deflate.name, f"server_max_window_bits={ours}"]
    if "client_max_window_bits" in asked:
        theirs = min(int(asked["client_max_window_bits"] or WINDOW_BITS), WINDOW_BITS)
        told.append(f"client_max_window_bits={theirs}")
    if not keep_ours:
        told.append("server_no_context_takeover")
    if not keep_theirs:
        told.append("client_no_context_takeover")
    # What was made with a window of 256 bytes can be read with one of 512, the least that zlib has.
    return Deflate(limit, ours, max(theirs, 9), keep_ours, keep_theirs), "; ".join(told).encode("ascii")


def _is_right(name: str, value: str | None) -> bool:
    """Whether a parameter may stand in an offer (RFC 7692, 7.1.1 and 7.1.2)."""
    if name in ("server_no_context_takeover", "client_no_context_takeover"):
        return value is None
    if name == "server_max_window_bits":
        return value is not None and _BITS.fullmatch(value) is not None
    return name == "client_max_window_bits" and (value is None or _BITS.fullmatch(value) is not None)
