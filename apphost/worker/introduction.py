"""Reading the PROXY header with which trusted peers begin a connection, before anything else looks at the socket.

The header's bytes are taken from the socket, and not one more: what follows may be TLS. They are looked at first
(MSG_PEEK), and what of them belongs to the header is taken at once, so a header that comes in pieces does not leave the
socket readable, and nothing spins.
"""

from __future__ import annotations

import asyncio
import socket

from apphost.logs import Log
from apphost.protocols.capsule import Capsule
from apphost.protocols.proxies import ProxyRules
from apphost.protocols.proxy_protocol import V2_MAX, About, BadProxyHeader, ProxyHeader, take_header
from apphost.protocols.wire import own_address

PARTING = 1.0  # s that a header may take once the worker wants to go; it comes with the connection, or never


class Introductions:
    """Reads the headers of connections that a worker accepts. Event loop only.

    timeout: seconds for a header.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, rules: ProxyRules, timeout: float, log: Log) -> None:
        self._loop = loop
        self._rules = rules
        self._timeout = timeout
        self._log = log
        self._waiting: set[asyncio.Future[None]] = set()
        self._complained = False
        self._leaving = False

    async def read(self, sock: socket.socket, peer: str | None, secure: bool = False) -> Capsule | None:
        """What the connection begins with; None for a peer that is not trusted, which is not asked. `secure`: what
        follows the header is TLS.

        Also where a proxy says that it asks for itself, what comes is not taken for its own word: HAProxy says so of
        clients that it has no address of. Raises `ConnectionAbortedError` when a trusted peer sends no header, or not
        in time, and other kinds of OSError for what befalls the socket.
        """
        if not self._rules.trusted.trusts_peer(peer):
            return None
        end = self._loop.time() + self._timeout
        try:
            header = await self._take(sock, end)
        except BadProxyHeader as exc:
            self._complain(f"{peer or 'unix'}: {exc}")
            raise ConnectionAbortedError(0, f"no PROXY header: {exc}") from None
        client = header.client
        if header.about is About.ITSELF:
            own = sock.getpeername()
            client = (own[0], own[1]) if isinstance(own, tuple) else None
        server = header.server or own_address(sock.getsockname())
        scheme = "https" if header.secure or secure else "http"
        left = end - self._loop.time()
        nobody = header.about is not About.CLIENT
        return Capsule(client, server, scheme, 0, left, False, b"", anonymous=nobody)

    def hurry(self) -> None:
        """The worker wants to go: those who have not introduced themselves soon are let go of."""
        self._leaving = True
        self._loop.call_later(PARTING, self._give_up, list(self._waiting))

    async def _take(self, sock: socket.socket, end: float) -> ProxyHeader:
        taken = b""
        while True:
            try:
                seen = sock.recv(V2_MAX, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await self._readable(sock, end)
                continue
            if not seen:  # as where somebody only looks whether the port is open
                raise ConnectionAbortedError(0, "it ended before its PROXY header")
            count, header = take_header(taken + seen)
            taken += sock.recv(count - len(taken))
            if header is not None and len(taken) == count:
                return header

    async def _readable(self, sock: socket.socket, end: float) -> None:
        """Until something can be read. Raises `ConnectionAbortedError` at `end`."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(future)
        timer = self._loop.call_at(end, self._give_up, [future])
        if self._leaving:
            self._loop.call_later(PARTING, self._give_up, [future])
        self._loop.add_reader(sock.fileno(), _settle, future)
        try:
            await future
        finally:
            self._loop.remove_reader(sock.fileno())
            timer.cancel()
            self._waiting.discard(future)

    @staticmethod
    def _give_up(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            if not future.done():
                future.set_exception(ConnectionAbortedError(0, "no PROXY header came in time"))

    def _complain(self, what: str) -> None:
        """Once: a proxy that is set up wrongly would fill the log."""
        if not self._complained:
            self._complained = True
            self._log.warning(
                f"closed a connection of the trusted proxy {what}. With proxy_protocol on it must send a PROXY header "
                "first: proxy_protocol in nginx, send-proxy in HAProxy. This is said once"
            )


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
