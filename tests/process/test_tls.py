"""TLS in real processes with real clients: H3, W4, G2, X6 and A9, certificates that change, ends and deploys."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_websocket

from tests import operating
from tests import pki as pki_module
from tests.load import Load, deploy, serving, site
from tests.pki import Pki
from tests.support import DEADLINE, RawClient, Server, connect, request_bytes, wait_for, write_app

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
NAMES = {TLS12: "TLSv1.2", TLS13: "TLSv1.3"}

FLAVOURS = [("asgi", "httptools", "uvloop"), ("wsgi", "h11", "asyncio")]
each_flavour = pytest.mark.parametrize("flavour", FLAVOURS, ids="-".join)

_ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        tls = scope["extensions"]["tls"]
        said = [scope["scheme"], tls["tls_version"], sorted(scope["extensions"])]
        await send({"type": "websocket.send", "text": repr(said)})
        return await receive()
    size, more = 0, True
    while more and scope["path"] != "/early":
        event = await receive()
        size += len(event["body"])
        more = event["more_body"]
    facts = {name: scope[name] for name in ("scheme", "client", "server", "extensions")}
    body = {"/size": str(size), "/early": "early"}.get(scope["path"], repr(facts)).encode()
    if scope["path"] == "/big":
        body = bytes(range(256)) * 4096 * int(scope["query_string"])
    length = [(b"content-length", str(len(body)).encode())]
    if scope["path"] == "/cut":
        body, length = b"some", []
    if scope["path"] == "/end":
        length = [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": body, "more_body": scope["path"] == "/cut"})
    if scope["path"] == "/cut":
        raise RuntimeError("cut")
"""

_WSGI = """
import os

def app(environ, start_response):
    path = environ["PATH_INFO"]
    size = 0
    while path != "/early" and (piece := environ["wsgi.input"].read(65536)):
        size += len(piece)
    facts = {"scheme": environ["wsgi.url_scheme"], "client": (environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"])),
             "server": (environ["SERVER_NAME"], int(environ["SERVER_PORT"]))}
    body = {"/size": str(size), "/early": "early"}.get(path, repr(facts)).encode()
    if path == "/big":
        body = bytes(range(256)) * 4096 * int(environ["QUERY_STRING"])
    if path == "/file":
        with open("content", "wb") as file:
            file.write(bytes(range(256)) * 4096 * 3)
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](open("content", "rb"))
    if path == "/cut":
        start_response("200 OK", [])
        return cut()
    start_response("200 OK", [] if path == "/end" else [("Content-Length", str(len(body)))])
    return [body]

def cut():
    yield b"some"
    raise RuntimeError("cut")
"""

_SOURCES = {"asgi": _ASGI, "wsgi": _WSGI}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return pki_module.make(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def running(folder: Path, flavour: tuple[str, str, str], *args: str, **options: object) -> Iterator[Server]:
    interface, parser, loop = flavour
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    write_app(folder, "app", _SOURCES[interface])
    choice = ("--interface", interface, "--http", parser, "--loop", loop, "--lifespan", "off", "--log-level", "debug")
    with Server("app:app", *choice, *args, cwd=folder, **options) as server:  # type: ignore[arg-type]
        yield server
        if server.exit_code is None:
            assert server.stop() == 0


@pytest.fixture(scope="module", params=FLAVOURS, ids="-".join)
def flavour(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def server(flavour: tuple[str, str, str], pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two certificates, client certificates welcome, a plain port and a plain Unix socket; two workers."""
    folder = tmp_path_factory.mktemp("site")
    binds = ["--bind", "https://127.0.0.1:0", "--bind", "http://127.0.0.1:0", "--bind", f"unix:{folder}/socket"]
    client_certs = ["--tls-ca-certs", str(pki.ca_file), "--tls-client-certs", "optional"]
    limits = ["--limit-request-body", "40MiB", "--workers", "2"]
    with running(folder, flavour, *binds, *pki.options("local", "other"), *client_certs, *limits) as server:
        yield server


def facts(server: Server, tls: ssl.SSLContext, host: str = "127.0.0.1", **more: str) -> dict[str, object]:
    with RawClient(server.port, tls=tls, host=host) as client:
        response = client.request("GET", "/", list(more.items()))
        assert response.status == 200
        local = client.sock.getsockname()
        found = ast.literal_eval(response.body.decode())
    assert found.pop("client") == local
    assert found.pop("server") == ("127.0.0.1", server.port)
    return found  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- what is told


def test_listening_line(server: Server) -> None:
    assert server.wait_line(r"listening at https://127\.0\.0\.1:\d+$")
    assert f"https://127.0.0.1:{server.port}" in operating.status(server)["listening"]
    assert server.wait_line(r"listening at http://127\.0\.0\.1:\d+$")
    assert server.wait_line(r"listening at unix:")


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_scheme_and_extension(server: Server, pki: Pki, flavour: tuple[str, str, str], version: ssl.TLSVersion) -> None:
    """H3, G2, X6: the scheme, and each value of the extension."""
    tls = pki.client(version=version)
    found = facts(server, tls)
    assert found.pop("scheme") == "https"
    if flavour[0] == "wsgi":
        assert not found
        return
    with connect(server.port, tls=tls) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        cipher = sock.cipher()
        assert cipher is not None
        suite = {each["name"]: each["id"] & 0xFFFF for each in tls.get_ciphers()}[cipher[0]]
    assert found == {
        "extensions": {
            "tls": {
                "server_cert": pki.leaf("local"),
                "client_cert_chain": [],
                "client_cert_name": None,
                "client_cert_error": None,
                "tls_version": {TLS12: 0x0303, TLS13: 0x0304}[version],
                "cipher_suite": suite,
            }
        }
    }
    assert version is TLS12 or suite in (0x1301, 0x1302, 0x1303)


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_client_certificate(server: Server, pki: Pki, flavour: tuple[str, str, str], version: ssl.TLSVersion) -> None:
    """X6: who the client is, the same in a session that is resumed."""
    if flavour[0] == "wsgi":
        pytest.skip("WSGI has no word for it")
    found = facts(server, pki.client("client", version))
    tls = found["extensions"]["tls"]  # type: ignore[index]
    assert tls["client_cert_chain"][0] == pki.leaf("client")
    assert all(each.startswith("-----BEGIN CERTIFICATE-----") for each in tls["client_cert_chain"])
    name, unit, organization = (
        tls["client_cert_name"].split(",OU=")[0],
        *tls["client_cert_name"].split(",OU=")[1].rsplit(",O="),
    )
    assert name == 'CN=Jo \\"J\\"\\, the #1'
    assert unit.startswith("Testing cert #")
    assert organization == "Test\\, Inc."
    assert tls["client_cert_error"] is None


@pytest.mark.parametrize("announced", [False, True], ids=["bare", "PROXY"])
def test_with_what_a_trusted_proxy_tells(tmp_path: Path, pki: Pki, announced: bool) -> None:
    """H3, X6: TLS that a proxy hands through, with and without a PROXY header before it; and allowed hosts."""
    options = ["--trusted-proxies", "127.0.0.1", "--allowed-hosts", "example.org", *pki.options("local")]
    options += ["--proxy-protocol"] if announced else []
    with running(tmp_path, FLAVOURS[0], *options) as server:
        plain = connect(server.port)
        if announced:
            plain.sendall(b"PROXY TCP4 127.0.0.1 192.0.2.2 4711 8443\r\n")  # its client is a proxy that is trusted, too
        with pki.client().wrap_socket(plain, server_hostname="127.0.0.1") as sock:

            def ask(host: str) -> bytes:
                sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n".encode())
                return sock.recv(65536)

            head, _, body = ask("example.org").partition(b"\r\n\r\n")
            found = ast.literal_eval(body.decode())
            assert head.startswith(b"HTTP/1.1 200 ")
            assert (found["scheme"], found["client"]) == ("https", ("203.0.113.9", 0))
            assert found["server"] == (("192.0.2.2", 8443) if announced else ("127.0.0.1", server.port))
            assert found["extensions"]["tls"]["server_cert"] == pki.leaf("local")
            assert ask("elsewhere.org").startswith(b"HTTP/1.1 421 ")


def test_allowed_hosts(tmp_path: Path, pki: Pki) -> None:
    with (
        running(tmp_path, FLAVOURS[1], "--allowed-hosts", "localhost", *pki.options("local")) as server,
        RawClient(server.port, tls=pki.client()) as client,
    ):
        assert client.request("GET", "/", [("Host", "localhost")]).status == 200
        assert client.request("GET", "/", [("Host", "elsewhere.org")]).status == 421


def test_no_extension_without_tls(server: Server, flavour: tuple[str, str, str]) -> None:
    """A9, H3: a listener that is written `http://`, and a Unix socket."""
    port = int(server.wait_line(r"listening at http://127\.0\.0\.1:(\d+)")[1])
    for address in (port, str(server.cwd / "socket")):
        if flavour[0] == "wsgi" and isinstance(address, str):
            continue  # without REMOTE_PORT
        with RawClient(address) as client:
            found = ast.literal_eval(client.request("GET", "/").body.decode())
            assert found["scheme"] == "http"
            assert "tls" not in found.get("extensions", {})


def test_sni(server: Server, pki: Pki) -> None:
    """Of several certificates the one with the name that the client asks for, else the first."""

    def shown(host: str | None) -> str:
        tls = pki.client()
        tls.check_hostname = False
        with connect(server.port) as plain, tls.wrap_socket(plain, server_hostname=host) as sock:
            return ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True) or b"")

    local, other = pki.leaf("local"), pki.leaf("other")
    for host in ("other.example", "OTHER.example", "a.wild.example", "b.wild.example"):
        assert shown(host) == other
    for host in ("localhost", "127.0.0.1", "nobody.example", "wild.example", "a.b.wild.example", None):
        assert shown(host) == local


def test_httpx_and_curl(server: Server, pki: Pki) -> None:
    with httpx.Client(verify=pki.client(), base_url=f"https://127.0.0.1:{server.port}") as client:
        assert client.get("/size").text == "0"
        assert client.post("/size", content=b"x" * 100_000).text == "100000"
    if shutil.which("curl"):
        command = ["curl", "-sS", "--cacert", str(pki.ca_file), f"https://127.0.0.1:{server.port}/size", "-d", "four"]
        done = subprocess.run([*command, "-w", " %{http_version}"], capture_output=True, text=True, check=True)
        assert done.stdout == "4 1.1"


def test_alpn(server: Server, pki: Pki) -> None:
    tls = pki.client()
    tls.set_alpn_protocols(["h2", "http/1.1"])
    with connect(server.port, tls=tls) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.selected_alpn_protocol() == "http/1.1"
        assert sock.compression() is None
    tls.set_alpn_protocols(["h2"])
    with connect(server.port, tls=tls) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.selected_alpn_protocol() is None


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_resumption(server: Server, pki: Pki, version: ssl.TLSVersion) -> None:
    """The workers of a generation share the keys of tickets: a session goes on in whichever takes the connection."""
    tls = pki.client(version=version)
    session = None
    for number in range(8):
        with connect(server.port) as plain:
            sock = tls.wrap_socket(plain, server_hostname="127.0.0.1", session=session)
            sock.sendall(request_bytes("GET", "/size"))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert sock.session_reused is (number > 0)
            session = sock.session
            sock.close()


# ------------------------------------------------------------------------------------------------- what is refused


def failed(server: Server, mark: int, why: str) -> None:
    """One line tells it, and no traceback."""
    server.wait_line(rf"\] info the TLS handshake with 127\.0\.0\.1:\d+ has failed: .*{why}", after=mark)
    assert "Traceback" not in "\n".join(server.lines(mark))
    assert sum(" has failed: " in line for line in server.lines(mark)) == 1


def test_old_version(server: Server, pki: Pki) -> None:
    mark = server.mark()
    tls = pki.client()
    tls.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|protocol version"):  # the alert says it
        connect(server.port, tls=tls)
    failed(server, mark, "unsupported protocol")


def test_unknown_client_certificate(server: Server, pki: Pki, tmp_path: Path) -> None:
    """Optional means that none is welcome, and a wrong one is not."""
    mark = server.mark()
    stranger = Pki(tmp_path)
    tls = pki.client()
    tls.load_cert_chain(*stranger.issue("client", "eve@example.com"))
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"), connect(server.port, tls=tls) as sock:
        sock.recv(1)
    failed(server, mark, "the client's certificate is not accepted: ")


def test_http_to_the_tls_port(server: Server) -> None:
    mark = server.mark()
    with RawClient(server.port) as client:
        response = client.request("GET", "/")
        assert (response.status, response.header(b"connection")) == (400, b"close")
        assert b"this port speaks TLS" in response.body
        assert client.eof()
    failed(server, mark, "http request")


def test_tls_to_the_plain_port(server: Server, pki: Pki) -> None:
    port = int(server.wait_line(r"listening at http://127\.0\.0\.1:(\d+)")[1])
    mark = server.mark()
    with pytest.raises(ssl.SSLError):
        connect(port, tls=pki.client())
    server.wait_line(r"\] debug refused a request from 127\.0\.0\.1:\d+: 400 ", after=mark)
    assert "Traceback" not in "\n".join(server.lines(mark))


def test_odd_host_name(server: Server) -> None:
    """A name that is no text in the greeting, where SNI chooses: refused in one line."""
    name = b"\xff\xfe.example"
    entry = b"\0" + struct.pack(">H", len(name)) + name
    sni = struct.pack(">HHH", 0, len(entry) + 2, len(entry)) + entry
    rest = bytes.fromhex("000a00040002001d000d00080006040308040401002b0003020303")
    body = (
        b"\x03\x03"
        + bytes(32)
        + b"\0"
        + b"\0\x02\xc0\x2b"
        + b"\x01\0"
        + struct.pack(">H", len(sni + rest))
        + sni
        + rest
    )
    hello = b"\x16\x03\x01" + struct.pack(">H", len(body) + 4) + b"\x01" + len(body).to_bytes(3, "big") + body
    mark = server.mark()
    with connect(server.port) as sock:
        sock.sendall(hello)
        data = sock.recv(65536)
        assert data[:1] == b"\x15"  # an alert
        assert sock.recv(65536) == b""
    failed(server, mark, "")


def test_client_that_leaves(server: Server, pki: Pki) -> None:
    """Half a handshake, and half a request: nothing to see above debug."""
    mark = server.mark()
    with connect(server.port) as sock:
        sock.sendall(b"\x16\x03\x01")
    server.wait_line(r"\] debug the TLS handshake with \S+ has failed: the client has left", after=mark)
    with connect(server.port, tls=pki.client()) as sock:
        sock.sendall(b"GET / HT")
    with RawClient(server.port, tls=pki.client()) as client:
        assert client.request("GET", "/size").status == 200
    assert not [line for line in server.lines(mark) if "] debug " not in line]


def test_garbage_after_the_handshake(server: Server, pki: Pki) -> None:
    mark = server.mark()
    with connect(server.port, tls=pki.client()) as sock:
        fd = os.dup(sock.fileno())
        with socket.socket(fileno=fd) as plain:
            plain.settimeout(DEADLINE)
            plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(ConnectionError), pytest.raises(ssl.SSLError):
            sock.recv(65536)
    server.wait_line(r"\] debug the TLS connection of \S+ has failed: ", after=mark)


# ------------------------------------------------------------------------------------------------- bodies and ends


def test_big_bodies(server: Server, pki: Pki) -> None:
    with RawClient(server.port, tls=pki.client()) as client:
        assert client.request("POST", "/size", (), bytes(30 * 2**20)).body == str(30 * 2**20).encode()
        assert client.request("GET", "/big?20").body == bytes(range(256)) * 4096 * 20
        assert client.request("GET", "/size").status == 200


def test_slow_reader_gets_everything(server: Server, pki: Pki) -> None:
    """Also behind `Connection: close`, when the server has said its last word long before."""
    with RawClient(server.port, tls=pki.client()) as client:
        client.send(request_bytes("GET", "/big?8", [("Connection", "close")]))
        response = client.read_head()
        time.sleep(0.5)
        assert b"".join(client.read_body(response)) == bytes(range(256)) * 4096 * 8
        assert client.eof()


def test_file(server: Server, pki: Pki, flavour: tuple[str, str, str]) -> None:
    """G18, X5: what sendfile does without TLS."""
    if flavour[0] == "asgi":
        pytest.skip("of WSGI")
    with RawClient(server.port, tls=pki.client()) as client:
        for _ in range(2):
            assert client.request("GET", "/file").body == bytes(range(256)) * 4096 * 3


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_end_is_said(server: Server, pki: Pki, version: ssl.TLSVersion) -> None:
    """close_notify after the last answer, of known length and of none: an end without it is an error of `sock.recv`."""
    with RawClient(server.port, tls=pki.client(version=version)) as client:
        assert client.request("GET", "/size", [("Connection", "close")]).body == b"0"
        assert client.eof()
    with RawClient(server.port, tls=pki.client(version=version)) as client:
        client.send(b"GET /end HTTP/1.0\r\n\r\n")
        assert b"https" in client.read_response().body


def test_cut_response_does_not_look_complete(server: Server, pki: Pki) -> None:
    """A6: where only the end of the connection tells, there is no close_notify."""
    with RawClient(server.port, tls=pki.client()) as client:
        client.send(b"GET /cut HTTP/1.0\r\n\r\n")
        with pytest.raises(OSError, match=r"EOF|reset"):
            client.read_response()
    with RawClient(server.port, tls=pki.client()) as client, pytest.raises(AssertionError, match="ended within"):
        client.request("GET", "/cut")
    server.wait_line("RuntimeError")


def test_half_close(server: Server, pki: Pki) -> None:
    """A client that ends its side still gets its answer (RFC 8446, 6.1; RFC 9112, 9.6)."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = pki.client().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with connect(server.port) as sock:

        def until_done(step: str) -> bytes:
            while True:
                try:
                    return getattr(tls, step)(*([65536] if step == "read" else [])) or b""
                except ssl.SSLWantReadError:
                    if outgoing.pending:
                        sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))

        until_done("do_handshake")
        tls.write(request_bytes("POST", "/size", (), b"four"))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(outgoing.read())
        sock.shutdown(socket.SHUT_WR)
        data = b""
        with contextlib.suppress(ssl.SSLZeroReturnError):
            while piece := until_done("read"):
                data += piece
        assert data.endswith(b"\r\n\r\n4")


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_early_answers_arrive(server: Server, pki: Pki, version: ssl.TLSVersion) -> None:
    """413 and an application that does not read, while the client goes on sending."""
    for target, status in (("/size", 413), ("/early", 200)):
        with RawClient(server.port, tls=pki.client(version=version)) as client:
            size = 2**20 * (100 if status == 413 else 30)
            client.send(request_bytes("POST", target, [("Content-Length", str(size))]))
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 8 * 2**20:
                    client.send(bytes(65536))
                    sent += 65536
            response = client.read_response()
            assert (response.status, response.header(b"connection")) == (status, b"close")
            assert client.eof()


@each_flavour
def test_slow_head(pki: Pki, tmp_path: Path, flavour: tuple[str, str, str]) -> None:
    options = [*pki.options("local"), "--request-header-timeout", "1"]
    with running(tmp_path, flavour, *options) as server, RawClient(server.port, tls=pki.client()) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        assert client.read_response().status == 408
        assert client.eof()


def test_websocket(server: Server, pki: Pki, flavour: tuple[str, str, str]) -> None:
    """W4: wss, the extension tls, and no offer to move."""
    if flavour[0] == "wsgi":
        pytest.skip("of ASGI")
    with connect_websocket(f"wss://127.0.0.1:{server.port}/", ssl=pki.client()) as client:
        assert ast.literal_eval(str(client.recv(DEADLINE))) == ["wss", 0x0304, ["tls", "websocket.http.response"]]


# ------------------------------------------------------------------------------------------------- time and limits


def test_stalled_handshakes(pki: Pki, tmp_path: Path) -> None:
    """They end in time, cost no thread, and count as connections: with five of them there is no room for a sixth."""
    options = ["--tls-handshake-timeout", "1", "--limit-connections", "5", "--threads", "1"]
    with running(tmp_path, FLAVOURS[1], *pki.options("local"), *options) as server, contextlib.ExitStack() as stack:
        begun = time.monotonic()
        stalled = [stack.enter_context(connect(server.port)) for _ in range(5)]
        for sock in stalled[1:]:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        with RawClient(server.port, tls=pki.client()) as client:  # its turn comes when the first has had its time
            assert client.request("GET", "/size").status == 200
        assert time.monotonic() - begun > 0.9
        for sock in stalled:
            assert sock.recv(100) == b""
        assert sum("has failed: it took longer than 1 s" in line for line in server.lines()) == 5


def test_slow_handshake_disturbs_nobody(server: Server, pki: Pki) -> None:
    """Byte by byte, while others are served."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = pki.client().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with connect(server.port) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                for byte in outgoing.read():
                    sock.sendall(bytes([byte]))
                with RawClient(server.port, tls=pki.client()) as client:
                    assert client.request("GET", "/size").status == 200
                incoming.write(sock.recv(65536))
        tls.write(request_bytes("GET", "/size"))
        sock.sendall(outgoing.read())
        data = b""
        while not data:
            incoming.write(sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                data = tls.read(65536)
        assert data.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("mode", ["required", "none"])
def test_client_certificates(pki: Pki, tmp_path: Path, mode: str) -> None:
    checks = ["--tls-ca-certs", str(pki.ca_file)] if mode == "required" else []
    options = [*pki.options("local"), *checks, "--tls-client-certs", mode, "--tls-minimum", "1.3"]
    with running(tmp_path, FLAVOURS[0], *options) as server:
        found = facts(server, pki.client("client"))
        name = found["extensions"]["tls"]["client_cert_name"]  # type: ignore[index]
        assert (name or "").startswith("CN=Jo ") is (mode == "required")
        mark = server.mark()
        with pytest.raises(ssl.SSLError, match=r"(?i)version"):
            connect(server.port, tls=pki.client(version=TLS12))
        server.wait_line("unsupported protocol", after=mark)
        if mode == "required":
            with (
                pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"),
                connect(server.port, tls=pki.client()) as sock,
            ):
                sock.recv(1)
            server.wait_line("peer did not return a certificate", after=mark)


# ------------------------------------------------------------------------------------------------- files that change


def serial(server: Server, pki: Pki) -> str:
    with connect(server.port, tls=pki.client()) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        return ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True) or b"")


def test_renewal_by_reload(tmp_path: Path) -> None:
    """USR1 takes new files; with wrong ones it is given up. What has begun goes on."""
    pki = pki_module.make(tmp_path / "pki")
    old = pki.leaf("local")
    options = [*pki.options("local"), "--tls-watch-interval", "0"]
    with running(tmp_path, FLAVOURS[0], *options) as server, RawClient(server.port, tls=pki.client()) as client:
        assert client.request("GET", "/size").status == 200
        certfile, keyfile = pki.folder / "local.pem", pki.folder / "local.key"
        good_key = keyfile.read_bytes()
        keyfile.write_bytes((pki.folder / "other.key").read_bytes())
        mark = server.mark()
        server.signal(signal.SIGUSR1)
        server.wait_line(f"does not belong to the certificate in {certfile}", after=mark)
        server.wait_line("generation 2 given up", after=mark)
        assert serial(server, pki) == old
        keyfile.write_bytes(good_key)
        pki.issue("local", "127.0.0.1")
        server.reload()
        assert serial(server, pki) == pki.leaf("local") != old
        response = client.request("GET", "/size")
        assert (response.status, response.header(b"connection")) == (200, b"close")


def test_renewal_without_reload(tmp_path: Path) -> None:
    """A changed pair is taken when it is whole; what is not keeps the old one, with one line."""
    pki = pki_module.make(tmp_path / "pki")
    old = pki.leaf("local")
    options = [*pki.options("local"), "--tls-watch-interval", "0.2"]
    with running(tmp_path, FLAVOURS[1], *options) as server, RawClient(server.port, tls=pki.client()) as client:
        assert client.request("GET", "/size").status == 200
        first = (pki.folder / "local.pem").read_bytes(), (pki.folder / "local.key").read_bytes()
        certfile, keyfile = pki.issue("local", "127.0.0.1")
        server.wait_line("worker 1 gen 1 has taken the changed certificates")
        new = pki.leaf("local")
        assert serial(server, pki) == new != old
        assert client.request("GET", "/size").header(b"connection") is None  # what is open stays as it is

        mark = server.mark()
        pki_module.write(certfile, first[0])  # and the key is the other one
        server.wait_line("worker 1 gen 1 keeps the certificates that it has: .* does not belong", after=mark)
        assert serial(server, pki) == new
        pki_module.write(keyfile, first[1])
        server.wait_line("worker 1 gen 1 has taken the changed certificates", after=mark)
        assert serial(server, pki) == old
        assert sum("keeps the certificates" in line for line in server.lines()) == 1

        # A worker that is forked later has the files as they are then.
        mark = server.mark()
        pki.issue("local", "127.0.0.1")
        server.wait_line("worker 1 gen 1 has taken the changed certificates", after=mark)
        mark = server.mark()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_line("worker 2 gen 1 has taken the changed certificates", after=mark)
        assert serial(server, pki) == pki.leaf("local")


def test_key_of_root(tmp_path: Path) -> None:
    """Read before the privileges are dropped, at the start and at a reload; in between nobody can look at it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give root up")
    trial = [sys.executable, "-c", "import sysconfig; sysconfig.get_paths()"]
    try:
        subprocess.run(trial, user="nobody", cwd="/", capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this Python is out of the reach of others")
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:-1]:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    pki = pki_module.make(tmp_path / "pki")
    (pki.folder / "local.key").chmod(0o600)
    options = [*pki.options("local"), "--tls-watch-interval", "0.2", "--user", "nobody"]
    with running(tmp_path, FLAVOURS[0], *options) as server:
        server.wait_line(r"user nobody may not read \S+local\.key: .* send USR1")
        old = serial(server, pki)
        pki.issue("local", "127.0.0.1")
        (pki.folder / "local.key").chmod(0o600)
        server.reload()
        assert serial(server, pki) == pki.leaf("local") != old


# ------------------------------------------------------------------------------------------------- deploys


@each_flavour
def test_deploys_under_load(pki: Pki, tmp_path: Path, flavour: tuple[str, str, str]) -> None:
    """P1, P3: no request is lost; every connection that ends has said so in its last answer."""
    interface, parser, loop = flavour
    options = [*pki.options("local"), "--http", parser, "--loop", loop, "--workers", "2", "--graceful-timeout", "10s"]
    with serving(tmp_path, interface, *options) as server:
        with Load(server.port, clients=6, tls=pki.client()) as load:
            load.wait(60)
            for number in range(2):
                deploy(server, interface, f"v{number}")
                load.wait(60)
        assert not load.report.lost
        assert load.report.versions[-1] == "v1"
        assert load.report.announced >= 6
        assert load.report.connections - load.report.announced <= 6
        # Nothing is left to drain, so the old workers do not wait for their time.
        wait_for(lambda: len(server.worker_pids()) == 2)


def test_idle_connection_in_a_deploy(pki: Pki, tmp_path: Path) -> None:
    """It stays until its next answer; one without a next request gets a clean end when the drain is over."""
    options = [*pki.options("local"), "--graceful-timeout", "2s"]
    with serving(tmp_path, "asgi", *options) as server:
        with (
            RawClient(server.port, tls=pki.client()) as busy,
            RawClient(server.port, tls=pki.client()) as idle,
            connect(server.port) as stalled,
        ):
            for client in (busy, idle):
                assert client.request("GET", "/").header(b"connection") is None
            deploy(server, "asgi", "two")
            response = busy.request("GET", "/")
            assert response.body.startswith(b"one ")
            assert response.header(b"connection") == b"close"
            assert busy.eof()
            assert idle.eof()  # or `recv` would raise
            assert stalled.recv(100) == b""
        wait_for(lambda: len(server.worker_pids()) == 1)


def test_stop_with_idle_connections(pki: Pki, tmp_path: Path) -> None:
    patient = ("--stop-timeout", "600", "--tls-handshake-timeout", "600")
    with (
        serving(tmp_path, "wsgi", *pki.options("local"), *patient) as server,
        RawClient(server.port, tls=pki.client()) as idle,
        connect(server.port) as stalled,
    ):
        assert idle.request("GET", "/").status == 200
        assert server.stop() == 0, "long before `stop_timeout`, and the time for a handshake, are over"
        assert idle.eof()
        assert stalled.recv(100) == b""


def test_websocket_in_a_deploy(pki: Pki, tmp_path: Path) -> None:
    """It cannot move, whatever `ws_on_reload` says: 1012, and it is not told that it could."""
    options = [*pki.options("local"), "--ws-on-reload", "resume"]
    with (
        running(tmp_path, FLAVOURS[0], *options) as server,
        connect_websocket(f"wss://127.0.0.1:{server.port}/", ssl=pki.client()) as client,
    ):
        assert "apphost.resume" not in str(client.recv(DEADLINE))
        server.reload()
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(DEADLINE)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012


def test_session_after_a_deploy(pki: Pki, tmp_path: Path) -> None:
    """A ticket of the generation before is not accepted, which costs a full handshake and nothing else."""
    with serving(tmp_path, "asgi", *pki.options("local")) as server:
        tls = pki.client()
        session = None
        for expected in (False, True, False):
            with connect(server.port) as plain:
                sock = tls.wrap_socket(plain, server_hostname="127.0.0.1", session=session)
                sock.sendall(request_bytes("GET", "/"))
                assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
                assert sock.session_reused is expected
                session = sock.session
                sock.close()
            if expected:
                deploy(server, "asgi", "two")


def test_upgrade_keeps_what_is_plain(pki: Pki, tmp_path: Path) -> None:
    """P9: after USR2 a listener that is written `http://` is still plain."""
    binds = ["--bind", "127.0.0.1:0", "--bind", "http://127.0.0.1:0"]
    with serving(tmp_path, "asgi", *binds, *pki.options("local")) as server:
        plain = int(server.wait_line(r"listening at http://127\.0\.0\.1:(\d+)")[1])
        mark = server.mark()
        server.signal(signal.SIGUSR2)
        server.wait_line(r"generation 2 is serving", after=mark)
        with RawClient(plain) as client:
            assert client.request("GET", "/").status == 200
        with RawClient(server.port, tls=pki.client()) as client:
            assert client.request("GET", "/").status == 200


# ------------------------------------------------------------------------------------------------- wrong settings


def test_wrong_files_at_the_start_and_at_check(pki: Pki, tmp_path: Path) -> None:
    write_app(tmp_path, "app", site("asgi"))
    wrong = ["--tls-certfile", str(pki.folder / "local.pem"), "--tls-keyfile", str(pki.folder / "other.key")]
    for command in ([], ["check"]):
        with Server(*command, "app:app", *wrong, cwd=tmp_path, until=None) as server:
            assert server.wait_exit() == 2
            server.wait_line("the private key in .*other.key does not belong to the certificate in .*local.pem")
            assert "Traceback" not in server.log
