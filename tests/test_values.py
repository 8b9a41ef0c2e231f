"""Reading, checking and showing one value: tables of texts and TOML values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import values
from apphost.values import KINDS, Setting


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("30s", 30.0),
        ("30 s", 30.0),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("500ms", 0.5),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1.5H", 5400.0),
        ("1d", 86400.0),
        (" 7 ", 7.0),
        ("0", 0.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert values.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "nan", "inf", "-1", "+1", "1e3", "1 min", "1h30m", "1_0", "0x10", "٣", "1,5"]
)
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        values.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8190", 8190),
        ("8190b", 8190),
        ("64k", 65536),
        ("64K", 65536),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("1m", 1048576),
        ("1MiB", 1048576),
        ("2g", 2147483648),
        ("1GiB", 1073741824),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "1.5m", "-1", "1kB", "1MB", "nan", "1_000", "1e6", "9" * 5000, "٣"])
def test_no_sizes_and_no_ambiguous_units(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        values.parse_size(text)


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "YES", " on "])
def test_true(text: str) -> None:
    assert values.parse_bool(text) is True


@pytest.mark.parametrize("text", ["false", "FALSE", "0", "no", "off"])
def test_false(text: str) -> None:
    assert values.parse_bool(text) is False


@pytest.mark.parametrize("text", ["", "2", "y", "enable", "None"])
def test_no_bool(text: str) -> None:
    with pytest.raises(ValueError, match="not a switch"):
        values.parse_bool(text)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("-3", -3), (" 12 ", 12), ("007", 7)])
def test_integers(text: str, number: int) -> None:
    assert values.parse_int(text) == number


@pytest.mark.parametrize("text", ["", "1_000", "1.0", "0x10", "٣", "1e3", "9" * 5000])
def test_no_integers(text: str) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        values.parse_int(text)


@pytest.mark.parametrize(("text", "mask"), [("022", 0o22), ("0o027", 0o27), ("0", 0), ("777", 0o777)])
def test_octal(text: str, mask: int) -> None:
    assert values.parse_octal(text) == mask


@pytest.mark.parametrize("text", ["", "088", "0x22", "-022", "0b1"])
def test_no_octal(text: str) -> None:
    with pytest.raises(ValueError, match="not an octal number"):
        values.parse_octal(text)


def make(kind: tuple[str, str], default: object, **about: object) -> Setting:
    return Setting(name="it", default=default, kind=KINDS[kind], heading="H", does="D.", unit=kind[1], **about)


FLAG = make(("bool", ""), False)
COUNT = make(("int", ""), 1, low=1, high=9, words={"auto": lambda: 5})
SIZE = make(("int", "bytes"), 1, low=0)
WAIT = make(("float", "s"), 1.0, low=0, high=100.0)
MASK = make(("int | None", ""), None, low=0, high=0o777)
NAMES = make(("tuple[str, ...]", ""), (), separator=",")
WORD = make(("str", ""), "")
CHOICE = make(("str", ""), "on", choices=("on", "off"))


@pytest.mark.parametrize(
    ("this", "toml", "value"),
    [
        (FLAG, True, True),
        (COUNT, 3, 3),
        (COUNT, "auto", 5),
        (SIZE, 100, 100),
        (SIZE, "1k", 1024),
        (WAIT, 2, 2.0),
        (WAIT, 2.5, 2.5),
        (WAIT, "500ms", 0.5),
        (MASK, "022", 0o22),
        (NAMES, ["a", "b,c"], ("a", "b,c")),
        (NAMES, "a, b,,c", ("a", "b", "c")),
        (NAMES, [], ()),
        (WORD, "x y", "x y"),
        (CHOICE, "off", "off"),
    ],
)
def test_toml_values(this: Setting, toml: object, value: object) -> None:
    read = this.convert(toml, typed=True)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("this", "toml", "expected"),
    [
        (FLAG, 1, "expected true or false, not an integer"),
        (FLAG, "true", "expected true or false, not a string"),
        (COUNT, True, "expected a whole number from 1 to 9, or auto, not a boolean"),
        (COUNT, "3", "expected a whole number from 1 to 9, or auto, not a string"),
        (COUNT, 3.0, "expected a whole number from 1 to 9, or auto, not a float"),
        (COUNT, 10, "expected a whole number from 1 to 9, or auto"),
        (COUNT, 10**400, "expected a whole number from 1 to 9, or auto"),
        (SIZE, 1.5, "expected a size in bytes, or such as 64k or 1MiB, of at least 0, not a float"),
        (SIZE, -1, "expected a size in bytes, or such as 64k or 1MiB, of at least 0"),
        (WAIT, True, "expected a duration in seconds, or such as 500ms or 2m, from 0 to 100, not a boolean"),
        (WAIT, math.nan, "expected a duration in seconds, or such as 500ms or 2m, from 0 to 100"),
        (WAIT, math.inf, "expected a duration in seconds, or such as 500ms or 2m, from 0 to 100"),
        (WAIT, 10**400, "expected a duration in seconds, or such as 500ms or 2m, from 0 to 100"),
        (WAIT, "-1", "expected a duration in seconds, or such as 500ms or 2m, from 0 to 100"),
        (MASK, 22, "expected an octal text such as 022 from 000 to 777, not an integer"),
        (MASK, "1000", "expected an octal text such as 022 from 000 to 777"),
        (NAMES, {"a": 1}, "expected text, or a list of texts separated by ',', not a table"),
        (NAMES, ["a", 1], "expected text, or a list of texts separated by ','"),
        (WORD, ["a"], "expected text, not an array"),
        (WORD, "a\0b", "expected text"),
        (CHOICE, "of", "expected one of on, off. Did you mean 'off'?"),
        (CHOICE, "x", "expected one of on, off"),
    ],
)
def test_wrong_toml_values(this: Setting, toml: object, expected: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        this.convert(toml, typed=True)
    assert str(caught.value) == expected


@pytest.mark.parametrize("this", [FLAG, COUNT, SIZE, WAIT, MASK], ids=lambda this: this.kind.noun)
def test_text_that_is_no_value(this: Setting) -> None:
    for text in ("", "nonsense", "nan", "inf", "-inf", "9" * 5000):
        with pytest.raises(ValueError, match="expected"):
            this.convert(text, typed=False)


def test_choices_may_come_from_installed_packages() -> None:
    this = make(("str", ""), "auto", choices=("auto",), plugins="console_scripts")
    known = values.entry_point_names("console_scripts")
    assert "pytest" in known
    assert this.convert("pytest", typed=True) == "pytest"
    with pytest.raises(ValueError, match=r"one of auto, or the name of an entry point in console_scripts.*'pytest'\?"):
        this.convert("pytestt", typed=True)


def test_how_the_command_line_spells_a_setting() -> None:
    assert make(("int", ""), 1, short="-i").spellings == ("-i", "--it")
    assert make(("str", ""), "", argument="APP").spellings == ("APP",)
    assert FLAG.spellings == ("--it", "--no-it")


@pytest.mark.parametrize(
    ("this", "value", "shown"),
    [
        (FLAG, True, "true"),
        (COUNT, 3, "3"),
        (SIZE, 100, "100 bytes"),
        (WAIT, 75.0, "75 s"),
        (WAIT, 0.25, "0.25 s"),
        (MASK, None, ""),
        (MASK, 0o22, "022"),
        (NAMES, ("a", "b"), "a,b"),
        (NAMES, (), ""),
        (WORD, "x", "x"),
    ],
)
def test_shown(this: Setting, value: object, shown: str) -> None:
    assert this.show(value) == shown


@given(st.floats(min_value=0.001, max_value=100))
def test_a_shown_duration_reads_back(seconds: float) -> None:
    text = WAIT.show(seconds)
    assert "e" in text or WAIT.convert(text, typed=False) == seconds


@given(st.text(), st.sampled_from([FLAG, COUNT, SIZE, WAIT, MASK, NAMES, WORD, CHOICE]), st.booleans())
def test_any_text_is_a_value_or_a_value_error(text: str, this: Setting, typed: bool) -> None:
    value, problem = None, ""
    try:
        value = this.convert(text, typed=typed)
    except ValueError as exc:
        problem = str(exc)
    assert not problem or problem.startswith("expected ")
    if isinstance(value, (int, float)) and this.low is not None:
        assert this.low <= value <= (math.inf if this.high is None else this.high)
