"""The control socket: commands from `apphost status`, `apphost reload` and so on, as JSON lines (docs/control.md).

Everything is bounded, and nobody is waited for: requests, clients, what a client has not read, and the time in which
it must do something. Whatever comes, the arbiter goes on.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import apphost
from apphost.arbiter import vocabulary as v
from apphost.arbiter.arbiter import Arbiter
from apphost.arbiter.history import History
from apphost.arbiter.jobs import Ask, Job, Rollout, Stop, UpgradeWait
from apphost.arbiter.services import Happening, guarded
from apphost.arbiter.status import status
from apphost.endpoint import AUTO, BACKLOG, LINE_MAX, OFF, abstract_sockets, may_command, open_abstract
from apphost.errors import AddressError, nearest
from apphost.logs import Log
from apphost.peers import Peer, peer_of
from apphost.settings import SETTINGS, Settings
from apphost.sockets import Address, Identity, identify, open_listeners

CLIENTS_MAX = 64  # of people, scripts and monitors; a descriptor each, of which there are 1024 usually
WAITING_MAX = 16  # requests of one client that wait for the answer to the one before
OUT_MAX = 1 << 22  # bytes that a client has not read: three times the status of 1024 workers
IDLE_MAX = 60.0  # s without a request, when nothing is waited for
STALL_MAX = 30.0  # s without reading on
ACCEPTS = 16  # a turn
PAUSE = 1.0  # s without accepting after the system said that it has no descriptors


def open_control(settings: Settings, own: dict[str, Identity], log: Log) -> socket.socket | None:
    """The listening socket for the setting `control`, None when there is none; `own` notes a file for removal.

    Raises `AddressError`, but only for a path that was asked for.
    """
    path = settings.control
    if path == OFF:
        return None
    if path == AUTO:
        if not abstract_sockets():
            return None
        try:
            return open_abstract()
        except OSError as exc:
            log.warning(f"there is no control socket: {exc.strerror}. `apphost status` and the like cannot be used")
            return None
    mask = os.umask(0o177)
    try:
        sock = open_listeners(Address(f"the control socket {path}", path=path), BACKLOG)[0]
    except PermissionError as exc:  # a stale socket that we may not remove
        raise AddressError(f"cannot listen at the control socket {path}: {exc.strerror}") from None
    finally:
        os.umask(mask)
    own[path] = identify(path)
    return sock


class Client:
    """One connection. A job's `Requester`."""

    def __init__(self, sock: socket.socket, peer: Peer | None, now: float, changed: Callable[[Client], None]) -> None:
        self.sock = sock
        self.peer = peer
        self.job: Job | None = None
        self.buffer = bytearray()  # of a line that is not whole yet
        self.lines: deque[bytes] = deque()  # not answered yet
        self.out = bytearray()
        self.heard = now  # when it last did something
        self.ended = False  # it has said all that it will say; it may still read
        self.lost = False
        self._changed = changed

    @property
    def who(self) -> str:
        return str(self.peer) if self.peer is not None else "an unknown user"

    @property
    def unread(self) -> int:
        return len(self.out)

    @property
    def due(self) -> float | None:
        """When it is to be dropped."""
        if self.out:
            return self.heard + STALL_MAX
        return None if self.job is not None else self.heard + IDLE_MAX

    def say(self, line: dict[str, Any]) -> None:
        if self.lost:
            return
        if not self.out:
            self.heard = time.monotonic()
        self.out += json.dumps(line, separators=(",", ":"), default=str).encode() + b"\n"
        if len(self.out) > OUT_MAX:
            self.lost = True
        self.flush()
        self._changed(self)

    def finish(self, line: dict[str, Any]) -> None:
        self.job = None
        self.say({**line, "done": True})

    def flush(self) -> None:
        try:
            while self.out:
                del self.out[: self.sock.send(self.out)]
                self.heard = time.monotonic()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.lost = True

    def receive(self) -> None:
        """Take what has come, and split it into lines."""
        try:
            data = self.sock.recv(LINE_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.lost = True
            return
        self.heard = time.monotonic()
        if not data:
            self.ended = True
            return
        *whole, rest = (self.buffer + data).split(b"\n")
        self.buffer = bytearray(rest)
        self.lines.extend(bytes(line) for line in whole if line.strip())
        if len(rest) > LINE_MAX or len(self.lines) > WAITING_MAX:
            why = f"a request has at most {LINE_MAX} bytes" if len(rest) > LINE_MAX else "too many requests at once"
            self.finish({"error": why})
            self.lines.clear()
            self.ended = True


class BadCommand(Exception):
    """The request cannot be understood or obeyed; the message says why."""


class Control:
    """The service. `history` is written by a service that is told before this one."""

    title = "control socket"

    def __init__(self, arbiter: Arbiter, listener: socket.socket, history: History) -> None:
        self.arbiter = arbiter
        self.history = history
        self.deadline: float | None = None
        self._listener = listener
        self._clients: list[Client] = []
        self._news = False  # something has happened, and jobs have not looked at what has come of it
        self._paused_until: float | None = None
        arbiter.hub.watch(listener, selectors.EVENT_READ, self._accept)

    def fileno(self) -> int:
        return self._listener.fileno()

    # -- the service

    @guarded
    def notice(self, happening: Happening) -> None:
        for client in list(self._clients):
            if client.job is not None:
                client.job.notice(happening)
        self._news = True

    @guarded
    def expire(self, now: float) -> None:
        if self._news:
            self._news = False
            for client in list(self._clients):
                if client.job is not None:
                    client.job.settle()
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            self.arbiter.hub.watch(self._listener, selectors.EVENT_READ, self._accept)
        for client in list(self._clients):
            job = client.job
            if job is not None and job.deadline is not None and job.deadline <= now:
                job.deadline = None
                job.expire(now)
            if client.due is not None and client.due <= now:
                self._drop(client)
        self._serve()

    @guarded
    def close(self) -> None:
        for client in list(self._clients):
            if client.job is not None:
                client.finish(client.job.closing())
        for client in list(self._clients):
            self._drop(client)
        self.arbiter.hub.unwatch(self._listener)
        self._listener.close()

    @property
    def log(self) -> Log:
        return self.arbiter.log

    def settle(self, failed: bool) -> None:
        """Let those go that are done, and set the deadline anew."""
        for client in list(self._clients):
            if client.lost or (client.ended and client.job is None and not client.lines and not client.out):
                self._drop(client)
        if self._news:
            self.deadline = 0.0
            return
        times = [self._paused_until, *(client.due for client in self._clients)]
        times += [client.job.deadline for client in self._clients if client.job is not None]
        self.deadline = min((due for due in times if due is not None), default=None)

    # -- clients

    @guarded
    def _accept(self, _mask: int) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as exc:
                self.arbiter.log.warning(f"the control socket pauses: {exc.strerror}")
                self.arbiter.hub.unwatch(self._listener)
                self._paused_until = time.monotonic() + PAUSE
                return
            sock.setblocking(False)
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        peer = peer_of(sock)
        client = Client(sock, peer, time.monotonic(), self._watch)
        if not may_command(peer):
            self.arbiter.log.warning(f"the control socket refused {client.who}")
            self._turn_away(client, f"only the user of this server (uid {os.geteuid()}) and root may command it")
            return
        if len(self._clients) >= CLIENTS_MAX:
            idle = [each for each in self._clients if each.job is None or each.ended]
            if not idle:
                self._turn_away(client, f"{CLIENTS_MAX} others are connected: try again later")
                return
            self._drop(min(idle, key=lambda each: each.heard))
        self._clients.append(client)
        self._watch(client)

    @staticmethod
    def _turn_away(client: Client, why: str) -> None:
        try:
            client.sock.send(json.dumps({"error": why, "refused": True, "done": True}).encode() + b"\n")
        except OSError:
            pass
        client.sock.close()

    def _watch(self, client: Client) -> None:
        """Wait for what the client may do next."""
        if client not in self._clients:
            return
        events = selectors.EVENT_WRITE if client.out else 0
        events |= 0 if client.ended else selectors.EVENT_READ
        if client.lost or not events:
            self.arbiter.hub.unwatch(client.sock)
        else:
            self.arbiter.hub.watch(client.sock, events, functools.partial(self._ready, client))

    @guarded
    def _ready(self, client: Client, mask: int) -> None:
        if client not in self._clients:
            return  # dropped in the same turn
        if mask & selectors.EVENT_WRITE:
            client.flush()
        if mask & selectors.EVENT_READ and not client.ended:
            client.receive()
        self._serve()
        self._watch(client)

    def _drop(self, client: Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self.arbiter.hub.unwatch(client.sock)
            client.sock.close()
            client.job = None
            client.lost = True

    # -- requests

    def _serve(self) -> None:
        """Answer what was asked, each client's requests one after the other.

        Only from the arbiter's loop, never while it carries out an order: what is asked then would be answered with
        how things were before.
        """
        for client in list(self._clients):
            while client.lines and client.job is None and not client.lost:
                self._answer(client, client.lines.popleft())

    def _answer(self, client: Client, line: bytes) -> None:
        try:
            self._obey(client, line)
        except BadCommand as exc:
            client.finish({"error": str(exc)})

    def _obey(self, client: Client, line: bytes) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise BadCommand('not JSON: expected one object in a line, such as {"do": "status"}') from None
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            raise BadCommand('expected an object with the command as "do", such as {"do": "status"}')
        name = request.pop("do")
        command = _COMMANDS.get(name)
        if command is None:
            raise BadCommand(f"unknown command {name[:40]!r}.{nearest(name[:40], _COMMANDS)}")
        function, kinds = command
        for key, value in request.items():
            if key not in kinds:
                raise BadCommand(f"{name} has no argument {key[:40]!r}.{nearest(key[:40], kinds)}")
            noun, kind = kinds[key]
            if type(value) is not kind:  # to isinstance, a bool is an int
                raise BadCommand(f"{key} of {name}: expected {noun}")
        function(self, client, **request)

    def _begin(self, client: Client, job: Job) -> None:
        client.job = job
        job.begin()

    def _order(self, client: Client, event: v.Event, command: str) -> None:
        """Give an order to the fleet; what is told of it while it is carried out is part of the answer."""
        self.arbiter.ask(event, f"`apphost {command}` of {client.who}")

    def _status(self, client: Client) -> None:
        client.finish({"status": status(self.arbiter, self.history, time.monotonic())})

    def _reload(self, client: Client, wait: bool = False) -> None:
        self._refuse_when_stopping()
        self._order(client, v.ReloadAsked(), "reload")
        generation = self._awaited()
        if wait:
            self._begin(client, Rollout(self.arbiter, self.history, client, generation))
        else:
            client.finish({"outcome": "asked", "generation": generation})

    def _awaited(self) -> int:
        """The generation that brings what was asked for last: one that is not tried yet comes after the target."""
        fleet = self.arbiter.fleet
        return fleet.newest + 1 if fleet.again else fleet.target

    def _refuse_when_stopping(self) -> None:
        if self.arbiter.fleet.stopping or self.arbiter.fleet.stop_at is not None:
            raise BadCommand("it stops")

    def _wait(self, client: Client, generation: int = 0) -> None:
        newest = self._awaited()
        if not 0 <= generation <= newest:
            raise BadCommand(f"generation {generation} was never asked for, the newest is {newest}")
        client.say({"version": apphost.__version__, "python": platform.python_version()})
        self._begin(client, Rollout(self.arbiter, self.history, client, generation or newest))

    def _stop(self, client: Client, now: bool = False) -> None:
        self._begin(client, Stop(self.arbiter, self.history, client))
        fleet = self.arbiter.fleet
        if now or not (fleet.stopping or fleet.stop_at is not None):  # to the fleet, a second order means at once
            self._order(client, v.StopAsked(now=now), "stop --now" if now else "stop")

    def _scale(self, client: Client, size: int | None = None, by: int = 0) -> None:
        """`by`, in place of `size`: so many more or, if negative, fewer than there are to be now."""
        high = int(SETTINGS["workers"].high or 1)
        was = self.arbiter.fleet.size
        if size is not None and by:
            raise BadCommand("scale takes size or by, not both")
        wanted = was + by if by else size or 0
        if not 1 <= wanted <= high:
            raise BadCommand(f"size of scale: expected a whole number from 1 to {high}, not {wanted}")
        self._refuse_when_stopping()
        self._order(client, v.ScaleAsked(wanted - was), f"scale {by:+}" if by else f"scale {size}")
        client.finish({"size": self.arbiter.fleet.size, "was": was})

    def _upgrade(self, client: Client) -> None:
        upgrade = self.arbiter.upgrade
        self._refuse_when_stopping()
        if upgrade is None:
            raise BadCommand("it cannot upgrade itself")
        self.arbiter.log.info(f"`apphost upgrade` of {client.who} received: the new program is tried")
        self._begin(client, UpgradeWait(self.arbiter, self.history, client))
        client.say({"event": "trying", "generation": self._awaited(), "at": round(time.time(), 3)})
        upgrade.begin()

    def _ask(self, client: Client, what: str, worker: int) -> None:
        """`worker`: a wid or a pid, 0 for all."""
        known = self.arbiter.workers
        wids = [wid for wid, each in known.items() if worker in (0, wid, each.pid)]
        if worker and not wids:
            there = ", ".join(map(str, sorted(known))) or "none"
            raise BadCommand(f"there is no worker {worker}; there is {there}")
        self._begin(client, Ask(self.arbiter, self.history, client, what, wids))

    def _connections(self, client: Client, worker: int = 0) -> None:
        self._ask(client, "connections", worker)

    def _stacks(self, client: Client, worker: int = 0) -> None:
        self._ask(client, "stacks", worker)


_FLAG, _NUMBER = ("true or false", bool), ("a whole number", int)

# The command, and its arguments: what they are called in an error, and their type.
_COMMANDS: dict[str, tuple[Callable[..., None], dict[str, tuple[str, type]]]] = {
    "status": (Control._status, {}),
    "connections": (Control._connections, {"worker": _NUMBER}),
    "stacks": (Control._stacks, {"worker": _NUMBER}),
    "reload": (Control._reload, {"wait": _FLAG}),
    "wait": (Control._wait, {"generation": _NUMBER}),
    "stop": (Control._stop, {"now": _FLAG}),
    "scale": (Control._scale, {"size": _NUMBER, "by": _NUMBER}),
    "upgrade": (Control._upgrade, {}),
}
