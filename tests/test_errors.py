"""Exit codes, near misses, and tracebacks that show the user's code and not ours."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import pytest

from apphost import errors
from apphost.errors import TRACEBACK_MAX, ApphostError, ExitCode, nearest, user_traceback
from apphost.worker.loading import load_application
from tests.support import OWN_CODE, write_app


def test_exit_codes() -> None:
    """Tools rely on them: a change is a break. Below 64, so no signal's 128 + n and none of sysexits.h."""
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0, "INTERNAL": 1, "USAGE": 2, "APPLICATION": 3, "ADDRESS": 4, "RUNNING": 5, "PRIVILEGES": 6,
        "UNREACHABLE": 7, "GIVEN_UP": 8, "SUPERSEDED": 9, "GONE": 10, "TIMED_OUT": 11,
    }  # fmt: skip


def test_every_error_has_a_code_of_its_own() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ApphostError)]
    codes = [each.exit_code for each in classes]
    assert len(set(codes)) == len(classes) == 11
    assert ApphostError("x").exit_code is ExitCode.INTERNAL
    error = errors.SettingsError("a message", "a detail")
    assert (error.message, error.detail, str(error)) == ("a message", "a detail", "a message")


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("wrokers", ["threads", "workers"], " Did you mean 'workers'?"),
        ("ap", ["app", "apply"], " Did you mean 'app'?"),
        ("xyz", ["workers"], ""),
        ("", ["workers"], ""),
        ("x", [], ""),
    ],
)
def test_nearest(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known) == expected
    assert nearest(name, iter(known)) == expected


def caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """The traceback of a module with this source, imported by us."""
    name = f"broken_{tmp_path.name}"
    write_app(tmp_path, name, source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ApphostError) as info:
        load_application(name, False)
    sys.modules.pop(name, None)
    return info.value.detail


def test_only_frames_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = caught(tmp_path, monkeypatch, "def deep():\n    raise LookupError('deep')\n\n\ndeep()\n")
    assert text.startswith("Traceback (most recent call last):\n")
    assert text.endswith("LookupError: deep")
    assert text.count("  File ") == 2
    assert str(OWN_CODE) not in text
    assert "importlib" not in text


def test_also_of_a_cause_and_a_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "try:\n    import not_there_at_all\nexcept ImportError as exc:\n"
        "    try:\n        {}['x']\n    except KeyError:\n        raise ValueError('end') from exc\n"
    )
    text = caught(tmp_path, monkeypatch, source)
    assert "ModuleNotFoundError: No module named 'not_there_at_all'" in text
    assert "ValueError: end" in text
    assert "direct cause" in text
    assert str(OWN_CODE) not in text


def test_syntax_error_shows_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = caught(tmp_path, monkeypatch, "x = 1\ny = (\n")
    assert "line 2" in text
    assert "y = (" in text


def test_frames_of_ours_below_the_user_stay() -> None:
    """There the user called us, and that is part of the story."""

    def user() -> None:
        load_application("json:nothing_of_this_name", False)

    try:
        user()
    except ApphostError as exc:
        text = user_traceback(exc)
    assert "in user" in text
    assert "loading.py" in text


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert "first" in user_traceback(first)


def test_the_exception_itself_is_left_alone() -> None:
    """Others may still want its whole traceback, the debugger of a framework for one."""
    with pytest.raises(ApphostError) as info:
        load_application("json:nothing_of_this_name", False)
    before = traceback.format_exception(info.value)
    user_traceback(info.value)
    assert traceback.format_exception(info.value) == before


def test_an_exception_that_cannot_be_told() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "Bad" in user_traceback(Bad())


def wrapped(depth: int) -> BaseException:
    """A chain of so many causes, as of a parser that wraps its errors at each level."""
    error: BaseException = ValueError("the first")
    for number in range(depth):
        cause, error = error, RuntimeError(f"number {number}")
        error.__cause__ = cause
    return error


def test_a_chain_of_causes_that_is_longer_than_the_stack_is_deep() -> None:
    text = user_traceback(wrapped(5000))
    assert len(text) < TRACEBACK_MAX + 100
    assert text.startswith("ValueError: the first\n")
    assert "characters are left out here" in text
    assert text.endswith("RuntimeError: number 4999")


def test_a_long_text() -> None:
    text = user_traceback(ValueError("x" * 10 * TRACEBACK_MAX))
    assert (text[:13], text[-10:]) == ("ValueError: x", "x" * 10)
    assert len(text) < TRACEBACK_MAX + 100


def test_an_exception_that_traceback_cannot_show() -> None:
    """A `SyntaxError` made by hand: its last part should be the line, as text."""

    def user() -> None:
        raise SyntaxError("odd", ("file", 1, 1, b"no text"))

    try:
        user()
    except SyntaxError as exc:
        text = user_traceback(exc)
    assert "in user" in text
    assert "SyntaxError" in text
