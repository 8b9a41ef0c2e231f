"""A service of the arbiter that has a defect: it is logged with its traceback, and nothing else happens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apphost.arbiter.services import guarded
from apphost.logs import Log


class Divider:
    title = "dividing service"

    def __init__(self, log: Log) -> None:
        self.log = log
        self.results: list[int] = []
        self.settled: list[bool] = []

    def settle(self, failed: bool) -> None:
        self.settled.append(failed)

    @guarded
    def divide(self, value: int, by: int) -> None:
        self.results.append(value // by)

    @guarded
    def leave(self) -> None:
        raise SystemExit(3)


def test_a_defect_is_logged_and_the_arbiter_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    service = Divider(Log("info", "text", os.open(path, os.O_WRONLY | os.O_CREAT)))
    service.divide(6, 2)
    assert (service.results, service.settled, path.read_text()) == ([3], [False], "")
    service.divide(6, 0)
    assert (service.results, service.settled) == ([3], [False, True])
    said = path.read_text()
    assert "error internal error in the dividing service; it goes on\n" in said
    assert said.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    service.divide(6, 3)
    assert service.results == [3, 2]


def test_what_ends_a_process_is_no_defect(tmp_path: Path) -> None:
    service = Divider(Log("info", "text", os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)))
    with pytest.raises(SystemExit):
        service.leave()
