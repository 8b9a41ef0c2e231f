from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.support import Server

# Slow tests whose combinations differ little: of these every n-th runs, chosen so that each value of each parameter
# still has its turn. All of them run with --thorough.
THINNED = {
    "test_deploys.py::test_a_deploy_that_fails_is_given_up_and_nobody_notices": 3,
    "test_deploys.py::test_a_switched_link_leads_to_the_new_release": 3,
    "test_deploys.py::test_an_edit_that_python_cannot_see_is_run": 3,
    "test_reload.py::test_a_broken_deploy_keeps_the_old_code_serving": 3,
    "test_handover.py::test_two_hundred_silent_connections_survive_three_reloads": 3,
    "test_handover.py::test_a_connection_that_is_silent_over_a_reload_is_answered": 3,
    "test_handover.py::test_a_request_in_progress_ends_where_it_is_and_then_its_connection_moves": 3,
    "test_handover.py::test_what_a_successor_does_not_live_to_take_is_served_on": 3,
    "test_handover.py::test_a_storm_of_reloads_ends_no_connection": 3,
    "test_handover.py::test_a_stream_that_outlives_three_generations_ends_at_the_newest": 3,
    "test_handover.py::test_a_slow_upload_and_a_long_stream_go_on_over_a_reload": 3,
    "test_upgrade.py::test_an_upgrade_loses_no_request_and_no_connection": 3,
    "test_canary.py::test_a_worker_of_some_age_is_replaced": 3,
    "test_canary.py::test_good_code_passes": 3,
    "test_bad_start.py::test_application_that_is_not_there": 3,
    "test_preload.py::test_a_first_start_that_fails_ends_with_the_reason": 3,
    "test_lifespan.py::test_auto_serves_without": 3,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run every combination of the slow tests, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thorough"):
        return
    seen: Counter[str] = Counter()
    left_out: list[pytest.Item] = []
    for item in items:
        name = f"{item.path.name}::{item.name.partition('[')[0]}"
        if seen[name] % THINNED.get(name, 1):
            left_out.append(item)
        seen[name] += 1
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]


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
