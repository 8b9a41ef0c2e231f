"""The end of an application's lifespan, without processes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from apphost.interfaces.lifespan import Lifespan
from apphost.logs import Log


def test_l4_the_shutdown_takes_no_longer_than_it_may_in_all() -> None:
    """Also when the application says late that it is complete, and then goes on for ever."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(0.3)
        await send({"type": "lifespan.shutdown.complete"})
        await asyncio.Event().wait()

    async def run() -> float:
        lifespan = Lifespan(app, "on", Log("error"), "worker 1")
        await lifespan.startup()
        began = time.monotonic()
        await lifespan.shutdown(0.4)
        return time.monotonic() - began

    assert 0.3 < asyncio.run(run()) < 0.65
