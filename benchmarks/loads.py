"""Load on a running server: wrk, WebSocket echoes, requests at a fixed rate. Each returns a Load."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case, Request
from servers import HERE, Bench, RunFailed, Running

PATIENCE = 10  # s that wrk waits for one answer before it counts a timeout
HEAD_MAX = 1024  # bytes that the head of an answer has at most here
COUNTED = ("connect", "read", "write", "status", "timeout")  # errors of wrk, which counts as status those from 400 on
WRK_REPORT = '\n{"requests": %d, "us": %d, "bytes": %.0f, ' + ", ".join(f'"{kind}": %d' for kind in COUNTED) + "}\n"
FRAMING = 1.05  # what chunked framing may add to a body of 1 KiB chunks, generously


@dataclass(frozen=True)
class Load:
    """What a load found. ``busy``: the share of its core that the client used, None when it spins."""

    values: dict[str, float]
    errors: dict[str, int] = field(default_factory=dict)
    busy: float | None = None


def lua_string(data: bytes) -> str:
    """A string of Lua. Letters that repeat are written as their number: a body of 1 MiB is a short script."""
    if len(data) > 4096 and data == data[:1] * len(data):
        return f'string.rep("\\{data[0]:03d}", {len(data)})'
    return '"' + "".join(f"\\{byte:03d}" for byte in data) + '"'


def wrk_script(request: Request) -> str:
    """The request as wrk's script, made once, before the load if it can be; its report is a line of JSON."""
    lines = [f"wrk.method = {lua_string(request.method.encode())}"]
    lines += [f"wrk.headers[{lua_string(n.encode())}] = {lua_string(v.encode())}" for n, v in request.headers]
    if request.body:
        lines.append(f"wrk.body = {lua_string(request.body)}")
    if request.pipelined > 1:
        lines += [
            "init = function(args)",
            "  local each = {}",
            f"  for i = 1, {request.pipelined} do each[i] = wrk.format() end",
            "  all = table.concat(each)",
            "end",
            "request = function() return all end",
        ]
    if request.counted:
        lines += [
            "local count = 0",
            "request = function()",
            "  count = count + 1",
            f"  wrk.headers[{lua_string(request.counted.encode())}] = string.format('%032x', count)",
            "  return wrk.format()",
            "end",
        ]
    lines += [
        "done = function(s, latency, requests)",
        f"  io.write(string.format({lua_string(WRK_REPORT.encode())},",
        f"    s.requests, s.duration, s.bytes, {', '.join(f's.errors.{kind}' for kind in COUNTED)}))",
        "end",
    ]
    return "\n".join(lines) + "\n"


def read_wrk(output: str, request: Request, connections: int) -> Load:
    """The rate of answers with a status below 400: an error that is answered quickly must not count as speed.

    RunFailed when the report is missing, or the bytes that came do not fit the bodies that should have come.
    """
    lines = [line for line in output.splitlines() if line.startswith('{"requests"')]
    if not lines:
        raise RunFailed(f"wrk: {output.strip()[-200:]!r}")
    found: dict[str, Any] = json.loads(lines[-1])
    errors = {kind: found[kind] for kind in COUNTED if found[kind]}
    size = len(request.whole_answer)
    if not errors and found["requests"]:
        # Answers in progress at the end are in the bytes and not in the requests.
        most = (found["requests"] + connections * request.pipelined) * (size * FRAMING + HEAD_MAX)
        if not found["requests"] * size <= found["bytes"] <= most:
            raise RunFailed(f"{found['requests']} answers had {found['bytes']} bytes, which does not fit {size} each")
    return Load({"rate": (found["requests"] - found["status"]) / (found["us"] / 1e6)}, errors)


def run_pinned(core: int, command: Sequence[str], seconds: float) -> tuple[str, float]:
    """The output of a client, and the share of its core that it used. RunFailed when it failed."""
    before, start = os.times(), time.monotonic()
    try:
        done = subprocess.run(
            ["taskset", "-c", str(core), *command], capture_output=True, text=True, timeout=seconds + 30
        )
    except subprocess.SubprocessError as error:
        raise RunFailed(f"{Path(command[0]).name}: {error}") from error
    after = os.times()
    if done.returncode:
        raise RunFailed(f"{' '.join(Path(part).name for part in command[:2])}: {(done.stderr or done.stdout).strip()}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, used / (time.monotonic() - start)


def run_wrk(bench: Bench, running: Running, case: Case, seconds: int, connections: int | None = None) -> Load:
    connections = connections or case.connections
    script = running.folder / "request.lua"
    script.write_text(wrk_script(case.request))
    url = f"http://127.0.0.1:{running.port}{case.request.path}"
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", f"{PATIENCE}s", "-s", str(script)]
    output, busy = run_pinned(bench.client_core, ["wrk", *options, url], seconds + PATIENCE)
    return dataclasses.replace(read_wrk(output, case.request, connections), busy=busy)


def run_echo(bench: Bench, running: Running, case: Case, seconds: int) -> Load:
    command = [sys.executable, str(HERE / "echo.py"), str(running.port), str(seconds), str(case.message)]
    output, busy = run_pinned(bench.client_core, [*command, str(case.connections)], seconds)
    found = json.loads(output)
    errors = {"wrong echo": found["wrong"]} if found["wrong"] else {}
    return Load({"rate": (found["echoes"] - found["wrong"]) / found["seconds"]}, errors, busy)


def run_open_loop(bench: Bench, running: Running, case: Case, seconds: int, rate: float) -> Load:
    command = [sys.executable, str(HERE / "openloop.py"), str(running.port), str(seconds), f"{rate:.0f}"]
    body = case.request.answer.decode()
    output, _ = run_pinned(bench.client_core, [*command, str(case.connections), body], seconds)
    found = json.loads(output)
    errors = {"unanswered": found["unanswered"]} if found["unanswered"] else {}
    return Load({key: found[key] for key in ("p50", "p99", "worst", "lag")} | {"rate": rate}, errors)
