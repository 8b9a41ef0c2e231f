"""The WSGI environ, without a server: what becomes of one request head."""

from __future__ import annotations

import io
from typing import Any

import pytest

from apphost.interfaces import environ as module
from apphost.interfaces.environ import base_environ, path_info, request_environ
from apphost.interfaces.wsgi_io import ErrorLog, FileWrapper
from apphost.logs import Log
from apphost.protocols.base import Fields, Headers, RequestHead

BODY = io.BytesIO()


class FakeStream:
    """The part of a stream that an environ is made of."""

    def __init__(self, target: bytes, headers: Headers) -> None:
        self.head = RequestHead("POST", target, "1.1", headers)
        self.head.take(Fields("1.1", headers))
        self.head.raw_path, _, self.head.query = target.partition(b"?")
        self.scheme = "http"
        self.client: tuple[str, int] | None = ("10.0.0.1", 4711)
        self.server: tuple[str, int | None] = ("10.0.0.2", 8000)


def made(target: bytes = b"/", headers: Headers | None = None, root: str = "", **attributes: object) -> dict[str, Any]:
    stream = FakeStream(target, headers or [])
    for name, value in attributes.items():
        setattr(stream, name, value)
    base = base_environ(root, ErrorLog(Log(), "worker"), multithread=True, multiprocess=False)
    return request_environ(base, stream, root, BODY)  # type: ignore[arg-type]


def test_everything_that_pep_3333_asks_for() -> None:
    """G1, G2"""
    environ = made(b"/a%20b?x=%20", [(b"host", b"example.org")])
    assert type(environ) is dict
    errors = environ.pop("wsgi.errors")
    assert isinstance(errors, ErrorLog)
    assert environ == {
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/a b", "QUERY_STRING": "x=%20",
        "REQUEST_URI": "/a%20b?x=%20", "RAW_URI": "/a%20b?x=%20", "SERVER_NAME": "10.0.0.2", "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_SOFTWARE": "apphost", "REMOTE_ADDR": "10.0.0.1", "REMOTE_PORT": "4711",
        "HTTP_HOST": "example.org", "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": BODY,
        "wsgi.input_terminated": True, "wsgi.file_wrapper": FileWrapper, "wsgi.multithread": True,
        "wsgi.multiprocess": False, "wsgi.run_once": False,
    }  # fmt: skip


def test_base_is_not_touched() -> None:
    """G1"""
    base = base_environ("", ErrorLog(Log(), "worker"), multithread=False, multiprocess=True)
    before = dict(base)
    request_environ(base, FakeStream(b"/", [(b"x-a", b"1")]), "", BODY).clear()  # type: ignore[arg-type]
    assert base == before
    assert (base["wsgi.multithread"], base["wsgi.multiprocess"]) == (False, True)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"content-type", b"a/b"), (b"content-length", b"3")], {"CONTENT_TYPE": "a/b", "CONTENT_LENGTH": "3"}),
        ([(b"x-a", b"1"), (b"x-b", b""), (b"x-a", b"2"), (b"x-a", b"")], {"HTTP_X_A": "1,2,", "HTTP_X_B": ""}),
        ([(b"cookie", b"a=1"), (b"cookie", b"b=2")], {"HTTP_COOKIE": "a=1; b=2"}),
        ([(b"proxy", b"http://evil"), (b"proxy", b"again")], {}),
        ([(b"proxy", b"evil"), (b"x-a", b"1")], {"HTTP_X_A": "1"}),
        ([(b"proxy-authorization", b"x")], {"HTTP_PROXY_AUTHORIZATION": "x"}),
        ([(b"x-t", bytes(range(0x80, 0x100)))], {"HTTP_X_T": bytes(range(0x80, 0x100)).decode("latin-1")}),
        ([(b"x!#$%&'*+.^`|~", b"1")], {"HTTP_X!#$%&'*+.^`|~": "1"}),
    ],
)
def test_headers(headers: Headers, expected: dict[str, str]) -> None:
    """G3"""
    plain = made()
    environ = made(headers=headers)
    assert {name: environ[name] for name in environ.keys() - plain.keys()} == expected


def test_names_that_a_client_makes_up_cost_no_memory() -> None:
    """G3: the table of known names has a bound, beyond which the variables are still right."""
    for number in range(3 * module._VARIABLES_MAX):
        assert made(headers=[(b"x-%d" % number, b"v")])[f"HTTP_X_{number}"] == "v"
    assert len(module._VARIABLES) <= module._VARIABLES_MAX


@pytest.mark.parametrize(
    ("server", "scheme", "expected"),
    [
        (("::1", 8000), "http", ("[::1]", "8000")),  # RFC 3875, 4.1.14
        (("/run/app.sock", None), "http", ("localhost", "80")),
        (("/run/app.sock", None), "https", ("localhost", "443")),
        (("", None), "http", ("localhost", "80")),
        (("0.0.0.0", 0), "http", ("0.0.0.0", "0")),
    ],
)
def test_server(server: tuple[str, int | None], scheme: str, expected: tuple[str, str]) -> None:
    """G2: a name and a port, both str, neither empty; the path of a Unix socket is no name."""
    environ = made(server=server, scheme=scheme)
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == expected
    assert environ["wsgi.url_scheme"] == scheme


def test_no_client() -> None:
    """G3: of a Unix socket."""
    environ = made(client=None)
    assert environ["REMOTE_ADDR"] == ""
    assert "REMOTE_PORT" not in environ


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        (b"/", "", "/"),
        (b"*", "", "*"),
        (b"/a%2Fb%00%", "", "/a/b\0%"),
        (b"/%C3%A9", "", "/\xc3\xa9"),
        (b"/%zz+a", "", "/%zz+a"),
        (b"/m/page", "/m", "/page"),
        (b"/m", "/m", ""),
        (b"/m/", "/m", "/"),
        (b"/mm", "/m", "/mm"),
        (b"/page", "/m", "/page"),
        (b"/m/m/m", "/m", "/m/m"),
        (b"/%6D/page", "/m", "/page"),
        (b"/m%C3%B6/x", "/m\xf6", "/x"),
    ],
)
def test_path_info(path: bytes, root: str, expected: str) -> None:
    """G1, H7: decoded, as latin-1, less the root path."""
    assert path_info(path, root) == expected


def test_script_name_beyond_ascii() -> None:
    """G1: SCRIPT_NAME in the same form as PATH_INFO, so that both together are the path."""
    environ = made(b"/m%C3%B6/x", root="/m\xf6")
    assert environ["SCRIPT_NAME"] + environ["PATH_INFO"] == "/m\xc3\xb6/x"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_https_is_told_as_apache_does(scheme: str) -> None:
    """G2; PEP 3333. A Unix socket has no port, so it is that of the scheme."""
    environ = made(scheme=scheme, server=("/run/s", None), client=None)
    assert environ.get("HTTPS") == ("on" if scheme == "https" else None)
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("localhost", "443" if scheme == "https" else "80")
