"""The hooks of a worker: run in it, each with a time, and harmless whatever they do."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from apphost.errors import user_traceback
from apphost.hooks import Hook, HookEvent, load_hook
from apphost.logs import Log

if TYPE_CHECKING:
    from apphost.worker.main import Assignment

NAMES = ("worker_start", "worker_ready", "worker_drain", "worker_exit")
# s that what runs at the end, and then `on_worker_exit`, get at the least. With SHUTDOWN_MIN of the lifespan it stays
# below KILL_GRACE, after which the arbiter kills a worker that should have ended.
TIME_MIN = 0.2


class Hooks:
    """Those of one worker. Functions are called with a `HookEvent`; without any, each of these does nothing.

    A coroutine function runs on the event loop, anything else in a thread of its own: neither can hold the loop, and
    what takes longer than `hook_timeout` is left behind. Only `start` runs before there is a loop to hold.
    """

    def __init__(
        self, functions: Mapping[str, Hook], event: HookEvent, log: Log, loop: asyncio.AbstractEventLoop, worker: str
    ) -> None:
        self._functions = functions
        self._event = event
        self._log = log
        self._loop = loop
        self._worker = worker
        self._running: dict[asyncio.Task[None], str] = {}

    @classmethod
    def load(cls, assignment: Assignment, log: Log, loop: asyncio.AbstractEventLoop) -> Hooks:
        """Import all of them at once: a slip shows when the worker boots, not when it drains. `ApplicationError`.

        A worker without listeners (`apphost check`) serves nobody, so nobody is told that it serves.
        """
        settings = assignment.settings
        targets = {name: getattr(settings, f"on_{name}") for name in NAMES}
        functions = {name: load_hook(f"on_{name}", target) for name, target in targets.items() if target}
        if not assignment.listeners:
            functions = {name: function for name, function in functions.items() if name == "worker_start"}
        event = HookEvent(
            name="", pid=os.getpid(), generation=assignment.generation, settings=settings, worker=assignment.wid
        )
        return cls(functions, event, log, loop, assignment.name)

    def start(self) -> None:
        """`on_worker_start`, before the application is imported and before the loop runs; in the main thread."""
        function = self._functions.get("worker_start")
        if function is None:
            return
        event = replace(self._event, name="worker_start")
        if inspect.iscoroutinefunction(function):
            self._loop.run_until_complete(self._watch(function, event, event.settings.hook_timeout))
            return
        try:
            function(event)
        except BaseException as exc:
            self._say_raised(event.name, exc)

    def ready(self) -> None:
        """`on_worker_ready`: it serves. Nobody waits for the end of it."""
        self._begin("worker_ready")

    def drain(self, reason: str) -> None:
        """`on_worker_drain`, beside the drain; `exit` waits for its end."""
        self._event = replace(self._event, reason=reason)
        self._begin("worker_drain")

    async def exit(self, seconds: float) -> None:
        """Let what still runs end, then call `on_worker_exit`: within `seconds`, or what is the least for each."""
        if not self._functions:
            return
        end = self._loop.time() + seconds
        if self._running:
            await asyncio.wait(self._running, timeout=max(TIME_MIN, seconds))
        for name in self._running.values():
            self._log.error(f"{self._worker}: {self._name(name)} has not ended when its worker had to")
        function = self._functions.get("worker_exit")
        if function is not None:
            event = replace(self._event, name="worker_exit")
            left = max(TIME_MIN, end - self._loop.time())
            await self._watch(function, event, min(event.settings.hook_timeout, left))

    def _begin(self, name: str) -> None:
        function = self._functions.get(name)
        if function is None:
            return
        event = replace(self._event, name=name)
        task = self._loop.create_task(self._watch(function, event, event.settings.hook_timeout))
        self._running[task] = name
        task.add_done_callback(self._running.pop)

    async def _watch(self, function: Hook, event: HookEvent, seconds: float) -> None:
        """Call a hook, wait for at most `seconds`, and tell what went wrong."""
        task = self._loop.create_task(self._call(function, event))
        try:
            await asyncio.wait({task}, timeout=seconds)
        finally:
            task.cancel()
        if not task.done():
            self._log.error(f"{self._worker}: {self._name(event.name)} took longer than {seconds:.1f} s and is left")
        elif task.cancelled():
            self._log.error(f"{self._worker}: {self._name(event.name)} was cancelled")
        elif (exc := task.result()) is not None:
            self._say_raised(event.name, exc)

    async def _call(self, function: Hook, event: HookEvent) -> BaseException | None:
        """What it raised. Returned, as SystemExit out of a task would end the loop."""
        try:
            result = (
                function(event) if inspect.iscoroutinefunction(function) else await self._in_thread(function, event)
            )
            if inspect.isawaitable(result):
                await result
        except asyncio.CancelledError:
            raise
        except BaseException as exc:
            return exc
        return None

    def _in_thread(self, function: Hook, event: HookEvent) -> Coroutine[Any, Any, object]:
        """A daemon thread, not one of a pool: nobody waits for it at the end of the process."""
        future: asyncio.Future[tuple[object, BaseException | None]] = self._loop.create_future()

        def settle(result: object, error: BaseException | None) -> None:
            if not future.done():
                future.set_result((result, error))

        def run() -> None:
            try:
                outcome: tuple[object, BaseException | None] = function(event), None
            except BaseException as exc:
                outcome = None, exc
            try:
                self._loop.call_soon_threadsafe(settle, *outcome)
            except RuntimeError:
                pass  # the loop is closed: it took too long

        async def finish() -> object:
            result, error = await future
            if error is not None:
                raise error
            return result

        threading.Thread(target=run, name=f"hook {event.name}", daemon=True).start()
        return finish()

    def _name(self, name: str) -> str:
        return f"the hook on_{name} = {getattr(self._event.settings, f'on_{name}')!r}"

    def _say_raised(self, name: str, exc: BaseException) -> None:
        self._log.error(f"{self._worker}: {self._name(name)} raised {type(exc).__name__}", user_traceback(exc))
