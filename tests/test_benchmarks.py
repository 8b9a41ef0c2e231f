"""The tables of benchmarks/ agree with each other, and readers and writers with the tables. Nothing is started."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import cases
    import chart
    import compare
    import loads
    import openloop
    import report
    import results
    import scale
    from servers import RunFailed
finally:
    sys.path.remove(str(BENCHMARKS))

LINES_MAX, FUNCTION_MAX = 500, 60  # as in the package
FACTS = {
    "cpu": "a <CPU> & more",
    "cores": 2,
    "system": "Linux 6.1",
    "wrk": "wrk 4.1.0",
    "seconds": 3,
    "warmup": 1,
    "server_core": 0,
    "client_core": 1,
    "apphost": {"python": "3.11.7", "packages": {"apphost": "1.0", "h11": "0.16.0"}},
    "peers": {"python": "3.11.7", "packages": {"uvicorn": "1.0", "h11": "0.16.0"}},
}


def sample(case: str, server: str, number: int, value: float | None, **more: object) -> results.Sample:
    key = cases.BY_NAME[case].kind.metrics[0].key
    values = {} if value is None else {key: value}
    failure = "exited with 1 while starting: no" if value is None else None
    fields = {"values": values, "failure": failure} | more
    return results.Sample(case, server, number, f"2030-01-01T00:00:0{number}Z", "abc1234", 0.1, 100.0, 0.01, **fields)


def everything() -> results.Results:
    """Each server of each case in two rounds."""
    samples = [
        sample(case.name, name, number, float(100 * number + position))
        for case in cases.CASES
        for position, name in enumerate(case.servers)
        for number in (1, 2)
    ]
    return results.Results(FACTS, samples)


def of(case: str, *rates: tuple[str, float | None], **more: object) -> results.Results:
    return results.Results(FACTS, [sample(case, server, 1, rate, **more) for server, rate in rates])


# The tables


def test_names_are_unique_and_short() -> None:
    assert len(cases.BY_NAME) == len(cases.CASES)
    assert all(0 < len(server.label) < 32 for server in cases.SERVERS.values())  # what fits beside a bar


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_case_names_what_exists(case: cases.Case) -> None:
    """Its servers, its application; apphost comes first, and nobody is both measured and left out."""
    assert set(case.servers) <= set(cases.SERVERS)
    assert {server for server, _ in case.left_out} <= set(cases.SERVERS) - set(case.servers)
    assert len(set(case.servers)) == len(case.servers) >= 2
    assert cases.SERVERS[case.servers[0]].is_apphost
    module = case.app.partition(":")[0].replace(".", "/")
    assert (BENCHMARKS / case.folder / f"{module}.py").is_file()
    assert (case.message > 0) is (case.kind is cases.Kind.ECHO)


@pytest.mark.parametrize("wanted", cases.WANTED, ids=lambda wanted: f"{wanted.case}-{'-'.join(wanted.against)}")
def test_a_wanted_figure_is_of_servers_that_its_case_measures(wanted: cases.Wanted) -> None:
    case = cases.BY_NAME[wanted.case]
    assert {wanted.ours, *wanted.against} <= set(case.servers)
    assert cases.SERVERS[wanted.ours].is_apphost
    assert wanted.figure > 0


def test_every_server_is_measured() -> None:
    assert {name for case in cases.CASES for name in case.servers} == set(cases.SERVERS)


@pytest.mark.parametrize("server", cases.SERVERS.values(), ids=cases.SERVERS)
def test_a_command_is_complete(server: cases.Server) -> None:
    command = server.command(app="module:app", port=8123, workers=3, tmp="/somewhere")
    assert "module:app" in command
    assert any("8123" in part for part in command)
    assert "3" in command
    assert not any("{" in part for part in command)


def test_no_command_turns_off_what_belongs_in_an_answer() -> None:
    """The same for all: no access log unless it is the case, Date and Server as they come."""
    for name, server in cases.SERVERS.items():
        assert not any(word in server.arguments for word in ("no-date", "no-server", "server-header", "date-header")), (
            name
        )
        assert ("{tmp}/access.log" in server.arguments) is (name == "apphost-log")


def test_all_that_reload_names_its_signal() -> None:
    reloading = [case for case in cases.CASES if case.kind is cases.Kind.RELOAD]
    assert reloading
    assert all(cases.SERVERS[name].reload for case in reloading for name in case.servers)


def test_a_kind_is_measured_and_reported() -> None:
    reported = {kind for _, kinds, _ in report.GROUPS for kind in kinds}
    assert reported == set(cases.Kind)
    assert set(compare.GAUGES) == set(cases.Kind) - {cases.Kind.THROUGHPUT, cases.Kind.ECHO, cases.Kind.LATENCY}
    assert set(chart.CHARTED) <= set(cases.BY_NAME)


def test_the_json_body_is_1_kib_and_comes_back_as_it_was() -> None:
    assert len(cases.JSON_BODY) == 1024
    assert json.dumps(json.loads(cases.JSON_BODY)).encode() == cases.JSON_BODY


def test_files_and_functions_are_short() -> None:
    for path in {*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("apps/*.py")} - {BENCHMARKS / "reload_storm.py"}:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= LINES_MAX, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < FUNCTION_MAX, f"{path.name}: {node.name}"


def test_the_full_set_takes_about_45_minutes_at_most() -> None:
    options = SimpleNamespace(warmup=1, seconds=3)
    assert 3 * sum(compare.estimate(case, options) for case in cases.CASES) < 55 * 60  # the estimate is too high


def test_what_scale_serves_is_there() -> None:
    module, _, name = scale.APP.partition(":")
    assert f"def {name}(" in (scale.APPS / f"{module}.py").read_text()


# What comes from the load


def wrk(**found: object) -> str:
    zeros = dict.fromkeys(("connect", "read", "write", "status", "timeout"), 0)
    return (
        "Running 3s test\n\n" + json.dumps({"requests": 100, "us": 2_000_000, "bytes": 20_000, **zeros, **found}) + "\n"
    )


def test_a_rate_without_errors() -> None:
    assert loads.read_wrk(wrk(), cases.HELLO, 64) == loads.Load({"rate": 50.0})


def test_errors_are_shown_and_do_not_count_as_speed() -> None:
    load = loads.read_wrk(wrk(status=20, read=3), cases.HELLO, 64)
    assert load == loads.Load({"rate": 40.0}, {"status": 20, "read": 3})


@pytest.mark.parametrize("size", [100 * 13 - 1, 10_000_000])
def test_bytes_that_do_not_fit_the_bodies_are_a_failure(size: int) -> None:
    with pytest.raises(RunFailed, match="does not fit"):
        loads.read_wrk(wrk(bytes=size), cases.HELLO, 64)


def test_no_report_of_wrk_is_a_failure() -> None:
    with pytest.raises(RunFailed, match="unable to connect"):
        loads.read_wrk("unable to connect to 127.0.0.1:1 Connection refused\n", cases.HELLO, 64)


def test_a_script_of_wrk() -> None:
    """Text cannot end a string early, and a large body is not written out."""
    script = loads.wrk_script(cases.Request(headers=(("X", 'a"\n'),), body=b"y" * 10_000, pipelined=16))
    assert r'wrk.headers["\088"] = "\097\034\010"' in script
    assert r'wrk.body = string.rep("\121", 10000)' in script
    assert "for i = 1, 16 do" in script
    assert "init" not in loads.wrk_script(cases.HELLO)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (0.9, 1), (0.99, 7), (1.0, 7)])
def test_percentiles_of_bins(share: float, expected: int) -> None:
    bins = array("I", [0, 90, 0, 0, 0, 0, 0, 10])
    assert openloop.percentile(bins, share) == expected


# How samples are read


@pytest.mark.parametrize(
    ("ours", "theirs", "word"), [(115.0, 100.0, "met"), (114.0, 100.0, "missed"), (None, 100.0, "not comparable")]
)
def test_a_verdict(ours: float | None, theirs: float, word: str) -> None:
    found = results.judge(
        cases.Wanted("asgi-hello", ("granian",), 1.15), of("asgi-hello", ("apphost", ours), ("granian", theirs))
    )
    assert found.word == word
    assert found.missed is (word == "missed")


def test_a_verdict_is_about_the_best_of_several() -> None:
    """The highest rate, or the lowest latency."""
    rates = of("asgi-upload-1m", ("apphost", 100.0), ("granian", 50.0), ("uvicorn", 200.0))
    found = results.judge(cases.Wanted("asgi-upload-1m", ("granian", "uvicorn"), 1.0), rates)
    assert (found.against, found.word) == ("uvicorn", "missed")
    latencies = of("latency-half", ("apphost", 1.0), ("granian", 2.0), ("uvicorn", 1.5))
    found = results.judge(cases.Wanted("latency-half", ("granian", "uvicorn"), 1.0), latencies)
    assert (found.against, found.word) == ("uvicorn", "met")


@pytest.mark.parametrize(("python", "figure"), [("3.11.9", 1.15), ("3.12.0", 1.3), ("3.13.1", 1.3)])
def test_newer_pythons_may_have_another_figure(python: str, figure: float) -> None:
    found = of("asgi-hello", ("apphost", 1.0), ("granian", 1.0))
    found.facts = FACTS | {"apphost": {"python": python, "packages": {}}}
    assert results.judge(cases.WANTED[0], found).figure == figure


def test_a_limit_without_a_peer() -> None:
    wanted = cases.Wanted("memory-idle", (), 6.0)
    assert results.judge(wanted, of("memory-idle", ("apphost", 6.0))).word == "met"
    assert results.judge(wanted, of("memory-idle", ("apphost", 6.1))).word == "missed"
    assert results.judge(wanted, of("memory-idle")).word == "not measured"


def test_errors_are_part_of_a_verdict() -> None:
    found = of("asgi-hello", ("apphost", 200.0), ("granian", 100.0), errors={"read": 3})
    assert results.judge(cases.WANTED[0], found).word == "met, with errors"
    assert results.describe_errors(found.samples) == "read 6"


def test_the_ratio_of_medians_with_its_range_by_round() -> None:
    ours = [sample("asgi-hello", "apphost", number, value) for number, value in enumerate((10.0, 30.0, 20.0))]
    theirs = [sample("asgi-hello", "granian", number, value) for number, value in enumerate((10.0, 10.0, 5.0))]
    assert results.ratio(ours, theirs, "rate") == (2.0, 1.0, 4.0)
    assert results.ratio(ours, [], "rate") is None


# Files


def test_a_file_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    results.save(path, everything())
    again = results.load(path, FACTS)
    assert again.samples == everything().samples
    assert again.has_round(cases.CASES[0], 2)
    assert not again.has_round(cases.CASES[0], 3)
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_other_versions_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    results.save(path, everything())
    with pytest.raises(results.Mismatch, match="another seconds: 3, not 5"):
        results.load(path, FACTS | {"seconds": 5})


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"facts": {}, "samples": [{"case": 1}]}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(results.Mismatch, match=r"other\.json"):
        results.load(path, {})


# The report


def test_the_report_has_all_that_was_measured() -> None:
    text = report.render(everything())
    for case in cases.CASES:
        assert f"`{case.name}`" in text
        assert case.title in text
        assert all(f"| {cases.SERVERS[name].label} |" in text for name in case.servers)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|"), line
    assert "results.svg" in text


def test_the_report_says_what_failed_and_what_was_unfair() -> None:
    found = of("asgi-hello", ("apphost", 2.0), ("granian", None), busy=0.95)
    found.facts = FACTS | {"peers": {"python": "3.12.0", "packages": {"h11": "0.14.0"}}}
    text = report.render(found)
    assert "1 of 1 runs failed" in text
    assert "ASGI hello, granian, round 1: exited with 1 while starting: no" in text
    assert "different versions of h11 (0.16.0, 0.14.0)" in text
    assert "apphost runs on Python 3.11.7, its peers on 3.12.0" in text
    assert "used up to 95% of its core" in text
    assert "not comparable" in text


def test_the_report_warns_of_few_rounds_and_of_a_machine_that_is_not_there() -> None:
    found = everything()
    assert "**Preliminary: a case has 2 of at least 3 rounds.**" in report.render(found)
    third = [dataclasses.replace(each, round=3) for each in found.samples if each.round == 1]
    enough = results.Results(FACTS, found.samples + third)
    assert "Preliminary" not in report.render(enough)
    enough.samples = [dataclasses.replace(each, stolen=0.3) for each in enough.samples]
    assert "the hypervisor took more than 10% of a core" in report.render(enough)


def stories(monkeypatch: pytest.MonkeyPatch, *runs: results.Sample) -> results.Sample:
    """What counts when a server is measured with these outcomes, one after another."""
    left = list(runs)
    monkeypatch.setattr(compare, "measure_one", lambda *_: left.pop(0))
    found = compare.settled(None, cases.CASES[0], 1, "apphost", SimpleNamespace(repeats=2), None)
    assert found.repeated == len(runs) - len(left) - 1
    return found


def test_a_run_of_which_too_much_was_stolen_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to twice; then the least counts. Errors of all are kept, and a failure is not repeated away."""
    quiet = sample("asgi-hello", "apphost", 1, 5.0, errors={"read": 1})
    noisy = dataclasses.replace(quiet, stolen=0.5, values={"rate": 9.0})
    less = dataclasses.replace(quiet, stolen=0.2, values={"rate": 7.0})
    failed = sample("asgi-hello", "apphost", 1, None)
    assert stories(monkeypatch, quiet, noisy).values == {"rate": 5.0}
    second = stories(monkeypatch, noisy, quiet)
    assert (second.values, second.errors) == ({"rate": 5.0}, {"read": 2})
    assert stories(monkeypatch, noisy, less, noisy).values == {"rate": 7.0}
    assert stories(monkeypatch, noisy, failed).failure


def test_the_chart_is_well_formed_and_has_a_bar_for_each_number() -> None:
    root = ElementTree.fromstring(chart.draw(everything()))
    namespace = "{http://www.w3.org/2000/svg}"
    bars = [each for each in root.iter(f"{namespace}rect") if each.get("class") in ("ours", "peer")]
    assert len(bars) == sum(len(cases.BY_NAME[name].servers) for name in chart.CHARTED)
    assert all(0 < float(bar.get("width", "0")) <= chart.WIDTH / 2 for bar in bars)
    words = [each.text for each in root.iter(f"{namespace}text")]
    assert "ASGI hello" in words
    assert any("a <CPU> & more" in (word or "") for word in words)


def test_a_chart_of_little() -> None:
    assert "ASGI hello" in chart.draw(of("asgi-hello", ("apphost", 2.0), ("granian", None)))


def test_the_help_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare.parse_options(["--help"])
    assert end.value.code == 0
    assert "--json FILE" in capsys.readouterr().out
