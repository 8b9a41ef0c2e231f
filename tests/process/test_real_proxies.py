"""nginx and HAProxy in front: what they say is what the application hears, and no reload gives their clients a 502.

As Debian packages them; skipped where they are not installed. H3, H10, G2.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load import Load, site
from tests.process.proxy_site import APPS, told, write_site
from tests.rawhttp import DEADLINE, Address, RawClient, connect
from tests.support import Server, wait_for, write_app
from tests.test_docs import snippets

PATH = "/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin"  # services are not in everybody's path
NGINX, HAPROXY = shutil.which("nginx", path=PATH), shutil.which("haproxy", path=PATH)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")

LIES = [("X-Forwarded-For", "6.6.6.6"), ("Forwarded", "for=6.6.6.6;proto=https"), ("X_Forwarded_For", "6.6.6.6")]

NGINX_CONF = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream site {{ server {upstream}; keepalive 8; keepalive_requests 1000000; }}
    keepalive_requests 1000000;
    server {{
        listen unix:{folder}/front;
        listen [::1]:{port};
        client_body_buffer_size 64k;
        underscores_in_headers on;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_next_upstream off;
        location / {{
            proxy_pass http://site;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto https;
        }}
        location /shop/ {{
            proxy_pass http://site/;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Host $host;
            proxy_set_header X-Forwarded-Prefix /shop;
        }}
    }}
}}
"""

HAPROXY_CONF = """
global
    stats socket {folder}/admin
defaults
    mode http
    timeout connect 5s
    timeout client 20s
    timeout server 20s
    retries 0
    log stdout format raw local0
frontend front
    bind {folder}/front
    bind [::1]:{port}
    {mode}
    default_backend site
backend site
    {options}
"""


def free_port() -> int:
    """One of ::1 that nobody listens at; if somebody takes it in the next moment, the proxy fails, and so the test."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], folder: Path, address: Address) -> Iterator[None]:
    """A program that listens at `address`, until the end of the `with`; it must have come so far without ending."""
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder, stdin=subprocess.DEVNULL)

    def listening() -> bool:
        assert process.poll() is None, (folder / "said").read_text()
        with contextlib.suppress(OSError):
            connect(address).close()
            return True
        return False

    try:
        wait_for(listening, what=f"{command[0]} to listen")
        yield
        assert process.poll() is None, (folder / "said").read_text()
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def nginx(folder: Path, upstream: Address) -> Iterator[Address]:
    """nginx in front of `upstream`, and its address, where its clients are ::1, whom nobody trusts."""
    port = free_port()
    server = f"unix:{upstream}" if isinstance(upstream, str) else f"127.0.0.1:{upstream}"
    (folder / "nginx.conf").write_text(NGINX_CONF.format(folder=folder, upstream=server, port=port))
    with running(
        [str(NGINX), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")], folder, ("::1", port)
    ):
        yield "::1", port


@contextlib.contextmanager
def haproxy(folder: Path, upstream: Address, mode: str, options: str, sends: str = "") -> Iterator[Address]:
    """HAProxy in front of `upstream`, and its address, as that of `nginx`. sends: of its `server` line."""
    port = free_port()
    server = f"unix@{upstream}" if isinstance(upstream, str) else f"127.0.0.1:{upstream}"
    options = f"mode {mode}\n    {options}\n    server one {server} {sends}"
    text = HAPROXY_CONF.format(folder=folder, port=port, mode=f"mode {mode}", options=options)
    (folder / "haproxy.cfg").write_text(text)
    with running([str(HAPROXY), "-db", "-f", str(folder / "haproxy.cfg")], folder, ("::1", port)):
        yield "::1", port


@contextlib.contextmanager
def apphost(folder: Path, app: str, kind: str, *args: str) -> Iterator[tuple[Server, Address]]:
    """A server that trusts whoever comes from this machine."""
    bind = ("--bind", f"unix:{folder}/s") if kind == "unix" else ("--bind", "127.0.0.1:0")
    options = ("--trusted-proxies", "127.0.0.1,unix", "--workers", "2", *args)
    with Server(app, *bind, *options, cwd=folder) as server:
        yield server, f"{folder}/s" if kind == "unix" else server.port
        assert server.stop() == 0


each_kind = pytest.mark.parametrize("kind", ["tcp", "unix"])


@needs_nginx
@each_kind
def test_behind_nginx(tmp_path: Path, kind: str) -> None:
    """Whatever a client sends along; nginx hands header names with `_` and `Forwarded` through here."""
    write_site(tmp_path)
    args = ("--forwarded-fields", "for,proto,host,prefix")
    with (
        apphost(tmp_path, APPS["asgi" if kind == "tcp" else "wsgi"], kind, *args) as (_, upstream),
        nginx(tmp_path, upstream) as front,
        RawClient(front) as client,
        RawClient(str(tmp_path / "front")) as local,
    ):
        said = told(client.request("GET", "/x", [*LIES, ("Host", "shop.example")]))
        assert said["seen"]["x-forwarded-for"] == "6.6.6.6, ::1"
        assert (said["client"], said["scheme"], said["host"]) == (["::1", 0], "https", "shop.example")
        said = told(client.request("GET", "/shop/x", [*LIES, ("Host", "shop.example")]))
        assert (said["client"], said["root"], said["path"]) == (["::1", 0], "/shop", "/shop/x")
        assert (said["host"], said["scheme"]) == ("shop.example", "http")
        # nginx says `unix:` of a client on its Unix socket: here a trusted hop.
        assert told(local.request("GET", "/x", [("X-Forwarded-For", "203.0.113.9")]))["client"] == ["203.0.113.9", 0]
        assert told(local.request("GET", "/shop/x"))["client"] is None


@needs_haproxy
@each_kind
def test_behind_haproxy(tmp_path: Path, kind: str) -> None:
    write_site(tmp_path)
    options = "option forwardfor\n    http-request set-header X-Forwarded-Proto https"
    with (
        apphost(tmp_path, APPS["asgi"], kind) as (_, upstream),
        haproxy(tmp_path, upstream, "http", options) as front,
        RawClient(front) as client,
    ):
        said = told(client.request("GET", "/", [*LIES, ("X-Forwarded-Proto", "http")]))
        assert (said["client"], said["scheme"]) == (["::1", 0], "https")


@needs_haproxy
@pytest.mark.parametrize(
    ("kind", "sends"),
    [("tcp", "send-proxy"), ("unix", "send-proxy-v2"), ("tcp", "send-proxy-v2 proxy-v2-options crc32c,unique-id")],
    ids=["v1", "v2", "v2-options"],
)
def test_the_proxy_protocol_of_haproxy(tmp_path: Path, kind: str, sends: str) -> None:
    """The client's port is in it, so what is told is exactly the client's socket."""
    write_site(tmp_path)
    with (
        apphost(tmp_path, APPS["asgi"], kind, "--proxy-protocol") as (server, upstream),
        haproxy(tmp_path, upstream, "tcp", "", f"{sends} check inter 100ms") as front,
    ):
        with RawClient(front) as client:
            own = list(client.sock.getsockname()[:2])
            said = told(client.request("GET", "/", LIES))
            assert (said["client"], said["server"]) == (own, list(front))
            write_site(tmp_path, "two")
            server.reload()
            said = told(client.request("GET", "/"))
            assert (said["version"], said["client"]) == ("two", own)
        with RawClient(str(tmp_path / "front")) as client:
            # HAProxy has no address of this client. Version 2 then says LOCAL, so that it is HAProxy who seems to ask.
            said = told(client.request("GET", "/", LIES))
            if kind == "unix" or sends == "send-proxy":
                assert said["client"] is None
            else:
                assert said["client"][0] == "127.0.0.1"
        assert "warning" not in server.log, "its health checks are no reason for one"


def answered(folder: Path, server: Server, front: Address, interface: str) -> None:
    """Load through a proxy and three deploys: every request answered, by the old code or by the new."""
    with Load(front, clients=4, pause=0.01) as load:
        load.wait(50)
        for number in range(3):
            write_app(folder, "app", site(interface, f"v{number}"))
            server.reload()
            load.wait(50)
    assert load.report.lost == []
    assert load.report.versions[-1] == "v2"
    assert load.report.announced == 0, "the proxy has kept its clients' connections"


@needs_nginx
@each_kind
def test_no_502_of_nginx_through_reloads(tmp_path: Path, kind: str) -> None:
    """Kept connections, which apphost's workers hand on; nginx is told not to try a request again."""
    interface = "asgi" if kind == "tcp" else "wsgi"
    write_app(tmp_path, "app", site(interface))
    with apphost(tmp_path, "app:app", kind) as (server, upstream), nginx(tmp_path, upstream) as front:
        answered(tmp_path, server, front, interface)
        errors = (tmp_path / "error.log").read_text()
        assert not re.search(r"\[(warn|error|crit|alert|emerg)\]|upstream", errors), errors
        codes = re.findall(r'" (\d{3}) \d+ ', (tmp_path / "access.log").read_text())
        assert set(codes) == {"200"}


@needs_haproxy
@pytest.mark.parametrize(("kind", "sends"), [("tcp", "send-proxy-v2"), ("unix", "")], ids=["tcp-announced", "unix"])
def test_no_502_of_haproxy_through_reloads(tmp_path: Path, kind: str, sends: str) -> None:
    """Kept connections, shared by all clients; HAProxy does not try a request again either."""
    write_app(tmp_path, "app", site("asgi"))
    options = "http-reuse always\n    option forwardfor"
    announced = ("--proxy-protocol",) if sends else ()
    with (
        apphost(tmp_path, "app:app", kind, *announced) as (server, upstream),
        haproxy(tmp_path, upstream, "http", options, sends) as front,
    ):
        answered(tmp_path, server, front, "asgi")


@needs_nginx
@pytest.mark.parametrize("name", ["proxies.md", "deploy.md", "README.md"])
def test_nginx_understands_the_documents(tmp_path: Path, name: str) -> None:
    root = Path(__file__).parent.parent.parent
    found = snippets(root / name if name == "README.md" else root / "docs" / name, "nginx")
    assert found
    for text in found:
        assert text.count("listen 80;") == 1
        port = f"listen unix:{tmp_path}/front;"
        whole = f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {text.replace('listen 80;', port)} }}"
        (tmp_path / "nginx.conf").write_text(whole)
        command = [str(NGINX), "-t", "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


@needs_haproxy
def test_haproxy_understands_the_documents(tmp_path: Path) -> None:
    found = snippets(Path(__file__).parent.parent.parent / "docs" / "proxies.md", "haproxy")
    assert len(found) == 2
    for text in found:
        timeouts = "".join(f"    timeout {name} 5s\n" for name in ("connect", "client", "server"))
        mode = "tcp" if "mode tcp" in text else "http"
        front = f"frontend front\n    mode {mode}\n    bind {tmp_path}/front\n    default_backend site\n"
        (tmp_path / "haproxy.cfg").write_text(f"defaults\n{timeouts}{front}{text}")
        command = [str(HAPROXY), "-c", "-f", str(tmp_path / "haproxy.cfg")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, "WARNING" in result.stderr) == (0, False), result.stderr
