"""What an application is told behind a proxy, by real servers: headers, PROXY protocol, hosts, and through reloads.

H3, H5, H7, H10, G2, G3, P1 and the rows of S4 about proxy headers. ::1 is the peer that nobody trusts.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.process.proxy_site import APPS, told, write_site
from tests.process.ws_probe import WsClient, handshake
from tests.rawhttp import Address, RawClient, raw, request_bytes
from tests.support import Server, wait_for
from tests.test_proxy_protocol import FOUR, LINE, binary, extra

EVERYTHING = ("--forwarded-fields", "for,proto,host,port,prefix")
FOR, PROTO, HOST, PORT, PREFIX = (f"X-Forwarded-{name}" for name in ("For", "Proto", "Host", "Port", "Prefix"))


@dataclass
class Site:
    server: Server
    interface: str
    stranger: Address  # where clients are not trusted
    path: str  # of the Unix socket

    def ask(self, *headers: tuple[str, str], address: Address | None = None, target: str = "/x") -> dict[str, Any]:
        with RawClient(address or self.server.port) as client:
            return told(client.request("GET", target, headers))

    def status(self, *headers: tuple[str, str]) -> int:
        with RawClient(self.server.port) as client:
            return client.request("GET", "/", headers).status


@contextlib.contextmanager
def serving(folder: Path, interface: str, *args: str, trusted: str = "127.0.0.1,unix") -> Iterator[Site]:
    write_site(folder)
    path = str(folder / "s")
    binds = ("--bind", "127.0.0.1:0", "--bind", "[::1]:0", "--bind", f"unix:{path}")
    flavour = ("h11", "asyncio") if interface == "wsgi" else ("httptools", "uvloop")
    options = ("--http", flavour[0], "--loop", flavour[1], "--trusted-proxies", trusted, "--access-log", "-")
    with Server(APPS[interface], *binds, *options, *args, cwd=folder) as server:
        stranger = ("::1", int(server.wait_line(r"listening at http://\[::1\]:(\d+)")[1]))
        yield Site(server, interface, stranger, path)
        assert server.stop() == 0


@pytest.fixture(scope="module", params=list(APPS))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server that believes every field of `X-Forwarded-*`."""
    with serving(tmp_path_factory.mktemp("site"), request.param, *EVERYTHING) as running:
        yield running


# ------------------------------------------------------------------------------------------------------------ headers


def test_a_trusted_peer_is_believed(site: Site) -> None:
    """H3, H10, G2: client and scheme are the client's, in the access log, too; the header stays as it was sent."""
    for address in (site.server.port, site.path):
        said = site.ask((FOR, "6.6.6.6, 203.0.113.9:99"), (PROTO, "https"), address=address)
        assert said["client"] == ["203.0.113.9", 99]
        assert said["scheme"] == "https"
        assert said["seen"] == {"x-forwarded-for": "6.6.6.6, 203.0.113.9:99"}
        assert said["host"] == "127.0.0.1"
    site.server.wait_line(r'^203\.0\.113\.9 - - \[.*"GET /x HTTP/1\.1" 200 ')


def test_others_are_not(site: Site) -> None:
    lies = [(FOR, "127.0.0.1"), (PROTO, "https"), (HOST, "evil"), (PORT, "1"), (PREFIX, "/p"), ("Forwarded", "for=_x")]
    said = site.ask(*lies, address=site.stranger)
    assert said["client"][0] == "::1"
    assert (said["scheme"], said["host"], said["root"], said["path"]) == ("http", "127.0.0.1", "", "/x")
    assert said["server"] == list(site.stranger)
    assert said["seen"] == {"x-forwarded-for": "127.0.0.1", "forwarded": "for=_x"}
    assert site.ask((FOR, "garbage"), address=site.stranger)["client"][0] == "::1", "it is a header like any other"


def test_a_trusted_peer_that_says_nothing(site: Site) -> None:
    assert site.ask()["client"][0] == "127.0.0.1"
    assert site.ask(address=site.path)["client"] is None
    assert site.ask((FOR, "unknown"))["client"] is None, "and not the proxy"


def test_host_port_and_prefix(site: Site) -> None:
    """H7, G2: links that the application makes lead to where its client came from."""
    said = site.ask((HOST, "Shop.example"), (PROTO, "https"), (PREFIX, "/shop/"))
    assert (said["host"], said["server"], said["scheme"]) == ("Shop.example", ["Shop.example", 443], "https")
    assert (said["root"], said["path"]) == ("/shop", "/shop/x")
    assert site.ask((PREFIX, "/shop"), target="/shop/x")["path"] == "/shop/x", "a proxy may leave the prefix"
    assert site.ask()["root"] == "", "of one request, not of the connection or the worker"
    said = site.ask((PORT, "8443"), (PROTO, "https"), ("Host", "shop.example:8000"))
    assert (said["host"], said["server"]) == ("shop.example:8443", ["shop.example", 8443])
    said = site.ask((PORT, "443"), (PROTO, "https"), (HOST, "[2001:db8::1]:99"), address=site.path)
    assert (said["host"], said["server"]) == ("[2001:db8::1]", ["2001:db8::1", 443])


def test_prefixes_without_end(site: Site) -> None:
    """More of them than are kept are served all the same."""
    with RawClient(site.server.port) as client:
        for number in range(100):
            assert told(client.request("GET", "/x", [(PREFIX, f"/p{number}")]))["path"] == f"/p{number}/x"


def test_a_connection_carries_many_clients(site: Site) -> None:
    """What was told of one request is forgotten at the next, also at a pipelined one."""
    with RawClient(site.server.port) as client:
        for number in (1, 2, 3):
            assert (
                told(client.request("GET", "/", [(FOR, f"203.0.113.{number}")]))["client"][0] == f"203.0.113.{number}"
            )
        client.send(request_bytes("GET", "/", [(FOR, "203.0.113.9")]) + request_bytes("GET", "/"))
        assert told(client.read_response())["client"][0] == "203.0.113.9"
        assert told(client.read_response())["client"][0] == "127.0.0.1"


@pytest.mark.parametrize("header", [(FOR, "garbage"), (PROTO, "ftp"), (HOST, "a b"), (PORT, "x"), (PREFIX, "//evil")])
def test_nonsense_is_refused(site: Site, header: tuple[str, str]) -> None:
    assert site.status(header) == 400
    site.server.wait_line(r"warning refused a request from .* field of a trusted proxy is malformed")
    assert len(re.findall("warning refused a request", site.server.log)) == 1, "the log says it once"


def test_underscores_and_httpoxy(site: Site) -> None:
    """G3: neither passes for another header, and `Proxy` does not become a setting of HTTP clients (CVE-2016-5385)."""
    said = site.ask(("X_Forwarded_For", "6.6.6.6"), ("Proxy", "http://evil"), (FOR, "203.0.113.9"))
    assert said["client"][0] == "203.0.113.9"
    assert said["seen"]["x-forwarded-for"] == "203.0.113.9"
    assert ("proxy" in said["seen"]) == (site.interface == "asgi")
    assert site.ask(("X_Forwarded_For", "6.6.6.6"))["client"][0] == "127.0.0.1"


def test_forwarded_alone(tmp_path: Path) -> None:
    """RFC 7239; and then `X-Forwarded-For` is a client's own. By default neither host nor prefix is believed."""
    with serving(tmp_path, "asgi", "--forwarded-headers", "forwarded") as site:
        value = 'for=6.6.6.6, for="[2001:db8::9]:1";proto=https;host=evil'
        said = site.ask(("Forwarded", value), (FOR, "6.6.6.6"), (PREFIX, "/p"))
        assert (said["client"], said["scheme"], said["host"], said["root"]) == (
            ["2001:db8::9", 1], "https", "127.0.0.1", ""
        )  # fmt: skip
        assert site.ask((FOR, "6.6.6.6"))["client"][0] == "127.0.0.1"
        assert site.status(("Forwarded", 'for="1.1.1.1, for=203.0.113.9')) == 400


def test_nobody_is_trusted_by_default(tmp_path: Path) -> None:
    write_site(tmp_path)
    with Server("app:app", cwd=tmp_path) as server, RawClient(server.port) as client:
        headers = [(FOR, "6.6.6.6"), (PROTO, "https"), ("Forwarded", "for=6.6.6.6")]
        said = told(client.request("GET", "/", headers))
        assert (said["client"][0], said["scheme"]) == ("127.0.0.1", "http")
        answer = raw(server.port, LINE + request_bytes("GET", "/"))
        assert answer.startswith(b"HTTP/1.1 400 "), "a PROXY header is no request"


# -------------------------------------------------------------------------------------------------------------- hosts


def test_allowed_hosts(tmp_path: Path) -> None:
    """P1; RFC 9110, 15.5.20. What counts is the host that the application sees, whoever has named it."""
    args = ("--allowed-hosts", ".example.org", "--ready-probe", "/", *EVERYTHING)
    with serving(tmp_path, "wsgi", *args) as site:
        for address in (site.server.port, site.stranger, site.path):
            with RawClient(address) as client:
                assert (
                    told(client.request("GET", "/", [("Host", "www.Example.org:80")]))["host"] == "www.Example.org:80"
                )
                refused = client.request("GET", "/", [("Host", "evil.example")])
                assert (refused.status, refused.header(b"connection")) == (421, b"close")
            assert raw(address, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421 ")
            assert raw(address, b"GET http://evil/ HTTP/1.1\r\nHost: example.org\r\n\r\n").startswith(b"HTTP/1.1 421 ")
        assert site.ask((HOST, "example.org"), ("Host", "upstream"))["host"] == "example.org"
        assert site.status((HOST, "evil.example"), ("Host", "example.org")) == 421
        assert site.status(("Host", "upstream")) == 421


# ---------------------------------------------------------------------------------------------------- PROXY protocol


@pytest.fixture(scope="module")
def announced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("announced")
    args = ("--proxy-protocol", "--log-level", "debug", "--workers", "2")
    with serving(folder, "asgi", *args, trusted="127.0.0.1,unix,198.18.0.0/15") as running:
        yield running


V1 = LINE
V2 = binary(FOUR)
ALL_HEADERS = pytest.mark.parametrize(
    "header", [V1, V2, binary(FOUR + extra(4, bytes(3000)))], ids=["v1", "v2", "long"]
)


def introduced(address: Address, header: bytes, pieces: bool = False) -> RawClient:
    client = RawClient(address)
    for piece in [header[at : at + 1] for at in range(len(header))] if pieces else [header]:
        client.send(piece)
    return client


@ALL_HEADERS
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_proxy_announces_its_client(announced: Site, header: bytes, kind: str) -> None:
    """Both ends are the client's; what it says itself is not believed, for it is not the proxy that says it."""
    address = announced.server.port if kind == "tcp" else announced.path
    with introduced(address, header + request_bytes("GET", "/x", [(FOR, "6.6.6.6"), (PROTO, "https")])) as client:
        said = told(client.read_response())
        assert (said["client"], said["server"]) == (["203.0.113.9", 4711], ["192.0.2.2", 443])
        assert said["scheme"] == "http"
        assert told(client.request("GET", "/"))["client"] == ["203.0.113.9", 4711], "it is the connection's"


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_a_header_in_single_bytes(announced: Site, header: bytes) -> None:
    with introduced(announced.server.port, header, pieces=True) as client:
        assert told(client.request("GET", "/"))["client"] == ["203.0.113.9", 4711]


def test_half_a_header_costs_nothing_and_has_a_deadline(tmp_path: Path) -> None:
    """The bytes are taken, so the socket is not readable and the loop sleeps; time is up after a second."""
    with serving(tmp_path, "asgi", "--proxy-protocol", "--request-header-timeout", "1") as site:
        clients = [introduced(site.server.port, header) for header in (V1[:20], V2[:20], V2[:3], b"")]
        before = [cpu(pid) for pid in site.server.worker_pids()]
        for client in clients:
            assert client.eof()
            client.close()
        spent = sum(cpu(pid) for pid in site.server.worker_pids()) - sum(before)
        assert spent < 0.5, f"{spent} s of CPU time while waiting"


def cpu(pid: int) -> float:
    """Seconds of CPU time that a process has taken; 0 where that cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PROXY TCP4 x\r\n", binary(FOUR, 0x11), b"\x16\x03\x01", binary(b"")],
)
def test_a_trusted_peer_must_introduce_its_client(announced: Site, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        assert raw(announced.server.port, data) == b"", "not a word: it is no HTTP that we speak then"
    announced.server.wait_line(
        "warning closed a connection of the trusted proxy 127.0.0.1: .* must send a PROXY header"
    )


def test_a_stranger_cannot_introduce_anybody(announced: Site) -> None:
    """It is served as who it is; a PROXY header from it is a malformed request (S4)."""
    assert announced.ask((FOR, "6.6.6.6"), address=announced.stranger)["client"][0] == "::1"
    for header in (V1, V2):
        answer = raw(announced.stranger, header + request_bytes("GET", "/"))
        assert re.match(rb"HTTP/1\.1 400 ", answer)
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("header", [binary(b"", 0x20, 0), binary(FOUR, 0x20)])
def test_a_proxy_that_asks_for_itself(announced: Site, header: bytes) -> None:
    """LOCAL, as in its health checks: its own address, as the protocol wants it. But not its word: HAProxy says LOCAL
    of clients without an address, too."""
    with introduced(announced.server.port, header) as client:
        assert told(client.request("GET", "/"))["client"][0] == "127.0.0.1"
        assert told(client.request("GET", "/", [(FOR, "6.6.6.6")]))["client"][0] == "127.0.0.1"


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", binary(b"", 0x21, 0), binary(bytes(216), 0x21, 0x31)])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_client_that_the_proxy_cannot_name_is_nobody(announced: Site, header: bytes, kind: str) -> None:
    """Not the proxy: it could say whom it is, in a header, and the proxy's address may open doors."""
    with introduced(announced.server.port if kind == "tcp" else announced.path, header) as client:
        assert told(client.request("GET", "/", [(FOR, "6.6.6.6")]))["client"] is None


def test_tls_at_the_proxy(announced: Site) -> None:
    """H3: the SSL extension of version 2."""
    with introduced(announced.server.port, binary(FOUR + extra(0x20, b"\x01" + bytes(4)))) as client:
        assert told(client.request("GET", "/"))["scheme"] == "https"


def test_the_proxy_behind_the_announced_client(announced: Site) -> None:
    """A balancer announces a proxy that is trusted, too: that one's headers are believed."""
    with introduced(announced.server.port, V1.replace(b"203.0.113.9", b"198.18.0.1")) as client:
        assert told(client.request("GET", "/", [(FOR, "198.51.100.1")]))["client"][0] == "198.51.100.1"


# --------------------------------------------------------------------------------------------------- through a reload


def test_a_moved_connection_is_believed_as_before(tmp_path: Path) -> None:
    """The worker that takes it over knows whom it is with: the announced client, nobody, or the proxy itself."""
    ends = {
        "announced": (V1, "203.0.113.9"),
        "a proxy": (V1.replace(b"203.0.113.9", b"127.0.0.1"), "198.51.100.1"),
        "nobody": (b"PROXY UNKNOWN\r\n", None),
        "itself": (binary(b"", 0x20, 0), None),
    }
    with serving(tmp_path, "wsgi", "--proxy-protocol") as site, contextlib.ExitStack() as stack:
        clients = {
            (kind, name): stack.enter_context(introduced(address, header))
            for kind, address in (("tcp", site.server.port), ("unix", site.path))
            for name, (header, _) in ends.items()
        }
        stranger = stack.enter_context(RawClient(site.stranger))
        for version in ("one", "two", "three"):
            if version != "one":
                write_site(tmp_path, version)
                site.server.reload()
            for (kind, name), client in clients.items():
                said = told(client.request("GET", "/", [(FOR, "198.51.100.1")]))
                host = said["client"] and said["client"][0]
                expected = "127.0.0.1" if (kind, name) == ("tcp", "itself") else ends[name][1]
                assert (said["version"], host) == (version, expected), name
            assert told(stranger.request("GET", "/", [(FOR, "6.6.6.6")]))["client"][0] == "::1"


def test_trust_follows_the_settings_at_a_reload(tmp_path: Path) -> None:
    """A proxy keeps its connections for hours: what is trusted from now on counts on those as well."""
    write_site(tmp_path)
    settings = tmp_path / "apphost.toml"
    settings.write_text('forwarded_headers = "none"\n')
    with Server("app:app", cwd=tmp_path) as server, RawClient(server.port) as client:
        for text, expected in (
            ("", "127.0.0.1"),
            ('trusted_proxies = ["127.0.0.0/8"]', "203.0.113.9"),
            ("", "127.0.0.1"),
        ):
            settings.write_text(text + "\n")
            server.reload()
            assert told(client.request("GET", "/", [(FOR, "203.0.113.9")]))["client"][0] == expected
        assert server.stop() == 0


def test_a_stop_does_not_wait_for_introductions(tmp_path: Path) -> None:
    patient = ("--graceful-timeout", "600", "--request-header-timeout", "600")
    with (
        serving(tmp_path, "asgi", "--proxy-protocol", *patient) as site,
        introduced(site.server.port, V1[:20]) as client,
        introduced(site.server.port, V1) as other,
    ):
        assert told(other.request("GET", "/"))["client"][0] == "203.0.113.9"  # so the first was accepted, too
        site.server.reload()
        site.server.wait_line(r"worker 1 gen 1 gone: exit 0")
        assert client.eof()


# --------------------------------------------------------------------------------------------------------- WebSockets


def test_websockets(tmp_path: Path) -> None:
    """W4: client and scheme of the handshake's proxy; the socket that moves to the next worker keeps them."""
    with serving(tmp_path, "asgi", *EVERYTHING, "--ws-on-reload", "rejoin") as site:
        headers = [(FOR, "6.6.6.6, 203.0.113.9"), (PROTO, "https"), (HOST, "shop.example"), (PREFIX, "/shop")]
        with WsClient(site.server.port, "/x", headers).opened() as client:
            for version in ("one", "two"):
                if version == "two":
                    write_site(tmp_path, version)
                    site.server.reload()
                    wait_for(lambda: "worker 1 gen 1 gone" in site.server.log)
                client.say("?")
                text = client.hear()
                assert isinstance(text, str)
                said = json.loads(text)
                assert said["version"] == version
                assert (said["client"], said["scheme"], said["host"]) == (["203.0.113.9", 0], "wss", "shop.example")
                assert (said["root"], said["path"], said["server"]) == ("/shop", "/shop/x", ["shop.example", 443])
        with WsClient.ask(site.server.port, handshake("/", [(PROTO, "wss")])) as client:
            client.opened().say("?")
            assert json.loads(client.hear())["scheme"] == "wss"
