"""Answers with the version that ``BENCH_VERSION_FILE`` held when this code was imported: tells old code from new."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from plain_asgi import fixed

answer = fixed(Path(os.environ["BENCH_VERSION_FILE"]).read_bytes())


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await answer(scope, receive, send)
