"""What a worker does once its application is loaded: start it, serve it, beat, drain, end."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from apphost.access import AccessLog, Origin, compile_format, needs_queue, resolve
from apphost.interfaces.admission import Admission
from apphost.interfaces.lifespan import Lifespan
from apphost.interfaces.mounts import Mounts
from apphost.interfaces.threads import ThreadPool
from apphost.interfaces.timing import timed
from apphost.lifecycle import State, allowed
from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError, is_cut
from apphost.peers import take_channels
from apphost.protocols import masking
from apphost.protocols.base import HeadParser, Interface
from apphost.protocols.context import Context, Timeouts
from apphost.protocols.http1 import Connection
from apphost.protocols.proxies import HostList, ProxyRules, TrustList
from apphost.protocols.request_ids import RequestIds
from apphost.protocols.response import ServerFields
from apphost.protocols.strict import Limits
from apphost.protocols.websocket import WebSocketOptions, read_on_reload
from apphost.worker.acceptor import Acceptor
from apphost.worker.certificates import Tls
from apphost.worker.descriptors import room_for_moved
from apphost.worker.handover import Receiver, Sender
from apphost.worker.hooks import Hooks
from apphost.worker.inquiry import Inquiry, Oldest
from apphost.worker.loading import load_plugin
from apphost.worker.meter import Meter, TimedPool
from apphost.worker.parting import Parting, Ways, in_turns
from apphost.worker.probe import probe
from apphost.worker.recycling import Recycling

if TYPE_CHECKING:
    from apphost.worker.main import Assignment

TICK = 0.5  # s between two looks at time-outs and two beats
# Moments within that time on which the ticks of all workers fall. So the arbiter wakes 8 times a second for the beats
# of a large fleet, not for each of them; and not all workers tick at once.
MOMENTS = 4
IDLE_STOP_GRACE = 0.3  # s that an idle connection gets on a stop: time for a request that is on its way
SHUTDOWN_MIN = 0.5  # s that the application's lifespan shutdown gets even when the drain took all of its time


class Server:
    """One worker's serving side. All methods run on the event loop."""

    _recycling: Recycling  # once it serves

    def __init__(
        self,
        assignment: Assignment,
        channel: Channel,
        log: Log,
        loop: asyncio.AbstractEventLoop,
        parser: HeadParser,
        hooks: Hooks,
    ) -> None:
        self.assignment = assignment
        self.settings = assignment.settings
        self.channel = channel
        self.log = log
        self.loop = loop
        self.hooks = hooks
        self.state = State.BOOTING
        self.deadline = 0.0  # loop time by which the drain must be over
        self.context = self._make_context(parser)
        self.acceptors: list[Acceptor] = []
        self.pool: ThreadPool | None = None
        self.sender: Sender | None = None  # to the successors, while draining
        self.receivers: set[Receiver] = set()  # from workers that drain
        self.parting = Parting(loop)
        self.drained = asyncio.Event()
        self._stopping = False  # the drain is for a stop: nobody takes our connections
        self._tick_handle: asyncio.Handle | None = None
        self._tick_due = math.inf  # loop time; uvloop's handles do not tell it of what is due at once
        self._tls = self._make_tls()
        self._inquiry = Inquiry(loop, channel, self.context)
        self._oldest = Oldest()
        self._meter: Meter | None = None  # with an admin listener

    def _make_context(self, parser: HeadParser) -> Context:
        settings = self.settings
        return Context(
            self.loop,
            parser,
            self.log,
            limits=Limits(
                request_line=settings.limit_request_line,
                fields=settings.limit_request_fields,
                field_size=settings.limit_request_field_size,
                head=settings.limit_request_head,
                body=settings.limit_request_body,
                chunk_extension=settings.limit_chunk_extension,
                trailers=settings.limit_trailers,
                pipelined=settings.limit_pipelined,
            ),
            timeouts=Timeouts(
                keep_alive=settings.keep_alive,
                request_header=settings.request_header_timeout,
                request_body=settings.request_body_timeout,
                write=settings.write_timeout,
            ),
            server_fields=ServerFields(date=settings.date_header, server=settings.server_header),
            underscores=settings.underscore_headers,
            proxies=self._proxy_rules(),
            hosts=None if "*" in settings.allowed_hosts else HostList(settings.allowed_hosts),
            request_ids=self._request_ids(),
        )

    def _make_access_log(self) -> AccessLog | None:
        """To the file of the setting, and where `log_config` has its logger, there."""
        assignment = self.assignment
        relay = assignment.log_config.access if assignment.log_config is not None else None
        sinks = [sink for sink in (assignment.access_log, relay) if sink is not None]
        if not sinks:
            return None
        origin = Origin(assignment.wid, assignment.generation, os.getpid())
        return AccessLog(sinks, compile_format(self._access_log_format(), origin), self.loop)

    def _access_log_format(self) -> str:
        return resolve(self.settings.access_log_format, self.settings.log_format)

    def _make_tls(self) -> Tls | None:
        certificates = self.assignment.certificates
        return Tls(self.settings, certificates, self.log, self.assignment.name) if certificates is not None else None

    def _proxy_rules(self) -> ProxyRules | None:
        settings = self.settings
        trusted = TrustList(settings.trusted_proxies)
        if not trusted:
            return None
        return ProxyRules(trusted, settings.forwarded_headers, settings.forwarded_fields, settings.proxy_protocol)

    def _request_ids(self) -> RequestIds | None:
        name = self.settings.request_id_header
        return RequestIds(name, self.settings.underscore_headers == "allow") if name else None

    def _websocket_options(self) -> WebSocketOptions | None:
        settings = self.settings
        if settings.ws == "none" or not self.context.interface.websockets:
            return None
        return WebSocketOptions(
            ping_interval=settings.ws_ping_interval,
            ping_timeout=settings.ws_ping_timeout,
            close_timeout=settings.ws_close_timeout,
            message=settings.limit_ws_message,
            compression=settings.ws_compression,
            on_reload=read_on_reload(settings.ws_on_reload),
            unmask=masking.fastest(),
        )

    # -- life

    async def serve(self, app: Any, interface: str, names: dict[str, str], started: float) -> None:
        """Start the application, tell the arbiter, serve until drained. Raises `ApphostError` when it cannot."""
        self.loop.add_reader(self.channel.fileno(), self._orders)
        self.loop.add_signal_handler(signal.SIGTERM, self._stray_term)
        self.context.access_log = self._make_access_log()
        if self.settings.admin:
            self.context.access_log = self._meter = Meter(self.context.access_log)
        lifespan = await self._start_application(app, interface)
        self._limit_requests()
        self.context.websockets = self._websocket_options()
        if self.settings.ready_probe and self.state is State.BOOTING:
            await probe(self.loop, self.context, self.settings.ready_probe)
        if self.state is State.BOOTING:
            self._begin_serving()
            self.channel.send({"t": "ready", "seconds": time.monotonic() - started, **names})
            self._tick()  # not before: who is not ready cannot ask for a successor
            self._inquiry.tell_code(self.settings.app, self.assignment.code)
            self.hooks.ready()
        await self.drained.wait()
        self._end_serving()
        if lifespan is not None:
            await lifespan.shutdown(max(SHUTDOWN_MIN, self.deadline - self.loop.time()))
        await self.hooks.exit(self.deadline - self.loop.time())
        if self.context.access_log is not None:
            self.context.access_log.flush()

    async def _start_application(self, app: Any, name: str) -> Lifespan | None:
        settings = self.settings
        options: dict[str, Any] = {"worker": self.assignment.name}
        factory = load_plugin("apphost.interfaces", name)
        if self.context.access_log is not None and needs_queue(self._access_log_format()):
            factory = timed(factory)
        if name == "wsgi":
            from apphost.interfaces.wsgi import Uploads

            self.pool = self._make_pool()
            options |= {"multithread": settings.threads > 1, "multiprocess": settings.workers > 1}
            options["uploads"] = Uploads.of(self.pool)  # one for all prefixes
            self._mount(partial(factory, app, self.pool, self.log, self.context.active, **options))
            return None
        lifespan = None
        if settings.lifespan != "off" and getattr(factory, "lifespan", False):
            lifespan = Lifespan(app, settings.lifespan, self.log, self.assignment.name)
            await lifespan.startup()
            options["state"] = lifespan.state
        self._mount(partial(factory, app, self.loop, self.log, self.context.active, **options))
        return lifespan

    def _make_pool(self) -> ThreadPool:
        if self._meter is None:
            return ThreadPool(self.loop, self.settings.threads, "wsgi")
        return TimedPool(self.loop, self.settings.threads, "wsgi", self._meter.waits)

    def _mount(self, factory: Callable[..., Interface]) -> None:
        """Make the interface; where proxies tell a prefix, one for each."""
        root = self.settings.root_path
        proxies = self.context.proxies
        if proxies is not None and "prefix" in proxies.fields:
            self.context.interface = Mounts(lambda prefix: factory(root_path=root + prefix))
        else:
            self.context.interface = factory(root_path=root)

    def _limit_requests(self) -> None:
        context, limit = self.context, self.settings.limit_requests
        if limit:
            context.interface = Admission(context.interface, limit, context.active, self.log, self.assignment.name)

    def _begin_serving(self) -> None:
        self._move(State.READY)
        # What the application has made until now stays: the collector need not look at it at every full collection.
        gc.collect()
        gc.freeze()
        context = self.context
        context.on_closed = self._connection_closed
        self._recycling = Recycling(self.settings, self.loop.time())
        if self._recycling.warning:
            self.log.warning(f"{self.assignment.name}: {self._recycling.warning}")
        context.requests_wanted = self._recycling.requests
        context.on_enough = self._ask_for_successor
        if self._tls is not None:
            self._tls.start(self.loop)
        for listener in self.assignment.listeners:
            tls = self._tls if listener.may_tls else None
            acceptor = Acceptor(self.loop, listener, context, self.log, self._has_room, tls)
            self.acceptors.append(acceptor)
            acceptor.start()

    def _end_serving(self) -> None:
        """Whatever is left has had its time."""
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        self._beat()  # what was counted since the last one
        cut = len(self.context.active)
        if cut:
            requests = ", ".join(self.describe_requests()[:5])
            self.log.warning(f"{self.assignment.name} cut {cut} requests short at the end of its drain: {requests}")
        for connection in list(self.context.connections):
            if connection.exchange is None and not connection.transport.is_closing():
                connection.close()  # it owes nothing: an idle client sees a close, not a reset
            else:
                connection.abort()
        if self.sender is not None:
            self.sender.close()
        for receiver in self.receivers:
            receiver.close()
        if self.pool is not None:
            self.pool.close()

    def _move(self, state: State) -> None:
        assert allowed(self.state, state), f"from {self.state} to {state}"
        self.state = state

    # -- serving

    def _has_room(self) -> bool:
        return self._held() < self.assignment.room

    def _held(self) -> int:
        """Connections, with those that are about to be ours."""
        opening = sum(len(acceptor.opening) for acceptor in self.acceptors)
        opening += sum(receiver.coming for receiver in self.receivers)
        return len(self.context.connections) + opening

    def connected(self) -> list[int]:
        """Descriptors of connections."""
        return [connection.fileno() for connection in self.context.connections]

    def _connection_closed(self) -> None:
        if self.state is State.DRAINING:
            self._check_drained()
        else:
            for acceptor in self.acceptors:
                acceptor.start()

    def _ask_for_successor(self) -> None:
        why = self._recycling.due(self.context.requests, self.loop.time())
        if why:
            self.channel.send({"t": "replace", "why": why})

    def _tick(self) -> None:
        now = self.loop.time()
        late = now - self._tick_due > TICK
        self._tick_due = next_tick(now, self.assignment.wid)
        self._tick_handle = self.loop.call_at(self._tick_due, self._tick)
        if not late:  # else the process was stopped, or the loop blocked: what clients sent meanwhile is read first
            self.context.tick(now)
        self._beat()
        if self.state is State.DRAINING:
            if self.sender is not None:
                self.sender.tick(now)
            self._check_drained()
        else:
            self._ask_for_successor()

    def _beat(self) -> None:
        context = self.context
        count = len(context.connections)
        figures: Message = {"requests": context.requests, "connections": count, "active": len(context.active)}
        if self._meter is not None:
            moved = self.sender.moved if self.sender is not None else 0
            figures["measures"] = self._meter.measures(context.connections, count, moved, context.adopted)
        longest = self._oldest.look(context.active)
        self.channel.send({"t": "beat", "errors": context.errors, "oldest": longest, **figures})

    def describe_requests(self) -> list[str]:
        """The requests in progress, a few words each. Also called by a signal handler, so it only reads."""
        return [request.describe() for request in list(self.context.active)]

    # -- drain

    def _orders(self) -> None:
        """Messages of the arbiter; the end of the channel means that it is gone, and that we finish and go."""
        try:
            messages = self.channel.receive()
        except ProtocolError as exc:
            self.log.error(f"{self.assignment.name}: the arbiter sent nonsense ({exc}); draining")
            messages = None
        if messages is None:
            self.loop.remove_reader(self.channel.fileno())
            self.drain(self.settings.graceful_timeout, "the arbiter is gone")
            return
        for message, fds in messages:
            sockets = take_channels(fds, self.channel.sock)
            if is_cut(message, fds):
                self._tell_cut(message)
            if sockets is None:
                self.log.error(f"{self.assignment.name}: an order came with a channel that the arbiter has not made")
            self._obey(message, sockets or [])

    def _obey(self, message: Message, sockets: list[socket.socket]) -> None:
        if message["t"] == "drain":
            self.drain(float(message["seconds"]), str(message["reason"]), sockets)
        elif message["t"] == "adopt" and len(sockets) == 1:
            welcome = self._welcome
            receiver = Receiver(self.loop, self.log, self.context, sockets[0], welcome, self.receivers.discard)
            self.receivers.add(receiver)
        elif message["t"] == "ask":
            self._inquiry.answer(message)
        elif message["t"] == "successor":
            if self.state is State.DRAINING and not self._stopping:
                self._move_connections(sockets)
            else:
                for sock in sockets:
                    sock.close()

    def _tell_cut(self, message: Message) -> None:
        """There was no descriptor left for its channels, which are gone.

        Without them an `adopt` is refused: the worker that drains sees the end of its channel, and keeps what it has. A
        `drain` has no successors: what waits for a request gets one more answer, unless a `successor` follows, for
        whose channel the listeners that are closed by then have left room.
        """
        what = {"drain": "its connections", "adopt": "connections of another worker"}.get(message["t"], "connections")
        self.log.warning(f"{self.assignment.name}: no descriptors are left (ulimit -n), so {what} cannot move")

    def _welcome(self) -> bool:
        """Whether a connection of another worker may come here."""
        return self.state is State.READY and self._held() < room_for_moved(self.assignment.room)

    def _stray_term(self) -> None:
        """A container runtime may send TERM to every process: take it as the arbiter's word, and tell it."""
        if self.state is not State.DRAINING:
            self.channel.send({"t": "leaving", "why": "TERM"})
        self.drain(self.settings.graceful_timeout, "TERM")

    def drain(self, seconds: float, reason: str, successors: Sequence[socket.socket] = ()) -> None:
        """Finish within `seconds`: accept nothing, answer what was asked. A later call can only shorten the time.

        Connections that wait for a request move to the `successors`. Without any, they get one more answer, which says
        `Connection: close`.
        """
        now = self.loop.time()
        stopping = reason == "stop"
        if self.state is State.DRAINING:
            self.deadline = min(self.deadline, now + seconds)
        else:
            self.deadline = now + seconds
            self._move(State.DRAINING)
            self.hooks.drain(reason)
            self.context.draining = True
            for acceptor in self.acceptors:
                acceptor.stop(take_rest=not successors)
            if self._tls is not None:
                self._tls.stop()
        self._stopping = self._stopping or stopping
        if successors and not self._stopping:
            self._move_connections(successors)
        elif self._stopping or self.sender is None:
            self._end_connections(stopping)
        else:
            self._part_sockets()  # there may be less time
        self.loop.call_at(self.deadline - min(IDLE_STOP_GRACE, seconds / 2), self._close_idle)
        self.loop.call_at(self.deadline, self.drained.set)
        self._check_drained()

    def _move_connections(self, successors: Sequence[socket.socket]) -> None:
        """These take our connections; also those that come later, when the first ones may be draining themselves."""
        if self.sender is None:
            self.sender = Sender(self.loop, self.log, self.assignment.name, lambda: self._end_connections(False))
        for sock in successors:
            self.sender.add(sock)
        if self.context.on_idle is None:  # else they are on their way already
            self.context.closing = False
            self.context.on_idle = self.sender.offer
            self.sender.offer_all(self.context.connections)
            self._part_sockets()

    def _end_connections(self, stopping: bool) -> None:
        """Nobody takes our connections: each gets its polite end here."""
        self.context.on_idle = None
        self.context.closing = True
        self._part_sockets()
        if stopping:  # nobody waits for a connection that is silent
            self.loop.call_later(IDLE_STOP_GRACE, self._close_idle)

    def _part_sockets(self) -> None:
        """Plan how the WebSockets go, also those that are opened later."""
        ways = Ways.END if self._stopping else Ways.CLOSE if self.context.on_idle is None else Ways.MOVE
        self.context.on_socket = self.parting.add
        self.parting.plan(self.context.connections, ways, self.deadline - self.loop.time())

    def _close_idle(self) -> None:
        in_turns(self.loop, list(self.context.connections), Connection.close_idle)
        for acceptor in self.acceptors:
            acceptor.give_up()

    def _check_drained(self) -> None:
        """Set `drained` when nothing is left to finish."""
        opening = any(acceptor.opening for acceptor in self.acceptors) or any(each.coming for each in self.receivers)
        busy = self.pool is not None and self.pool.busy
        if not self.context.connections and not self.context.active and not opening and not busy:
            self.drained.set()


def next_tick(now: float, wid: int) -> float:
    """When worker `wid` ticks after `now`, in seconds of the monotonic clock, which all workers share."""
    moment = wid % MOMENTS * TICK / MOMENTS
    return moment + TICK * math.floor((now + 1.5 * TICK - moment) / TICK)
