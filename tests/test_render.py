"""What the commands show: it fits 100 columns, whatever the numbers, and steers no terminal."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.operate import render


def worker(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "worker": number, "generation": 1, "pid": 4711, "state": "ready", "age": 20.0, "serving": 10.0,
        "requests": 500, "errors": 0, "in_progress": 1, "connections": 3, "oldest": None, "rss": 81 << 20, "cpu": 2.0,
        "code": {"hash": "e6f3b65d0011", "files": 3, "directory": "/srv"}, "reason": None, **changes,
    }  # fmt: skip


def status(*workers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "app": "shop:app", "what": "serving, all is well", "good": 3, "target": 3, "pid": 4711, "uptime": 7300.0,
        "version": "0.1.0", "python": "3.13.1", "listening": ["http://127.0.0.1:8000"], "workers": list(workers),
        "given_up": None, "canary_left": None, "pause_left": None, "stop_in": None, "reload_waits": False,
        "replaced": {}, "ends": [], "settings": {}, **changes,
    }  # fmt: skip


def shown(*workers: dict[str, Any], **changes: Any) -> str:
    found = status(*workers, **changes)
    return render.headline(found) + "\n" + render.status_text(found, {4711: 43 << 20}, 100.0, {})


def test_status() -> None:
    assert shown(worker(1), worker(12, oldest={"seconds": 12.34, "request": "GET /report"})) == (
        "shop:app: serving, all is well\n"
        "generation 3, pid 4711, up 2h, apphost 0.1.0 on Python 3.13.1, listening at http://127.0.0.1:8000\n"
        "\n"
        "worker  gen  state   pid  age  requests  req/s  busy  oldest  conns  RSS  PSS  CPU  code\n"
        "     1    1  ready  4711  20s       500   50.0     1       -      3  81M  43M  10%  e6f3b65d\n"
        "    12    1  ready  4711  20s       500   50.0     1     12s      3  81M  43M  10%  e6f3b65d\n"
        "\n"
        "worker 12 has been at GET /report for 12s\n"
        "code e6f3b65d (generation 1): /srv, own modules: 3"
    )


def test_answers_with_5xx_have_a_column_when_there_are_any() -> None:
    heads, healthy, failing = shown(worker(1), worker(2, errors=41)).splitlines()[3:6]
    assert heads.split()[5:7] == ["requests", "5xx"]
    assert (healthy.split()[6], failing.split()[6]) == ("-", "41")


def test_rates_since_the_sample_before() -> None:
    found = status(worker(1))
    text = render.status_text(found, {}, 100.0, {1: (98.0, 100, 1.0)})
    row = text.splitlines()[3].split()
    assert (row[6], row[-2]) == ("200", "50%")
    assert render.sample(worker(1), 5.0) == (5.0, 500, 2.0)


def test_what_the_system_does_not_tell_is_left_out() -> None:
    text = render.status_text(status(worker(1, rss=None, cpu=None)), {}, 1.0, {})
    assert "RSS" not in text
    assert "PSS" not in text
    assert "CPU" not in text


def test_what_is_remarkable() -> None:
    text = shown(
        worker(1, state="draining", drain_left=12.0, reason="reload"),
        worker(2, state="booting", boot_left=43.0, serving=None, code={}),
        worker(3, silent=5.5, code={"hash": "another", "files": 1, "directory": "/srv", "commit": "f" * 40}),
        given_up={"at": time.time(), "text": "generation 4 given up: it raised"},
        canary_left=3.0, pause_left=0.4, stop_in=2.0, reload_waits=True, replaced={"crashed": 1, "reload": 4},
        ends=[{"at": 0, "why": "reload", "text": "not shown"}, {"at": 0, "why": "crashed", "text": "worker 9 gone"}],
        settings={"app": "shop:app", "bind": ["a:1", "b:2"], "umask": 18, "unknown": 5, "keep_alive": 5.0},
    )  # fmt: skip
    for line in (
        "worker 1 drains (reload), 12s are left",
        "worker 2 boots, 43s are left of boot_timeout",
        "worker 3 has not answered for 5.5s: `apphost stacks 3` shows why",
        "generation 4 given up: it raised",
        "generation 3 is on probation for another 3.0s",
        "the next worker is started in 0.4s, since those before it ended early",
        "the stop begins in 2.0s",
        "another reload is asked for and waits for its turn",
        "the workers of generation 1 run different code: files were changed without a reload",
        "commit ffffffffffff,",
        "ended workers: 1 crashed, 4 reload",
        "1970-01-01",
        "worker 9 gone",
        "settings: bind = a:1,b:2, umask = 022, unknown = 5, keep_alive = 5 s",
    ):
        assert line in text
    assert "not shown" not in text


numbers = st.integers(0, 10**9)
seconds = st.floats(0, 1e9)


@given(
    st.lists(
        st.builds(
            worker, st.integers(1, 9999), generation=st.integers(1, 9999), pid=st.integers(1, 4194304), age=seconds,
            serving=seconds, requests=numbers, in_progress=st.integers(0, 9999), connections=st.integers(0, 99999),
            state=st.sampled_from(["booting", "ready", "draining"]), rss=st.integers(0, 2**38), cpu=st.floats(0, 1e6),
            oldest=st.none() | st.fixed_dictionaries({"seconds": st.floats(0, 1e6), "request": st.text(max_size=200)}),
        ),
        max_size=4,
    ),
    st.text(max_size=300),
)  # fmt: skip
def test_it_fits_and_is_printable(workers: list[dict[str, Any]], text: str) -> None:
    found = status(*workers, given_up={"at": text, "text": text}, settings={"proc_name": text})
    out = render.status_text(found, {each["pid"]: each["rss"] for each in workers}, 1.0, {})
    lines = out.split("\n")
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) <= render.WIDTH


@pytest.mark.parametrize(
    "line",
    [
        {"event": "gone", "at": 1.0, "worker": 1, "generation": 2, "text": "gone\x1b[2J", "detail": "a\n\x1b]0;x\x07"},
        {"event": "draining", "text": "\x9b31m"},
        {"event": "new\r", "text": "\x00"},
    ],
)
def test_progress_steers_no_terminal(line: dict[str, Any]) -> None:
    text = render.progress_text(line)
    assert text
    assert all(each.isprintable() for each in text.split("\n"))


def test_progress() -> None:
    assert render.progress_text({"event": "ready", "at": 0, "worker": 3, "generation": 2}).endswith(
        "worker 3 gen 2 ready"
    )
    assert render.progress_text({"outcome": "complete", "done": True}) == ""
    assert render.progress_text({"event": "complete", "text": "said by the outcome"}) == ""


def test_connections() -> None:
    row = {"peer": "unix", "protocol": "http/1.1", "state": "waiting", "age": 3.0, "requests": 2, "received": None}
    row |= {"sent": None, "movable": True}
    text = render.connections_text([
        {"worker": 1, "connections": [row, {**row, "movable": False, "why": "TLS", "request": "GET /\x1b" + "x" * 99}]},
        {"worker": 2, "error": "no answer"},
        {"worker": 3, "connections": [], "left_out": 7},
    ])  # fmt: skip
    lines = text.splitlines()
    assert lines[0].split() == ["worker", "peer", "protocol", "state", "age", "requests", "moves", "request"]
    assert lines[-2:] == ["worker 2: no answer", "worker 3: 7 more connections were left out"]
    assert all(len(line) <= render.WIDTH and line.isprintable() for line in lines)
    assert render.connections_text([]) == "no connections"


def test_stacks() -> None:
    who = {"worker": 1, "generation": 2, "pid": 3}
    assert render.stacks_text({**who, "stacks": ["a", "b\x1b"]}) == "worker 1 gen 2, pid 3\n    a\n    b\\x1b"
    assert render.stacks_text({**who, "error": "gone"}) == "worker 1 gen 2, pid 3: gone"
    assert "it has written nothing" in render.stacks_text({**who, "stacks": [], "silent": "no answer"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (59.6, "60s"),
        (99, "99s"),
        (100, "2m"),
        (7200, "2h"),
        (200000, "2d"),
        (1e9, "11574d"),
    ],
)
def test_duration(value: float | None, text: str) -> None:
    assert render.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (999, "999"), (1000, "1K"), (81 << 20, "81M"), (1288490189, "1.2G")]
)
def test_size(value: int | None, text: str) -> None:
    assert render.size(value) == text
