"""The PROXY protocol, versions 1 and 2: what a proxy says of a connection before its first byte. Pure.

Source: "The PROXY protocol", Willy Tarreau, 2.x (haproxy.org, doc/proxy-protocol.txt); section numbers are its own.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from apphost.protocols.proxies import Address, plain

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # 2.2
V1_MAX = 107  # bytes with CRLF: the longest line of version 1 (2.1)
V2_MAX = 4096  # bytes; what nginx takes. Addresses need 52, and what proxies put behind them is a few hundred

_V1_START = b"PROXY "
_V1_LINE = re.compile(rb"PROXY TCP([46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})\r\n")
_V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")
_LOCAL, _PROXY = 0x20, 0x21  # 2.2: version and command
_UNSPEC, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31  # family and transport
_SIZES = {_TCP4: 4, _TCP6: 16}  # bytes of one address
_UNIX_SIZE = 216  # bytes: two paths
_CRC32C, _SSL = 0x03, 0x20  # 2.2.3, 2.2.6
_CLIENT_SSL = 0x01


class BadProxyHeader(Exception):
    """What came is no PROXY header; the text says what is wrong with it."""


class About(enum.Enum):
    """Of whom a header speaks."""

    CLIENT = enum.auto()  # of a client whose address is told
    SOMEBODY = enum.auto()  # of a client whose address the proxy cannot tell
    ITSELF = enum.auto()  # of nobody: the proxy asks for itself, as in a health check


class ProxyHeader(NamedTuple):
    """client, server: the ends of the client's connection to the proxy if `about` is CLIENT. secure: it uses TLS."""

    about: About
    client: Address | None = None
    server: Address | None = None
    secure: bool = False


def take_header(data: bytes) -> tuple[int, ProxyHeader | None]:
    """How many bytes of `data` belong to the header at its start, and the header, None when more of it must come.

    At least one byte belongs to it, of data that has one: who reads that much at a time gets on, and never reads what
    is not the header's. Raises `BadProxyHeader` as soon as it cannot become one.
    """
    if data[:12] == SIGNATURE[: len(data)]:
        if len(data) < 16:
            return len(data), None
        size = 16 + int.from_bytes(data[14:16], "big")
        if size > V2_MAX:
            raise BadProxyHeader(f"a header of {size} bytes")
        return (size, _read_v2(data[:size])) if len(data) >= size else (len(data), None)
    if data[:6] == _V1_START[: len(data)]:
        end = data.find(b"\n", 0, V1_MAX) + 1
        if end:
            return end, _read_v1(data[:end])
        if len(data) < V1_MAX:
            return len(data), None
        raise BadProxyHeader("a line without an end")
    raise BadProxyHeader("no PROXY header")


def _read_v1(line: bytes) -> ProxyHeader:
    match = _V1_LINE.fullmatch(line)
    if match is None:
        if _V1_UNKNOWN.fullmatch(line):
            return ProxyHeader(About.SOMEBODY)
        raise BadProxyHeader("a malformed line")
    version, *fields = (text.decode("ascii") for text in match.groups())
    kind = ipaddress.IPv4Address if version == "4" else ipaddress.IPv6Address
    try:
        client, server = (str(plain(kind(text))) for text in fields[:2])
    except ValueError:
        raise BadProxyHeader("a malformed address") from None
    ports = [int(text) for text in fields[2:]]
    if max(ports) > 65535:
        raise BadProxyHeader("a malformed port")
    return ProxyHeader(About.CLIENT, (client, ports[0]), (server, ports[1]))


def _read_v2(data: bytes) -> ProxyHeader:
    command, family = data[12], data[13]
    if command not in (_LOCAL, _PROXY):
        raise BadProxyHeader(f"version and command {command:#04x}")
    if command == _LOCAL:  # whatever else it says does not count (2.2)
        return ProxyHeader(About.ITSELF)
    if family in _SIZES:
        size = _SIZES[family]
        rest = 16 + 2 * size + 4
    elif family in (_UNSPEC, _UNIX):
        rest = 16 if family == _UNSPEC else 16 + _UNIX_SIZE
    else:
        raise BadProxyHeader(f"family and transport {family:#04x}")
    if rest > len(data):
        raise BadProxyHeader("addresses that are cut short")
    if family == _UNSPEC:  # the lengths of what follows are not known either
        return ProxyHeader(About.SOMEBODY)
    secure = False
    for kind, value, start in _extras(data, rest):
        if kind == _CRC32C:
            _check_crc(data, value, start)
        elif kind == _SSL and value:
            secure = bool(value[0] & _CLIENT_SSL)
    if family == _UNIX:
        return ProxyHeader(About.SOMEBODY, secure=secure)
    hosts = (data[16 : 16 + size], data[16 + size : 16 + 2 * size])
    client, server = (str(plain(ipaddress.ip_address(host))) for host in hosts)
    ports = data[rest - 4 : rest]
    return ProxyHeader(
        About.CLIENT, (client, int.from_bytes(ports[:2], "big")), (server, int.from_bytes(ports[2:], "big")), secure
    )


def _extras(data: bytes, position: int) -> Iterator[tuple[int, bytes, int]]:
    """The type, value and place of each TLV (2.2.1)."""
    while position < len(data):
        start = position + 3
        position = start + int.from_bytes(data[position + 1 : start], "big")
        if start > len(data) or position > len(data):
            raise BadProxyHeader("an extension that is cut short")
        yield data[start - 3], data[start:position], start


def _check_crc(data: bytes, value: bytes, start: int) -> None:
    """2.2.3: of the whole header, with zeros in place of the checksum itself."""
    told = int.from_bytes(value, "big")
    if len(value) != 4 or crc32c(data[:start] + bytes(4) + data[start + 4 :]) != told:
        raise BadProxyHeader("a wrong checksum")


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli; RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
