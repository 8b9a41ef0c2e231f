"""The admin listener with real processes: metrics through reloads, health, readiness; and that it holds nobody up."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from apphost.errors import ExitCode
from tests.load import INTERFACES, Load, ask, check, deploy, serving, site
from tests.process.browser import browser
from tests.support import Address, RawClient, Response, Server, alive, descendants, linux, wait_for, write_app

ADMIN = ("--admin", "127.0.0.1:0")
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def admin_port(server: Server) -> int:
    return int(server.wait_line(r"info admin listener at http://127\.0\.0\.1:(\d+)$")[1])


def get(where: Server | Address, path: str, method: str = "GET", **fields: str) -> Response:
    with RawClient(admin_port(where) if isinstance(where, Server) else where) as client:
        return client.request(method, path, [*fields.items(), ("Connection", "close")])


def status(server: Server) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(get(server, "/status.json").body)
    return dict(told["snapshot"] or {})


def metrics(server: Server) -> Samples:
    """Read by the parser of Prometheus."""
    response = get(server, "/metrics", Accept=OPENMETRICS)
    assert response.status == 200, response.body
    assert b"openmetrics-text" in response.all(b"content-type")[0]
    found = parse_openmetrics(response.body.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in found for s in family.samples}


def total(samples: Samples, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (each, own), value in samples.items() if each == name and wanted <= set(own))


def answered(server: Server) -> float:
    return total(metrics(server), "http_requests_total", code="2xx")


def admin_pid(server: Server) -> int:
    """The process that listens there: it has the command of `apphost.arbiter.admin`."""
    found = []
    for pid in descendants(server.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"apphost.admin.process" in command:
            found.append(pid)
    assert len(found) <= 1, found
    return found[0] if found else 0


# ------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("interface", INTERFACES)
def test_metrics_count_every_request_through_reloads(tmp_path: Path, interface: str) -> None:
    """What clients have counted is what the metrics say, also of workers that are gone, and nothing ever falls."""
    with serving(tmp_path, interface, *ADMIN, "--workers", "2") as server, RawClient(server.port) as idle:
        check(idle.request("GET", "/"))
        done = 1
        for version in ("two", "three"):
            before = metrics(server)
            with Load(server.port) as load:
                load.wait(40)
                deploy(server, interface, version)
                load.wait(40)
            assert not load.report.lost
            done += load.report.answered
            wait_for(lambda goal=done: answered(server) >= goal, what="all are counted")  # type: ignore[misc]
            after = metrics(server)
            for (name, labels), value in before.items():
                if re.search(r"_(total|bucket|count|sum)$", name):
                    assert after[name, labels] >= value, name
        check(idle.request("GET", "/"))
        wait_for(lambda: answered(server) > done, what="the last one is counted")
        samples = metrics(server)
        assert total(samples, "http_requests_total") == done + 1
        assert total(samples, "http_request_duration_seconds_count") == done + 1
        assert (total(samples, "http_request_queue_seconds_count") == done + 1) is (interface == "wsgi")
        assert total(samples, "apphost_reloads_total", outcome="complete") == 2
        assert total(samples, "apphost_worker_exits_total", reason="reload") >= 3
        assert total(samples, "apphost_handed_over_connections_total") >= 2
        assert total(samples, "apphost_workers", state="ready", generation="3") == 2
        if os.path.exists("/proc/self/statm"):
            assert total(samples, "process_resident_memory_bytes", role="worker") > 2**22
            assert total(samples, "process_cpu_seconds_total", role="worker") > 0
        older = get(server, "/metrics")
        assert older.all(b"content-type") == [b"text/plain; version=0.0.4; charset=utf-8"]
        assert {family.name for family in parse_text(older.body.decode())} >= {"http_requests", "apphost_workers"}


def test_connections_by_state(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", *ADMIN) as server:
        clients = [RawClient(server.port) for _ in range(3)]
        check(clients[0].request("GET", "/"))
        clients[1].send(b"GET / HTT")
        clients[2].send(b"GET /wait/go HTTP/1.1\r\nHost: x\r\n\r\n")

        def seen() -> bool:
            samples = metrics(server)
            return [total(samples, "apphost_connections", state=s) for s in ("idle", "head", "busy")] == [1, 1, 1]

        wait_for(seen, what="one of each")
        assert total(metrics(server), "http_requests_in_progress") == 1
        Path(tmp_path, "go").touch()
        for client in clients:
            client.close()


def test_it_is_off_by_default(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        assert "admin" not in server.log
        assert len(server.children()) == 2, "a fork server and a worker"


# ------------------------------------------------------------------------------------------ health and readiness


def test_ready_only_while_it_serves(tmp_path: Path) -> None:
    """Not before the first worker is ready, and not once a stop was asked for, although it still serves then."""
    wait = "\nimport os, time\nwhile not os.path.exists('boot'): time.sleep(0.01)\n"
    options: dict[str, Any] = {"extra": wait, "until": "listening"}
    with serving(tmp_path, "asgi", *ADMIN, "--shutdown-delay", "600", **options) as server:
        wait_for(lambda: get(server, "/healthz").status == 200, what="the arbiter has told something")
        early = get(server, "/readyz")
        assert (early.status, early.body) == (503, b"not ready: starting, nothing is ready yet\n")
        Path(tmp_path, "boot").touch()
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        assert get(server, "/readyz", "HEAD").body == b""
        server.signal(signal.SIGTERM)
        wait_for(lambda: get(server, "/readyz").status == 503, what="it is not ready any more")
        ask(server.port)
        assert get(server, "/healthz").status == 200


def test_strange_requests(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", *ADMIN) as server:
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        assert get(server, "/").status == 200
        assert get(server, "/metrics", "POST").status == 405
        assert get(server, "/../etc/passwd").status == 404
        page = get(server, "/")
        assert not page.all(b"access-control-allow-origin")
        assert b"default-src 'none'" in page.all(b"content-security-policy")[0]
        with RawClient(admin_port(server)) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n")
            assert client.read_response().status == 400


# ----------------------------------------------------------------------------------- processes, and their troubles


@linux
def test_nobody_is_held_up(tmp_path: Path) -> None:
    """A stopped arbiter or worker does not keep the admin process from answering, nor it them."""
    with serving(tmp_path, "asgi", *ADMIN) as server:
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        pid = admin_pid(server)
        os.kill(pid, signal.SIGSTOP)
        try:
            assert deploy(server, "asgi", "two") == 2
            assert ask(server.port).version == "two"
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: status(server).get("good") == 2, what="it has caught up")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert ask(server.port).version == "two"
            told = wait_for(lambda: (r := get(server, "/healthz")).status == 503 and r, what="it is silent")
            assert b"the arbiter has told nothing for" in told.body
            assert get(server, "/metrics").status == 503
        finally:
            os.kill(server.pid, signal.SIGCONT)
        wait_for(lambda: get(server, "/healthz").status == 200, what="it speaks again")


@linux
def test_the_admin_process_is_started_again(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", *ADMIN) as server:
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        pid = admin_pid(server)
        os.kill(pid, signal.SIGKILL)
        server.wait_line(r"warning the admin process is gone; it is started again in 0\.5 s")
        wait_for(lambda: admin_pid(server) not in (0, pid), what="there is another")
        assert get(server, "/readyz").status in (200, 503), "its listener was never closed"
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        ask(server.port)


@linux
def test_an_upgrade_keeps_the_listener_and_the_counts(tmp_path: Path) -> None:
    """USR2: the same address, another process, and no counter falls."""
    with serving(tmp_path, "asgi", *ADMIN, "--workers", "2") as server:
        port = admin_port(server)
        with Load(server.port) as load:
            load.wait(40)
            before = admin_pid(server)
            mark = server.mark()
            server.signal(signal.SIGUSR2)
            server.wait_line(r"info upgraded: ", after=mark)
            server.wait_line(r"generation 2 is serving", after=mark)
            load.wait(10)
        wait_for(lambda: not alive(before), what="the one before has gone")
        assert admin_port(server) == port
        wait_for(lambda: get(port, "/readyz").status == 200, what="it is ready")
        wait_for(lambda: answered(server) >= load.report.answered, what="all are counted")
        assert answered(server) == load.report.answered


@linux
def test_it_ends_with_the_arbiter(tmp_path: Path) -> None:
    """Also with one that was killed."""
    with Server("app:app", *ADMIN, cwd=write_site(tmp_path)) as server:
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        pid = admin_pid(server)
        server.signal(signal.SIGKILL)
        assert server.wait_exit() == -signal.SIGKILL
        wait_for(lambda: not alive(pid), what="it has ended")


def write_site(folder: Path) -> Path:
    write_app(folder, "app", "async def app(scope, receive, send):\n    raise NotImplementedError\n")
    return folder


def test_an_address_that_is_taken_is_told_at_the_start(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", *ADMIN) as server:
        port = admin_port(server)
        with Server("app:app", "--admin", str(port), cwd=tmp_path, until=None) as other:
            assert other.wait_exit() == ExitCode.ADDRESS
            assert f"cannot listen at 127.0.0.1:{port}: another process is listening there already" in other.log


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with serving(tmp_path, "asgi", "--admin", f"unix:{path}") as server:
        server.wait_line(r"admin listener at unix:")
        wait_for(lambda: get(str(path), "/readyz").status == 200, what="it is ready")
        assert server.stop() == 0
    assert not path.exists()


# ----------------------------------------------------------------------------------------------------- dashboard


def test_the_dashboard_in_a_browser(tmp_path: Path) -> None:
    """State in words, workers as they come and go, connections that moved; nothing is asked of anybody else."""
    with browser() as session, serving(tmp_path, "asgi", *ADMIN, "--workers", "2") as server:
        wait_for(lambda: get(server, "/readyz").status == 200, what="it is ready")
        page = session.open(f"http://127.0.0.1:{admin_port(server)}/")
        with Load(server.port) as load:
            page.wait_for("document.getElementById('what').innerText === 'Generation 1 serves, 2 workers, all is well'")
            load.wait(20)
            page.run(
                "window.seen = new Set(); window.headlines = new Set(); setInterval(() => { "
                "for (const each of document.querySelectorAll('.state')) seen.add(each.innerText); "
                "headlines.add(document.getElementById('what').innerText.replace(/[0-9]/g, 'N')) }, 50); 1"
            )
            boots = "\nimport os, time\nwhile not os.path.exists('boot'): time.sleep(0.01)\n"
            write_app(tmp_path, "app", site("asgi", "two", boots))
            server.signal(signal.SIGUSR1)
            page.wait_for("seen.has('booting') && headlines.has('Reload to generation N: N of N workers replaced')")
            Path(tmp_path, "boot").touch()
            page.wait_for("document.getElementById('what').innerText === 'Generation 2 serves, 2 workers, all is well'")
            page.wait_for("Number(document.getElementById('moved').innerText) > 0")
            page.wait_for("seen.has('gone')")
        seen = set(page.run("[...window.seen]"))
        assert {"booting", "ready", "gone"} <= seen <= {"booting", "ready", "draining", "gone"}
        assert "Reload to generation N: N of N workers replaced" in page.run("[...window.headlines]")
        assert page.run("document.querySelectorAll('#ratecurve path').length") >= 2
        asked = page.run("performance.getEntriesByType('resource').map(each => each.name)")
        assert {name.rpartition("/")[2] for name in asked} == {"status.json"}
        assert all(name.startswith(f"http://127.0.0.1:{admin_port(server)}/") for name in asked)
        for width in (360, 1400):
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), width
        colours = set()
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours.add(page.run("getComputedStyle(document.body).backgroundColor"))
            assert page.run(CONTRAST) == [], scheme
        assert len(colours) == 2
        write_app(tmp_path, "app", "raise RuntimeError('broken')\n")
        server.signal(signal.SIGUSR1)
        page.wait_for("document.getElementById('what').innerText.startsWith('Generation 3 was given up: ')")
        assert server.stop() == 0
        page.wait_for("document.getElementById('what').innerText.startsWith('No answer')")


# Texts whose contrast with what is behind them is below what WCAG 2.1, 1.4.3 asks for (level AA: 4.5 to 1).
CONTRAST = """(() => {
  const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("h1, h2, p, th, td, b, .figure, .state, .key")].filter((node) => {
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
  }).map((node) => node.outerHTML);
})()"""
