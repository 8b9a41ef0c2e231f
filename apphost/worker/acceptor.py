"""Accepting connections: a few at a turn, within a limit, and without spinning when descriptors have run out."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from functools import partial

from apphost.logs import Log
from apphost.protocols.context import Context
from apphost.protocols.http1 import Connection
from apphost.protocols.proxied import new_connection
from apphost.protocols.tls import TlsTransport
from apphost.worker.certificates import Tls
from apphost.worker.introduction import Introductions

BATCH = 4  # accepts a turn of the loop: enough to keep up, few enough that the other workers get their share
EXHAUSTED_PAUSE = 1.0  # s without accepting after the system said that it has no descriptors or memory
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# accept(2): Linux reports errors of the network that befell the new connection, and firewalls refuse with EPERM. They
# are about that connection alone, which is gone then.
_LOST = {
    errno.ECONNABORTED, errno.EPERM, errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ETIMEDOUT,
    *([errno.ENONET] if hasattr(errno, "ENONET") else []),  # not on macOS
}  # fmt: skip


class Acceptor:
    """Takes connections from one listener of the worker and gives each to a `Connection`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        context: Context,
        log: Log,
        has_room: Callable[[], bool],
        tls: Tls | None = None,
    ) -> None:
        rules = context.proxies
        self._introductions: Introductions | None = None
        if rules is not None and rules.protocol:
            self._introductions = Introductions(loop, rules, context.timeouts.request_header, log)
        self._loop = loop
        self._listener = listener
        self._context = context
        self._log = log
        self._has_room = has_room
        self._tls = tls
        self._reading = False
        self._stopped = False
        self._retry: asyncio.TimerHandle | None = None
        self.opening: set[asyncio.Task[None]] = set()  # accepted, and not yet a Connection

    def start(self) -> None:
        """Accept from the next turn of the loop on; again after `pause`. Nothing after `stop`."""
        if not self._reading and not self._stopped and self._retry is None:
            self._reading = True
            self._loop.add_reader(self._listener.fileno(), self._readable)

    def pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._listener.fileno())

    def stop(self, take_rest: bool) -> None:
        """Accept nothing any more. `take_rest`: nobody else will, so what waits in the backlog is taken first."""
        self.pause()
        self._stopped = True
        if self._retry is not None:
            self._retry.cancel()
        if take_rest:
            while self._has_room() and self._accept():
                pass
        self._listener.close()
        if self._introductions is not None:
            self._introductions.hurry()

    def give_up(self) -> None:
        """The worker goes: end the TLS handshakes that are not complete."""
        if self._tls is not None:
            for task in self.opening:
                task.cancel()

    def _readable(self) -> None:
        for _ in range(BATCH):
            if not self._has_room():
                self.pause()  # the worker starts us again when a connection ends
                return
            if not self._accept():
                return

    def _accept(self) -> bool:
        """Take one connection; False when there is none, or none can be taken."""
        try:
            sock, address = self._listener.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            if exc.errno in _LOST:
                self._log.debug(f"a connection ended before it was accepted: {exc.strerror}")
                return True
            if exc.errno not in _EXHAUSTED:
                raise
            self._log.warning(f"cannot accept connections: {exc.strerror}; the next try is in {EXHAUSTED_PAUSE:.0f} s")
            self.pause()
            if not self._stopped:
                self._retry = self._loop.call_later(EXHAUSTED_PAUSE, self._try_again)
            return False
        sock.setblocking(False)
        peer = address[0] if isinstance(address, tuple) else None
        task = self._loop.create_task(self._open(sock, peer))
        self.opening.add(task)
        task.add_done_callback(self._opened)
        return True

    def _opened(self, task: asyncio.Task[None]) -> None:
        self.opening.discard(task)
        if not self._reading:  # one that has failed may have been what others wait for
            self._context.on_closed()

    async def _open(self, sock: socket.socket, peer: str | None) -> None:
        """`peer`: its address, None on a Unix socket."""
        capsule = None
        secure = self._tls is not None
        try:
            if self._introductions is not None:
                capsule = await self._introductions.read(sock, peer, secure)
            make = partial(new_connection, self._context, peer, capsule, secure)
            if self._tls is None:
                await self._loop.connect_accepted_socket(make, sock)
            else:
                await self._open_tls(self._tls, sock, make)
        except OSError as exc:
            self._log.debug(f"a connection ended before it began: {exc.strerror}")
            sock.close()

    async def _open_tls(self, tls: Tls, sock: socket.socket, make: Callable[[], Connection]) -> None:
        """Until the handshake has ended, so that one that takes long counts as a connection."""
        transport = TlsTransport(self._loop, tls.context, make, self._log, tls.patience)
        await self._loop.connect_accepted_socket(lambda: transport, sock)
        try:
            await transport.settled
        finally:
            transport.give_up()

    def _try_again(self) -> None:
        self._retry = None
        self.start()
