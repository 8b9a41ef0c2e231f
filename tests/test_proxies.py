"""Whom a request is believed to come from: tables of what proxies and liars send, and what no liar can reach."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apphost.protocols.base import BadRequest, Headers
from apphost.protocols.capsule import Capsule
from apphost.protocols.proxied import NOBODY, peer_name
from apphost.protocols.proxies import HOPS_MAX, HostList, ProxyRules, Told, TrustList, parse_forwarded, split_host

TRUSTED = ("10.0.0.0/8", "192.0.2.7", "2001:db8:1::/48", "unix")
PEER = ("10.0.0.1", 4711)
ALL = ("for", "proto", "host", "port", "prefix")


def read(
    *fields: tuple[str, str], family: str = "x-forwarded", believed: tuple[str, ...] = ALL, **more: object
) -> Told:
    trusted = more.get("trusted", TRUSTED)
    rules = ProxyRules(TrustList(trusted), family, believed)  # type: ignore[arg-type]
    headers: Headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields]
    return rules.read([(b"host", b"example.org"), *headers], PEER)


def client(value: str, **more: object) -> tuple[str, int] | None:
    return read(("X-Forwarded-For", value), **more).client  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the trust list


@pytest.mark.parametrize(
    ("entries", "yes", "no"),
    [
        ((), [], ["127.0.0.1", "::1", None, "", "10.0.0.1"]),
        (("127.0.0.1",), ["127.0.0.1", "::ffff:127.0.0.1"], ["127.0.0.2", "::1", None, ""]),
        (("10.0.0.0/8",), ["10.255.0.1", "::ffff:10.1.1.1", "::ffff:a01:101"], ["11.0.0.1", "::a01:101", "10.0.0"]),
        (("::ffff:10.0.0.0/104",), ["10.1.2.3", "::ffff:10.1.2.3"], ["11.1.2.3"]),
        (("::/0",), ["::1", "fe80::1%eth0"], ["127.0.0.1", "::ffff:127.0.0.1", None]),
        (("0.0.0.0/0",), ["1.2.3.4", "::ffff:1.2.3.4"], ["::1", None, ""]),
        (("fe80::/10",), ["fe80::1", "fe80::1%eth0"], ["::1"]),
        (("[::1]",), ["::1", "0:0:0:0:0:0:0:1"], ["::2"]),
        (("unix",), [None], ["", "127.0.0.1", "unix", "unix:"]),
        (("*",), [None, "1.2.3.4", "::1", "fe80::1%eth0"], [NOBODY, "unix"]),
    ],
)
def test_who_is_a_trusted_peer(entries: tuple[str, ...], yes: list[str | None], no: list[str | None]) -> None:
    """Nobody by default; a mapped IPv4 address is that address, and the name of an interface is no part of one."""
    trusted = TrustList(entries)
    assert bool(trusted) == bool(entries)
    assert {peer: trusted.trusts_peer(peer) for peer in (*yes, *no)} == dict.fromkeys(yes, True) | dict.fromkeys(
        no, False
    )


@pytest.mark.parametrize(
    ("of_client", "of_server", "anonymous", "peer"),
    [
        (("192.0.2.1", 1), ("10.0.0.1", 80), False, "192.0.2.1"),
        (None, ("/run/s", None), False, None),
        (None, ("/run/s", None), True, NOBODY),
        (None, ("10.0.0.1", 80), False, NOBODY),  # TCP, and the peer had gone before it could be asked
        (("192.0.2.1", 1), ("/run/s", None), False, "192.0.2.1"),  # a PROXY header on a Unix socket
    ],
)
def test_the_peer_of_a_connection_with_a_past(
    of_client: tuple[str, int] | None, of_server: tuple[str, int | None], anonymous: bool, peer: str | None
) -> None:
    assert peer_name(Capsule(of_client, of_server, "http", 0, 1.0, False, b"", anonymous=anonymous)) == peer


# ------------------------------------------------------------------------------------------------------ X-Forwarded-For


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("203.0.113.9", ("203.0.113.9", 0)),
        ("203.0.113.9:5678", ("203.0.113.9", 5678)),
        ("\t 203.0.113.9 ", ("203.0.113.9", 0)),
        ("2001:db8::9", ("2001:db8::9", 0)),
        ("[2001:DB8:0::9]", ("2001:db8::9", 0)),
        ("[2001:db8::9]:443", ("2001:db8::9", 443)),
        ("fe80::1%eth0", ("fe80::1", 0)),
        ("::ffff:203.0.113.9", ("203.0.113.9", 0)),
        ("[::ffff:203.0.113.9]:1", ("203.0.113.9", 1)),
        # what a client has put in front does not count, whatever it looks like
        ("127.0.0.1, 203.0.113.9", ("203.0.113.9", 0)),
        ("10.0.0.9,203.0.113.9", ("203.0.113.9", 0)),
        ("<script>, 203.0.113.9", ("203.0.113.9", 0)),
        (",,, ,203.0.113.9", ("203.0.113.9", 0)),
        ("unknown, 203.0.113.9", ("203.0.113.9", 0)),
        # trusted proxies in front of the peer
        ("1.1.1.1, 203.0.113.9, 10.0.0.2", ("203.0.113.9", 0)),
        ("1.1.1.1, 203.0.113.9, 192.0.2.7, 2001:db8:1::5", ("203.0.113.9", 0)),
        ("1.1.1.1, 203.0.113.9, ::ffff:10.0.0.2", ("203.0.113.9", 0)),
        ("1.1.1.1, 203.0.113.9, unix:", ("203.0.113.9", 0)),
        # nobody but trusted ones: the one who has begun
        ("10.0.0.3, 10.0.0.2", ("10.0.0.3", 0)),
        ("unix:", None),
        # a proxy that does not know, or does not tell; never the proxy's own address instead
        ("unknown", None),
        ("UNKNOWN", None),
        ("_hidden", None),
        ("1.1.1.1, unknown, 10.0.0.2", None),
        # nothing
        ("", PEER),
        (" , ", PEER),
    ],
)
def test_the_rightmost_address_that_is_not_trusted(value: str, expected: tuple[str, int] | None) -> None:
    """H10, G2"""
    assert client(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "garbage", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.4:", "1.2.3.4:65536", "1.2.3.4:999999", "1.2.3.4:http",
        "[1.2.3.4]", "[::1", "::1]", "[::1]x", "[::1]:", "::1::2", ":::", "fe80::1%<b>", '"1.2.3.4"', "1.2.3.4;x",
        "http://1.2.3.4", "1.2.3.4 5.6.7.8", "localhost", "\xa01.2.3.4", "1.2.3.4, ", "1.2.3.4,,", "0x7f.1",
        "2130706433", "_" * 129, "unknown" * 20,
        "garbage, 10.0.0.2", ", 10.0.0.2", "unix:/run/s", "_", "unknown:http",
    ],
)  # fmt: skip
def test_nonsense_from_a_trusted_proxy_is_refused(value: str) -> None:
    """Where a proxy must have named its client stands no address: any guess would be the choice of somebody else."""
    with pytest.raises(BadRequest, match="the X-Forwarded-For field of a trusted proxy is malformed") as caught:
        client(value)
    assert caught.value.status == 400


def test_several_lines_are_one_list() -> None:
    """A proxy that adds a line of its own says the same as one that adds to the line; an empty one hides nothing."""
    lines = [("X-Forwarded-For", "1.1.1.1"), ("X-Forwarded-For", "203.0.113.9"), ("x-forwarded-for", "10.0.0.2")]
    assert read(*lines).client == ("203.0.113.9", 0)
    with pytest.raises(BadRequest):
        read(("X-Forwarded-For", "1.1.1.1"), ("X-Forwarded-For", ""))


def test_everybody_is_trusted_only_as_a_peer() -> None:
    """With `*` the proxy's word counts, and not the list that its client has begun."""
    assert client("6.6.6.6, 203.0.113.9", trusted=("*",)) == ("203.0.113.9", 0)
    assert client("6.6.6.6, 203.0.113.9, 10.0.0.2", trusted=("*", "10.0.0.0/8")) == ("203.0.113.9", 0)
    assert client("6.6.6.6, unix:", trusted=("10.0.0.0/8",)) is None


def test_a_chain_has_an_end() -> None:
    hops = ["10.0.0.2"] * (HOPS_MAX - 1)
    assert client(", ".join(["6.6.6.6", "203.0.113.9", *hops])) == ("203.0.113.9", 0)
    with pytest.raises(BadRequest):
        client(", ".join(["203.0.113.9", "10.0.0.2", *hops]))


@pytest.mark.parametrize(
    "value", ["10.0.0.2," * 7000, "," * 64000, "1:" * 32000, "[" * 64000, "1.2.3.4%" * 8000 + "," + "9" * 60000]
)
@pytest.mark.parametrize("family", ["x-forwarded", "forwarded"])
def test_a_hostile_field_takes_no_time(value: str, family: str) -> None:
    """64 KiB, the largest head. (CVE-2020-5236 was a field that took minutes.)"""
    name = "Forwarded" if family == "forwarded" else "X-Forwarded-For"
    started = time.process_time()
    for text in (value, 'for="' + value, f"for={value}", value + ";"):
        try:
            read((name, text), family=family)
        except BadRequest:
            pass
    assert time.process_time() - started < 2.0  # quadratic: minutes


# -------------------------------------------------------------------------------------------------- the other fields


@pytest.mark.parametrize(
    ("value", "scheme"),
    [("https", "https"), ("HTTPS", "https"), ("http", "http"), ("wss", "https"), ("ws", "http"), ("", None)],
)
def test_the_scheme(value: str, scheme: str | None) -> None:
    """H3"""
    assert read(("X-Forwarded-Proto", value)).scheme == scheme


@pytest.mark.parametrize(
    ("addresses", "schemes", "scheme"),
    [
        ("203.0.113.9", "https", "https"),
        ("203.0.113.9", "https, http", "http"),  # the first is the client's
        ("6.6.6.6, 203.0.113.9", "https, http", "http"),
        ("203.0.113.9, 10.0.0.2", "https, http", "https"),
        ("6.6.6.6, 203.0.113.9, 10.0.0.2", "http, https, http", "https"),
        ("203.0.113.9, 10.0.0.3, 10.0.0.2", "https", "https"),  # set by the outermost, and left alone
        ("203.0.113.9, 10.0.0.3, 10.0.0.2", "https, http", "https"),
        ("", "http, https", "https"),
    ],
)
def test_of_several_schemes_that_of_the_same_hop(addresses: str, schemes: str, scheme: str) -> None:
    assert read(("X-Forwarded-For", addresses), ("X-Forwarded-Proto", schemes)).scheme == scheme


def test_other_fields() -> None:
    told = read(
        ("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-Host", "Example.com:8443"), ("X-Forwarded-Port", "8443"),
        ("X-Forwarded-Prefix", "/shop/"), ("X-Forwarded-Proto", "https"),
    )  # fmt: skip
    assert told == Told(("203.0.113.9", 0), "https", b"Example.com:8443", 8443, "/shop")
    assert read(("X-Forwarded-Prefix", "/")).prefix == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Proto", "ftp"), ("Proto", "https;"), ("Proto", "on"), ("Proto", "https,"), ("Proto", "ht tps"),
        ("Host", "a b"), ("Host", "a/b"), ("Host", ":80"), ("Host", "a:123456"), ("Host", "user@a"), ("Host", "[::1"),
        ("Port", "0"), ("Port", "65536"), ("Port", "-1"), ("Port", "80a"), ("Port", "+80"), ("Port", "8_0"),
        ("Prefix", "shop"), ("Prefix", "//evil.example"), ("Prefix", "/a//b"), ("Prefix", "/a/../b"), ("Prefix", "/."),
        ("Prefix", "/.."), ("Prefix", "/a?b"), ("Prefix", "/a#b"), ("Prefix", "/a b"), ("Prefix", "/%2e"),
        ("Prefix", "/\xe4"), ("Prefix", "/a\\b"), ("Prefix", "http://evil.example"),
    ],
)  # fmt: skip
def test_nonsense_in_other_fields(name: str, value: str) -> None:
    with pytest.raises(BadRequest, match=f"the X-Forwarded-{name} field of a trusted proxy is malformed"):
        read((f"X-Forwarded-{name}", value))


def test_only_what_is_believed_is_looked_at() -> None:
    """The others may be the client's, handed through; nonsense in them is nobody's business, too."""
    lies = (("X-Forwarded-Host", "evil.example"), ("X-Forwarded-Port", "?"), ("X-Forwarded-Prefix", "//evil.example"))
    assert read(*lies, believed=("for", "proto")) == Told(PEER)
    assert read(("X-Forwarded-For", "garbage"), believed=("proto",)) == Told(PEER)


@pytest.mark.parametrize(
    "name",
    ["X_Forwarded_For", "X-Forwarded_For", "X-Forwarded-For-", "Forwarded", "X-Real-IP", "True-Client-IP", "Via"],
)
def test_other_names_say_nothing(name: str) -> None:
    assert read((name, "6.6.6.6"), ("X-Forwarded-For", "203.0.113.9")) == Told(("203.0.113.9", 0))
    assert read((name, "6.6.6.6")) == Told(PEER)


def test_only_one_family_is_read() -> None:
    """A client that sends `Forwarded` through a proxy that only sets `X-Forwarded-For`, and the other way round."""
    both = (("Forwarded", "for=6.6.6.6;proto=https;host=evil"), ("X-Forwarded-For", "203.0.113.9"))
    assert read(*both) == Told(("203.0.113.9", 0))
    both = (("Forwarded", "for=203.0.113.9"), ("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-Proto", "https"))
    assert read(*both, family="forwarded") == Told(("203.0.113.9", 0))


def test_no_family_at_all() -> None:
    rules = ProxyRules(TrustList(["10.0.0.1"]), "none", ("for",))
    assert not rules.believes("10.0.0.1")
    assert ProxyRules(TrustList(["10.0.0.1"]), "forwarded", ("for",)).believes("10.0.0.1")


# ---------------------------------------------------------------------------------------------------------- Forwarded


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("for=203.0.113.9", Told(("203.0.113.9", 0))),
        ("For=203.0.113.9;Proto=HTTPS;by=10.0.0.1", Told(("203.0.113.9", 0), "https")),
        ('for="203.0.113.9:47011"', Told(("203.0.113.9", 47011))),
        ('for="[2001:db8:cafe::17]:4711"', Told(("2001:db8:cafe::17", 4711))),
        ('for="[2001:db8:cafe::17]"', Told(("2001:db8:cafe::17", 0))),
        ('for="203.0.113.9:_port"', Told(("203.0.113.9", 0))),
        (r'for="\2\03.0.113.9"', Told(("203.0.113.9", 0))),
        ("for=_gazonk", Told(None)),
        ("for=unknown;proto=https", Told(None, "https")),
        ('for="_gazonk:_x"', Told(None)),
        ("for=6.6.6.6;proto=https, for=203.0.113.9;proto=http", Told(("203.0.113.9", 0), "http")),
        ("for=6.6.6.6, for=203.0.113.9;proto=https;host=a.example, for=10.0.0.2;proto=http;host=b.example",
            Told(("203.0.113.9", 0), "https", b"a.example")),
        ("for=203.0.113.9;host=\"a.example:8443\"", Told(("203.0.113.9", 0), None, b"a.example:8443")),
        # the last proxy says nothing of its client: whatever stands left of it could be the client's own
        ("for=6.6.6.6, proto=https", Told(PEER, "https")),
        ("for=6.6.6.6;proto=https,", Told(PEER)),
        ("for=6.6.6.6, ;", Told(PEER)),
        ('for=6.6.6.6, secret="a,b;for=1.1.1.1"', Told(PEER)),
        ("", Told(PEER)),
        ('x="\\"", for=203.0.113.9', Told(("203.0.113.9", 0))),
        ("for=203.0.113.9;;proto=https;", Told(("203.0.113.9", 0), "https")),
        ("for=203.0.113.9 \t,\t for=10.0.0.2", Told(("203.0.113.9", 0))),
    ],
)  # fmt: skip
def test_forwarded(value: str, expected: Told) -> None:
    """RFC 7239"""
    assert read(("Forwarded", value), family="forwarded") == expected


@pytest.mark.parametrize(
    "value",
    [
        "203.0.113.9", "for", "for=", "=1", "for =1.2.3.4", "for= 1.2.3.4", "for=1.2.3.4; proto=https",
        "for=1.2.3.4 ;proto=https", "for=1.2.3.4;for=5.6.7.8", "for=1.2.3.4;FOR=1.2.3.4", "for=[::1]", "for=::1",
        'for="::1"', "for=1.2.3.4:80", 'for="1.2.3.4', 'for="1.2.3.4\\"', 'for=1.2.3.4"', "for=1.2.3.4 x",
        "for='1.2.3.4'", 'for="unix:"', "for=garbage", 'for=""', "for=1.2.3.4;proto=ftp", 'for=1.2.3.4;host=""',
        'for=1.2.3.4;host="a b"',
        # what a client leaves open, and what a proxy adds behind it
        'for="1.1.1.1, for=203.0.113.9', 'x=", for=203.0.113.9;by="_proxy"', 'x=", for="[2001:db8::1]"',
        'x=", for="203.0.113.9:1";by="_proxy"', 'x="\\, for="203.0.113.9:1"',
    ],
)  # fmt: skip
def test_forwarded_that_is_none(value: str) -> None:
    with pytest.raises(BadRequest, match="the Forwarded field of a trusted proxy is malformed"):
        read(("Forwarded", value), family="forwarded")


def test_each_line_of_forwarded_stands_on_its_own() -> None:
    """A quote that the client leaves open in its line does not reach into the line of the proxy."""
    with pytest.raises(BadRequest):
        read(("Forwarded", 'x="'), ("Forwarded", 'for=203.0.113.9;by="'), family="forwarded")
    lines = (("Forwarded", "for=6.6.6.6"), ("Forwarded", "for=203.0.113.9"), ("Forwarded", "for=10.0.0.2"))
    assert read(*lines, family="forwarded").client == ("203.0.113.9", 0)


# ------------------------------------------------------------------------------------------- what no client can reach

ADDRESSES = st.sampled_from(["203.0.113.9", "2001:db8::9", "198.51.100.1:80", "[2001:db8::9]:443"])
PROXIES = st.lists(st.sampled_from(["10.0.0.2", "10.9.9.9", "192.0.2.7", "2001:db8:1::1", "unix:"]), max_size=4)
LIES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=60)


@settings(max_examples=60)
@given(LIES, ADDRESSES, PROXIES)
@example("10.0.0.1", "203.0.113.9", ["10.0.0.2"])
def test_whatever_a_client_sends_it_is_itself(lie: str, address: str, proxies: list[str]) -> None:
    """Each trusted proxy appends its peer; the first of them that of the client, who may have sent any list."""
    honest = client(", ".join([address, *proxies]))
    assert client(", ".join([lie, address, *proxies])) == honest
    assert read(("X-Forwarded-For", lie), ("X-Forwarded-For", ", ".join([address, *proxies]))).client == honest
    assert honest is not None
    assert not TrustList(TRUSTED).trusts_peer(honest[0])


@settings(max_examples=60)
@given(LIES, ADDRESSES)
def test_whatever_a_client_sends_it_is_itself_or_refused(lie: str, address: str) -> None:
    """`Forwarded` is read from the left, so a client can make its own request malformed, and nothing else."""
    try:
        told = read(("Forwarded", f'{lie}, for="{address}";proto=http'), family="forwarded")
    except BadRequest:
        return
    host = address.rpartition(":")[0].strip("[]") if address[0] == "[" or address.count(":") == 1 else address
    assert told.client is not None
    assert (told.client[0], told.scheme) == (host, "http")


TOKENS = st.text("abcdefgh0123_-!#$", min_size=1, max_size=8)
QUOTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(TOKENS.map(str.lower), TOKENS | QUOTABLE, max_size=4), min_size=1, max_size=5))
def test_forwarded_is_read_as_it_was_written(elements: list[dict[str, str]]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    text = ", ".join(";".join(f"{name}={quoted(value)}" for name, value in pairs.items()) for pairs in elements)
    # A list of one element without anything in it is written as nothing, and read as that.
    assert parse_forwarded(text.encode()) == [
        {name.encode(): value.encode() for name, value in pairs.items()} for pairs in elements
    ]


@settings(max_examples=60)
@given(st.binary(max_size=80))
def test_no_bytes_surprise_the_reader(value: bytes) -> None:
    for family, name in (("x-forwarded", b"x-forwarded-for"), ("forwarded", b"forwarded")):
        rules = ProxyRules(TrustList(TRUSTED), family, ALL)
        try:
            told = rules.read([(name, value)], PEER)
        except BadRequest:
            continue
        assert told.client is None or 0 <= told.client[1] < 65536


# ------------------------------------------------------------------------------------------------------ allowed hosts


@pytest.mark.parametrize(
    ("entries", "yes", "no"),
    [
        (["example.org"], ["example.org", "EXAMPLE.org", "example.org:8000", "example.org."],
            ["", "www.example.org", "example.org.evil", "evilexample.org", "xexample.org"]),
        ([".example.org"], ["example.org", "www.example.org", "a.b.example.org"], ["evilexample.org", "org", ".", ""]),
        (["*.example.org"], ["www.example.org", "a.b.example.org:1"], ["example.org", "evilexample.org"]),
        (["127.0.0.1", "[::1]"], ["127.0.0.1:80", "[::1]", "[::1]:8000"], ["127.0.0.2", "::1", "[::2]"]),
        (["*"], ["", "anything", "[::1]:1"], []),
        (["a", "b"], ["a", "b"], ["c", "ab"]),
    ],
)  # fmt: skip
def test_allowed_hosts(entries: list[str], yes: list[str], no: list[str]) -> None:
    """P1"""
    hosts = HostList(entries)
    for host in yes:
        hosts.check(host.encode())
    for host in no:
        with pytest.raises(BadRequest) as caught:
            hosts.check(host.encode())
        assert caught.value.status == 421
    for none in (None, b"a" * 300):
        with pytest.raises(BadRequest):
            hosts.check(none)


@pytest.mark.parametrize(
    ("host", "parts"),
    [
        (b"a", ("a", None)), (b"a:80", ("a", 80)), (b"a:", ("a", None)), (b"[::1]", ("::1", None)),
        (b"[::1]:80", ("::1", 80)), (b"1.2.3.4:1", ("1.2.3.4", 1)), (b"", ("", None)),
    ],
)  # fmt: skip
def test_the_parts_of_a_host(host: bytes, parts: tuple[str, int | None]) -> None:
    assert split_host(host) == parts
