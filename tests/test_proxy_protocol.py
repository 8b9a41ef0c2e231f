"""The PROXY protocol, versions 1 and 2, as bytes: what is taken, what is refused, and that no byte too many is."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apphost.protocols.proxy_protocol import (
    SIGNATURE,
    V1_MAX,
    V2_MAX,
    About,
    BadProxyHeader,
    ProxyHeader,
    crc32c,
    take_header,
)

CLIENT, SERVER = ("203.0.113.9", 4711), ("192.0.2.2", 443)
CLIENT6, SERVER6 = ("2001:db8::9", 4711), ("2001:db8::2", 443)
KNOWN = ProxyHeader(About.CLIENT, CLIENT, SERVER)
SOMEBODY = ProxyHeader(About.SOMEBODY)
LINE = b"PROXY TCP4 203.0.113.9 192.0.2.2 4711 443\r\n"


def packed(*addresses: tuple[str, int]) -> bytes:
    hosts = b"".join(ipaddress.ip_address(host).packed for host, _ in addresses)
    return hosts + b"".join(struct.pack("!H", port) for _, port in addresses)


def binary(payload: bytes, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", size) + payload


def extra(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def checked(payload: bytes) -> bytes:
    """With a checksum behind it."""
    whole = bytearray(binary(payload + extra(3, bytes(4))))
    whole[-4:] = struct.pack("!I", crc32c(bytes(whole)))
    return bytes(whole)


FOUR, SIX = packed(CLIENT, SERVER), packed(CLIENT6, SERVER6)

GOOD = [
    (LINE, KNOWN),
    (b"PROXY TCP6 2001:db8::9 2001:db8::2 4711 443\r\n", ProxyHeader(About.CLIENT, CLIENT6, SERVER6)),
    (b"PROXY TCP6 ::ffff:203.0.113.9 ::ffff:192.0.2.2 4711 443\r\n", KNOWN),
    (b"PROXY TCP4 1.2.3.4 5.6.7.8 0 65535\r\n", ProxyHeader(About.CLIENT, ("1.2.3.4", 0), ("5.6.7.8", 65535))),
    (b"PROXY UNKNOWN\r\n", SOMEBODY),
    (b"PROXY UNKNOWN 1.2.3.4 garbage\r\n", SOMEBODY),
    (b"PROXY UNKNOWN " + b"f" * (V1_MAX - 16) + b"\r\n", SOMEBODY),
    (binary(FOUR), KNOWN),
    (binary(SIX, family=0x21), ProxyHeader(About.CLIENT, CLIENT6, SERVER6)),
    (binary(FOUR + extra(0x04, b"nothing") + extra(0xEA, b"")), KNOWN),
    (binary(FOUR + extra(0x20, b"\x01" + bytes(4))), KNOWN._replace(secure=True)),
    (binary(FOUR + extra(0x20, b"\x00" + bytes(4))), KNOWN),
    (checked(FOUR + extra(0x01, b"h2")), KNOWN),
    (binary(b"", 0x20, 0x00), ProxyHeader(About.ITSELF)),
    (binary(FOUR, 0x20, 0x11), ProxyHeader(About.ITSELF)),
    (binary(b"garbage", 0x20, 0x77), ProxyHeader(About.ITSELF)),  # with LOCAL nothing else counts
    (binary(b"", 0x21, 0x00), SOMEBODY),
    (binary(b"whatever", 0x21, 0x00), SOMEBODY),
    (binary(b"/a".ljust(108, b"\0") * 2, 0x21, 0x31), SOMEBODY),
    (binary(FOUR + extra(0x04, bytes(V2_MAX - 16 - 12 - 3))), KNOWN),
]


@pytest.mark.parametrize(("header", "expected"), GOOD)
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", SIGNATURE, LINE])
def test_headers(header: bytes, expected: ProxyHeader, rest: bytes) -> None:
    """All of it and not a byte more, whatever stands behind it, another header, too."""
    assert take_header(header + rest) == (len(header), expected)


@pytest.mark.parametrize(("header", "expected"), GOOD[:-1])
def test_headers_in_pieces(header: bytes, expected: ProxyHeader) -> None:
    """Each beginning belongs to the header, so it can be read at once, and nothing waits in the socket."""
    for size in range(1, len(header)):
        assert take_header(header[:size]) == (size, None)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n", b"G", b"\x16\x03\x01", b"\n", b"\r\n\r\nGET", b"proxy TCP4 ", b"PROXYTCP4", b"PROXY\t",
        b" PROXY", LINE.replace(b"\r\n", b"\n"), LINE.replace(b" 4711", b"  4711"), LINE.replace(b"443", b"65536"),
        LINE.replace(b"443", b"0443"), LINE.replace(b"443", b"+443"), LINE.replace(b"443", b"443 "),
        LINE.replace(b"TCP4", b"TCP6"), LINE.replace(b"TCP4", b"UDP4"), LINE.replace(b"TCP4", b"tcp4"),
        LINE.replace(b"203.0.113.9", b"203.0.113.09"), LINE.replace(b"203.0.113.9", b"203.0.113"),
        LINE.replace(b"203.0.113.9", b"203.0.113.9, 1.1.1.1"), LINE.replace(b"203.0.113.9", b"::1"),
        LINE.replace(b"203.0.113.9", b"localhost"), LINE.replace(b"443\r\n", b"443\r\r\n"),
        b"PROXY TCP6 fe80::1%1 ::1 1 2\r\n", b"PROXY TCP6 ::1 ::1\r\n", b"PROXY \r\n", b"PROXY UNKNOWNS\r\n",
        b"PROXY UNKNOWN \r\r\n", b"PROXY UNKNOWN " + b"f" * V1_MAX, b"PROXY UNKNOWN " + b"f" * (V1_MAX - 15) + b"\r\n",
        binary(FOUR, 0x11), binary(FOUR, 0x31), binary(FOUR, 0x22), binary(FOUR, 0x2F), binary(FOUR, 0x21, 0x12),
        binary(SIX, 0x21, 0x22), binary(FOUR, 0x21, 0x10), binary(FOUR, 0x21, 0x41), binary(b"", 0x21, 0x32),
        binary(FOUR[:-1]), binary(FOUR, family=0x21), binary(b"/a", family=0x31), binary(FOUR + b"\x04"),
        binary(FOUR + b"\x04\x00"), binary(FOUR + b"\x04\x00\x01"), binary(FOUR + extra(3, b"\0\0\0\0")),
        binary(FOUR + extra(3, b"\0")), binary(FOUR, length=V2_MAX - 15), binary(FOUR, length=0xFFFF),
    ],
)  # fmt: skip
def test_what_is_no_header(data: bytes) -> None:
    with pytest.raises(BadProxyHeader):
        take_header(data)


def test_what_can_only_be_refused_is_refused_at_once() -> None:
    """Nobody waits for the rest of it, and no line grows without bound."""
    with pytest.raises(BadProxyHeader):
        take_header(b"PROXX")
    with pytest.raises(BadProxyHeader):
        take_header(SIGNATURE + b"\x21\x11\xff\xff")
    with pytest.raises(BadProxyHeader):
        take_header(b"PROXY TCP4 " + b"1" * V1_MAX)


def test_the_checksum() -> None:
    """RFC 3720, B.4 has these examples."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E
    good = checked(FOUR)
    for position in (*range(16, len(good) - 7), *range(len(good) - 6, len(good))):  # all but the type of the checksum
        bad = bytearray(good)
        bad[position] ^= 1
        with pytest.raises(BadProxyHeader):
            take_header(bytes(bad))


HOSTS4 = st.ip_addresses(v=4).map(str)
HOSTS6 = st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None).map(str)
PORTS = st.integers(0, 65535)
ENDS = st.tuples(HOSTS4, HOSTS4) | st.tuples(HOSTS6, HOSTS6)
EXTRAS = st.lists(st.tuples(st.integers(4, 0x1F), st.binary(max_size=40)), max_size=3)


@settings(max_examples=60)
@given(ENDS, PORTS, PORTS, EXTRAS, st.binary(max_size=30))
def test_any_addresses_in_both_versions(
    hosts: tuple[str, str], source: int, target: int, extras: list[tuple[int, bytes]], rest: bytes
) -> None:
    expected = ProxyHeader(About.CLIENT, (hosts[0], source), (hosts[1], target))
    version = 6 if ":" in hosts[0] else 4
    line = f"PROXY TCP{version} {hosts[0]} {hosts[1]} {source} {target}\r\n".encode()
    assert take_header(line + rest) == (len(line), expected)
    kind = socket.AF_INET6 if version == 6 else socket.AF_INET
    payload = b"".join(socket.inet_pton(kind, host) for host in hosts) + struct.pack("!HH", source, target)
    data = binary(payload + b"".join(extra(*item) for item in extras), 0x21, 0x21 if version == 6 else 0x11)
    assert take_header(data + rest) == (len(data), expected)


@settings(max_examples=60)
@given(
    st.binary(max_size=60) | st.binary(max_size=60).map(lambda rest: SIGNATURE + rest) | st.binary().map(LINE.__add__)
)
def test_no_bytes_surprise_the_reader(data: bytes) -> None:
    """It takes a header, waits for more with all bytes its own, or refuses; and the same of what it took alone."""
    try:
        count, header = take_header(data)
    except BadProxyHeader:
        return
    assert count <= len(data)
    if header is None:
        assert count == len(data)
    else:
        assert take_header(data[:count]) == (count, header)
