"""The metrics as text: OpenMetrics 1.0 and the Prometheus text format 0.0.4. Pure.

A family is named without the suffixes of its samples, as OpenMetrics wants it; the older format has its counters' names
with `_total`, and no units and infos. docs/metrics.md explains each family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apphost.measures import BOUNDS, CODES, PHASES

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, object]
Snapshot = Mapping[str, Any]


@dataclass(slots=True)
class Family:
    """kind: counter, gauge, histogram or info. samples: (suffix, labels, value)."""

    name: str
    kind: str
    help: str
    unit: str = ""
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)

    def add(self, value: float | None, **labels: object) -> Family:
        """Nothing for None: the system does not tell it."""
        if value is not None:
            self.samples.append((_SUFFIX.get(self.kind, ""), labels, value))
        return self

    def add_histogram(self, buckets: list[int], total: float) -> Family:
        below = 0
        for bound, count in zip((*BOUNDS, "+Inf"), buckets, strict=True):
            below += count
            self.samples.append(("_bucket", {"le": bound}, below))
        self.samples += [("_count", {}, below), ("_sum", {}, total)]
        return self


_SUFFIX = {"counter": "_total", "info": "_info"}


def families(snapshot: Snapshot) -> list[Family]:
    """All metrics of a snapshot of the arbiter (`apphost.arbiter.admin`)."""
    return [*_requests(snapshot), *_connections(snapshot), *_workers(snapshot), *_processes(snapshot)]


def _requests(snapshot: Snapshot) -> Iterable[Family]:
    measures = snapshot["measures"]
    codes = Family("http_requests", "counter", "Requests that are finished, by class of the status.")
    for code, count in zip(CODES, measures["codes"], strict=True):
        codes.add(count, code=code)
    yield codes
    yield Family(
        "http_request_duration_seconds",
        "histogram",
        "From the head of a request to the end of its response.",
        "seconds",
    ).add_histogram(measures["latency"], measures["latency_us"][0] / 1e6)
    yield Family(
        "http_request_queue_seconds", "histogram", "How long requests have waited for a thread (WSGI).", "seconds"
    ).add_histogram(measures["queue"], measures["queue_us"][0] / 1e6)
    yield Family("http_response_body_bytes", "counter", "Bytes of response bodies.", "bytes").add(measures["sent"][0])
    yield Family("apphost_responses_cut", "counter", "Responses that ended incomplete.").add(measures["cut"][0])
    active = sum(worker["in_progress"] for worker in snapshot["workers"])
    yield Family("http_requests_in_progress", "gauge", "Requests and open WebSockets in progress.").add(active)


def _connections(snapshot: Snapshot) -> Iterable[Family]:
    states = Family("apphost_connections", "gauge", "Open connections of clients, by what they do.")
    totals = [0] * len(PHASES)
    for worker in snapshot["workers"]:
        totals = [a + b for a, b in zip(totals, worker["phases"] or [0] * len(PHASES), strict=True)]
    for phase, count in zip(PHASES, totals, strict=True):
        states.add(count, state=phase)
    yield states
    moved = snapshot["measures"]["moved"][0]
    yield Family("apphost_handed_over_connections", "counter", "Connections that moved to another worker.").add(moved)


def _workers(snapshot: Snapshot) -> Iterable[Family]:
    counts = Counter((worker["state"], worker["generation"]) for worker in snapshot["workers"])
    family = Family("apphost_workers", "gauge", "Workers by state and generation.")
    target = snapshot["target"]
    for state in ("booting", "ready", "draining"):
        for generation in sorted({target, *(number for _, number in counts)}):
            family.add(counts[state, generation], state=state, generation=generation)
    yield family
    yield Family("apphost_workers_wanted", "gauge", "Workers that there should be.").add(snapshot["size"])
    yield Family("apphost_generation", "gauge", "The newest generation that serves.").add(snapshot["good"])
    reloads = Family("apphost_reloads", "counter", "Reloads, by outcome.")
    for outcome in ("complete", "given up", "superseded"):
        reloads.add(snapshot["reloads"].get(outcome, 0), outcome=outcome.replace(" ", "_"))
    yield reloads
    exits = Family("apphost_worker_exits", "counter", "Workers that have ended, by why they had to.")
    # Those that alerts are made of are there from the start: a rate needs a value before the first one.
    known = dict.fromkeys(("crashed", "could not boot", "stuck", "boot timeout", "reload", "recycle"), 0)
    for reason, count in {**known, **snapshot["replaced"]}.items():
        exits.add(count, reason=reason.replace(" ", "_").replace("-", "_"))
    yield exits
    ready = 1 if is_ready(snapshot) else 0
    yield Family("apphost_ready", "gauge", "1 when /readyz says so.").add(ready)


def _processes(snapshot: Snapshot) -> Iterable[Family]:
    arbiter, workers = snapshot["arbiter"], snapshot["workers"]
    rss = [worker["rss"] for worker in workers if worker["rss"] is not None]
    memory = Family("process_resident_memory_bytes", "gauge", "Memory (RSS); shared pages count in each.", "bytes")
    yield memory.add(arbiter["rss"], role="arbiter").add(sum(rss), role="worker")
    cpu = Family("process_cpu_seconds", "counter", "CPU time, user and system.", "seconds")
    yield cpu.add(arbiter["cpu"], role="arbiter").add(snapshot["workers_cpu"], role="worker")
    start = Family("process_start_time_seconds", "gauge", "When the arbiter has started, Unix time.", "seconds")
    yield start.add(snapshot["started"])
    build = Family("apphost_build", "info", "The version of apphost, and of Python.")
    yield build.add(1, version=snapshot["version"], python=snapshot["python"])


def is_ready(snapshot: Snapshot) -> bool:
    """At least one worker serves, and no stop was asked for."""
    return snapshot["state"] != "stopping" and any(worker["state"] == "ready" for worker in snapshot["workers"])


def openmetrics(metrics: Iterable[Family]) -> str:
    lines: list[str] = []
    for family in metrics:
        lines.append(f"# TYPE {family.name} {family.kind}")
        if family.unit:
            lines.append(f"# UNIT {family.name} {family.unit}")
        lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines += _samples(family)
    return "\n".join([*lines, "# EOF", ""])


def prometheus_text(metrics: Iterable[Family]) -> str:
    lines: list[str] = []
    for family in metrics:
        name = family.name + _SUFFIX.get(family.kind, "")
        kind = "gauge" if family.kind == "info" else family.kind
        lines += [f"# HELP {name} {_escape(family.help)}", f"# TYPE {name} {kind}", *_samples(family)]
    return "\n".join([*lines, ""])


def _samples(family: Family) -> Iterable[str]:
    for suffix, labels, value in family.samples:
        inside = ",".join(f'{name}="{_escape(str(text))}"' for name, text in labels.items())
        yield f"{family.name}{suffix}{'{' + inside + '}' if inside else ''} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def prefers_openmetrics(accept: str) -> bool:
    """Whether a client wants OpenMetrics more than the older format (RFC 9110, 12.5.1); nothing said: the older one."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for entry in accept.split(",")[:32]:  # scrapers name five
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        if kind in weights:
            weights[kind] = max(weights[kind], _weight(parameters))
    return weights["application/openmetrics-text"] > weights["text/plain"]


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0
