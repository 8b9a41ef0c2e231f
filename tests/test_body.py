"""Decoding request bodies: R2, R8, P6 and the limits; fed whole, byte by byte, and in any other pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.protocols.base import BadRequest
from apphost.protocols.body import BodyDecoder, ChunkedDecoder, LengthDecoder, decoder_for
from apphost.protocols.strict import Limits

NEXT = b"GET /next HTTP/1.1\r\n\r\n"


def run(decoder: BodyDecoder, pieces: Iterable[bytes]) -> tuple[bytes, bytes]:
    """The body and all that is left over: what was left of a piece, and the pieces that were not needed."""
    body, rest = b"", b""
    for piece in pieces:
        if decoder.done:
            rest += piece
            continue
        data, left = decoder.feed(piece)
        assert decoder.done or left == b""
        body += data
        rest += left
    return body, rest


def singly(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@st.composite
def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def refusal(pieces: Iterable[bytes], limits: Limits | None = None) -> int:
    with pytest.raises(BadRequest) as caught:
        run(ChunkedDecoder(limits or Limits()), pieces)
    return caught.value.status


# -- a declared length


@given(st.binary(max_size=200), st.binary(max_size=50), st.data())
def test_length_in_any_pieces(body: bytes, rest: bytes, data: st.DataObject) -> None:
    decoder = LengthDecoder(len(body))
    assert run(decoder, data.draw(split(body + rest))) == (body, rest)
    assert decoder.done


@given(st.binary(min_size=1, max_size=50), st.integers(1, 9))
def test_length_is_not_done_too_early(body: bytes, missing: int) -> None:
    decoder = LengthDecoder(len(body) + missing)
    assert decoder.feed(body) == (body, b"")
    assert not decoder.done


def test_length_zero_is_done_at_once() -> None:
    assert LengthDecoder(0).done


# -- chunks


def encoded(chunks: list[bytes], extensions: list[bytes], trailers: list[bytes]) -> bytes:
    lines = [b"%x%b\r\n%b\r\n" % (len(c), e, c) for c, e in zip(chunks, extensions, strict=True)]
    return b"".join(lines) + b"0\r\n" + b"".join(line + b"\r\n" for line in trailers) + b"\r\n"


EXTENSIONS = st.sampled_from([b"", b";", b";a", b";a=b", b';a="q \xff"', b";;", b"; a = b\t"])
TRAILERS = st.lists(st.sampled_from([b"X-T: 1", b"Content-Length: 5", b"a:", b"Host:\tx \xff"]), max_size=3)


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), EXTENSIONS), max_size=6),
    TRAILERS,
    st.sampled_from([b"", NEXT, b"\r\n", b"\r", b"\n", b"0"]),
    st.data(),
)
def test_chunks_in_any_pieces(
    chunks: list[tuple[bytes, bytes]], trailers: list[bytes], rest: bytes, data: st.DataObject
) -> None:
    """R2 R8: the same body and the same rest, however they arrive; trailers are read away."""
    wire = encoded([c for c, _ in chunks], [e for _, e in chunks], trailers) + rest
    body = b"".join(c for c, _ in chunks)
    for pieces in ([wire], singly(wire), data.draw(split(wire))):
        decoder = ChunkedDecoder(Limits())
        assert run(decoder, pieces) == (body, rest)
        assert decoder.done


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=4), TRAILERS, st.data())
def test_no_beginning_of_a_body_is_complete(chunks: list[bytes], trailers: list[bytes], data: st.DataObject) -> None:
    """P6 R5: as long as the last byte is missing it is not the end."""
    wire = encoded(chunks, [b""] * len(chunks), trailers)
    cut = data.draw(st.integers(0, len(wire) - 1))
    decoder = ChunkedDecoder(Limits())
    body, rest = run(decoder, [wire[:cut]])
    assert not decoder.done
    assert rest == b""
    assert b"".join(chunks).startswith(body)


def test_data_is_given_as_it_comes() -> None:
    """R3"""
    decoder = ChunkedDecoder(Limits())
    assert decoder.feed(b"5\r\nab") == (b"ab", b"")
    assert decoder.feed(b"c") == (b"c", b"")
    assert decoder.feed(b"de") == (b"de", b"")
    assert decoder.feed(b"\r\n1\r\nf\r\n") == (b"f", b"")
    assert decoder.feed(b"0\r\n\r\nrest") == (b"", b"rest")


@pytest.mark.parametrize("size", [b"a", b"A", b"0a", b"0000000000000a", b"000000000000000A"])
def test_sizes(size: bytes) -> None:
    wire = size + b"\r\n0123456789\r\n0\r\n\r\n"
    assert run(ChunkedDecoder(Limits()), [wire]) == (b"0123456789", b"")


@pytest.mark.parametrize("end", [b"00", b"0000000000000000", b"0;x=y"])
def test_last_chunks(end: bytes) -> None:
    assert run(ChunkedDecoder(Limits()), [end + b"\r\n\r\n" + NEXT]) == (b"", NEXT)


MALFORMED = [
    *[b"%b\r\n12345\r\n0\r\n\r\n" % size for size in
      (b"", b" 5", b"5 ", b"5\t", b"+5", b"-5", b"0x5", b"5_", b"5h", b"0 5", b"5,5", b"\xb2", b"5\x0b", b"5\0")],
    *[b"5;%b\r\n12345\r\n0\r\n\r\n" % extension for extension in (b"\0", b"a\rb", b"\x01", b"\x7f", b"a=\n")],
    b"5\n12345\r\n0\r\n\r\n", b"5\r12345\r\n0\r\n\r\n", b"\r\n5\r\n12345\r\n0\r\n\r\n", b"\n",
    b"5\r\n12345X0\r\n\r\n", b"5\r\n12345\n0\r\n\r\n", b"5\r\n12345\rX", b"5\r\n12345 \r\n", b"5\r\n1234\r\n0\r\n\r\n",
    b"5\r\n123456\r\n0\r\n\r\n", b"5\r\n123450\r\n\r\n", b"0\n\n", b"0\r\n\n", b"0\r\n\rX: y\r\n\r\n",
    b"0\r\nX : y\r\n\r\n", b"0\r\nnonsense\r\n\r\n", b"0\r\n: y\r\n\r\n", b"0\r\nX: a\0b\r\n\r\n", b"0\r\nX: a\n\r\n",
    b"0\r\nX: a\r\n folded\r\n\r\n", b"00000000000000005\r\n12345\r\n0\r\n\r\n", b"fffffffffffffffff\r\n",
]  # fmt: skip


@pytest.mark.parametrize("wire", MALFORMED)
def test_malformed_chunks_are_refused_in_any_pieces(wire: bytes) -> None:
    """P6: 400, and with the same answer however it arrives."""
    assert refusal([wire]) == refusal(singly(wire)) == 400


@pytest.mark.parametrize(
    "beginning", [b"g", b"5 ", b"5\r\n12345X", b"5;\0", b"+", b"00000000000000005", b"5\r\n12345\rX"]
)
def test_what_can_only_be_wrong_is_refused_without_waiting(beginning: bytes) -> None:
    """P6"""
    assert refusal([beginning]) == 400


@given(st.binary(max_size=60), st.data())
def test_any_bytes_mean_the_same_in_any_pieces(wire: bytes, data: st.DataObject) -> None:
    """P6: and no exception but a refusal."""

    def outcome(pieces: Iterable[bytes]) -> object:
        decoder = ChunkedDecoder(Limits())
        try:
            body, rest = run(decoder, pieces)
        except BadRequest as exc:
            return exc.status
        return body, rest, decoder.done

    whole = outcome([wire])
    assert whole == outcome(singly(wire)) == outcome(data.draw(split(wire)))
    if wire and not re.match(rb"[0-9A-Fa-f]", wire):
        assert whole == 400


# -- limits


@pytest.mark.parametrize("feed", [lambda wire: [wire], singly], ids=["whole", "bytewise"])
@pytest.mark.parametrize(
    ("limits", "good", "bad", "status"),
    [
        (Limits(body=6), b"3\r\nabc\r\n3\r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n4\r\nabcd\r\n0\r\n\r\n", 413),
        (Limits(body=6), b"6\r\nabcdef\r\n0\r\n\r\n", b"7\r\n", 413),
        (Limits(chunk_extension=4), b"1;abc\r\nx\r\n0;abc\r\n\r\n", b"1;abcd\r\nx\r\n0\r\n\r\n", 413),
        (Limits(chunk_extension=4), b"0000000000000001;abc\r\nx\r\n0\r\n\r\n", b"1;abcd", 413),
        (Limits(trailers=16), b"0\r\nA: 234\r\nB: 234\r\n\r\n"[:-1] + b"\n", b"0\r\nA: 2345678\r\nB: 234\r\n\r\n", 431),
        (Limits(trailers=16), b"0\r\nA: 1234567890a\r\n\r\n", b"0\r\nA: 1234567890ab\r\n\r\n", 431),
    ],
)  # fmt: skip
def test_limits(limits: Limits, good: bytes, bad: bytes, status: int, feed: object) -> None:
    """P6 P8: exactly at the limit is within it."""
    assert callable(feed)
    decoder = ChunkedDecoder(limits)
    run(decoder, feed(good))
    assert decoder.done
    assert refusal(feed(bad), limits) == status


@pytest.mark.parametrize("start", [b"1;", b"0\r\nX: "])
def test_nothing_grows_without_an_end(start: bytes) -> None:
    """P6: endless extensions and trailers (CVE-2024-21647) are refused long before they end."""
    decoder = ChunkedDecoder(Limits())
    decoder.feed(start)
    with pytest.raises(BadRequest):  # noqa: PT012
        for _ in range(20000):
            decoder.feed(b"x")


# -- the choice


def test_decoder_for() -> None:
    """P8: a declared length over the limit is refused before a byte of it has come."""
    limits = Limits(body=100)
    assert decoder_for(None, False, limits) is None
    assert decoder_for(0, False, limits) is None
    assert isinstance(decoder_for(None, True, limits), ChunkedDecoder)
    assert isinstance(decoder_for(100, False, limits), LengthDecoder)
    assert isinstance(decoder_for(10**18, False, Limits()), LengthDecoder)
    with pytest.raises(BadRequest) as caught:
        decoder_for(101, False, limits)
    assert caught.value.status == 413
