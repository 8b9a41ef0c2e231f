"""The fork servers of an arbiter: started when a worker of their generation is wanted, let go when none is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterable

from apphost.arbiter.hub import Hub
from apphost.arbiter.processes import (
    Failure,
    ForkServer,
    configure_fork_server,
    kill,
    read_last_words,
    start_fork_server,
)
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
        self.spare: ForkServer | None = None  # started in advance, of no generation yet
        self.extras: Callable[[int], Message] = lambda generation: {}  # what the configuration of one has besides

    def get(self, generation: int) -> ForkServer | None:
        return self.running.get(generation)

    def settings(self, generation: int) -> Settings | None:
        """Those that it has read for its generation, None before."""
        server = self.running.get(generation)
        return server.settings if server is not None else None

    def by_pid(self, pid: int) -> ForkServer | None:
        return next((server for server in self._all() if server.pid == pid), None)

    def provide(self, generation: int, settings: Settings) -> ForkServer:
        """The one of this generation, started if there is none. `settings`: those of the arbiter. Raises `OSError`."""
        server = self.running.get(generation)
        if server is None:
            server, self.spare = self.spare or self._start(), None
            server.generation = generation
            self.running[generation] = server
            configure_fork_server(server, self._source, self._listeners, settings, self.extras(generation))
            self._hub.log.debug(f"fork server of generation {generation} started, pid {server.pid}")
        return server

    def prepare(self, settings: Settings) -> None:
        """Start the fork server of the next generation in advance, so that the next one is ready sooner.

        It has imported our own modules when it is wanted, and reads settings and code only then. Raises `OSError`.
        """
        if self.spare is None:
            self.spare = self._start()
            self.spare.channel.send({"t": "prepare", "http": settings.http, "loop": settings.loop})
            self._hub.log.debug(f"a fork server is started in advance, pid {self.spare.pid}")

    def dismiss_spare(self) -> None:
        """At once, as it may be in the middle of its imports: it has nothing to finish."""
        if self.spare is not None:
            self._drop(self.spare)

    def _start(self) -> ForkServer:
        server = start_fork_server(self._source, self._listeners)
        self._listen(server)
        return server

    def adopt(self, server: ForkServer) -> None:
        """One that the program before this one has started."""
        self.running[server.generation] = server
        self._listen(server)

    def _listen(self, server: ForkServer) -> None:
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
        """It is dead, or it has said what no fork server says, or it is not wanted any more."""
        kill(server.pid, signal.SIGKILL)
        self.lose(server)

    def lose(self, server: ForkServer) -> None:
        """It gets no more orders; its exit is reaped in a moment."""
        if self.running.get(server.generation) is server:
            del self.running[server.generation]
        if self.spare is server:
            self.spare = None
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
        return [server.pid for server in self._all()]

    def _all(self) -> list[ForkServer]:
        return [*self.running.values(), *self.leaving, *([self.spare] if self.spare is not None else [])]
