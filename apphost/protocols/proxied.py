"""Connections of proxies, and connections whose Host is looked at.

Which kind a connection is, is decided once, when it begins or comes from another worker; so those of peers that nobody
trusts pay nothing at their requests, and where nothing is trusted there is no other kind.
"""

from __future__ import annotations

from apphost.protocols.base import BadRequest, RequestHead
from apphost.protocols.body import BodyDecoder
from apphost.protocols.capsule import Capsule
from apphost.protocols.context import Context
from apphost.protocols.exchange import Exchange
from apphost.protocols.http1 import Connection
from apphost.protocols.proxies import DEFAULT_PORTS, Told, split_host
from apphost.protocols.request_ids import identified
from apphost.protocols.tls import TlsConnection, TlsExchange

NOBODY = ""  # a peer that cannot be trusted, whatever the list says


class GuardedExchange(Exchange):
    """A request whose Host must be an allowed one."""

    __slots__ = ()

    def __init__(self, connection: Connection, head: RequestHead, decoder: BodyDecoder | None) -> None:
        super().__init__(connection, head, decoder)
        hosts = self.context.hosts
        assert hosts is not None
        hosts.check(host_of(head))


class ProxiedExchange(Exchange):
    """A request that a trusted proxy has passed on: client, scheme and the rest are those that it tells.

    They are of this request, not of the connection, over which the proxy asks for many clients.
    """

    __slots__ = ("prefix",)

    def __init__(self, connection: Connection, head: RequestHead, decoder: BodyDecoder | None) -> None:
        super().__init__(connection, head, decoder)
        rules = self.context.proxies
        assert rules is not None
        try:
            told = rules.read(head.headers, connection.client)
        except BadRequest as refusal:
            if not rules.complained:
                rules.complained = True
                self.context.log.warning(
                    f"refused a request from {connection.peer}: {refusal.why}. Is it set by the proxy itself? If that "
                    "hands through what clients send, they can make up who they are. This is said once"
                )
            raise
        self.client = told.client
        self.prefix = told.prefix
        if told.scheme is not None:
            self.scheme = told.scheme
        if told.host is not None or told.port is not None:
            self._move_to(told)
        if self.context.hosts is not None:
            self.context.hosts.check(host_of(head))

    def _move_to(self, told: Told) -> None:
        """The origin that the client has asked, in place of the one that the proxy asks."""
        head = self.head
        host = told.host or host_of(head)
        if host:
            name, port = split_host(host)
        else:
            name, port = (self.server[0] if self.server[1] is not None else "localhost"), None
        default = DEFAULT_PORTS[self.scheme]
        if told.port is not None:
            port = told.port
            shown = f"[{name}]" if ":" in name else name
            host = (shown if port == default else f"{shown}:{port}").encode("ascii")
        assert host is not None
        self.server = (name, default if port is None else port)
        head.headers = [(b"host", host), *(item for item in head.headers if item[0] != b"host")]


class GuardedConnection(Connection):
    __slots__ = ()
    exchange_type = GuardedExchange


class ProxiedConnection(Connection):
    __slots__ = ()
    exchange_type = ProxiedExchange


class _TlsGuardedExchange(TlsExchange, GuardedExchange):
    __slots__ = ()


class _TlsProxiedExchange(TlsExchange, ProxiedExchange):
    __slots__ = ()


class _TlsGuardedConnection(TlsConnection):
    __slots__ = ()
    exchange_type = _TlsGuardedExchange


class _TlsProxiedConnection(TlsConnection):
    __slots__ = ()
    exchange_type = _TlsProxiedExchange


# By whether the peer is believed, whether hosts are looked at (where it is believed, that is seen to already), TLS.
_KINDS: dict[tuple[bool, bool, bool], type[Connection]] = {
    (False, False, False): Connection,
    (False, True, False): GuardedConnection,
    (True, False, False): ProxiedConnection,
    (True, True, False): ProxiedConnection,
    (False, False, True): TlsConnection,
    (False, True, True): _TlsGuardedConnection,
    (True, False, True): _TlsProxiedConnection,
    (True, True, True): _TlsProxiedConnection,
}


def host_of(head: RequestHead) -> bytes | None:
    for name, value in head.headers:
        if name == b"host":
            return value
    return None


def new_connection(
    context: Context, peer: str | None, capsule: Capsule | None = None, secure: bool = False
) -> Connection:
    """A connection with the `peer`: an address, or None for a Unix socket. One with a past goes on from its `capsule`,
    and its peer is whom that names: what a client says whom a proxy has announced is no word of the proxy.

    secure: it speaks TLS.
    """
    if capsule is not None:
        peer = peer_name(capsule)
    believed = context.proxies is not None and context.proxies.believes(peer)
    kind = _KINDS[believed, context.hosts is not None, secure]
    if context.request_ids is not None:
        kind = identified(kind, believed)
    return kind(context, capsule)


def peer_name(capsule: Capsule) -> str | None:
    if capsule.anonymous:
        return NOBODY
    if capsule.client is not None:
        return capsule.client[0]
    return None if capsule.server[1] is None else NOBODY
