"""One setting described as data, and how its value is read from text or TOML, checked and shown.

The command line and the environment have text: `30`, `500ms`, `64KiB`, `yes`. A settings file has types, and a value of
the wrong type is an error, not a guess. Nothing here knows which settings exist, nor where a value came from: a bad one
is a ValueError that says what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apphost.errors import nearest

if TYPE_CHECKING:
    import ipaddress

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *(ms|s|m|h|d|)", re.ASCII)
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d{1,20}) *(b|k|kib|m|mib|g|gib|)", re.ASCII)
_BYTES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_BOOLS = {**dict.fromkeys(("true", "1", "yes", "on"), True), **dict.fromkeys(("false", "0", "no", "off"), False)}
_TOML_NAMES = {bool: "a boolean", int: "an integer", str: "a string", list: "an array", dict: "a table"}


def parse_duration(text: str) -> float:
    """Seconds of `30`, `1.5`, `500ms`, `30s`, `2m`, `1h`, `1d`. ValueError for anything else, also `nan` and `-1`."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"not a duration: {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def parse_size(text: str) -> int:
    """Bytes of `8190`, `64k`, `64KiB`, `1m`, `1GiB`; every unit is a power of 1024. ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(match[1]) * _BYTES[match[2][:1]]


def parse_bool(text: str) -> bool:
    """true, yes, on, 1 or false, no, off, 0, in any case. ValueError for anything else."""
    try:
        return _BOOLS[text.strip().lower()]
    except KeyError:
        raise ValueError(f"not a switch: {text!r}") from None


def parse_int(text: str) -> int:
    """A decimal integer; `int()` alone would take `1_000` and other scripts' digits. ValueError for anything else."""
    if not re.fullmatch(r" *[+-]?\d{1,20} *", text, re.ASCII):
        raise ValueError(f"not a whole number: {text!r}")
    return int(text)


def parse_octal(text: str) -> int:
    """A file mode mask such as `022` or `0o22`. ValueError for anything else."""
    match = re.fullmatch(r" *(?:0o)?([0-7]+) *", text, re.ASCII)
    if match is None:
        raise ValueError(f"not an octal number: {text!r}")
    return int(match[1], 8)


def parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The network of `10.0.0.0/8`, `2001:db8::/32` or of a single address. What is mapped from IPv4 into IPv6 is IPv4.
    ValueError for anything else, also for a network with bits set behind its prefix."""
    import ipaddress  # an arbiter that trusts nobody does not need it

    if "%" in text:
        raise ValueError(f"{text!r} names an interface, which only this machine knows")
    network = ipaddress.ip_network(text.removeprefix("[").removesuffix("]"))
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96))


def _parse_text(text: str) -> str:
    if "\0" in text:  # ends a C string: the system would see another value than we do
        raise ValueError(f"not text: {text!r}")
    return text


def _show_number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one type are written. `toml` has the types that a settings file may use."""

    noun: str
    parse: Callable[[str], Any]
    toml: tuple[type, ...]
    show: Callable[[Any], str] = str
    metavar: str = "TEXT"


# The key is the annotation of the field, with its unit.
KINDS: Mapping[tuple[str, str], Kind] = {
    ("str", ""): Kind("text", _parse_text, (str,)),
    ("bool", ""): Kind(
        "true or false", parse_bool, (bool,), show=lambda value: "true" if value else "false", metavar="BOOL"
    ),
    ("int", ""): Kind("a whole number", parse_int, (int,), metavar="N"),
    ("int", "bytes"): Kind("a size in bytes, or such as 64k or 1MiB,", parse_size, (int, str), metavar="SIZE"),
    ("float", "s"): Kind(
        "a duration in seconds, or such as 500ms or 2m,", parse_duration, (int, float, str), _show_number, "DURATION"
    ),
    ("int | None", ""): Kind("an octal text such as 022", parse_octal, (str,), lambda value: f"{value:03o}", "OCTAL"),
    ("tuple[str, ...]", ""): Kind("text", _parse_text, (list, str)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of `Settings` with everything that is known about it."""

    name: str
    default: Any
    kind: Kind
    heading: str  # its group in `--help` and in the documents
    does: str
    unit: str = ""  # "s" or "bytes"
    low: float | None = None
    high: float | None = None
    short: str = ""
    metavar: str = ""
    argument: str = ""  # its name on the command line when it is an argument, not an option
    choices: tuple[str, ...] = ()
    plugins: str = ""  # names of this entry point group are further choices
    words: Mapping[str, Callable[[], Any]] = field(default_factory=dict)  # a word that stands for a computed value
    separator: str = ""  # between the items of a list in text form
    convention: tuple[str, Callable[[str], Any]] = ("", str)  # variable that hosting platforms set, and its meaning
    clean: Callable[[Any], Any] | None = None  # last check; returns the normal form or raises ValueError
    reloadable: bool = True  # False: takes effect at a start only

    @property
    def spellings(self) -> tuple[str, ...]:
        """How the command line names it: `-w`, `--workers`; a switch has `--name` and `--no-name`."""
        if self.argument:
            return (self.argument,)
        dashed = self.name.replace("_", "-")
        names = (self.short, f"--{dashed}", f"--no-{dashed}" if isinstance(self.default, bool) else "")
        return tuple(filter(None, names))

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, tuple)

    def convert(self, raw: object, *, typed: bool) -> Any:
        """The value for `raw`: text, or with `typed` a TOML value. ValueError says what was expected."""
        value = self._read(raw, typed)
        if self.choices and value not in self.choices:
            known = (*self.choices, *(entry_point_names(self.plugins) if self.plugins else ()))
            if value not in known:
                raise ValueError(f"expected {self.expected()}.{nearest(str(value), known)}".removesuffix("."))
        if isinstance(value, (int, float)) and not self._in_range(value):
            raise ValueError(f"expected {self.expected()}")
        if isinstance(self.default, float):
            value = float(value)
        return self.clean(value) if self.clean else value

    def _read(self, raw: object, typed: bool) -> Any:
        if isinstance(raw, str) and raw in self.words:
            return self.words[raw]()
        # `type() is`, since True is an int to isinstance. A command line flag is a bool, not text.
        if (typed or not isinstance(raw, str)) and type(raw) not in self.kind.toml:
            raise ValueError(f"expected {self.expected()}, not {_TOML_NAMES.get(type(raw), 'a ' + type(raw).__name__)}")
        try:
            if self.is_list:
                items = raw if isinstance(raw, list) else [item for item in str(raw).split(self.separator) if item]
                return tuple(self._item(item) for item in items)
            return self.kind.parse(raw) if isinstance(raw, str) else raw
        except ValueError:
            raise ValueError(f"expected {self.expected()}") from None

    def _item(self, item: object) -> str:
        if not isinstance(item, str):
            raise ValueError(f"not text: {item!r}")
        return str(self.kind.parse(item.strip()))

    def _in_range(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)  # false for nan

    def fits(self, value: object) -> bool:
        """Whether `value`, from another process, could be one: the type and the bounds, not what `clean` knows."""
        default = self.default
        if value is None:
            return default is None
        if self.is_list:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        kind = int if default is None else type(default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            return False
        if self.choices and not self.plugins and value not in self.choices:
            return False
        return not isinstance(value, (int, float)) or self._in_range(value)

    def expected(self) -> str:
        """What a value must be, for an error: `a whole number from 1 to 1024, or auto`."""
        if self.choices:
            plugin = f", or the name of an entry point in {self.plugins}" if self.plugins else ""
            return f"one of {', '.join(self.choices)}{plugin}"
        noun = f"text, or a list of texts separated by {self.separator!r}" if self.is_list else self.kind.noun
        show = self.kind.show
        if self.high is not None and self.low is not None:
            noun += f" from {show(self.low)} to {show(self.high)}"
        elif self.low is not None:
            noun += f" of at least {show(self.low)}"
        return noun + "".join(f", or {word}" for word in self.words)

    def describe(self, *, choices: bool) -> str:
        """What it does, its choices where they are not shown already, and whether a reload is not enough."""
        listed = f" One of {', '.join(self.choices)}." if choices and self.choices else ""
        return self.does + listed + ("" if self.reloadable else " Needs a restart.")

    def show(self, value: Any) -> str:
        """`value` for people; without its unit it could be given back in text form."""
        if value is None:
            return ""
        text = (self.separator or ",").join(value) if self.is_list else self.kind.show(value)
        return f"{text} {self.unit}" if self.unit else text


def entry_point_names(group: str) -> tuple[str, ...]:
    """Names that installed packages offer in an entry point group."""
    from importlib.metadata import entry_points  # slow to import, and needed for names that are not ours only

    return tuple(sorted({point.name for point in entry_points(group=group)}))
