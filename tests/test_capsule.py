"""What travels with a connection: it arrives as it was sent, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apphost.messages import MAX_MESSAGE, encode
from apphost.protocols.capsule import (
    BYTES_MAX,
    HEAD_MAX,
    HTTP,
    SOCKET_MAX,
    STATE_MAX,
    VERSION,
    WEBSOCKET,
    Capsule,
    CapsuleError,
    Socket,
)
from apphost.protocols.strict import Limits

FULL = Capsule(("192.0.2.1", 4711), ("192.0.2.2", 80), "http", 7, 12.5, True, b"GET / HT\x00\xff")

# What `json.loads` can make; the fields of a capsule are tried with all of it.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["http1", "", "!", "====", "\udcff"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
# Paths of Unix sockets need not be UTF-8: they come with surrogates.
TEXT = st.text(st.characters(max_codepoint=0x10FFFF, exclude_categories=())) | st.just("/run/\udcff.sock")
NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1)
SOCKETS = st.builds(
    Socket,
    target=st.binary(min_size=1),
    headers=st.lists(st.tuples(NAMES.map(str.encode), st.binary().map(lambda value: value.replace(b"\n", b"")))),
    offered=st.lists(NAMES),
    subprotocol=st.none() | NAMES,
    window=st.none() | st.tuples(st.integers(9, 15), st.integers(9, 15), st.booleans()),
    messages=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.binary()),
    ping=st.binary(max_size=125),
    state=st.none() | st.binary(),
)
SOCKET = Socket(
    b"/chat", [(b"host", b"a"), (b"x", b"")], ["v1", "v2"], "v1", (12, 15, True), ["one", b"two"], b"p", b"s"
)
CAPSULES = st.builds(
    Capsule,
    client=st.none() | st.tuples(TEXT, st.integers(0, 65535)),
    server=st.tuples(TEXT, st.none() | st.integers(0, 65535)),
    scheme=st.sampled_from(["http", "https"]),
    requests=st.integers(min_value=0),
    left=st.floats(allow_nan=False, allow_infinity=False),
    half=st.booleans(),
    data=st.binary(max_size=200),
    socket=st.none() | SOCKETS,
    anonymous=st.booleans(),
)


def through_the_wire(capsule: Capsule) -> Capsule:
    return Capsule.from_wire(json.loads(encode({"t": "move", "id": 1, **capsule.to_wire()})))


@given(CAPSULES)
@example(FULL)
@example(Capsule(None, ("/run/site.sock", None), "http", 0, -1.0, False, b""))
def test_a_capsule_arrives_as_it_was_sent(capsule: Capsule) -> None:
    assert through_the_wire(capsule) == capsule


def test_addresses_arrive_as_tuples() -> None:
    """They go into the ASGI scope and the WSGI environ as they are."""
    arrived = through_the_wire(FULL)
    assert type(arrived.client) is tuple
    assert type(arrived.server) is tuple


def test_all_that_a_connection_can_buffer_fits() -> None:
    """In the capsule, and the capsule in a message. A read of asyncio takes 256 KiB at most."""
    data = bytes(Limits().pipelined + 2 * 256 * 1024)
    assert through_the_wire(Capsule(*_but_data(FULL), data)).data == data
    assert len(data) == BYTES_MAX
    assert len(encode(FULL.to_wire())) + BYTES_MAX * 4 / 3 + 100 < MAX_MESSAGE


def _but_data(capsule: Capsule) -> tuple[Any, ...]:
    return capsule.client, capsule.server, capsule.scheme, capsule.requests, capsule.left, capsule.half


def test_all_that_a_websocket_can_have_fits() -> None:
    """In a message, with the largest of everything: what waits, a frame half read, a head, a state."""
    messages: list[str | bytes] = [bytes(SOCKET_MAX // 2)]
    target, names = b"/" * 8190, ["a"] * ((HEAD_MAX - 8190 - 30) // 2)
    fields = [(b"sec-websocket-protocol", ",".join(names).encode())]
    socket = Socket(target, fields, names, names[0], (15, 15, True), messages, bytes(125), bytes(STATE_MAX))
    capsule = Capsule(*_but_data(FULL), bytes(SOCKET_MAX // 2), socket)
    assert through_the_wire(capsule) == capsule
    assert len(encode(capsule.to_wire())) < MAX_MESSAGE


@pytest.mark.parametrize("key", sorted(SOCKET.to_wire()))
@given(value=JSON)
def test_a_field_of_a_websocket_with_anything_in_it_is_refused_or_fits(key: str, value: object) -> None:
    capsule = Capsule(None, ("a", 1), "http", 1, 1.0, False, b"", SOCKET)
    wire = json.loads(json.dumps(capsule.to_wire()))
    wire["socket"][key] = value
    try:
        arrived = Capsule.from_wire(wire)
    except CapsuleError:
        return
    assert through_the_wire(arrived) == arrived


@pytest.mark.parametrize("key", sorted(SOCKET.to_wire()))
def test_no_field_of_a_websocket_may_be_missing(key: str) -> None:
    wire = Capsule(None, ("a", 1), "http", 1, 1.0, False, b"", SOCKET).to_wire()
    del wire["socket"][key]
    with pytest.raises(CapsuleError):
        Capsule.from_wire(wire)
    with pytest.raises(CapsuleError):
        Capsule.from_wire({**wire, "socket": None, "kind": WEBSOCKET})


@pytest.mark.parametrize("key", sorted(FULL.to_wire()))
@given(value=JSON)
def test_a_field_with_anything_in_it_is_refused_or_fits(key: str, value: object) -> None:
    wire = json.loads(json.dumps(FULL.to_wire()))
    wire[key] = value
    try:
        capsule = Capsule.from_wire(wire)
    except CapsuleError:
        return
    assert math.isfinite(capsule.left)
    assert isinstance(capsule.half, bool)
    assert type(capsule.requests) is int
    assert through_the_wire(capsule) == capsule


@given(st.dictionaries(st.sampled_from([*FULL.to_wire(), "t", "id"]), JSON))
def test_any_object_gives_a_capsule_or_a_capsule_error(wire: dict[str, Any]) -> None:
    with pytest.raises(CapsuleError):
        Capsule.from_wire(wire)
    with pytest.raises(CapsuleError):
        Capsule.from_wire({**wire, "v": VERSION, "kind": HTTP, "half": None})


@pytest.mark.parametrize("key", sorted(FULL.to_wire()))
def test_no_field_may_be_missing(key: str) -> None:
    wire = FULL.to_wire()
    del wire[key]
    with pytest.raises(CapsuleError):
        Capsule.from_wire(wire)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("v", VERSION + 1),
        ("v", 0),
        ("v", str(VERSION)),
        ("v", True),
        ("v", 1.0),
        ("v", [VERSION] * 1000),
        ("kind", "http2"),
        ("kind", "HTTP1"),
        ("kind", None),
        ("client", ["192.0.2.1"]),
        ("client", ["192.0.2.1", 4711, 0, 0]),
        ("client", "ab"),
        ("client", ["192.0.2.1", "4711"]),
        ("client", ["192.0.2.1", True]),
        ("server", None),
        ("server", [None, None]),
        ("scheme", 1),
        ("requests", "7"),
        ("requests", True),
        ("left", math.inf),
        ("left", -math.inf),
        ("left", math.nan),
        ("left", 10**400),
        ("left", "1"),
        ("half", 1),
        ("data", "A"),
        ("data", "AA=A"),
        ("data", "Z\u00e4hl"),
        ("data", "QUJD\n"),
        ("data", 5),
        ("data", "A" * 4 * (BYTES_MAX // 3 + 1)),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_no_capsule_of_this_version_says_is_refused(key: str, value: object) -> None:
    with pytest.raises(CapsuleError) as caught:
        Capsule.from_wire({**FULL.to_wire(), key: value})
    assert len(str(caught.value)) < 100 or key not in ("v", "kind")


def test_what_a_later_version_adds_within_this_one_is_ignored() -> None:
    assert Capsule.from_wire({**FULL.to_wire(), "colour": "blue", "t": "move", "id": 3, "fds": 1}) == FULL
