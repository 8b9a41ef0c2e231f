"""The opening handshake of a WebSocket: W3, W4, W5, S10, and the grammar of its fields."""

from __future__ import annotations

import base64
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.headers import parse_extension
from wsproto.utilities import generate_accept_token

from apphost.protocols.base import BadRequest, RequestHead
from apphost.protocols.handshake import Handshake, Offer, accept_key, accept_response, read_handshake
from apphost.protocols.response import ServerFields

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455, 1.3
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
TOKEN = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def head_of(
    *more: tuple[str, str], key: str | None = KEY.decode(), version: str | None = "13", http: str = "1.1"
) -> RequestHead:
    """A request with the fields of the handshake, and `more` of them; None leaves one out."""
    told = [("host", "a"), ("upgrade", "websocket"), ("sec-websocket-key", key), ("sec-websocket-version", version)]
    fields = [(name, value) for name, value in (*told, *more) if value is not None]
    head = RequestHead("GET", b"/", http, [(name.encode(), value.encode("latin-1")) for name, value in fields])
    head.content_length, head.chunked = None, False
    return head


def refused(head: RequestHead) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read_handshake(head)
    return caught.value


def subprotocols(*values: str) -> list[str]:
    return read_handshake(head_of(*[("sec-websocket-protocol", value) for value in values])).subprotocols


def offers(*values: str) -> list[Offer]:
    return read_handshake(head_of(*[("sec-websocket-extensions", value) for value in values])).offers


# -- the request


def test_a_handshake() -> None:
    """W3 W4"""
    assert read_handshake(head_of()) == Handshake(KEY, [], [])
    more = [("sec-websocket-protocol", "chat, superchat"), ("sec-websocket-extensions", "x; y=1"), ("origin", "b")]
    assert read_handshake(head_of(*more)) == Handshake(KEY, ["chat", "superchat"], [Offer("x", (("y", "1"),))])


@pytest.mark.parametrize(
    "key",
    [None, "", "dGhl", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZQ=", "dGhlIHNhbXBsZSBub25jZQ===",
     "dGhlIHNhbXBsZSBub25jZQ==\0", "dGhlIHNhbXBsZSBub25jZQ==\n", " dGhlIHNhbXBsZSBub25jZQ==",
     "dGhlIHNhbXBsZSBub25jZR==", "dGhlIHNhbXBsZSBub25j", "dGhlIHNhbXBsZSBub25jZWE=", "dGhlIHNhbXBsZSBub25jZWFh",
     "dGhlIHNhbXBsZSBub25jZQ==,a",
     "dGhlIHNhbXBs ZSBub25jZQ==", "dGhlIHNhbXBsZSBub2-jZQ==", "dGhlIHNhbXBsZSBub2_jZQ==", "======================A==",
     "\xe9" * 22 + "=="],
)  # fmt: skip
def test_bad_keys(key: str | None) -> None:
    """W3: 400 for anything but 16 bytes in base64."""
    assert refused(head_of(key=key)).status == 400


@given(st.binary(min_size=16, max_size=16))
def test_good_keys(nonce: bytes) -> None:
    """W3 W5"""
    key = base64.b64encode(nonce)
    assert read_handshake(head_of(key=key.decode())).key == key
    assert accept_key(key) == generate_accept_token(key)


@pytest.mark.parametrize(
    ("name", "value", "status"), [("sec-websocket-key", KEY.decode(), 400), ("sec-websocket-version", "13", 426)]
)
def test_what_stands_there_twice(name: str, value: str, status: int) -> None:
    """W3: also where both say the same."""
    for other in (value, "", "8"):
        assert refused(head_of((name, other))).status == status


@pytest.mark.parametrize(
    "version", ["0", "7", "8", "12", "14", "013", "13.0", "+13", "13, 8", "8, 13", "13,", "x", "\xb9"]
)
def test_other_versions(version: str) -> None:
    """W3: 426, which says what is spoken here (RFC 6455, 4.4)."""
    refusal = refused(head_of(version=version))
    assert refusal.status == 426
    assert refusal.fields == ((b"sec-websocket-version", b"13"), (b"upgrade", b"websocket"))
    assert version not in refusal.why or version in "13"


@pytest.mark.parametrize("version", [None, ""])
def test_no_version(version: str | None) -> None:
    """W3: 400"""
    assert refused(head_of(version=version)).status == 400
    assert refused(head_of(version=version)).fields == ()


def test_what_comes_first() -> None:
    """W3: a client of another version may have another way to say its key."""
    assert refused(head_of(version="8", key=None)).status == 426
    assert refused(head_of(version=None, key=None)).status == 400
    assert refused(head_of(version="8", http="1.0")).status == 400


def test_http10() -> None:
    """W3: 400"""
    assert refused(head_of(http="1.0")).status == 400


@pytest.mark.parametrize(("length", "chunked", "good"), [(None, False, True), (0, False, True), (1, False, False),
                                                         (None, True, False)])  # fmt: skip
def test_bodies(length: int | None, chunked: bool, good: bool) -> None:
    """W3: bytes behind the head are frames, so there cannot be a body."""
    head = head_of()
    head.content_length, head.chunked = length, chunked
    if good:
        assert read_handshake(head).key == KEY
    else:
        assert refused(head).status == 400


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([], []),
        ([""], []),
        (["chat"], ["chat"]),
        (["chat, superchat"], ["chat", "superchat"]),
        (["a,b ,\tc"], ["a", "b", "c"]),
        (["a", "b, c", "d"], ["a", "b", "c", "d"]),
        ([", a, ,b,,", "", ",c"], ["a", "b", "c"]),
        (["b, a, b"], ["b", "a", "b"]),
        (["A, a"], ["A", "a"]),
        (["v1.chat.example+json"], ["v1.chat.example+json"]),
        ([TOKEN], [TOKEN]),
    ],
)
def test_subprotocols(values: list[str], names: list[str]) -> None:
    """W4: from one or many lists, in the client's order."""
    assert subprotocols(*values) == names


@pytest.mark.parametrize(
    "value", ["a b", "a;b", "a=b", '"a"', "a/b", "a, b c", "\xe9", "a\0", "a\x0b", "(a)", "a:b", "{}"]
)
def test_malformed_subprotocols(value: str) -> None:
    """W3: 400"""
    assert refused(head_of(("sec-websocket-protocol", value))).status == 400


# -- Sec-WebSocket-Extensions


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([""], []),
        ([" , ,\t, "], []),
        (["a"], [("a",)]),
        (["a, b"], [("a",), ("b",)]),
        (["a", "b", "", "a"], [("a",), ("b",), ("a",)]),
        ([",a, ,b,,,c,"], [("a",), ("b",), ("c",)]),
        (["a;b"], [("a", ("b", None))]),
        (["a ; b\t;c"], [("a", ("b", None), ("c", None))]),
        (["a; b=c"], [("a", ("b", "c"))]),
        (["a; b = c ,d"], [("a", ("b", "c")), ("d",)]),
        (['a; b="c"'], [("a", ("b", "c"))]),
        (['a; b = "c" ; d="e",f;g="h"'], [("a", ("b", "c"), ("d", "e")), ("f", ("g", "h"))]),
        (['a; b="1\\5"; c="\\d"'], [("a", ("b", "15"), ("c", "d"))]),
        (["a; b=1; b=2; b"], [("a", ("b", "1"), ("b", "2"), ("b", None))]),
        (["foo", "bar; baz=2"], [("foo",), ("bar", ("baz", "2"))]),
        (["permessage-deflate; client_max_window_bits, x"], [("permessage-deflate", ("client_max_window_bits", None)),
                                                             ("x",)]),
        ([f"{TOKEN};{TOKEN}={TOKEN}"], [(TOKEN, (TOKEN, TOKEN))]),
    ],
)  # fmt: skip
def test_extensions(values: list[str], expected: list[tuple[Any, ...]]) -> None:
    """W3 W14: RFC 6455, 9.1, in one or many fields; elements of the list may be empty."""
    assert offers(*values) == [Offer(name, tuple(parameters)) for name, *parameters in expected]


@pytest.mark.parametrize(
    "value",
    ["a b", "a;", ";a", "a; ;b", "a;;b", "=a", "a=b", "a; =b", "a; b=", "a; b= ;c", "a; b==c", "a; b=c=d", "a; b=c d",
     'a; b="', 'a; b="c', 'a; b=c"', 'a; b=""', 'a; b="c d"', 'a; b="c;d"', 'a; b="c,d"', 'a; b="c"d', 'a; b="c\\"',
     'a; b="\\"', 'a; b="\\\\"', 'a; "b"=c', '"a"', "a; b c", "a/b", "a\0", "a\x0b,b", "\xe9",
     "a; b=\xe9", "a, b;", "a,;b", "(a)", "a; b=c\\d"],
)  # fmt: skip
def test_malformed_extensions(value: str) -> None:
    """W3: 400, wherever it stands."""
    assert refused(head_of(("sec-websocket-extensions", value))).status == 400
    assert refused(head_of(*[("sec-websocket-extensions", each) for each in ("x; y=1", value)])).status == 400
    assert refused(head_of(*[("sec-websocket-extensions", each) for each in (value, "x; y=1")])).status == 400


TOKENS = st.text(TOKEN, min_size=1, max_size=8)
SPACES = st.sampled_from(["", " ", "\t", "  "])


PARAMETERS = st.lists(st.tuples(TOKENS, st.none() | TOKENS, st.booleans()), max_size=3)


@given(st.lists(st.tuples(TOKENS, PARAMETERS), min_size=1, max_size=4), st.tuples(SPACES, SPACES, SPACES))
def test_any_extensions(
    wanted: list[tuple[str, list[tuple[str, str | None, bool]]]], spaces: tuple[str, str, str]
) -> None:
    """W3: as the websockets library reads them, in one field or in many."""
    before, behind, around = spaces
    texts = []
    for name, parameters in wanted:
        text = name
        for key, value, quoted in parameters:
            told = f'"{value}"' if quoted else value
            text += f"{before};{behind}{key}" + ("" if value is None else f"{around}={around}{told}")
        texts.append(text)
    whole = f"{before},{behind}".join(texts)
    expected = [(name, [(key, value) for key, value, _ in parameters]) for name, parameters in wanted]
    assert parse_extension(whole) == expected
    assert offers(whole) == offers(*texts) == [Offer(name, tuple(parameters)) for name, parameters in expected]


@given(st.text(st.sampled_from('ab;=,"\\ \t\xe9'), max_size=14))
def test_any_text(value: str) -> None:
    """W3: no exception but a refusal; and what is read can be said again."""
    try:
        found = offers(value)
    except BadRequest:
        assert not re.fullmatch("[ab](;[ab])*", value)
        return
    again = ", ".join(
        "; ".join([offer.name, *[name if value is None else f'{name}="{value}"' for name, value in offer.parameters]])
        for offer in found
    )
    assert offers(again) == found


@pytest.mark.parametrize(
    "value",
    ["a;" * 30000, "a" * 60000 + '"', "a;b" * 20000 + '"', "a" + " " * 60000 + '"', "a;" + " " * 60000 + '"',
     'a;b="' + "\\c" * 30000, ("a;b" + " " * 20 + ",") * 2500 + '"', "a;b= " * 12000, "," * 60000 + '"',
     ", " * 30000 + "a b", "a;b=c " * 10000],
)  # fmt: skip
def test_long_fields_take_no_long_time(value: str) -> None:
    """W3: CVE-2020-7662 and CVE-2021-32640 are what such fields did to others."""
    head = head_of(("sec-websocket-extensions", value), ("sec-websocket-protocol", value))
    started = time.process_time()
    refused(head)
    refused(head_of(("sec-websocket-protocol", value)))
    assert time.process_time() - started < 0.1


# -- the answer


def response(
    *headers: Any,
    subprotocol: Any = None,
    offered: tuple[str, ...] = ("chat", "v2"),
    extension: bytes = b"",
    extra: bool = False,
) -> list[bytes]:
    """The lines of the 101."""
    fields = ServerFields(date=extra, server=extra)
    wire = accept_response(Handshake(KEY, [*offered], []), subprotocol, headers, extension, fields)
    assert wire.endswith(b"\r\n\r\n")
    return wire[:-4].split(b"\r\n")


FIRST = [b"HTTP/1.1 101 Switching Protocols", b"upgrade: websocket", b"sec-websocket-accept: " + ACCEPT]
UPGRADE = b"connection: Upgrade"


def test_the_example_of_the_rfc() -> None:
    """W5: RFC 6455, 1.3"""
    assert accept_key(KEY) == ACCEPT
    assert response() == [*FIRST, UPGRADE]


def test_all_that_there_may_be() -> None:
    """W5 S3 S11: the server's fields, the application's in their order, and Date and Server behind."""
    lines = response(
        (b"Set-Cookie", b"a"), (b"x-a", b""), [b"set-cookie", b"b"],
        subprotocol="v2", extension=b"permessage-deflate", extra=True,
    )  # fmt: skip
    assert lines == [
        *FIRST, b"sec-websocket-protocol: v2", b"sec-websocket-extensions: permessage-deflate",
        b"Set-Cookie: a", b"x-a: ", b"set-cookie: b", UPGRADE, lines[-2], b"server: apphost",
    ]  # fmt: skip
    assert lines[-2].startswith(b"date: ")


def test_date_and_server_of_the_application() -> None:
    """S11: in place of the server's."""
    lines = response((b"Date", b"now"), (b"server", b"mine"), extra=True)
    assert lines == [*FIRST, b"Date: now", b"server: mine", UPGRADE]


def test_headers_are_taken_from_any_iterable() -> None:
    """W5"""
    pairs = iter([(b"x-a", b"1"), (b"x-b", b"2")])
    assert response(*pairs) == [*FIRST, b"x-a: 1", b"x-b: 2", UPGRADE]


@pytest.mark.parametrize("subprotocol", ["chat", "v2", None])
def test_subprotocols_that_were_offered(subprotocol: str | None) -> None:
    """W5"""
    told = [] if subprotocol is None else [b"sec-websocket-protocol: " + subprotocol.encode()]
    assert response(subprotocol=subprotocol) == [*FIRST, *told, UPGRADE]


@pytest.mark.parametrize("subprotocol", ["", "Chat", "chat, v2", "v3", "chat\r\nx: y", b"chat", 1, ["chat"], "ch\xe4t"])
def test_subprotocols_that_were_not_offered(subprotocol: Any) -> None:
    """W5 S10"""
    for offered in (("chat", "v2"), ()):
        with pytest.raises(ValueError, match="not offered the subprotocol"):
            response(subprotocol=subprotocol, offered=offered)


@pytest.mark.parametrize(
    "name",
    [b"upgrade", b"sec-websocket-accept", b"sec-websocket-extensions", b"sec-websocket-protocol",
     b"sec-websocket-version"],
)  # fmt: skip
def test_fields_of_the_handshake_itself(name: bytes) -> None:
    """W5: in any spelling, and whatever they say."""
    for spelling in (name, name.title(), name.upper(), name.capitalize()):
        with pytest.raises(ValueError, match="belongs to the handshake"):
            response((b"x-a", b"1"), (spelling, b"websocket"))


@pytest.mark.parametrize("name", [b"Connection", b"connection", b"Transfer-Encoding", b"Content-Length"])
def test_fields_of_the_connection_are_dropped(name: bytes) -> None:
    """S4 S12: what the application says of them is a wish; a 101 has no length (RFC 9110, 8.6)."""
    assert response((name, b"5"), (b"x-a", b"1")) == [*FIRST, b"x-a: 1", UPGRADE]


@pytest.mark.parametrize("value", [b"\r", b"\n", b"\0", b"a\r\nset-cookie: b", b"a\nb", b"\r\n\r\n\x81\x05Hello"])
def test_values_that_split_the_answer(value: bytes) -> None:
    """W5 S10"""
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        response((b"x-a", value))


@pytest.mark.parametrize("name", [b"", b" ", b":a", b"a b", b"a\r\nb", b"a:", b"\x80", b"upgrade ", b"upgrade\0"])
def test_names_that_are_none(name: bytes) -> None:
    """W5 S10"""
    with pytest.raises(ValueError, match="not a header name"):
        response((name, b"x"))


@pytest.mark.parametrize(
    "pair", [("x-a", b"1"), (b"x-a", "1"), (b"x-a", 1), (None, b"1"), (bytearray(b"Upgrade"), b"1"), ("Upgrade", b"1")]
)
def test_types_that_are_not_bytes(pair: Any) -> None:
    """W5 A5"""
    with pytest.raises(TypeError):
        response(pair)


@pytest.mark.parametrize("item", [(b"a",), (b"a", b"b", b"c"), None, 5, b"a"])
def test_what_is_no_pair(item: Any) -> None:
    """W5 A5"""
    with pytest.raises((TypeError, ValueError)):
        response(item)
