"""Results and how they are read: samples, medians, ratios, verdicts; `load` and `save` for the JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import BY_NAME, SERVERS, Case, Wanted

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Sample:
    """One server in one round of one case. ``failure`` says why there are no values; a run that was measured has None.

    ``when``: UTC, ISO 8601. ``load``: the load average before the program began. ``core_speed``: turns a second of a
    fixed loop. ``busy``: the share of its core that the client used. ``stolen``: the share of one of the two cores, the
    larger one, that the hypervisor took for others during the run, start and end of the server included. ``repeated``:
    how many other runs were thrown away, because too much was stolen.
    """

    case: str
    server: str
    round: int
    when: str
    commit: str
    load: float
    core_speed: float
    stolen: float
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    busy: float | None = None
    failure: str | None = None
    repeated: int = 0


@dataclass
class Results:
    """All samples that one report is made of, and the facts that are the same for all of them."""

    facts: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)

    def of(self, case: str, server: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.case == case and sample.server == server]

    def cases(self) -> list[Case]:
        """Those with samples, in the order of CASES."""
        there = {sample.case for sample in self.samples}
        return [case for name, case in BY_NAME.items() if name in there]

    def has_round(self, case: Case, number: int) -> bool:
        return any(sample.case == case.name and sample.round == number for sample in self.samples)


class Mismatch(Exception):
    """A file whose results cannot stand in one report with these; the text says why."""


def load(path: Path, facts: dict[str, Any]) -> Results:
    """What a file holds, or nothing yet. Mismatch when it was measured differently or is no such file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return Results(facts)
    except ValueError as error:
        raise Mismatch(f"{path} is not JSON: {error}") from error
    differing = [key for key in facts if facts[key] != found.get("facts", {}).get(key)]
    if differing:
        was, are = ([str(each.get(key)) for key in differing] for each in (found.get("facts", {}), facts))
        raise Mismatch(
            f"{path} was measured with another {', '.join(differing)}: {'; '.join(was)}, not {'; '.join(are)}"
        )
    return read(found, path)


def read(found: dict[str, Any], path: Path) -> Results:
    """The samples of cases and servers that still exist."""
    try:
        samples = [Sample(**each) for each in found["samples"]]
    except (KeyError, TypeError) as error:
        raise Mismatch(f"{path} was not written by this compare.py: {error!r}") from error
    known = [each for each in samples if each.case in BY_NAME and each.server in BY_NAME[each.case].servers]
    return Results(found["facts"], known)


def save(path: Path, results: Results) -> None:
    """In one piece: a reader, or the next run after this one was killed, finds the old file or the new one."""
    new = path.with_name(path.name + ".new")
    document = {"facts": results.facts, "samples": [dataclasses.asdict(sample) for sample in results.samples]}
    new.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(new, path)


def values(samples: Iterable[Sample], key: str) -> list[float]:
    return [sample.values[key] for sample in samples if key in sample.values]


def median(samples: Iterable[Sample], key: str) -> float | None:
    found = values(samples, key)
    return statistics.median(found) if found else None


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], key: str) -> tuple[float, float, float] | None:
    """The ratio of the medians, then the smallest and largest ratio within one round; None without a common round."""
    mine, others = ({s.round: s.values[key] for s in side if s.values.get(key)} for side in (ours, theirs))
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
    parts = [f"{kind} {count:,}" for kind, count in totals.items()]
    failed = sum(sample.failure is not None for sample in samples)
    if failed:
        parts.append(f"{failed} of {len(samples)} runs failed")
    return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Verdict:
    """``reached``: a ratio with its range by round, or a value with its range; None without numbers."""

    wanted: Wanted
    against: str  # label of the one that it is compared with, "" for a limit
    figure: float
    at_least: bool
    reached: tuple[float, float, float] | None
    word: str  # "met", "missed", "not measured", "not comparable"; with ", with errors" behind the first two

    @property
    def missed(self) -> bool:
        return self.word.startswith("missed")


def is_newer(python: str) -> bool:
    """3.12 or newer."""
    return tuple(int(part) for part in python.split(".")[:2]) >= (3, 12)


def judge(wanted: Wanted, results: Results) -> Verdict:
    """Runs that failed have no number, so with any of them there is no verdict."""
    case = BY_NAME[wanted.case]
    key, more = case.kind.metrics[0].key, case.kind.more_is_better
    newer = wanted.newer if is_newer(results.facts["apphost"]["python"]) else None
    figure = newer or wanted.figure
    ours = results.of(case.name, wanted.ours)
    mine = values(ours, key)
    medians = {name: median(results.of(case.name, name), key) for name in wanted.against}
    known = {name: value for name, value in medians.items() if value is not None}
    best = (max if more else min)(known, key=known.__getitem__) if known else None
    theirs = [sample for name in wanted.against for sample in results.of(case.name, name)]
    label = SERVERS[best].label if best else ", ".join(SERVERS[name].label for name in wanted.against)
    reached: tuple[float, float, float] | None = None
    if best:
        reached = ratio(ours, results.of(case.name, best), key)
    elif mine and not wanted.against:
        reached = statistics.median(mine), min(mine), max(mine)
    if not ours:
        word = "not measured"
    elif reached is None or any(sample.failure for sample in (*ours, *theirs)):
        word = "not comparable"
    else:
        word = "met" if (reached[0] >= figure if more else reached[0] <= figure) else "missed"
        word += ", with errors" if any(sample.errors for sample in (*ours, *theirs)) else ""
    return Verdict(wanted, label, figure, more, reached, word)


def put_between_markers(text: str, report: str) -> str:
    """``text`` with ``report`` between the markers. ValueError unless there is one pair of them, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"expected one {BEGIN} followed by one {END}")
    return f"{head}{BEGIN}\n\n{report.rstrip()}\n\n{END}{tail}"
