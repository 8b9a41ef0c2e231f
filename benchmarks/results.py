"""Results and how they are read: the output of wrk, ratios, the Markdown table, the JSON. Nothing here performs I/O."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cases import Case

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
CONNECTIONS = 64  # enough to keep one worker busy at all times, few enough that no server has to queue accepts
BUSY_CLIENT = 0.9  # from this share of its core on, wrk may be what limits a run
SHARED_PACKAGES = ("h11", "httptools", "uvloop", "flask", "werkzeug")  # must be the same on both sides to be fair
PACKAGES = ("apphost", "uvicorn", "granian", "gunicorn", "gunicorn_h1c", *SHARED_PACKAGES)


@dataclass(frozen=True)
class WrkResult:
    """What one run of wrk printed: ``seconds`` as wrk measured them, ``errors`` counted by kind, without zeros."""

    requests: int
    seconds: float
    errors: dict[str, int]

    @property
    def good_per_second(self) -> float:
        """Answers with a status below 400, a second: an error that is answered quickly must not count as speed."""
        return (self.requests - self.errors.get("status", 0)) / self.seconds


@dataclass(frozen=True)
class Sample:
    """One contestant in one round. ``failure`` says why there is no number; a run that was measured has None."""

    round: int
    requests_per_second: float | None
    errors: dict[str, int]
    client_busy: float | None
    core_speed: float
    failure: str | None


@dataclass(frozen=True)
class Outcome:
    """All rounds of one case, per contestant, in the order of ``case.contestants``."""

    case: Case
    samples: tuple[tuple[Sample, ...], ...]


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_wrk(text: str) -> WrkResult:
    """Read the report of wrk 4. ValueError when it is none."""
    summary = re.search(r"(\d+) requests in ([\d.]+)(us|ms|s|m|h),", text)
    if summary is None:
        raise ValueError(f"not a report of wrk: {text.strip()!r}")
    errors = {}
    sockets = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    if sockets is not None:
        errors = dict(zip(("connect", "read", "write", "timeout"), map(int, sockets.groups()), strict=True))
    status = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    if status is not None:
        errors["status"] = int(status[1])
    seconds = float(summary[2]) * _UNITS[summary[3]]
    return WrkResult(int(summary[1]), seconds, {kind: count for kind, count in errors.items() if count})


def rates(samples: Sequence[Sample]) -> list[float]:
    return [sample.requests_per_second for sample in samples if sample.requests_per_second is not None]


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> tuple[float, float, float] | None:
    """The ratio of the medians, then the smallest and largest ratio within one round; None without a common round."""
    mine, others = ({s.round: s.requests_per_second for s in side if s.requests_per_second} for side in (ours, theirs))
    pairs = [mine[number] / others[number] for number in mine.keys() & others.keys()]
    if not pairs:
        return None
    return statistics.median(mine.values()) / statistics.median(others.values()), min(pairs), max(pairs)


def describe_errors(samples: Sequence[Sample]) -> str:
    """Errors of all rounds by kind, then how many runs gave no number: "none", "read 3", "2 of 5 runs failed"."""
    totals: dict[str, int] = {}
    for sample in samples:
        for kind, count in sample.errors.items():
            totals[kind] = totals.get(kind, 0) + count
    parts = [f"{kind} {count}" for kind, count in totals.items()]
    failed = sum(sample.failure is not None for sample in samples)
    if failed:
        parts.append(f"{failed} of {len(samples)} runs failed")
    return ", ".join(parts) or "none"


def verdict(at_least: float, ours: Sequence[Sample], theirs: Sequence[Sample]) -> str:
    """Whether the ratio was reached. Runs that failed have no number, so with any of them there is no verdict."""
    both = (*ours, *theirs)
    reached = ratio(ours, theirs)
    if reached is None or any(sample.failure for sample in both):
        return "not comparable"
    errors = ", with errors" if any(sample.errors for sample in both) else ""
    return ("met" if reached[0] >= at_least else "missed") + errors


def table_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    ours = outcome.samples[0]
    for contestant, samples in zip(outcome.case.contestants, outcome.samples, strict=True):
        measured = rates(samples)
        speed = f"{statistics.median(measured):,.0f}" if measured else "-"
        spread = f"{min(measured):,.0f} - {max(measured):,.0f}" if measured else "-"
        against = None if contestant.is_apphost else ratio(ours, samples)
        factor = f"{against[0]:.2f}x ({against[1]:.2f} - {against[2]:.2f})" if against else ""
        wanted = ""
        if contestant is outcome.case.against:
            wanted = f"{outcome.case.at_least}x: {verdict(outcome.case.at_least, ours, samples)}"
        rows.append((outcome.case.name, contestant.label, speed, spread, factor, wanted, describe_errors(samples)))
    return rows


HEADINGS = ("case", "server", "requests/s, median", "min - max", "apphost / it (by round)", "wanted", "errors")


def render(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> str:
    """The report as Markdown: how it was measured, the table, warnings, versions."""
    method = (
        f"{facts['date']}, {facts['cpu']}, {facts['cores']} cores, {facts['system']}, "
        f"Python {facts['apphost']['python']}. "
        f"Server on core {facts['server_core']}, {facts['wrk']} `-t1 -c{CONNECTIONS}` on core {facts['client_core']}, "
        f"{facts['rounds']} rounds of {facts['seconds']} s after {facts['warmup']} s of warm-up."
    )
    lines = [
        method,
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for outcome in outcomes for row in table_rows(outcome)]
    versions = {**facts["peers"]["packages"], **facts["apphost"]["packages"]}
    known = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if versions.get(name))
    lines += ["", f"Versions: {known}.", ""]
    lines += [f"- {note}" for note in notes(outcomes, facts)]
    return "\n".join(lines).rstrip() + "\n"


def notes(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    samples = [sample for outcome in outcomes for rounds in outcome.samples for sample in rounds]
    speeds = [sample.core_speed for sample in samples]
    typical = statistics.median(speeds)
    quietness = (
        f"Load average before the first run: {facts['load']:.2f}. "
        "A fixed loop, run on the server's core before each run, "
        f"went at {min(speeds) / typical:.0%} to {max(speeds) / typical:.0%} of its median speed: "
        "so much the machine itself varied."
    )
    found = [quietness]
    ours, theirs = facts["apphost"], facts["peers"]
    differing = [name for name in SHARED_PACKAGES if ours["packages"].get(name) != theirs["packages"].get(name)]
    if differing:
        found.append(f"Unfair: apphost and its peers have different versions of {', '.join(differing)}.")
    if ours["python"] != theirs["python"]:
        found.append(f"Unfair: apphost runs on Python {ours['python']}, its peers on {theirs['python']}.")
    for outcome in outcomes:
        for contestant, rounds in zip(outcome.case.contestants, outcome.samples, strict=True):
            name = f"{outcome.case.name}, {contestant.label}"
            busiest = max((sample.client_busy or 0.0 for sample in rounds), default=0.0)
            if busiest >= BUSY_CLIENT:
                found.append(f"{name}: wrk used up to {busiest:.0%} of its core: the server may be faster than shown.")
            found += [f"{name}, round {s.round}: {s.failure.splitlines()[0]}" for s in rounds if s.failure]
    return found


def put_between_markers(text: str, report: str) -> str:
    """``text`` with ``report`` between the markers. ValueError unless there is one pair of them, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"expected one {BEGIN} followed by one {END}")
    return f"{head}{BEGIN}\n\n{report.rstrip()}\n\n{END}{tail}"


def as_json(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    cases = []
    for outcome in outcomes:
        rows = []
        for contestant, samples in zip(outcome.case.contestants, outcome.samples, strict=True):
            measured = rates(samples)
            against = None if contestant.is_apphost else ratio(outcome.samples[0], samples)
            rows.append(
                {
                    "label": contestant.label,
                    "command": ["python", "-m", *contestant.arguments],
                    "median_requests_per_second": statistics.median(measured) if measured else None,
                    "apphost_ratio": against[0] if against else None,
                    "wanted_ratio": outcome.case.at_least if contestant is outcome.case.against else None,
                    "samples": [dataclasses.asdict(sample) for sample in samples],
                }
            )
        cases.append({"case": outcome.case.name, "contestants": rows})
    return {"facts": facts, "cases": cases}
