from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support import Server

# A shell has what it starts in the background ignore these, and so would all that a test starts and then interrupts.
for _number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)

# Tests whose combinations differ little, by name, or all those of a file: a part of them runs, all with --thorough.
# Names of parameters: each value of each of them has its turn, but not with each value of the others. A number n: every
# n-th, for parameters whose values belong together; from the last one on where it is below zero.
THINNED: dict[str, int | tuple[str, ...]] = {
    # What parses and what waits for sockets know nothing of each other.
    "test_asgi_conformance.py": ("http_parser", "loop_name"),
    "test_asgi_receive.py": ("http_parser", "loop_name"),
    "test_http_conformance.py": ("http_parser", "loop_name"),
    "test_http_connection.py": ("http_parser", "loop_name"),
    "test_examples.py": ("site", "http_parser"),
    # What the arbiter does with workers does not depend on what they serve.
    "test_admin.py::test_metrics_count_every_request_through_reloads": -2,
    "test_arbiter.py::test_a_graceful_stop_finishes_requests_in_progress": ("interface", "number"),
    "test_arbiter.py::test_a_killed_worker_is_replaced": -2,
    "test_arbiter.py::test_a_stop_at_once": ("interface", "numbers"),
    "test_arbiter.py::test_a_stop_of_the_whole_group_is_graceful": ("interface", "number"),
    "test_arbiter.py::test_a_stop_serves_the_backlog": 2,
    "test_arbiter.py::test_orphans_of_the_application_are_reaped": -2,
    "test_arbiter.py::test_the_log_of_a_life_reads_as_a_transcript": 2,
    "test_arbiter.py::test_the_whole_stop_keeps_to_stop_timeout": -2,
    "test_arbiter.py::test_without_the_arbiter_workers_finish_and_go": 2,
    "test_arbiter.py::test_without_their_fork_server_workers_go_on": -2,
    "test_bad_start.py::test_application_that_is_not_there": 3,
    "test_canary.py::test_a_canary_that_dies_is_given_up": 2,
    "test_canary.py::test_a_delayed_stop_serves_on_for_so_long": -2,
    "test_canary.py::test_a_deploy_that_fails_the_probe_is_given_up": 2,
    "test_canary.py::test_a_first_start_that_fails_the_probe": -2,
    "test_canary.py::test_a_worker_of_some_age_is_replaced": ("interface", "workers"),
    "test_canary.py::test_a_worker_that_has_grown_is_replaced": -2,
    "test_canary.py::test_an_application_that_answers_the_probe_serves": 2,
    "test_canary.py::test_code_that_answers_with_errors_is_given_up": -2,
    "test_canary.py::test_good_code_passes": ("interface", "workers"),
    "test_deploys.py::test_a_deploy_that_fails_is_given_up_and_nobody_notices": ("interface", "preload", "group"),
    "test_deploys.py::test_a_switched_link_leads_to_the_new_release": ("how", "preload"),
    "test_deploys.py::test_an_edit_that_python_cannot_see_is_run": ("times", "preload"),
    "test_forks.py::test_daemons_of_multiprocessing_go_with_their_generation": ("source", "loop"),
    "test_frozen.py::test_a_tree_that_was_stopped_goes_on": ("interface", "flavour"),
    "test_frozen.py::test_an_arbiter_that_was_stopped_blames_nobody": -2,
    "test_handover.py::test_a_connection_that_is_silent_over_a_reload_is_answered": 3,
    "test_handover.py::test_a_request_in_progress_ends_where_it_is_and_then_its_connection_moves": 3,
    "test_handover.py::test_a_slow_upload_and_a_long_stream_go_on_over_a_reload": 3,
    "test_handover.py::test_a_storm_of_reloads_ends_no_connection": ("flavour", "workers"),
    "test_handover.py::test_a_stream_that_outlives_three_generations_ends_at_the_newest": ("flavour", "ready"),
    "test_handover.py::test_pipelined_bursts_are_answered_in_order_over_reloads": -2,
    "test_handover.py::test_recycled_workers_hand_their_clients_on": -2,
    "test_handover.py::test_scaling_down_moves_connections": 2,
    "test_handover.py::test_successors_that_are_killed_at_any_moment_lose_nothing_but_what_they_had": 2,
    "test_handover.py::test_two_hundred_silent_connections_survive_three_reloads": 3,
    "test_handover.py::test_what_a_successor_does_not_live_to_take_is_served_on": ("flavour", "name"),
    "test_lifespan.py::test_auto_serves_without": 3,
    "test_lifespan.py::test_startup_failed": ("does", "mode"),
    "test_lifespan.py::test_whole_life": ("loop_name", "mode"),
    "test_limits.py::test_clients_that_vanish_leave_nothing_behind": ("interface", "loop"),
    "test_logging.py::test_a_full_pipe_for_a_log_stops_nothing": 2,
    "test_logging.py::test_without_the_setting_there_are_no_ids": -2,
    "test_preload.py::test_a_first_start_that_fails_ends_with_the_reason": 3,
    "test_preload.py::test_a_generation_imports_once_and_its_workers_share_it": 2,
    "test_preload.py::test_a_killed_worker_is_replaced_by_the_same_code": -2,
    "test_preload.py::test_what_is_imported_is_frozen": ("interface", "preload"),
    "test_real_proxies.py::test_no_502_of_haproxy_through_reloads": 2,
    "test_real_proxies.py::test_no_502_of_nginx_through_reloads": -2,
    "test_reload.py::test_a_broken_deploy_keeps_the_old_code_serving": 3,
    "test_reload.py::test_a_reload_picks_up_new_code": ("interface", "number"),
    "test_reload.py::test_a_request_that_outlasts_graceful_timeout_is_cut_and_named": -2,
    "test_reload.py::test_a_storm_of_reloads_ends_with_the_newest_code": 2,
    "test_reload.py::test_idle_connections_are_served_on": -2,
    "test_reload.py::test_workers_are_replaced_one_by_one_behind_ready_ones": ("interface", "workers"),
    "test_upgrade.py::test_a_stop_is_not_lost": ("number", "when"),
    "test_upgrade.py::test_an_upgrade_loses_no_request_and_no_connection": ("interface", "preload"),
    "test_upgrade.py::test_with_a_worker_that_drains": 2,
    "test_websocket_reload.py::test_a_fragmented_message_is_finished_first": 2,
    "test_websocket_reload.py::test_a_frame_that_is_half_received_goes_on": ("flavour", "cut"),
    "test_websocket_reload.py::test_a_socket_goes_on_with_the_next_worker": ("flavour", "kind"),
    "test_websocket_reload.py::test_a_storm_of_reloads_loses_no_message": -2,
    "test_websocket_reload.py::test_the_scope_is_the_same": 2,
    "test_websocket_reload.py::test_the_state_that_is_left_is_found": 2,
    "test_websocket_reload.py::test_w16_without_a_contract_each_socket_is_closed_as_a_restart": -2,
    "test_websocket_reload.py::test_what_the_application_has_not_received_is_for_the_next": -2,
    "test_worker.py::test_a_blocked_event_loop_is_killed_with_its_stacks_and_requests": ("flavour", "target"),
    "test_worker.py::test_a_crash_leaves_its_stacks_in_the_log": ("interface", "number"),
    "test_worker.py::test_a_worker_that_ends_itself_is_replaced": -2,
    "test_worker.py::test_a_worker_that_gets_term_finishes_and_is_replaced": 2,
    "test_worker.py::test_max_requests_recycles_without_a_lost_request": ("interface", "workers"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="run every combination of the slow tests, too, and many more examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    # An example may take as long as it likes: a time limit for each would test the machine. They are the same each
    # time, so that a run fails for what was changed and for nothing else; with --thorough there are others.
    slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("quick", max_examples=60, derandomize=True, **slow)  # type: ignore[arg-type]
    settings.register_profile("thorough", max_examples=500, **slow)  # type: ignore[arg-type]
    settings.load_profile("thorough" if config.getoption("--thorough") else "quick")


def _values(item: pytest.Item, names: Iterable[str]) -> dict[str, object]:
    """The values of these parameters, as far as it has them; those of its fixtures are among them."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return {name: params[name] for name in names if name in params}


def have_their_turn(items: list[pytest.Item], rule: int | tuple[str, ...]) -> list[pytest.Item]:
    """Those that run, of the tests of one name."""
    if isinstance(rule, int):
        return items[::rule]
    each: dict[str, list[object]] = {name: [] for name in rule}
    for item in items:
        for name, value in _values(item, rule).items():
            if value not in each[name]:
                each[name].append(value)
    rounds = [
        {name: values[number % len(values)] for name, values in each.items() if values}
        for number in range(max(map(len, each.values())))
    ]
    return [item for item in items if _values(item, rule) in (rounds or [{}])]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thorough"):
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(f"{item.path.name}::{item.name.partition('[')[0]}", []).append(item)
    left_out: list[pytest.Item] = []
    for name, group in groups.items():
        if (rule := THINNED.get(name, THINNED.get(name.partition("::")[0]))) is not None:
            chosen = set(have_their_turn(group, rule))
            left_out += [item for item in group if item not in chosen]
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
