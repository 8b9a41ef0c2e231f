"""The hooks of the arbiter: each call in a process of its own, one after the other, killed when it takes too long.

The arbiter runs nothing of the application, waits for nothing, and does not care how a hook ends.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from apphost.arbiter.processes import spawn_python
from apphost.arbiter.services import Happening, What
from apphost.hookrunner import COMMAND
from apphost.messages import Channel, Message

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter

WAITING_MAX = 16  # calls that wait for the one before; more than that means that it hangs each time

_OUTCOMES = {What.COMPLETE: "complete", What.GIVEN_UP: "given up"}


class ArbiterHooks:
    """The service that calls `on_arbiter_start` (by `begin`) and `on_reload`."""

    def __init__(self, arbiter: Arbiter) -> None:
        self._arbiter = arbiter
        self._waiting: deque[dict[str, Any]] = deque()
        self._channel: Channel | None = None  # to the one that runs
        self._pid = 0
        self._what = ""
        self.deadline: float | None = None

    def begin(self) -> None:
        self._call("arbiter_start", generation=0)

    def notice(self, happening: Happening) -> None:
        outcome = _OUTCOMES.get(happening.what)
        if outcome is not None and happening.generation > 1:  # the first one is the start
            self._call("reload", generation=happening.generation, reason=happening.text, outcome=outcome)

    def expire(self, _now: float) -> None:
        self._arbiter.log.error(
            f"{self._what} did not end within hook_timeout, {self._arbiter.settings.hook_timeout:g} s, and is killed"
        )
        self._kill()
        self._ended()

    def close(self) -> None:
        self._waiting.clear()
        self._kill()
        self._ended()

    def _call(self, name: str, **event: Any) -> None:
        target = getattr(self._arbiter.settings, f"on_{name}")
        if not target:
            return
        if len(self._waiting) >= WAITING_MAX:
            self._arbiter.log.error(f"the hook on_{name} = {target!r} is not called: {WAITING_MAX} others wait")
            return
        message = {"settings": self._arbiter.settings.to_wire(), "cwd": self._arbiter.source.cwd}
        self._waiting.append({"t": "run", **message, "event": {"name": name, "pid": os.getpid(), **event}})
        self._next()

    def _next(self) -> None:
        while self._channel is None and self._waiting:
            self._start(self._waiting.popleft())

    def _start(self, message: Message) -> None:
        name = f"on_{message['event']['name']}"
        self._what = f"the hook {name} = {message['settings'][name]!r}"
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._pid = spawn_python(str(message["cwd"]), COMMAND, [theirs.fileno()], own_group=True)
            except OSError as exc:
                ours.close()
                self._arbiter.log.error(f"{self._what} could not be started: {exc.strerror}")
                return
        self.deadline = time.monotonic() + float(message["settings"]["hook_timeout"])
        self._channel = Channel(ours)
        self._arbiter.hub.listen(self._channel, self._hear, self._lost)
        self._arbiter.hub.send(self._channel, message)

    def _hear(self, message: Message) -> None:
        if message["t"] == "done":
            self._ended()

    def _lost(self) -> None:
        self._arbiter.log.error(f"{self._what}: its process has ended early")
        self._ended()

    def _ended(self) -> None:
        """It is over, well or badly: what it had to say is in the log."""
        channel, self._channel = self._channel, None
        self.deadline = None
        self._pid = 0
        if channel is not None:
            self._arbiter.hub.forget(channel)
            self._next()

    def _kill(self) -> None:
        """With what it has started: it has a process group of its own."""
        if self._pid:
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # it has not made its group yet; macOS: all are zombies
                self._kill_alone()

    def _kill_alone(self) -> None:
        try:
            os.kill(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
