"""The end of an application's lifespan, without processes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from apphost.interfaces.lifespan import Lifespan
from apphost.logs import Log


def test_l4_the_shutdown_takes_no_longer_than_it_may_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an application does behind its last event gets what is left of the time, not all of it again."""
    waits: list[float] = []
    wait = asyncio.wait

    def recorded(tasks: Any, *, timeout: float, **more: Any) -> Any:
        waits.append(timeout)
        return wait(tasks, timeout=timeout, **more)

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(0.05)
        await send({"type": "lifespan.shutdown.complete"})

    async def run() -> None:
        lifespan = Lifespan(app, "on", Log("error"), "worker 1")
        await lifespan.startup()
        await lifespan.shutdown(10.0)

    monkeypatch.setattr(asyncio, "wait", recorded)
    asyncio.run(run())
    first, second = waits
    assert first == 10.0
    assert second <= 9.96
