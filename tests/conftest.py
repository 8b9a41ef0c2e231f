from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest

from tests.support import Server


def pytest_collection_finish() -> None:
    """What pytest has made of ten thousand tests stays. Each full collection would look at all of it, 0.2 s long, and
    some tests ask for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(*args, **options) -> Server`: a started server, which ends with the test. See `Server` for the options."""
    with contextlib.ExitStack() as stack:

        def start(*args: str, **options: object) -> Server:
            return stack.enter_context(Server(*args, **options))  # type: ignore[arg-type]

        yield start


@pytest.fixture(scope="session", params=["h11", "httptools"])
def http_parser(request: pytest.FixtureRequest) -> str:
    """The name of each parser in turn; skips where the optional one is not installed."""
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture(scope="session", params=["asyncio", "uvloop"])
def loop_name(request: pytest.FixtureRequest) -> str:
    """The name of each event loop in turn; skips where the optional one is not installed."""
    pytest.importorskip(request.param)
    return str(request.param)
