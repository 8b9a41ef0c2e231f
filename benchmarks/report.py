"""RESULTS.md: figures wanted and reached, a table for each kind of case, what was left out, when each case ran."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cases import SERVERS, WANTED, Case, Kind, Metric
from environment import PACKAGES, SHARED_PACKAGES
from results import Results, Sample, Verdict, describe_errors, judge, median, ratio, values

BUSY_CLIENT = 0.9  # from this share of its core on, the client may be what limits a run
LATE_CLIENT = 0.2  # from this share of the server's p99 on, the client's own delay blurs it

ROUNDS_ENOUGH = 3
STOLEN_MUCH = 0.1  # of a core, by the hypervisor

GROUPS = (
    ("Requests a second", (Kind.THROUGHPUT,), "More is better; the ratio is apphost's number divided by the other's."),
    (
        "WebSocket messages a second",
        (Kind.ECHO,),
        "More is better; the ratio is apphost's number divided by the other's.",
    ),
    ("Latency at a fixed rate", (Kind.LATENCY,), "Less is better; the ratio is that of the p99."),
    ("Memory", (Kind.IDLE, Kind.WORKERS, Kind.TREE), "Less is better. PSS of all processes of a server."),
    ("Start and reload", (Kind.START, Kind.RELOAD), "Less is better."),
    (
        "Balance",
        (Kind.BALANCE,),
        (
            "Connections of the busiest and the least busy worker, divided by an even share: 1 is perfect, 4 is one"
            " worker with all. Where the least is 0, a worker got none."
        ),
    ),
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table of Markdown; the first ``left`` columns are text."""
    marks = ["---"] * left + ["--:"] * (len(headings) - left)
    return [f"| {' | '.join(each)} |" for each in (headings, marks, *rows)]


def show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def show_range(samples: Sequence[Sample], metric: Metric) -> str:
    found = values(samples, metric.key)
    return f"{show(min(found), metric.digits)} - {show(max(found), metric.digits)}" if found else "-"


def show_ratio(found: tuple[float, float, float] | None) -> str:
    return f"{found[0]:.2f}x ({found[1]:.2f} - {found[2]:.2f})" if found else "-"


def case_rows(case: Case, results: Results) -> list[list[str]]:
    first, *others = case.kind.metrics
    ours = results.of(case.name, case.servers[0])
    rows = []
    for name in case.servers:
        samples = results.of(case.name, name)
        compared = "" if name == case.servers[0] else show_ratio(ratio(ours, samples, first.key))
        rows.append(
            [
                case.title if name == case.servers[0] else "",
                SERVERS[name].label,
                show(median(samples, first.key), first.digits),
                show_range(samples, first),
                compared,
                *(show(median(samples, metric.key), metric.digits) for metric in others),
                describe_errors(samples),
            ]
        )
    return rows


def kind_table(kind: Kind, results: Results) -> list[str]:
    rows = [row for case in results.cases() if case.kind is kind for row in case_rows(case, results)]
    if not rows:
        return []
    first, *others = (metric.heading for metric in kind.metrics)
    headings = ("case", "server", first, "min - max", "apphost / it (by round)", *others, "errors")
    return [*table(headings, rows, 2), ""]


def wanted_table(verdicts: Sequence[Verdict], results: Results) -> list[str]:
    titles = {case.name: case for case in results.cases()}
    rows = []
    for verdict in verdicts:
        case = titles.get(verdict.wanted.case)
        if case is None:
            continue
        metric = case.kind.metrics[0]
        bound = "at least" if verdict.at_least else "at most"
        if verdict.against:
            wanted, reached = f"{bound} {verdict.figure}x", show_ratio(verdict.reached)
        else:
            wanted = f"{bound} {verdict.figure:g}"
            low = verdict.reached
            reached = "-" if low is None else f"{low[0]:.2f} ({low[1]:.2f} - {low[2]:.2f})"
        who = SERVERS[verdict.wanted.ours].label
        rows.append([f"{case.title}: {metric.heading}", who, verdict.against, wanted, reached, verdict.word])
    if not rows:
        return []
    return [
        "## Figures wanted",
        "",
        *table(("case", "server", "against", "wanted", "reached (by round)", "verdict"), rows, 3),
        "",
    ]


def left_out(results: Results) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in results.cases():
        for server, reason in case.left_out:
            reasons.setdefault((SERVERS[server].label, reason), []).append(case.title)
    if not reasons:
        return []
    lines = [
        f"- {label}: {reason} ({'; '.join(titles) if len(titles) < 4 else f'{len(titles)} cases'})."
        for (label, reason), titles in reasons.items()
    ]
    return ["## Left out", "", *lines, ""]


def when_table(results: Results) -> list[str]:
    rows = []
    for case in results.cases():
        samples = [sample for sample in results.samples if sample.case == case.name]
        first, last = min(sample.when for sample in samples), max(sample.when for sample in samples)
        speeds = [sample.core_speed for sample in samples]
        typical = statistics.median(sample.core_speed for sample in results.samples)
        rows.append(
            [
                f"`{case.name}`",
                case.title,
                ", ".join(dict.fromkeys(sample.commit or "-" for sample in samples)),
                first.replace("T", " ").removesuffix("Z"),
                last.rpartition("T")[2].removesuffix("Z"),
                str(len({sample.round for sample in samples})),
                f"{max(sample.load for sample in samples):.2f}",
                f"{min(speeds) / typical:.0%} - {max(speeds) / typical:.0%}",
                f"{statistics.median(s.stolen for s in samples):.0%}, {max(s.stolen for s in samples):.0%}",
                str(sum(s.repeated for s in samples)),
            ]
        )
    headings: tuple[str, ...] = ("case", "", "apphost at", "first run, UTC", "last run", "rounds", "load before")
    headings += ("speed of the core", "stolen: median, most", "repeated")
    return ["## When", "", *table(headings, rows, 5), ""]


def notes(results: Results) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    ours, theirs = results.facts["apphost"], results.facts["peers"]
    pairs = ((name, ours["packages"].get(name), theirs["packages"].get(name)) for name in SHARED_PACKAGES)
    differing = [f"{name} ({mine}, {other})" for name, mine, other in pairs if mine and other and mine != other]
    if differing:
        found.append(f"Unfair: apphost and its peers have different versions of {', '.join(differing)}.")
    if ours["python"] != theirs["python"]:
        found.append(f"Unfair: apphost runs on Python {ours['python']}, its peers on {theirs['python']}.")
    for case in results.cases():
        for name in case.servers:
            samples = results.of(case.name, name)
            where = f"{case.title}, {SERVERS[name].label}"
            busiest = max((sample.busy or 0.0 for sample in samples), default=0.0)
            if busiest >= BUSY_CLIENT:
                found.append(
                    f"{where}: the client used up to {busiest:.0%} of its core: the server may be faster than shown."
                )
            late = [s for s in samples if s.values.get("lag", 0.0) >= LATE_CLIENT * s.values.get("p99", 1e9)]
            if late:
                found.append(f"{where}: the client was late in {len(late)} of {len(samples)} runs, see its p99.")
            found += [f"{where}, round {s.round}: {s.failure.splitlines()[0]}" for s in samples if s.failure]
    return ["## Notes", "", *(f"- {note}" for note in found), ""] if found else []


def warning(results: Results) -> list[str]:
    """In front of everything: why these figures are not to be relied on."""
    rounds = min(len({s.round for s in results.samples if s.case == case.name}) for case in results.cases())
    stolen = sum(sample.stolen > STOLEN_MUCH for sample in results.samples)
    reasons = [f"a case has {rounds} of at least {ROUNDS_ENOUGH} rounds"] if rounds < ROUNDS_ENOUGH else []
    if stolen > len(results.samples) / 10:
        reasons.append(
            f"during {stolen} of {len(results.samples)} runs the hypervisor took more than {STOLEN_MUCH:.0%} of a core"
        )
    return [f"**Preliminary: {', and '.join(reasons)}.**", ""] if reasons else []


def machine(facts: dict[str, Any]) -> str:
    packages = {**facts["peers"]["packages"], **facts["apphost"]["packages"]}
    known = ", ".join(f"{name} {packages[name]}" for name in PACKAGES if packages.get(name))
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, Python {facts['apphost']['python']}; "
        f"server on core {facts['server_core']}, load on core {facts['client_core']}; {facts['wrk']}; "
        f"each run {facts['seconds']} s after {facts['warmup']} s of warm-up. {known}."
    )


def render(results: Results) -> str:
    verdicts = [judge(wanted, results) for wanted in WANTED]
    lines = [
        "# Results",
        "",
        "Written by `compare.py`; [README.md](README.md) says how it is measured and how to read it.",
        "",
        *warning(results),
        machine(results.facts),
        "",
        "![apphost beside its peers, bars by case](results.svg)",
        "",
        *wanted_table(verdicts, results),
    ]
    for title, kinds, explanation in GROUPS:
        tables = [line for kind in kinds for line in kind_table(kind, results)]
        if tables:
            lines += [f"## {title}", "", explanation, "", *tables]
    lines += [*left_out(results), *when_table(results), *notes(results)]
    return "\n".join(lines).rstrip() + "\n"
