"""Ids of requests: which are taken, which are made, and what else of them a client may have sent. Pure."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.protocols.base import Headers
from apphost.protocols.proxied import _KINDS
from apphost.protocols.request_ids import IdentifiedExchange, RequestIds, identified

MADE = re.compile(rb"[0-9a-f]{32}")
NAMES = st.sampled_from([b"x-request-id", b"x_request_id", b"x-request_id", b"host", b"x-request-ids"])
FIELDS = st.lists(st.tuples(NAMES, st.binary(max_size=200)), max_size=5)


@given(FIELDS, st.booleans(), st.booleans())
def test_there_is_one_id_and_it_is_harmless(headers: Headers, believed: bool, underscores: bool) -> None:
    """Whatever is sent; fields with other names stay, in order."""
    made, after = RequestIds("X-Request-ID", underscores).take(headers, believed)
    assert re.fullmatch(rb"[!-~]{1,144}", made)
    assert [value for name, value in after if name == b"x-request-id"] == [made]
    if underscores:
        assert [name for name, _ in after if name.replace(b"_", b"-") == b"x-request-id"] == [b"x-request-id"]
    if not believed:
        assert MADE.fullmatch(made)
    others = (b"host", b"x-request-ids")
    assert [item for item in after if item[0] in others] == [item for item in headers if item[0] in others]


@pytest.mark.parametrize(
    "good",
    ["0", "f" * 32, "7d444840-9dc0-11d1-b245-5ffdce74fad2", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
     "Root=1-67891233-abcdef012345678912345678", "AbC+/==", "x" * 144],
)  # fmt: skip
def test_ids_of_proxies(good: str) -> None:
    """What nginx, HAProxy, load balancers and tracers send."""
    headers = [(b"host", b"a"), (b"x-request-id", good.encode())]
    ids = RequestIds("X-Request-ID")
    assert ids.take(headers, True)[0] == good.encode()
    assert MADE.fullmatch(ids.take(headers, False)[0])
    assert headers == [(b"host", b"a"), (b"x-request-id", good.encode())], "what was given is not changed"


def test_ids_do_not_repeat() -> None:
    """Also across the stocks of random bytes that they are cut from."""
    ids = RequestIds("X-Request-ID")
    made = [ids.make() for _ in range(1000)]
    assert all(map(MADE.fullmatch, made))
    assert len(set(made)) == 1000


@pytest.mark.parametrize("key", _KINDS)
def test_every_kind_of_connection_can_have_ids(key: tuple[bool, bool, bool]) -> None:
    """It stays what it was; one that has none pays nothing, not even a slot."""
    kind = _KINDS[key]
    with_ids = identified(kind, key[0])
    assert issubclass(with_ids, kind)
    assert issubclass(with_ids.exchange_type, (IdentifiedExchange, kind.exchange_type))
    assert with_ids.exchange_type.believed is key[0]  # type: ignore[attr-defined]
    assert identified(kind, key[0]) is with_ids
    assert with_ids.exchange_type.__dictoffset__ == 0, "its slots are all that it has"
    assert not hasattr(kind.exchange_type, "request_id")
