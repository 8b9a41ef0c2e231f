"""The examples, and applications that check their host, served for real and asked by httpx, curl and plain sockets.

One server for each (application, parser) serves all tests of this file that need it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support import DEADLINE, RawClient, Response, Server, raw, request_bytes, wait_for

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAYLOAD = b"".join(bytes([i % 251]) * 8192 for i in range(640))  # 5 MiB
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
MADE = re.compile(rb"(\d{10}\.\d{6})")  # what the streams say about when a piece was made

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@dataclass(frozen=True)
class Example:
    folder: str
    app: str
    needs: str  # a module
    workers: int = 2
    upload: str = "/upload"
    stream: str = "/stream"
    cookies: str = "/cookies"
    echo: str = "/echo"
    head_status: int = 200  # FastAPI answers HEAD only where asked to
    lifespan: bool = False


EXAMPLE = {
    "django-wsgi": Example(
        "django_app", "mysite.wsgi:application", "django", 2, "/upload/", "/stream/", "/cookies/", "/echo/"
    ),
    "django-asgi": Example(
        "django_app", "mysite.asgi:application", "django", 2, "/upload/", "/stream/", "/cookies/", "/echo/"
    ),
    "flask": Example("flask_app", "app:app", "flask"),
    # One worker: what these two remember, they remember for each worker.
    "starlette": Example("starlette_app", "app:app", "starlette", 1, stream="/events", lifespan=True),
    "fastapi": Example("fastapi_app", "app:app", "fastapi", 1, head_status=405, lifespan=True),
}


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("site", names, indirect=True)


def speed(parser: str) -> list[str]:
    """The options that go with a parser: the compiled loop with the compiled parser, where there is one."""
    compiled = parser == "httptools" and importlib.util.find_spec("uvloop") is not None
    return ["--http", parser, "--loop", "uvloop" if compiled else "asyncio"]


@dataclass(frozen=True)
class Site:
    example: Example
    server: Server
    http: httpx.Client

    def upload(self, client: httpx.Client, data: bytes) -> httpx.Response:
        """Send `data` as a browser would: for Django with the token of the form."""
        fields = {}
        if self.example.needs == "django":
            fields["csrfmiddlewaretoken"] = form_token(client.get(self.example.upload))
        return client.post(self.example.upload, files={"file": ("data.bin", data)}, data=fields)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, timeout=DEADLINE, trust_env=False)


def form_token(page: httpx.Response) -> str:
    match = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)
    assert match, page.text
    return match[1]


@pytest.fixture(scope="module")
def django_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A migrated database with a superuser, as the environment that a Django server needs."""
    env = {"DJANGO_DB": str(tmp_path_factory.mktemp("django") / "db.sqlite3"), "DJANGO_SECRET_KEY": "k" * 50}
    admin = {"DJANGO_SUPERUSER_USERNAME": "root", "DJANGO_SUPERUSER_PASSWORD": "s3cret-enough"}
    for command in (["migrate", "-v0"], ["createsuperuser", "--noinput", "--email", "root@localhost", "-v0"]):
        subprocess.run(
            [sys.executable, "manage.py", *command],
            cwd=EXAMPLES / "django_app",
            env={**os.environ, **env, **admin},
            check=True,
        )
    return env


@pytest.fixture(scope="module", params=list(EXAMPLE))
def site(request: pytest.FixtureRequest, http_parser: str) -> Iterator[Site]:
    example = EXAMPLE[request.param]
    pytest.importorskip(example.needs)
    env = request.getfixturevalue("django_env") if example.needs == "django" else {}
    args = [example.app, *speed(http_parser), "--workers", str(example.workers)]
    with Server(*args, cwd=EXAMPLES / example.folder, env=env) as server:
        with httpx.Client(base_url=server.url, timeout=DEADLINE, trust_env=False) as http:
            yield Site(example, server, http)
        assert server.stop() == 0
        if example.lifespan:
            server.wait_line("^lifespan: shutdown$")


# ------------------------------------------------------------------------------------------------- for all of them


def test_get_and_head(site: Site) -> None:
    """S7, S13: HEAD has the fields of GET and no body, and the connection goes on."""
    with RawClient(site.server.port) as client:
        get = client.request("GET", "/")
        head = client.request("HEAD", "/")
        again = client.request("GET", "/")
    assert (get.status, head.status, again.status) == (200, site.example.head_status, 200)
    assert get.body == again.body != b""
    assert head.body == b""
    if head.status == 200:
        assert without_date(head) == without_date(get)


def without_date(response: Response) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in response.headers if name != b"date"]


def test_not_found(site: Site) -> None:
    assert site.http.get("/no/such/page").status_code == 404
    assert site.http.get("/").status_code == 200


def test_upload_of_five_megabytes(site: Site) -> None:
    """R2, R7, G5: a multipart body arrives whole, in Content-Length framing."""
    with site.client() as client:
        answer = site.upload(client, PAYLOAD)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    assert (got["name"], got["size"], got["sha256"]) == ("data.bin", len(PAYLOAD), DIGEST)


@only("flask", "starlette")
def test_upload_in_chunks(site: Site) -> None:
    """R2, G5: a body without a length is read to its end."""
    pieces = (PAYLOAD[start : start + 100_001] for start in range(0, len(PAYLOAD), 100_001))
    answer = site.http.put("/raw", content=pieces)
    assert answer.json() == {"size": len(PAYLOAD), "sha256": DIGEST}


@only("django-wsgi", "django-asgi", "flask", "starlette")
def test_stream_arrives_in_pieces(site: Site) -> None:
    """S2, S5, G13: the first piece is with the client before the last one is made."""
    with RawClient(site.server.port) as client:
        client.send(request_bytes("GET", site.example.stream))
        head = client.read_head()
        pieces = [(time.time(), piece) for piece in client.read_body(head)]
    assert head.header(b"transfer-encoding") == b"chunked"
    made = [float(match) for match in MADE.findall(b"".join(piece for _, piece in pieces))]
    assert len(made) == 4
    assert pieces[0][0] < made[-1]


@only("django-wsgi", "django-asgi", "flask", "starlette")
def test_stream_to_http_10(site: Site) -> None:
    """S5: HTTP/1.0 knows no chunks; the end of the connection is the end of the body."""
    answer = raw(site.server.port, f"GET {site.example.stream} HTTP/1.0\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert b"transfer-encoding" not in head.lower()
    assert len(MADE.findall(body)) == 4
    assert re.fullmatch(rb"(piece \d made at [\d.]+\n|id: \d\ndata: [\d.]+\n\n){4}", body)


@only("django-wsgi", "django-asgi", "flask", "starlette")
def test_several_cookies(site: Site) -> None:
    """S3, G3, H8: each cookie in a field of its own; all of them come back."""
    with RawClient(site.server.port) as client:
        set_cookies = client.request("GET", site.example.cookies).all(b"set-cookie")
    assert [value.partition(b"=")[0] for value in set_cookies] == [b"flavour", b"theme", b"token"]
    with site.client() as client:
        assert client.get(site.example.cookies).json() == {"received": {}}
        received = client.get(site.example.cookies).json()["received"]
    assert received == {"flavour": "oat, raisin; 2", "theme": "dark", "token": "a=b"}


@only("django-wsgi", "django-asgi", "flask", "starlette")
def test_keep_alive(site: Site) -> None:
    """S13, H10, G3: many requests, one connection; each is told apart from the one before."""
    peers = set()
    with site.client() as client:
        for number in range(50):
            sent = {"number": number, "text": "é" * number}
            got = client.post(f"{site.example.echo}?n={number}", json=sent).json()
            assert got["json"] == sent
            assert got["query"] == f"n={number}"
            assert got["path"] == site.example.echo
            assert got["scheme"] == "http"
            peers.add(tuple(got["peer"]))
    assert len(peers) == 1
    assert next(iter(peers))[0] == "127.0.0.1"


@only("django-wsgi", "django-asgi", "flask", "starlette")
def test_pipelined_requests(site: Site) -> None:
    """S14: requests sent at once are answered in order."""
    json = [("Content-Type", "application/json")]
    requests = [request_bytes("POST", f"{site.example.echo}?{n}", json, b"%d" % n) for n in range(5)]
    with RawClient(site.server.port) as client:
        client.send(b"".join(requests) + request_bytes("GET", "/nowhere", [("Connection", "close")]))
        for number in range(5):
            answer = client.read_response()
            assert answer.status == 200
            assert re.search(rb'"json": ?%d\b' % number, answer.body)
        assert client.read_response().status == 404
        assert client.eof()


@needs_curl
@only("django-wsgi", "django-asgi", "flask", "starlette")
def test_curl(site: Site, tmp_path: Path) -> None:
    """R9, S13: curl asks before it sends a megabyte (Expect: 100-continue), and reuses its connection."""
    url = site.server.url
    body = tmp_path / "body.json"
    body.write_text('"' + "x" * 1_500_000 + '"')
    post = ["-H", "Content-Type: application/json", "-H", "Expect: 100-continue", "--data-binary", f"@{body}"]
    echo = url + site.example.echo
    told = "%{http_code} %{num_connects}\n"
    done = curl(
        "-v", "-o", os.devnull, "-w", told, *post, echo, "--next", "-sS", "-o", os.devnull, "-w", told, url + "/"
    )
    assert done.stdout == "200 1\n200 0\n"
    assert "100 Continue" in done.stderr


@needs_curl
@only("flask", "starlette", "fastapi")
def test_curl_form(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "payload"
    path.write_bytes(PAYLOAD)
    done = curl("--fail", "-F", f"file=@{path}", site.server.url + site.example.upload)
    assert DIGEST in done.stdout


def curl(*args: str) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-q", "-sS", "--noproxy", "*", "--max-time", "20", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@only("flask", "starlette")
def test_failing_route(site: Site) -> None:
    """A6, G19: an exception before the response is a 500, it is logged, and the next request is served."""
    mark = site.server.mark()
    with RawClient(site.server.port) as client:
        assert client.request("GET", "/error").status == 500
    site.server.wait_line("RuntimeError: this route always fails", after=mark)
    assert site.http.get("/").status_code == 200


# ---------------------------------------------------------------------------------------------------------- Django

django = only("django-wsgi", "django-asgi")


@django
def test_django_sessions(site: Site) -> None:
    def visit(client: httpx.Client) -> int:
        match = re.search(r'id="count">(\d+)<', client.get("/counter/").text)
        assert match
        return int(match[1])

    with site.client() as one, site.client() as other:
        assert [visit(one), visit(one), visit(other), visit(one)] == [1, 2, 1, 3]


@django
def test_django_refuses_a_form_without_its_token(site: Site) -> None:
    with site.client() as client:
        answer = client.post("/upload/", files={"file": ("a", b"a")})
    assert answer.status_code == 403


@django
def test_django_admin(site: Site) -> None:
    """A real login: form, cookies, redirect, and pages behind it."""
    with site.client() as client:
        page = client.get("/admin/", follow_redirects=True)
        assert "Log in" in page.text
        fields = {"username": "root", "password": "s3cret-enough", "next": "/admin/"}
        login = client.post("/admin/login/", data={**fields, "csrfmiddlewaretoken": form_token(page)})
        assert (login.status_code, login.headers["location"]) == (302, "/admin/")
        uploaded = site.upload(client, b"seen by the admin").json()
        listing = client.get("/admin/visits/upload/").text
    assert uploaded["sha256"] in listing


@django
def test_django_static_files(site: Site) -> None:
    """G18: the admin's style sheet, which Django hands to `wsgi.file_wrapper`, arrives byte for byte."""
    spec = importlib.util.find_spec("django")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "contrib/admin/static/admin/css/base.css"
    answer = site.http.get("/static/admin/css/base.css")
    assert answer.headers["content-length"] == str(file.stat().st_size)
    assert answer.content == file.read_bytes()


# ----------------------------------------------------------------------------------------------- Starlette, FastAPI


@only("starlette")
def test_starlette_lifespan_state(site: Site) -> None:
    """L1, L5, H12: the object made at startup is the one that every request sees."""
    before = site.server.log.partition("is serving")[0]
    assert before.count("lifespan: startup") == 1
    one, two = site.http.get("/count").json(), site.http.get("/count").json()
    assert two["requests"] == one["requests"] + 1
    assert two["started"] == one["started"]


@only("starlette")
def test_starlette_background_task(site: Site) -> None:
    """S18: the job ends after its response, and holds up no request on the same connection."""
    with RawClient(site.server.port) as client:
        accepted = client.request("POST", "/jobs/report")
        answered = time.time()
        assert accepted.status == 202
        assert client.request("GET", "/jobs/report").body == b'{"ended":null}'
    ended = wait_for(lambda: site.http.get("/jobs/report").json()["ended"], what="the background task")
    assert answered < ended


@only("fastapi")
def test_fastapi_model(site: Site) -> None:
    item = {"name": "tea", "price": 2.5, "tags": ["hot"]}
    assert site.http.post("/items", json=item).json() == item
    refused = site.http.post("/items", json={"name": "", "price": -1})
    assert refused.status_code == 422
    assert {problem["loc"][-1] for problem in refused.json()["detail"]} == {"name", "price"}
    assert site.http.get("/sync").json() == {"message": "from a thread"}


@only("fastapi")
def test_fastapi_dependency_is_closed(site: Site) -> None:
    """Also after a failure."""
    before = site.http.get("/ledger").json()
    assert site.http.get("/query").json() == {"connection": before["opened"] + 1, "open": True}
    assert site.http.get("/query", params={"fail": "1"}).status_code == 409

    def closed() -> bool:
        ledger = site.http.get("/ledger").json()
        return bool(ledger["opened"] == ledger["closed"] == before["opened"] + 2)

    wait_for(closed, what="both connections to be given back")


@only("fastapi")
def test_fastapi_background_task(site: Site) -> None:
    """S18"""
    with RawClient(site.server.port) as client:
        assert client.request("POST", "/mails/ann").status == 202
        answered = time.time()
        assert b"ann" not in client.request("GET", "/ledger").body
    sent = wait_for(lambda: site.http.get("/ledger").json()["mails"].get("ann"), what="the mail")
    assert answered < sent
