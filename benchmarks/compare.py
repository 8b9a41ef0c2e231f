"""Measure apphost beside its peers: one worker on one core, the load on another, the servers in turns.

    python benchmarks/compare.py --json all.json --write    # everything, about 45 minutes; RESULTS.md and results.svg
    python benchmarks/compare.py --quick                    # the main cases, about 5 minutes
    python benchmarks/compare.py --check                    # start every server of every case, ask once, no load

apphost runs from the environment of this interpreter, its peers from ``benchmarks/.peers`` (made when missing). Linux
only: cores are pinned, processes looked up in ``/proc``. The method and its limits are in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import http.client
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import gauges
from cases import BY_NAME, CASES, SERVERS, WANTED, Case, Kind, Server
from chart import draw
from environment import Steal, commit, core_speed, gather_facts, make_bench
from loads import Load, run_echo, run_open_loop, run_wrk
from report import render
from results import Mismatch, Results, Sample, judge, load, save
from servers import HERE, Bench, RunFailed, ask, check_pinned, serving

REPORT, CHART = HERE / "RESULTS.md", HERE / "results.svg"
FAILED, NOT_DONE = 1, 3  # exit statuses
STOLEN_MAX = 0.1  # of a core, by the hypervisor: a run with more says little about the server, so it is repeated
PEAK_SECONDS = 2  # of saturation, which tells what half of the peak is
# What a run takes besides load and warm-up, seconds, generously: an estimate for --limit.
OVERHEAD = {Kind.LATENCY: 6, Kind.IDLE: 8, Kind.WORKERS: 10, Kind.TREE: 7, Kind.RELOAD: 14, Kind.BALANCE: 6}
TROUBLE = (RunFailed, OSError, http.client.HTTPException)  # of a run, which then has no value
GAUGES = {
    Kind.IDLE: gauges.idle,
    Kind.WORKERS: gauges.workers,
    Kind.TREE: gauges.tree,
    Kind.START: gauges.start,
    Kind.RELOAD: gauges.reload,
    Kind.BALANCE: gauges.balance,
}


def under_load(bench: Bench, case: Case, server: Server, options: argparse.Namespace, rate: float | None) -> Load:
    """Warms a fresh server up, measures, and asks it once more. ``rate``: None is half of the peak that it has."""
    run = run_echo if case.kind is Kind.ECHO else run_wrk
    with serving(bench, server, case) as running:
        warm = run(bench, running, case, options.warmup)
        if case.kind is Kind.LATENCY:
            peak = run_wrk(bench, running, case, PEAK_SECONDS).values["rate"]
            found = run_open_loop(bench, running, case, options.seconds, rate or peak / 2)
            found.values["peak"] = peak
        else:
            found = run(bench, running, case, options.seconds)
        check_pinned(running.session, bench.server_core)
        ask(running.port, case.request)
    return Load(found.values, {f"{kind} in warm-up": n for kind, n in warm.errors.items()} | found.errors, found.busy)


def slowest_half(bench: Bench, case: Case, options: argparse.Namespace) -> float | None:
    """Half of the peak of the slowest server of a case, without those that fail: their own run says why."""
    peaks = []
    for name in case.servers:
        with contextlib.suppress(*TROUBLE), serving(bench, SERVERS[name], case) as running:
            run_wrk(bench, running, case, options.warmup)
            peaks.append(run_wrk(bench, running, case, PEAK_SECONDS).values["rate"])
    return min(peaks) / 2 if peaks else None


def measure_one(
    bench: Bench, case: Case, number: int, name: str, options: argparse.Namespace, rate: float | None
) -> Sample:
    """One server in one round, once."""
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    speed, found, failure = core_speed(bench.server_core), Load({}), None
    steal = Steal(bench.server_core, bench.client_core)
    try:
        if case.kind in GAUGES:
            found = GAUGES[case.kind](bench, SERVERS[name], case)
        else:
            found = under_load(bench, case, SERVERS[name], options, rate)
    except TROUBLE as error:
        failure = str(error) or repr(error)
    about = (case.name, name, number, when, options.commit, options.load, speed, steal.share())
    return Sample(*about, found.values, found.errors, found.busy, failure)


def settled(
    bench: Bench, case: Case, number: int, name: str, options: argparse.Namespace, rate: float | None
) -> Sample:
    """The first run without too much steal; when there is none, the one with the least. Errors of all are kept."""
    runs: list[Sample] = []
    for _ in range(1 + options.repeats):
        runs.append(measure_one(bench, case, number, name, options, rate))
        if runs[-1].stolen <= STOLEN_MAX or runs[-1].failure:
            break
    best = runs[-1] if runs[-1].failure else min(runs, key=lambda sample: sample.stolen)
    errors = sum((Counter(sample.errors) for sample in runs), Counter[str]())
    return dataclasses.replace(best, errors=dict(errors), repeated=len(runs) - 1)


def measure_round(bench: Bench, case: Case, number: int, options: argparse.Namespace) -> list[Sample]:
    """Each server of a case once. Every round begins with another one, so that none is always the first."""
    turn = (number - 1) % len(case.servers)
    rate = slowest_half(bench, case, options) if case.same_rate else None
    samples = []
    for name in (*case.servers[turn:], *case.servers[:turn]):
        sample = settled(bench, case, number, name, options, rate)
        samples.append(sample)
        shown = ", ".join(
            f"{sample.values[m.key]:,.{m.digits}f} {m.heading}" for m in case.kind.metrics if sample.values
        )
        told = sample.failure.splitlines()[0] if sample.failure else f"{shown} {sample.errors or ''}"
        label = SERVERS[name].label
        print(f"{case.name} {number}/{options.rounds}  {label}: {told}, stolen {sample.stolen:.0%}", file=sys.stderr)
    return samples


def estimate(case: Case, options: argparse.Namespace) -> float:
    """Seconds that a round of a case takes, rather too many."""
    each = OVERHEAD.get(case.kind, 2.5) + (0 if case.kind in GAUGES else options.warmup + options.seconds)
    return len(case.servers) * each * (2 if case.same_rate else 1)


def measure(bench: Bench, cases: Sequence[Case], results: Results, options: argparse.Namespace) -> bool:
    """Whether all rounds are there. Saves after each round; what the file has already is not measured again."""
    began = time.monotonic()
    for case in cases:
        for number in range(1, options.rounds + 1):
            if results.has_round(case, number):
                continue
            if options.limit and time.monotonic() - began + estimate(case, options) > options.limit:
                print(f"stopping before round {number} of {case.name}: --limit", file=sys.stderr)
                return False
            results.samples += measure_round(bench, case, number, options)
            if options.json:
                save(options.json, results)
    return True


def check(bench: Bench, cases: Sequence[Case]) -> int:
    """Start every server of every case once and ask once. The number of those that failed."""
    failed = 0
    for case in cases:
        for name in case.servers:
            try:
                with serving(bench, SERVERS[name], case) as running:
                    verdict = "ok"
                    if case.kind is Kind.ECHO:
                        run_echo(bench, running, case, 1)
            except RunFailed as error:
                failed += 1
                verdict = f"FAILED: {error}"
            print(f"{case.name}  {SERVERS[name].label}: {verdict}", flush=True)
    return failed


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure apphost beside its peers.")
    parser.add_argument("--case", action="append", choices=list(BY_NAME), metavar="NAME", help="only this; may repeat")
    parser.add_argument("--quick", action="store_true", help="only the main cases")
    parser.add_argument("--list", action="store_true", help="show the names of the cases, and exit")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of every server (default 3)")
    parser.add_argument("--seconds", type=positive, default=3, help="measured seconds of each run (default 3)")
    parser.add_argument("--warmup", type=positive, default=1, help="seconds of load before that (default 1)")
    parser.add_argument(
        "--repeats", type=int, default=2, help=f"of a run with more steal than {STOLEN_MAX:.0%}% of a core (default 2)"
    )
    parser.add_argument("--server-core", type=int, help="core of the servers (default: the first allowed)")
    parser.add_argument("--client-core", type=int, help="core of the load (default: the next on other hardware)")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter with the peers, not benchmarks/.peers")
    parser.add_argument("--check", action="store_true", help="start every server of every case and ask once, no load")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="collect samples in FILE; rounds that it has already are not repeated"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="SECONDS",
        help="begin no round that would end later; exit with 3 if some are left",
    )
    parser.add_argument("--write", action="store_true", help="write RESULTS.md and results.svg")
    parser.add_argument("--render", action="store_true", help="measure nothing: the report of what --json holds")
    options = parser.parse_args(arguments)
    if options.render and not options.json:
        parser.error("--render needs --json FILE")
    return options


def interrupted(number: int, _: object) -> NoReturn:
    """TERM and HUP unwind the stack as Ctrl-C does, so that no server is left behind."""
    raise SystemExit(128 + number)


def collect(options: argparse.Namespace, cases: Sequence[Case]) -> tuple[Results, bool]:
    """What was measured, and whether that is all."""
    bench = make_bench(options)
    os.sched_setaffinity(0, {bench.client_core})
    options.commit, options.load = commit(), os.getloadavg()[0]
    facts = gather_facts(bench) | {"seconds": options.seconds, "warmup": options.warmup}
    results = load(options.json, facts) if options.json else Results(facts)
    minutes = sum(estimate(case, options) for case in cases for _ in range(options.rounds)) / 60
    print(f"{len(cases)} cases, {options.rounds} rounds: {minutes:.0f} minutes at most", file=sys.stderr)
    return results, measure(bench, cases, results, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all was measured (wanted or not). 1: a run failed, the report says which. 3: --limit came first."""
    options = parse_options(arguments)
    cases = [
        case for case in CASES if (not options.case or case.name in options.case) and (case.quick or not options.quick)
    ]
    if options.list:
        print("\n".join(f"{case.name:20} {case.title}" for case in cases))
        return 0
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("compare.py needs Linux: it pins processes to cores")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    if options.check:
        return FAILED if check(make_bench(options), cases) else 0
    complete = True
    try:
        if options.render:
            results = load(options.json, {})
        else:
            results, complete = collect(options, cases)
    except Mismatch as error:
        raise SystemExit(str(error)) from error
    if not results.samples:
        raise SystemExit("nothing was measured")
    report = render(results)
    if options.write:
        REPORT.write_text(report)
        CHART.write_text(draw(results))
    else:
        print(report)
    for verdict in (judge(wanted, results) for wanted in WANTED):
        if verdict.missed:
            print(
                f"missed: {verdict.wanted.case}, {verdict.against or 'limit'} {verdict.figure}: {verdict.reached}",
                file=sys.stderr,
            )
    if not complete:
        return NOT_DONE
    return FAILED if any(sample.failure for sample in results.samples) else 0


if __name__ == "__main__":
    sys.exit(main())
