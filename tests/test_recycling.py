"""When a worker has served enough."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.settings import Settings
from apphost.worker import recycling
from apphost.worker.recycling import Recycling, resident_bytes

DRAWS = 300


def test_by_default_no_worker_is_recycled() -> None:
    this = Recycling(Settings(), now=5.0)
    assert this.requests == -1
    assert this.due(10**9, now=10.0**9) == ""


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_max_requests_is_reached_and_not_before(limit: int, below: int) -> None:
    this = Recycling(Settings(max_requests=limit), now=0.0)
    assert this.requests == limit
    assert this.due(max(0, limit - 1 - below), now=1e9) == ""
    assert this.due(limit, now=0.0) == f"max_requests: {limit} requests served"


def test_more_requests_than_the_limit_count_too() -> None:
    """They are counted by the connection, and asked about when it finds time."""
    assert Recycling(Settings(max_requests=10), 0.0).due(17, 0.0) == "max_requests: 17 requests served"


@given(st.floats(0.01, 1e5), st.floats(-1e6, 1e6))
def test_max_lifetime_counts_from_the_start(lifetime: float, start: float) -> None:
    this = Recycling(Settings(max_lifetime=lifetime), now=start)
    assert this.requests == -1
    assert this.due(10**6, now=start) == ""
    assert this.due(0, now=start + lifetime * 0.99) == ""
    assert this.due(0, now=start + lifetime) == "max_lifetime: it is old enough"


@given(st.sampled_from(["requests", "lifetime"]))
def test_it_tells_once(limit: str) -> None:
    settings = Settings(max_requests=1) if limit == "requests" else Settings(max_lifetime=1.0)
    this = Recycling(settings, now=0.0)
    assert this.due(1, now=1.0).startswith(f"max_{limit}")
    for later in range(5):
        assert this.due(1 + later, now=1.0 + later) == ""


def test_the_jitter_of_requests_stays_within_its_bounds() -> None:
    settings = Settings(max_requests=100, max_requests_jitter=9)
    drawn = {Recycling(settings, 0.0).requests for _ in range(DRAWS)}
    assert drawn == set(range(100, 110)), "every value, and both ends"


def test_the_jitter_of_lifetimes_stays_within_its_bounds() -> None:
    settings = Settings(max_lifetime=10.0, max_lifetime_jitter=4.0)
    early = late = 0
    for _ in range(DRAWS):
        this = Recycling(settings, now=100.0)
        assert this.due(0, now=109.999) == ""
        early += bool(this.due(0, now=112.0))
        late += bool(this.due(0, now=114.0))
    assert early + late == DRAWS, "at the latest after both"
    assert early > DRAWS // 5
    assert late > DRAWS // 5


def test_a_limit_is_drawn_once() -> None:
    this = Recycling(Settings(max_requests=100, max_requests_jitter=1000), 0.0)
    limit = this.requests
    assert [this.due(limit - 1, float(n)) for n in range(50)] == [""] * 50
    assert this.requests == limit
    assert this.due(limit, 51.0)


def test_jitter_alone_is_no_limit() -> None:
    this = Recycling(Settings(max_requests_jitter=5, max_lifetime_jitter=5.0), 0.0)
    assert this.due(10**9, 1e9) == ""


# ------------------------------------------------------------------------------------------------- memory


MIB = 1 << 20


class Memory:
    """What the process has, in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: int) -> None:
        self.now = now
        monkeypatch.setattr(recycling, "resident_bytes", lambda: self.now * MIB)


def test_more_memory_than_max_rss(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 60)
    this = Recycling(Settings(max_rss=100 * MIB), 0.0)
    assert this.warning == ""
    memory.now = 100
    assert this.due(0, 0.0) == ""
    memory.now = 101
    assert this.due(0, 0.0) == "max_rss: 101 MiB of memory, 100 MiB are allowed"
    memory.now = 200
    assert this.due(0, 1.0) == ""


def test_a_worker_that_begins_with_max_rss_is_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 100)
    this = Recycling(Settings(max_rss=100 * MIB), 0.0)
    assert (this.warning, this.due(0, 0.0)) == ("", "")
    memory.now = 101
    assert this.due(0, 0.0)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_who_begins_with_more_than_max_rss_may_grow_by_half(allowed: int, more: int) -> None:
    """Else its successor, which would begin with as much, had to go at once too, and so on."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        memory = Memory(monkeypatch, allowed + more)
        this = Recycling(Settings(max_rss=allowed * MIB), 0.0)
        limit = (allowed + more) * 3 // 2
        assert f"{allowed} MiB are allowed, and the application has taken {allowed + more} MiB" in this.warning
        assert this.warning.endswith(f"it is replaced when it has {limit} MiB")
        memory.now = limit
        assert this.due(0, 1e9) == ""
        memory.now = limit + 1
        assert this.due(0, 1e9) == f"max_rss: {limit + 1} MiB of memory, {limit} MiB are allowed"


def test_max_rss_is_about_the_memory_of_this_process() -> None:
    assert Recycling(Settings(max_rss=1), 0.0).warning
    this = Recycling(Settings(max_rss=2**50), 0.0)
    assert (this.warning, this.due(0, 0.0)) == ("", "")


def test_memory_is_looked_at_only_where_it_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a read of a file, on every tick of every worker."""
    monkeypatch.setattr(recycling, "resident_bytes", lambda: pytest.fail("nobody asked for it"))
    this = Recycling(Settings(max_requests=5), 0.0)
    assert (this.warning, this.due(1, 0.0)) == ("", "")


def test_the_resident_size_is_the_one_of_this_process() -> None:
    before = resident_bytes()
    assert 2**20 < before < 2**40
    if not os.path.exists("/proc/self/statm"):
        pytest.skip(f"{sys.platform} tells the peak only")
    ballast = b"x" * (64 << 20)
    assert resident_bytes() >= before + (56 << 20)
    del ballast
    assert resident_bytes() < before + (56 << 20), "and not the largest it ever was"
