"""`log_config`: what is read, and the handlers that apphost's own lines go to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from apphost.errors import SettingsError
from apphost.worker.logconfig import Relay, read


class Recorder(logging.Handler):
    def __init__(self, level: int = logging.NOTSET, fails: bool = False) -> None:
        super().__init__(level)
        self.said: list[str] = []
        self.errors = 0
        self.fails = fails

    def emit(self, record: logging.LogRecord) -> None:
        if self.fails:
            raise OSError("on purpose")
        self.said.append(f"{record.levelname} {record.getMessage()}")

    def handleError(self, record: logging.LogRecord) -> None:
        self.errors += 1


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """A logger and the one below it, of nobody else."""
    parent, child = logging.getLogger("relay-test"), logging.getLogger("relay-test.access")
    parent.propagate = False
    yield parent, child
    for logger in (parent, child):
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.disabled = False


def test_relay(loggers: tuple[logging.Logger, logging.Logger]) -> None:
    """To the handlers of the logger and of those above it, by their levels, and none where propagation ends."""
    parent, child = loggers
    mine, above, choosy = Recorder(), Recorder(), Recorder(logging.ERROR)
    child.addHandler(mine)
    parent.addHandler(above)
    parent.addHandler(choosy)
    parent.setLevel(logging.INFO)
    relay = Relay("relay-test.access")
    relay.write(["one 100%", "two"])
    relay.say("debug", "not wanted", "")
    relay.say("error", "bad", "detail")
    assert mine.said == above.said == ["INFO one 100%", "INFO two", "ERROR bad\ndetail"]
    assert choosy.said == ["ERROR bad\ndetail"]


def test_relay_goes_on_after_another_configuration(loggers: tuple[logging.Logger, logging.Logger]) -> None:
    """One that takes handlers off and disables loggers."""
    _, child = loggers
    handler = Recorder()
    child.addHandler(handler)
    child.setLevel(logging.INFO)
    relay = Relay("relay-test.access")
    child.handlers.clear()
    child.disabled = True
    relay.write(["still there"])
    assert handler.said == ["INFO still there"]


def test_a_handler_that_fails_takes_no_line_from_others(loggers: tuple[logging.Logger, logging.Logger]) -> None:
    _, child = loggers
    child.setLevel(logging.INFO)
    bad, good = Recorder(fails=True), Recorder()
    child.addHandler(bad)
    child.addHandler(good)
    Relay("relay-test.access").write(["one", "two"])
    assert bad.errors == 2
    assert good.said == ["INFO one", "INFO two"]


def test_read(tmp_path: Path) -> None:
    """By the ending, relative to the directory of the application."""
    (tmp_path / "a.toml").write_text("version = 1\n[root]\nlevel = 'INFO'\n")
    (tmp_path / "b.conf").write_text('{"version": 1, "root": {"level": "INFO"}}')
    assert read("a.toml", str(tmp_path)) == read(str(tmp_path / "b.conf"), "/") == {
        "version": 1, "root": {"level": "INFO"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [("a.toml", b"x", "a.toml is not valid TOML"), ("a.json", b"[" * 100000, "a.json is not valid JSON"),
     ("a.json", b"\xff", "not UTF-8"), ("a.json", b"1", "must be an object"), ("", None, "cannot read")],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, name: str, data: bytes | None, why: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SettingsError, match=why):
        read(name, str(tmp_path))
