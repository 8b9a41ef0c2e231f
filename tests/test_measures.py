"""What workers count, and what becomes of it: pure parts of the admin listener."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from apphost.admin.exposition import families, openmetrics, prefers_openmetrics, prometheus_text
from apphost.admin.site import POINTS, STALE_AFTER, Site, load_page, point
from apphost.arbiter.history import COMPLETE, GIVEN_UP, SUPERSEDED, History
from apphost.measures import BOUNDS, BUCKETS, COUNTERS, PHASES, add, fits, quantile, zero
from apphost.protocols.wire import Phase
from apphost.worker.meter import SAMPLE, Meter, TimedPool, count_phases
from tests.rawhttp import DEADLINE

# ------------------------------------------------------------------------------------------------ what is counted


def exchange(status: int, sent: int = 0, started_at: float = 0.0) -> Any:
    return SimpleNamespace(status=status, sent=sent, started_at=started_at)


def test_a_meter_counts_by_class_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    meter = Meter(None)
    for status, seconds in ((200, 0.0004), (204, 0.0005), (404, 0.2), (500, 11.0), (999, 0.0)):
        meter.write(exchange(status, 10, 100.0 - seconds))
    meter.write(exchange(0, 0, 99.5), cut=True)  # the client left before there was an answer
    meter.write_refusal(None, 431)  # type: ignore[arg-type]
    told = meter.measures([], 0, moved=3, adopted=4)
    assert fits(told)
    assert told["codes"] == [1, 0, 2, 0, 2, 2]
    assert sum(told["latency"]) == 6
    assert told["latency"][BOUNDS.index(0.25)] == 1
    assert told["latency"][-1] == 1
    assert told["latency_us"] == [11_700_900]
    assert meter.measures([], 0, moved=3, adopted=4) == told, "nothing is counted twice"
    assert (told["cut"], told["sent"], told["moved"], told["adopted"]) == ([1], [50], [3], [4])


def test_a_bound_belongs_to_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """`le` is less or equal (OpenMetrics, Histogram)."""
    monkeypatch.setattr("time.perf_counter", lambda: 0.25)
    meter = Meter(None)
    meter.write(exchange(200))
    assert meter.measures([], 0, 0, 0)["latency"].index(1) == BOUNDS.index(0.25)


def test_a_meter_hands_on_to_the_access_log() -> None:
    said: list[tuple[Any, ...]] = []
    log = SimpleNamespace(
        write=lambda *args: said.append(("write", *args)),
        write_refusal=lambda *args: said.append(("refusal", *args)),
        flush=lambda: said.append(("flush",)),
    )
    meter = Meter(log)
    one = exchange(200)
    meter.write(one, True)
    meter.write_refusal("connection", 400)  # type: ignore[arg-type]
    meter.flush()
    assert said == [("write", one, True), ("refusal", "connection", 400), ("flush",)]


def test_waits_for_a_thread_are_measured() -> None:
    async def story() -> list[int]:
        meter = Meter(None)
        pool = TimedPool(asyncio.get_running_loop(), 1, "test", meter.waits)
        first, gate = threading.Event(), threading.Event()

        def hold() -> None:
            first.set()
            gate.wait(DEADLINE)

        pool.submit(hold)
        await asyncio.to_thread(first.wait, DEADLINE)
        done = asyncio.Event()
        pool.submit(lambda: pool.post(done.set))
        await asyncio.sleep(0.03)  # what the second one waits
        gate.set()
        await asyncio.wait_for(done.wait(), DEADLINE)
        pool.close()
        told = meter.measures([], 0, 0, 0)
        assert told["queue_us"][0] >= 25_000
        return told["queue"]

    queue = asyncio.run(story())
    assert sum(queue) == 2
    assert sum(queue[BOUNDS.index(0.025) + 1 :]) >= 1


@given(st.lists(st.sampled_from(list(Phase)), max_size=3 * SAMPLE))
def test_phases_always_sum_up(phases: list[Phase]) -> None:
    """Each phase has its place, and beyond the sample the sum is still the number of connections."""
    counted = count_phases(iter(phases), len(phases))
    assert sum(counted) == len(phases)
    assert min(counted, default=0) >= 0
    if len(phases) <= SAMPLE:
        assert counted[PHASES.index("idle")] == phases.count(Phase.WAITING)


# ----------------------------------------------------------------------------------------------- what travels


def test_sums_never_fall() -> None:
    total = zero()
    add(total, {**zero(), "codes": [0, 0, 5, 0, 0, 0]})
    add(total, {"codes": [0, 0, 1, 0, 0, 1], "later": [1], "phases": [1] * len(PHASES)})
    add(total, {"codes": [1, 2], "sent": "many"})  # of another version: left out
    assert total == {**zero(), "codes": [0, 0, 6, 0, 0, 1]}


@pytest.mark.parametrize(
    "value",
    [None, 1, [], {"codes": 1}, {"codes": [1]}, {"codes": [0, 0, 0, 0, 0, -1]}, {"codes": [0, 0, 0, 0, 0, True]},
     {"latency": [0.5] * BUCKETS}, {"sent": [2**60]}, {"phases": ["1"] * len(PHASES)}],
)  # fmt: skip
def test_what_no_worker_says_is_refused(value: object) -> None:
    assert not fits(value)


def test_what_another_version_may_say_passes() -> None:
    assert fits({})
    assert fits({**zero(), "unknown": "anything"})


def test_quantiles() -> None:
    assert quantile([0] * BUCKETS, 0.5) is None
    buckets = [0] * BUCKETS
    buckets[BOUNDS.index(0.1)] = 100
    assert quantile(buckets, 0.5) == pytest.approx(0.075)
    buckets[-1] = 900
    assert quantile(buckets, 0.99) == BOUNDS[-1]


@given(st.lists(st.integers(0, 50), min_size=BUCKETS, max_size=BUCKETS), st.floats(0.01, 0.99))
def test_quantiles_are_in_order(buckets: list[int], fraction: float) -> None:
    lower, upper = quantile(buckets, fraction / 2), quantile(buckets, fraction)
    assert (lower is None) == (sum(buckets) == 0)
    if lower is not None and upper is not None:
        assert 0 <= lower <= upper <= BOUNDS[-1]


def test_reloads_are_counted_by_outcome() -> None:
    history = History(0.0)
    history.note_complete(1, 1.0, "")  # the start
    history.note_complete(2, 2.0, "")
    history.note_given_up(3, 3.0, "", None)
    history.note_complete(6, 4.0, "")  # 4 and 5 were superseded
    assert history.reloads == {COMPLETE: 2, GIVEN_UP: 1, SUPERSEDED: 2}
    history.measures["sent"] = [7]
    history.cpu = 1.5
    again = History.from_wire(json.loads(json.dumps(history.to_wire())), 9.0)
    assert (again.reloads, again.measures, again.cpu) == (history.reloads, history.measures, 1.5)
    again.note_complete(7, 5.0, "")
    assert again.reloads[SUPERSEDED] == 2, "nothing was skipped in the upgrade"


# ------------------------------------------------------------------------------------------------- what is shown


def snapshot(**changes: Any) -> dict[str, Any]:
    worker = {
        "worker": 1, "generation": 3, "pid": 9, "state": "ready", "requests": 5, "errors": 0, "in_progress": 2,
        "connections": 4, "rss": 1000, "cpu": 1.5, "phases": [2, 0, 2, 0, 0, 0], "moved": 0, "adopted": 0,
    }  # fmt: skip
    old = {**worker, "worker": 2, "generation": 2, "state": "draining", "rss": None, "phases": []}
    measures = {**zero(), "codes": [0, 0, 5, 0, 0, 1], "latency": [4, 0, 1, *[0] * (BUCKETS - 4), 1]}
    return {
        "version": '0.1"\\\n', "python": "3.13", "app": "app:app", "state": "serving", "what": "all is well",
        "target": 3, "good": 3, "size": 1, "started": 1.5, "at": 10.0, "workers": [worker, old], "workers_cpu": 2.5,
        "arbiter": {"rss": 500, "cpu": 0.5}, "measures": measures, "reloads": {"given up": 2},
        "replaced": {"scale-down": 1}, **changes,
    }  # fmt: skip


def samples(metrics: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in metrics for s in family.samples}


@pytest.mark.parametrize(
    ("write", "parse"), [(openmetrics, parse_openmetrics), (prometheus_text, parse_text)], ids=["openmetrics", "text"]
)
def test_the_parser_of_prometheus_reads_it(write: Any, parse: Any) -> None:
    """Both formats, with the same samples; labels that need escapes come back as they were."""
    text = write(families(snapshot()))
    found = samples(parse(text))
    assert len(found) == len(re.findall(r"^(?!#).", text, re.MULTILINE)), "every line is one sample, and none is twice"
    assert found["http_requests_total", (("code", "2xx"),)] == 5
    assert found["http_request_duration_seconds_bucket", (("le", "0.0025"),)] == 5
    assert found["http_request_duration_seconds_count", ()] == 6
    assert found["apphost_workers", (("generation", "2"), ("state", "draining"))] == 1
    assert found["apphost_workers", (("generation", "3"), ("state", "draining"))] == 0
    assert found["apphost_connections", (("state", "busy"),)] == 2
    assert found["apphost_reloads_total", (("outcome", "given_up"),)] == 2
    assert found["apphost_worker_exits_total", (("reason", "scale_down"),)] == 1
    assert found["process_resident_memory_bytes", (("role", "worker"),)] == 1000
    assert found["apphost_build_info", (("python", "3.13"), ("version", '0.1"\\\n'))] == 1


def test_every_metric_is_documented() -> None:
    """docs/metrics.md has each family once, with its type and labels, and its alerts use no others."""
    document = (Path(__file__).resolve().parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    suffix = {"counter": "_total", "info": "_info"}
    known = {
        family.name + suffix.get(family.kind, ""): (
            family.kind,
            {name for _, labels, _ in family.samples for name in labels} - {"le"},
        )
        for family in families(snapshot())
    }
    table = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| .+ \|$", document, re.MULTILINE)
    assert len(table) == len(known)
    assert {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in table} == known
    used = set(re.findall(r"\b(?:http|apphost|process)_\w+", document.partition("## Prometheus")[2]))
    assert len(used) >= 6
    assert {re.sub("_bucket$", "", name) for name in used} <= set(known)


def test_what_the_system_does_not_tell_is_left_out() -> None:
    text = openmetrics(families(snapshot(arbiter={"rss": None, "cpu": None})))
    assert ("process_cpu_seconds_total", (("role", "arbiter"),)) not in samples(parse_openmetrics(text))


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text; version=1.0.0", True),
        ("application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.5", False),
        ("application/openmetrics-text;q=nonsense, text/plain;q=0.1", False),
        ("application/openmetrics-text;q=0", False),
        (";;,=,q=1," * 50, False),
    ],
)
def test_the_format_is_negotiated(accept: str, wanted: bool) -> None:
    assert prefers_openmetrics(accept) is wanted


def test_a_point_of_the_curves() -> None:
    before = snapshot(measures=zero())
    assert point(before, snapshot(), 2.0) == {"at": 10.0, "rate": 3.0, "errors": 0.5, "p50": 0.000375, "p99": 10.0}
    assert point(before, before, 1.0)["p50"] is None


class Stream:
    """What the site needs of one."""

    def __init__(self, path: bytes, method: str = "GET", accept: bytes = b"") -> None:
        self.head = SimpleNamespace(raw_path=path, method=method, headers=[(b"accept", accept)])
        self.status = 0
        self.text = b""
        self.body = b""

    def start(self, head: Any) -> None:
        self.status, self.text = head.status, head.text

    def write(self, data: bytes, more: bool) -> None:
        assert not more
        self.body += data


def ask(site: Site, path: bytes, method: str = "GET", accept: bytes = b"") -> Stream:
    stream = Stream(path, method, accept)
    site.handle(stream)  # type: ignore[arg-type]
    return stream


def test_health_and_readiness() -> None:
    """Not ready before the first worker is, nor once a stop was asked for; not well when the arbiter is silent."""
    now = [0.0]
    site = Site(lambda: now[0])
    assert (ask(site, b"/healthz").status, ask(site, b"/readyz").status) == (503, 503)
    assert ask(site, b"/metrics").status == 503
    site.take(snapshot(state="starting", what="nothing is ready yet", workers=[]))
    assert (ask(site, b"/healthz").status, ask(site, b"/readyz").status) == (200, 503)
    assert b"nothing is ready yet" in ask(site, b"/readyz").body
    site.take(snapshot())
    assert (ask(site, b"/healthz").status, ask(site, b"/readyz").status) == (200, 200)
    site.take(snapshot(state="stopping", what="told to stop"))
    assert (ask(site, b"/healthz").status, ask(site, b"/readyz").status) == (200, 503)
    site.take(snapshot())
    now[0] += STALE_AFTER + 1
    assert (ask(site, b"/healthz").status, ask(site, b"/readyz").status) == (503, 503)
    assert b"6 s" in ask(site, b"/healthz").body
    assert ask(site, b"/metrics").status == 503
    assert json.loads(ask(site, b"/status.json").body)["stale"]


def test_methods_and_paths() -> None:
    site = Site(lambda: 0.0)
    site.take(snapshot())
    assert ask(site, b"/nothing").status == 404
    refused = ask(site, b"/metrics", "POST")
    assert refused.status == 405
    assert b"allow: GET, HEAD\r\n" in refused.text
    assert ask(site, b"/metrics", "HEAD").status == 200
    assert b"openmetrics-text" in ask(site, b"/metrics", accept=b"application/openmetrics-text").text


def test_the_curves_are_bounded() -> None:
    now = [0.0]
    site = Site(lambda: now[0])
    for _ in range(POINTS * 3):
        now[0] += 0.5
        site.take(snapshot())
    assert len(json.loads(ask(site, b"/status.json").body)["points"]) == POINTS


def test_the_page_asks_nobody_else_and_runs_nothing_else() -> None:
    """Its policy names the very script and style that it has; no address of another server stands in it."""
    page, policy = load_page()
    for name in (b"script", b"style"):
        (inside,) = re.findall(b"<%b>(.*?)</%b>" % (name, name), page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(inside).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert not re.search(rb"(?:src|href|action)=(?!\"data:,)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert b"innerHTML" not in page, "what comes from outside is text"
    assert not re.search(rb"<[^>]*\s(?:on[a-z]+|style)=", page), "the policy would forbid it"


def test_all_counters_are_told_somewhere() -> None:
    assert set(COUNTERS) == set(Meter(None).measures([], 0, 0, 0)) - {"phases"}
    assert deque(Meter(None).waits) == deque()
