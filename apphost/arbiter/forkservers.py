"""The fork servers of an arbiter: started when a worker of their generation is wanted, let go when none is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterable

from apphost.arbiter.hub import Hub
from apphost.arbiter.processes import Failure, ForkServer, kill, read_last_words, start_fork_server
from apphost.messages import Message
from apphost.settings import Settings
from apphost.sockets import Listener
from apphost.sources import Source

REST_READS = 17  # of a dead process's channel: a read takes 64 KiB at most, and a message may have 1 MiB


class ForkServers:
    """All of them, by generation. `of_worker`: what they tell of workers (`forked`, `exited`)."""

    def __init__(
        self, hub: Hub, source: Source, listeners: list[Listener], of_worker: Callable[[ForkServer, Message], None]
    ) -> None:
        self._hub = hub
        self._source = source
        self._listeners = listeners
        self._of_worker = of_worker
        self.running: dict[int, ForkServer] = {}
        self.leaving: list[ForkServer] = []  # their channels have ended, their exits are not known yet

    def get(self, generation: int) -> ForkServer | None:
        return self.running.get(generation)

    def settings(self, generation: int) -> Settings | None:
        """Those that it has read for its generation, None before."""
        server = self.running.get(generation)
        return server.settings if server is not None else None

    def by_pid(self, pid: int) -> ForkServer | None:
        return next((server for server in (*self.running.values(), *self.leaving) if server.pid == pid), None)

    def provide(self, generation: int, settings: Settings) -> ForkServer:
        """The one of this generation, started if there is none. `settings`: those of the arbiter. Raises `OSError`."""
        server = self.running.get(generation)
        if server is None:
            server = start_fork_server(generation, self._source, self._listeners, settings)
            self.adopt(server)
            self._hub.log.debug(f"fork server of generation {generation} started, pid {server.pid}")
        return server

    def adopt(self, server: ForkServer) -> None:
        self.running[server.generation] = server
        self._hub.listen(server.channel, lambda message: self._hear(server, message), lambda: self._drop(server))

    def _hear(self, server: ForkServer, message: Message) -> None:
        kind = message["t"]
        if kind == "settings":
            server.settings, server.ignored = Settings.from_wire(message["settings"]), message.get("ignored", [])
        elif kind == "failed":
            server.failure = Failure.told(message)
        else:
            self._of_worker(server, message)

    def _drop(self, server: ForkServer) -> None:
        """Its channel has ended, but not by us: it is dead, or it has said what no fork server says."""
        kill(server.pid, signal.SIGKILL)
        self.lose(server)

    def lose(self, server: ForkServer) -> None:
        """It gets no more orders; its exit is reaped in a moment."""
        if self.running.get(server.generation) is server:
            del self.running[server.generation]
        self._hub.forget(server.channel)
        self.leaving.append(server)

    def ended(self, server: ForkServer) -> str:
        """Its process is gone: its last words."""
        if server not in self.leaving:
            self._hub.read_rest(server.channel, lambda message: self._hear(server, message), REST_READS)
            self.lose(server)
        self.leaving.remove(server)
        last_words = read_last_words(server.dump)
        os.close(server.dump)
        return last_words

    def retire(self, wanted: Collection[int]) -> None:
        """Let those go whose generation is not in `wanted`."""
        for generation in [each for each in self.running if each not in wanted]:
            self.lose(self.running[generation])

    def order(self, message: Message) -> None:
        """Tell all of them."""
        for server in self.running.values():
            self._hub.send(server.channel, message)

    def pids(self) -> Iterable[int]:
        return [server.pid for server in (*self.running.values(), *self.leaving)]
