from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.process.probing import Probe
from tests.support import Server

PROBE = "tests.process.probe:app"


@pytest.fixture(scope="session")
def probe(http_parser: str, loop_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """A server with the probe application, one for each parser and event loop; three listeners, one worker."""
    path = str(tmp_path_factory.mktemp("probe") / "socket")
    binds = ("--bind", "127.0.0.1:0", "--bind", "[::1]:0", "--bind", f"unix:{path}")
    limits = ("--limit-request-body", "64MiB", "--log-level", "debug")
    with Server(PROBE, *binds, *limits, "--http", http_parser, "--loop", loop_name) as server:
        yield Probe(server, path)
