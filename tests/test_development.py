"""Development mode without processes: what is watched, what is warned of, and the error page."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from apphost.arbiter.development import warnings, watch_order
from apphost.arbiter.reports import fleet_config, given_up
from apphost.arbiter.vocabulary import GenerationGivenUp
from apphost.settings import Settings
from apphost.sources import Source
from apphost.worker.error_page import ErrorPage, as_html, place_of, settings_for, wants_html

TRACE = """Traceback (most recent call last):
  File "/srv/app.py", line 3, in <module>
    import other
  File "/srv/other.py", line 7, in <module>
    1 / 0
  File "<frozen importlib._bootstrap>", line 1, in x
ZeroDivisionError: <b>division</b> & zero"""


def test_what_is_watched() -> None:
    source = Source({}, None, "/srv/current")
    order = watch_order(Settings(pythonpath=("lib", "/opt/code")), source, {})
    assert order["roots"] == ["/srv/current", "/srv/current/lib", "/opt/code"]
    assert order["files"] == ["/srv/current/apphost.toml", "/srv/current/pyproject.toml"]
    order = watch_order(
        Settings(chdir="site", reload_dir=("src", "../shared")), source, {"APPHOST_CONFIG": "etc/a.toml"}
    )
    assert order["roots"] == ["/srv/current/site/src", "/srv/current/shared"]
    assert order["files"] == ["/srv/current/etc/a.toml"]


@pytest.mark.parametrize(
    ("changes", "euid", "words"),
    [
        ({}, 1000, []),
        ({"bind": ("127.0.0.1:80", "[::1]:80", "localhost:1", "unix:/run/x", "fd://3")}, 1000, []),
        ({"bind": ("127.0.0.1:80", "0.0.0.0:80")}, 1000, ["listens at 0.0.0.0"]),
        ({"bind": ("[::]:80",)}, 1000, ["traceback"]),
        ({}, 0, ["runs as root"]),
        ({"user": "www"}, 0, []),
        ({"workers": 3}, 1000, ["3 workers"]),
    ],
)
def test_what_is_warned_of(changes: dict[str, Any], euid: int, words: list[str]) -> None:
    said = warnings(Settings(**changes), euid)
    assert len(said) == len(words)
    assert all(word in line for word, line in zip(words, said, strict=True))


def test_what_the_fleet_is_told() -> None:
    production = Settings(canary=60.0, shutdown_delay=5.0)
    assert not fleet_config(production).stand_in
    config = fleet_config(dataclasses.replace(production, reload=True, reload_on_error="keep"))
    assert (config.stand_in, config.keep_good, config.canary, config.shutdown_delay) == (True, True, 0.0, 0.0)


def test_what_is_said_of_a_generation_that_was_given_up() -> None:
    assert "An error page is served" in given_up(GenerationGivenUp(2, 1, 3), None).message
    assert "Generation 1 keeps serving" in given_up(GenerationGivenUp(2, 1), None).message
    assert "asked for meanwhile" in given_up(GenerationGivenUp(2, 0), None).message


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_place_is_that_of_the_innermost_frame() -> None:
    assert place_of(TRACE) == ("/srv/other.py", 7)
    assert place_of('  File "/srv/app.py", line 9\n    def f(:\n') == ("/srv/app.py", 9)
    assert place_of("no traceback") is None


def test_nothing_of_the_failure_is_markup() -> None:
    page = as_html("raised <script>", TRACE.replace("/srv/other.py", "/srv/<i>.py"), 2)
    assert "raised &lt;script&gt;" in page
    assert "&lt;b&gt;division&lt;/b&gt; &amp; zero" in page
    assert "Line 7 of <code>/srv/&lt;i&gt;.py</code>" in page
    assert page.count("<script>") == 1
    braces = as_html("{0} {title}", "{x}", 2)
    assert "{0} {title}" in braces
    assert "{x}" in braces


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        (b"TEXT/HTML ; q=0.5", True),
        (b"application/json", False),
        (b"*/*", False),
        (b"", False),
        (b"text/html;q=0", False),
        (b"text/html;q=0.000, text/plain", False),
    ],
)
def test_who_gets_a_page(accept: bytes, html: bool) -> None:
    assert wants_html(accept) is html


def call(page: ErrorPage, scope: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(page(scope, None, send))
    return sent


def test_the_application() -> None:
    page = ErrorPage("raised ValueError \ud800", TRACE, 4)
    start, body = call(page, {"type": "http", "headers": [(b"accept", b"text/plain"), (b"accept", b"text/html")]})
    headers = dict(start["headers"])
    assert start["status"] == 500
    assert headers[b"content-type"] == b"text/html; charset=utf-8"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    assert headers[b"x-apphost-error"] == b"4"
    assert b"default-src 'none'" in headers[b"content-security-policy"]
    assert b'!== "4"' in body["body"]
    start, body = call(page, {"type": "http", "headers": []})
    assert dict(start["headers"])[b"content-type"] == b"text/plain; charset=utf-8"
    assert TRACE.encode() in body["body"]
    assert call(page, {"type": "websocket", "headers": []}) == [{"type": "websocket.close"}]


def test_its_settings_keep_nothing_that_could_end_it() -> None:
    running = Settings(
        app="a:b", interface="wsgi", ready_probe="/x", max_requests=5, max_rss=1, max_lifetime=1.0, limit_requests=1,
        factory=True, lifespan="on", access_log="-", bind=("127.0.0.1:1",),
    )  # fmt: skip
    settings = settings_for(running)
    assert settings.bind == running.bind
    assert (settings.interface, settings.lifespan, settings.ready_probe, settings.access_log) == ("asgi", "off", "", "")
    assert (settings.max_requests, settings.max_rss, settings.max_lifetime, settings.limit_requests) == (0, 0, 0.0, 0)
    assert settings.preload
    assert not settings.factory
