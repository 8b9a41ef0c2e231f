"""ASGI lifespan 2.0: startup before a worker is ready, shutdown after it has drained, both in the loop that serves."""

from __future__ import annotations

import asyncio
from typing import Any

from apphost.errors import ApplicationError, user_traceback
from apphost.interfaces.asgi_http import Application, Event
from apphost.logs import Log


class Lifespan:
    """One lifespan of an application. `state` is what requests get a copy of, None when lifespan is not supported."""

    def __init__(self, app: Application, mode: str, log: Log, worker: str) -> None:
        self._app = app
        self._required = mode == "on"
        self._log = log
        self._worker = worker
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[str | None] | None = None
        self._stopped: asyncio.Future[str | None] | None = None
        self.state: dict[str, Any] | None = {}

    async def startup(self) -> None:
        """Run the start-up of the application. Raises `ApplicationError` when it fails, or is missing but required."""
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        self._stopped = loop.create_future()
        self._events.put_nowait({"type": "lifespan.startup"})
        self._task = loop.create_task(self._run())
        failure = await self._started
        if failure is not None:
            raise ApplicationError(f"the lifespan startup of the application failed: {failure or 'no message'}")

    async def shutdown(self, timeout: float) -> None:
        """Run the shutdown of the application, for at most `timeout` seconds; what goes wrong is logged."""
        if self._task is None or self.state is None:
            return
        assert self._stopped is not None
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        if not self._task.done():
            self._events.put_nowait({"type": "lifespan.shutdown"})
            waiting: set[asyncio.Future[Any]] = {self._stopped, self._task}
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self._stopped.done():
            failure = self._stopped.result()
            if failure is not None:
                self._log.error(f"{self._worker}: the lifespan shutdown of the application failed: {failure}")
            # The application may have a little left to do after its last event, such as leaving a context manager.
            await asyncio.wait({self._task}, timeout=max(0.0, end - loop.time()))
        elif not self._task.done():
            self._log.error(f"{self._worker}: the lifespan shutdown took longer than {timeout:.1f} s and was cancelled")
        self._task.cancel()

    async def _run(self) -> None:
        assert self._started is not None
        assert self._stopped is not None
        state = self.state
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}
        try:
            await self._app(scope, self._events.get, self._send)
        except asyncio.CancelledError:
            raise
        except BaseException as exc:
            self._failed(exc)
        finally:
            if not self._started.done():
                self._unsupported("the application returned from its lifespan without an answer")

    def _failed(self, exc: BaseException) -> None:
        assert self._started is not None
        if not self._started.done():
            if self._required:
                self._started.set_exception(
                    ApplicationError(
                        f"the application raised {type(exc).__name__} in its lifespan startup", user_traceback(exc)
                    )
                )
            else:
                detail = f"{type(exc).__name__}: {exc}"
                self._unsupported(f"the application does not take part in lifespan ({detail})")
        elif self._started.exception() is None and self._started.result() is None:
            self._log.error(
                f"{self._worker}: the application raised {type(exc).__name__} in its lifespan", user_traceback(exc)
            )

    def _unsupported(self, why: str) -> None:
        assert self._started is not None
        if self._required:
            self._started.set_exception(ApplicationError(f"{why}, but the setting lifespan is on"))
            return
        self._log.debug(f"{self._worker}: {why}; it is served without")
        self.state = None
        self._started.set_result(None)

    async def _send(self, event: Event) -> None:
        assert self._started is not None
        assert self._stopped is not None
        kind = event["type"]
        startup = kind.startswith("lifespan.startup.")
        future = self._started if startup else self._stopped
        outcome = kind.rpartition(".")[2]
        if kind not in _OUTCOMES:
            raise RuntimeError(f"unknown event type {kind!r}; one of {', '.join(_OUTCOMES)} was expected")
        if future.done() or (not startup and not self._started.done()):
            raise RuntimeError(f"{kind} was sent twice or out of order")
        future.set_result(None if outcome == "complete" else str(event.get("message", "")))


_OUTCOMES = (
    "lifespan.startup.complete",
    "lifespan.startup.failed",
    "lifespan.shutdown.complete",
    "lifespan.shutdown.failed",
)
