"""Which peers are believed, and what they say about the client for whom they ask. Pure.

A header that a proxy sets can be sent by a client as well. So nothing is believed but what a trusted peer says, in the
one family of headers that it is known to write; and of a list, into which each proxy puts its peer behind what it was
sent, only the part that trusted proxies have written: the client is the rightmost address that is not trusted.

Sources: RFC 7239 (`Forwarded`); `X-Forwarded-*` has none, and is read as nginx, HAProxy and Apache write it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from apphost.protocols.base import BadRequest, Headers
from apphost.protocols.strict import TOKEN, is_host
from apphost.values import parse_network

Address = tuple[str, int]

HOPS_MAX = 32  # trusted proxies in a row; a chain has two or three, and what is longer is a loop or an attack
_NODE_MAX = 128  # bytes of one address; with the name of an interface and a port it has 85
_HOST_MAX = 262  # bytes: a name has at most 253 (RFC 1035, 2.3.4), and there may be a dot, brackets and a port
_CACHED = 1024  # addresses whose meaning is kept; clients choose them, so there is a bound

_SCHEMES = {b"http": "http", b"https": "https", b"ws": "http", b"wss": "https"}
DEFAULT_PORTS = {"http": 80, "https": 443}

# RFC 7239, 6: node = nodename [":" node-port]; the obfuscated forms begin with an underscore.
_PORT = r"(?::(?:(?P<port>[0-9]{1,5})|_[A-Za-z0-9._\-]+))?"
_KNOWN = re.compile(r"(?:(?P<v4>[0-9.]+)|\[(?P<v6>[0-9A-Fa-f:.]+)(?:%[A-Za-z0-9._\-]{1,32})?\])" + _PORT)
_HIDDEN = re.compile(r"(?:(?i:unknown)|_[A-Za-z0-9._\-]+)" + _PORT)
_BARE_V6 = re.compile(r"(?P<v6>[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)(?:%[A-Za-z0-9._\-]{1,32})?")  # X-Forwarded-For only

# RFC 7239, 4: pairs with `;` between them make an element, elements with `,` a list. White space is around the commas
# only. One match is one pair, or none, and what ends it.
_QUOTED = rb'"((?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*)"'
_PAIR = re.compile(rb"(?:(" + TOKEN + rb")=(?:(" + TOKEN + rb")|" + _QUOTED + rb"))?(;|[ \t]*(?:,[ \t]*|\Z))")
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)

# Unreserved characters and sub-delims but the comma, which ends a list's item. No empty segment: `//host` in front of
# a path would be a link to another site.
_PREFIX = re.compile(rb"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~!$&'()*+;=:@\-]+)*/?")


class Hop(NamedTuple):
    """One address that a proxy has named. client: None when it is not known or has no address."""

    client: Address | None
    trusted: bool


class Told(NamedTuple):
    """What a trusted peer says of a request; None: nothing. `host` is a well-formed Host value, `prefix` a path that
    was cut off, without a slash at its end."""

    client: Address | None
    scheme: str | None = None
    host: bytes | None = None
    port: int | None = None
    prefix: str = ""


def plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address that was mapped into IPv6, as a socket for both families gives it, is that IPv4 address."""
    return getattr(address, "ipv4_mapped", None) or address


class TrustList:
    """Addresses, networks, `unix` and `*`, as `parse_network` reads them. Raises `ValueError`.

    `unix` and `*` are about the other end of a connection. `*` says nothing of the addresses that a proxy names, or
    whoever names a list of them could choose one.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self.anybody = "*" in entries
        self.unix = "unix" in entries
        self._networks = [parse_network(entry) for entry in entries if entry not in ("*", "unix")]
        self.trusts_peer = lru_cache(_CACHED)(self._trusts_peer)

    def __bool__(self) -> bool:
        return bool(self.anybody or self.unix or self._networks)

    def _trusts_peer(self, host: str | None) -> bool:
        """Whether the other end of a connection is to be believed: its address, or None for a Unix socket. Any other
        text is nobody."""
        if host is None:
            return self.unix or self.anybody
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return False
        return self.anybody or self.contains(plain(address))

    def contains(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(address in network for network in self._networks)


class ProxyRules:
    """What is believed, and of whom.

    trusted: the peers. family: `x-forwarded`, `forwarded` or `none`. fields: of `for`, `proto`, `host`, `port`,
    `prefix` those that are believed. protocol: whether trusted peers begin with a PROXY header.
    """

    def __init__(self, trusted: TrustList, family: str, fields: Iterable[str], protocol: bool = False) -> None:
        self.trusted = trusted
        self.family = family
        self.fields = frozenset(fields)
        self.protocol = protocol
        self.complained = False  # the log says once, not at each request, that a trusted proxy writes nonsense
        names = {f"x-forwarded-{field}".encode(): field for field in self.fields}
        self._names = names if family == "x-forwarded" else {b"forwarded": "forwarded"}
        self._known_hop = lru_cache(_CACHED)(self._read_hop)

    def believes(self, peer: str | None) -> bool:
        """Whether headers of this peer are looked at, see `TrustList.trusts_peer`."""
        return self.family != "none" and self.trusted.trusts_peer(peer)

    def read(self, headers: Headers, peer: Address | None) -> Told:
        """What the trusted `peer` says. Raises `BadRequest` where it says nonsense: to guess would be to let somebody
        choose who is asking. What stands left of the client's address is the client's own, and is not looked at."""
        names = self._names
        lines: dict[str, list[bytes]] = {}
        for name, value in headers:
            field = names.get(name)
            if field is not None:
                lines.setdefault(field, []).append(value)
        if not lines:
            return Told(peer)
        if self.family == "forwarded":
            return self._read_forwarded(lines["forwarded"], peer)
        said = {field: b",".join(values) for field, values in lines.items()}
        return self._read_x_forwarded({field: value for field, value in said.items() if value.strip(b", \t")}, peer)

    # -- X-Forwarded-*

    def _read_x_forwarded(self, said: dict[str, bytes], peer: Address | None) -> Told:
        """A list of another field has an item for each proxy as well, unless the outermost have set it anew: the item
        of the proxy that has named the client counts, or the first."""
        client, hops = peer, 1
        value = said.get("for")
        if value is not None:
            for hops, item in enumerate(reversed(value.rsplit(b",", HOPS_MAX)), 1):
                hop = self._hop(item.strip(b" \t"), True) if hops <= HOPS_MAX else None
                if hop is None:
                    raise _bad("X-Forwarded-For")
                client = hop.client
                if not hop.trusted:
                    break
        chosen: dict[str, bytes] = {}
        for field, value in said.items():
            items = value.rsplit(b",", hops)
            chosen[field] = items[max(len(items) - hops, 0)].strip(b" \t")
        return Told(
            client,
            read_scheme(chosen["proto"], "X-Forwarded-Proto") if "proto" in chosen else None,
            read_host(chosen["host"], "X-Forwarded-Host") if "host" in chosen else None,
            _read_port(chosen["port"]) if "port" in chosen else None,
            _read_prefix(chosen["prefix"]) if "prefix" in chosen else "",
        )

    def _hop(self, text: bytes, bare: bool) -> Hop | None:
        """The meaning of one address, None if it has none. `bare`: IPv6 may do without brackets, and nginx's word for
        a Unix socket is known."""
        # What is longer is no address; the expressions are not made for it, and the cache must not hold it.
        return self._known_hop(text, bare) if len(text) <= _NODE_MAX else None

    def _read_hop(self, text: bytes, bare: bool) -> Hop | None:
        node = text.decode("latin-1")
        if bare and node == "unix:":
            return Hop(None, self.trusted.unix)
        match = _KNOWN.fullmatch(node) or (_BARE_V6.fullmatch(node) if bare else None)
        if match is None:
            return Hop(None, False) if _HIDDEN.fullmatch(node) else None
        groups = match.groupdict()
        try:
            v4 = groups.get("v4")
            address = plain(ipaddress.IPv4Address(v4) if v4 else ipaddress.IPv6Address(groups["v6"]))
        except ValueError:
            return None
        port = int(groups.get("port") or 0)
        return Hop((str(address), port), self.trusted.contains(address)) if port < 65536 else None

    # -- Forwarded

    def _read_forwarded(self, lines: list[bytes], peer: Address | None) -> Told:
        """The element that names the client says the rest of it, too."""
        client = peer
        elements = [element for line in lines for element in parse_forwarded(line)]
        for hops, element in enumerate(reversed(elements), 1):
            node = element.get(b"for") if "for" in self.fields else None
            if node is None:
                break  # who asked that proxy is not told: what stands left of it could be anybody's
            hop = self._hop(node, False) if hops <= HOPS_MAX else None
            if hop is None:
                raise _bad("Forwarded")
            client = hop.client
            if not hop.trusted:
                break
        proto = element.get(b"proto") if "proto" in self.fields else None
        host = element.get(b"host") if "host" in self.fields else None
        return Told(
            client,
            None if proto is None else read_scheme(proto, "Forwarded"),
            None if host is None else read_host(host, "Forwarded"),
        )


def parse_forwarded(value: bytes) -> list[dict[bytes, bytes]]:
    """The elements of one line of the `Forwarded` field: their parameters by lower-case names, unquoted. Raises
    `BadRequest`.

    All of it must be well-formed: a quote that a client has left open must not swallow what a proxy has put behind it.
    """
    elements: list[dict[bytes, bytes]] = []
    element: dict[bytes, bytes] = {}
    position = 0
    while True:
        match = _PAIR.match(value, position)
        if match is None:
            raise _bad("Forwarded")
        name, token, quoted, end = match.groups()
        if name is not None:
            name = name.lower()
            if name in element:
                raise _bad("Forwarded")
            element[name] = token if quoted is None else _ESCAPED.sub(rb"\1", quoted)
        position = match.end()
        if end != b";":
            elements.append(element)
            element = {}
            if b"," not in end:
                return elements


def read_scheme(value: bytes, where: str) -> str:
    scheme = _SCHEMES.get(value.lower())
    if scheme is None:
        raise _bad(where)
    return scheme


def read_host(value: bytes, where: str) -> bytes:
    if not value or value.startswith(b":") or not is_host(value):
        raise _bad(where)
    return value


def _read_port(value: bytes) -> int:
    port = int(value) if re.fullmatch(rb"[0-9]{1,5}", value) else 0
    if not 0 < port < 65536:
        raise _bad("X-Forwarded-Port")
    return port


def _read_prefix(value: bytes) -> str:
    if not value or _PREFIX.fullmatch(value) is None:
        raise _bad("X-Forwarded-Prefix")
    return value.decode("ascii").rstrip("/")


def _bad(where: str) -> BadRequest:
    return BadRequest(400, f"the {where} field of a trusted proxy is malformed")


def split_host(host: bytes) -> tuple[str, int | None]:
    """Name and port of a well-formed Host value; an IPv6 address without its brackets, as in addresses of sockets."""
    text = host.decode("ascii")
    name, colon, port = text.rpartition(":")
    if not colon or "]" in port:
        name, port = text, ""
    return name.removeprefix("[").removesuffix("]"), int(port) if port else None


class HostList:
    """Names that the Host field may have: `example.org`, `.example.org` (that and all below it), `*.example.org`
    (all below it), an address, `*`. The port does not count."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = [entry.lower() for entry in entries]
        self.everything = "*" in entries
        self._names = frozenset(entry.lstrip(".").strip("[]") for entry in entries if not entry.startswith("*"))
        self._endings = tuple(entry.lstrip("*") for entry in entries if entry.startswith((".", "*.")))
        self._known = lru_cache(_CACHED)(self._allows)

    def _allows(self, host: bytes) -> bool:
        name = split_host(host)[0].lower().removesuffix(".")
        return self.everything or name in self._names or (bool(name) and name.endswith(self._endings))

    def check(self, host: bytes | None) -> None:
        """Raises `BadRequest`: 421, for this server is not set up for that origin (RFC 9110, 7.4 and 15.5.20)."""
        if host is None or len(host) > _HOST_MAX or not self._known(host):
            raise BadRequest(421, "this server does not answer for that host")
