"""Request bodies off the wire: a declared length or chunks. One decoder for all parsers, fed bytes in any split. Pure.

The parsers are not used here on purpose: of the two, one accepts a bare CR in a chunk extension, spaces after a chunk
size and 20 hex digits, and neither tells how many bytes it has left over when a pipelined request follows.
"""

from __future__ import annotations

import enum
import re
from typing import Protocol

from apphost.protocols.base import BadRequest
from apphost.protocols.strict import Limits, is_field_line

# RFC 9112, 7.1. 16 hex digits are what 64 bits hold; no white space around the size (a known way to smuggle).
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")


class BodyDecoder(Protocol):
    done: bool

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Decoded bytes of the body, and what is left over after its end (b"" until `done`). Raises `BadRequest`."""
        ...


class LengthDecoder:
    """A body of a declared number of bytes."""

    __slots__ = ("_missing", "done")

    def __init__(self, length: int) -> None:
        self._missing = length
        self.done = length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        missing = self._missing
        if len(data) < missing:
            self._missing = missing - len(data)
            return data, b""
        self.done = True
        self._missing = 0
        return (data, b"") if len(data) == missing else (data[:missing], data[missing:])


class _Part(enum.Enum):
    SIZE = enum.auto()  # in the line with the size of a chunk
    DATA = enum.auto()
    DATA_END = enum.auto()  # in the CRLF after the data of a chunk
    TRAILERS = enum.auto()


class ChunkedDecoder:
    """A body in chunks (RFC 9112, 7.1). Trailer fields are checked and dropped, never merged into the header fields.

    Refused with 400: anything but a bare size and an optional extension in a chunk line, data that is not followed by
    CRLF, malformed trailers; with 413: a body, an extension or trailers over their limit (431 for the latter).
    """

    __slots__ = ("_kept", "_limits", "_missing", "_part", "_size", "_trailer_size", "done")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._part = _Part.SIZE
        self._kept = b""  # the beginning of a line or CRLF whose end has not come
        self._missing = 0  # of the current chunk
        self._size = 0  # of the body so far, as announced
        self._trailer_size = 0
        self.done = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        if self._kept:
            data = self._kept + data
            self._kept = b""
        body: list[bytes] = []
        position = 0
        while not self.done:
            if self._part is _Part.DATA:
                piece = data[position : position + self._missing]
                position += len(piece)
                self._missing -= len(piece)
                body.append(piece)
                if self._missing:
                    break
                self._part = _Part.DATA_END
            line_end = data.find(b"\n", position)
            if line_end < 0:
                self._kept = data[position:]
                self._check_kept()
                break
            if line_end == position or data[line_end - 1] != 0x0D:
                raise BadRequest(400, "the chunked body is malformed")
            self._take_line(data[position : line_end - 1])
            position = line_end + 1
        return b"".join(body), data[position:] if self.done else b""

    def _take_line(self, line: bytes) -> None:
        """One line without its CRLF."""
        if self._part is _Part.SIZE:
            self._take_size(line)
        elif self._part is _Part.DATA_END:
            if line:
                raise BadRequest(400, "the data of a chunk is longer than its size")
            self._part = _Part.SIZE
        elif not line:
            self.done = True
        else:
            self._trailer_size += len(line) + 2
            if self._trailer_size > self._limits.trailers:
                raise BadRequest(431, "the trailer fields are too large")
            if not is_field_line(line):
                raise BadRequest(400, "a trailer field line is malformed")

    def _take_size(self, line: bytes) -> None:
        size = self._check_size_line(line)
        if size == 0:
            self._part = _Part.TRAILERS
            return
        self._missing = size
        self._size += size
        if self._limits.body and self._size > self._limits.body:
            raise BadRequest(413, "the request body is too large")
        self._part = _Part.DATA

    def _check_size_line(self, line: bytes) -> int:
        """The size in a line, or in the beginning of one."""
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(400, "the size line of a chunk is malformed")
        if len(line) - match.end(1) > self._limits.chunk_extension:
            raise BadRequest(413, "a chunk extension is too large")
        return int(match[1], 16)

    def _check_kept(self) -> None:
        """Refuse an unfinished line as soon as no ending could make it right; so none grows without bound."""
        kept = self._kept.removesuffix(b"\r")
        if self._part is _Part.SIZE:
            if self._kept:
                self._check_size_line(kept)
        elif self._part is _Part.DATA_END:
            if kept:
                raise BadRequest(400, "the data of a chunk is longer than its size")
        elif kept and self._trailer_size + len(kept) + 2 > self._limits.trailers:
            raise BadRequest(431, "the trailer fields are too large")


def decoder_for(content_length: int | None, chunked: bool, limits: Limits) -> BodyDecoder | None:
    """The decoder that a request's framing asks for, None where there is no body. Raises `BadRequest` 413."""
    if chunked:
        return ChunkedDecoder(limits)
    if not content_length:
        return None
    if limits.body and content_length > limits.body:
        raise BadRequest(413, "the request body is too large")
    return LengthDecoder(content_length)
