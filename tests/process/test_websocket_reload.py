"""WebSockets through deploys: closed with a whole handshake, or gone on with by the next worker, with nothing lost.

W16 and `ws_on_reload`: `close`, `rejoin`, `resume`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from websockets.sync.client import connect as connect_websocket

from tests.process.ws_probe import BINARY, CONTINUED, PING, PONG, TEXT, Frame, WsClient, close_frame, frame
from tests.rawhttp import DEADLINE, Address, RawClient
from tests.support import Server, wait_for, write_app

# The parser only reads the handshake, so two flavours are all that there is.
FLAVOURS = [("h11", "asyncio"), ("httptools", "uvloop")]
each_flavour = pytest.mark.parametrize("flavour", FLAVOURS, ids="-".join)

# Each message is answered with the version, the worker, a count of this call of the application, and itself.
_APP = """
import asyncio, json, os

VERSION = {version!r}

def say(text):
    os.write(1, f"{{text}}\\n".encode())  # in one piece, among the lines of other processes

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    if scope["type"] == "http":
        await send({{"type": "http.response.start", "status": 200, "headers": []}})
        return await send({{"type": "http.response.body", "body": VERSION.encode()}})
    assert await receive() == {{"type": "websocket.connect"}}
    await before(scope, receive, send)
    accept = {{"type": "websocket.accept", "headers": [(b"x-version", VERSION.encode())]}}
    if scope["subprotocols"]:
        accept["subprotocol"] = subprotocol(scope)
    await send(accept)
    legacy = scope["extensions"].get("apphost.resume", {{}})
    count = int(legacy.get("state") or b"0")
    while True:
        event = await receive()
        if event["type"] == "websocket.disconnect":
            say(f"VERSION {{VERSION}} ended {{json.dumps(event)}}")
            return await after(scope, receive, send)
        count += 1
        legacy["state"] = str(count).encode()
        text = event["text"]
        if text == "hold":
            await send({{"type": "websocket.send", "text": "holding"}})
            while not os.path.exists("go-on"):
                await asyncio.sleep(0.01)
        await send({{"type": "websocket.send", "text": f"{{VERSION}} {{os.getpid()}} {{count}} {{text}}"}})

async def before(scope, receive, send): pass
async def after(scope, receive, send): pass
def subprotocol(scope): return scope["subprotocols"][0]
"""

_DENIES = """
async def before(scope, receive, send):
    await send({'type': 'websocket.http.response.start', 'status': 403, 'headers': []})
    await send({'type': 'websocket.http.response.body', 'body': b'no'})
"""

RULES = ("--ws-on-reload", "/rejoin*=rejoin,/resume*=resume,close")


@contextlib.contextmanager
def serving(folder: Path, *args: str, extra: str = "", kind: str = "tcp") -> Iterator[tuple[Server, Address]]:
    write_app(folder, "app", _APP.format(version="one") + extra)
    bind = ("--bind", f"unix:{folder}/s") if kind == "unix" else ("--bind", "127.0.0.1:0")
    with Server("app:app", *bind, *RULES, *args, cwd=folder) as server:
        yield server, f"{folder}/s" if kind == "unix" else server.port
        if server.exit_code is None:
            assert server.stop() == 0


def flags(flavour: Sequence[str]) -> tuple[str, ...]:
    return "--http", flavour[0], "--loop", flavour[1]


def deploy(server: Server, version: str, extra: str = "") -> int:
    write_app(server.cwd, "app", _APP.format(version=version) + extra)
    return server.reload()


def replace(server: Server, version: str, extra: str = "") -> None:
    """Deploy, and wait until the old workers are gone, and so with the next ones all that was theirs."""
    mark = server.mark()
    generation = deploy(server, version, extra)
    count = server.log.count(f"gen {generation} booting")
    wait_for(lambda: "\n".join(server.lines(mark)).count(f"gen {generation - 1} gone: exit 0") == count)


def ask(client: WsClient, text: str) -> tuple[str, int, int]:
    """Version, pid and count of the answer to one message, which must come next."""
    client.say(text)
    return answer(client, text)


def answer(client: WsClient, text: str) -> tuple[str, int, int]:
    got = client.hear()
    assert isinstance(got, str)
    version, pid, count, echo = got.split(" ", 3)
    assert echo == text
    return version, int(pid), int(count)


def ended(server: Server, version: str, code: int, count: int) -> None:
    """Wait until so many calls of the application have heard of their end."""
    wait_for(lambda: len(re.findall(f'VERSION {version} ended .*"code": {code}', server.log)) == count)


@contextlib.contextmanager
def opened(address: Address, *targets: str, headers: Sequence[tuple[str, str]] = ()) -> Iterator[list[WsClient]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(WsClient(address, target, headers).opened()) for target in targets]


def gone(server: Server, generation: int) -> None:
    server.wait_line(rf"gen {generation} gone: exit 0")


# --------------------------------------------------------------------------------------------------------------- close


@each_flavour
def test_w16_without_a_contract_each_socket_is_closed_as_a_restart(tmp_path: Path, flavour: tuple[str, str]) -> None:
    """W16: 1012 and a full closing handshake; the application is told the same."""
    with (
        serving(tmp_path, *flags(flavour), "--workers", "2") as (server, address),
        opened(address, *["/close"] * 20) as clients,
    ):
        assert {ask(client, "hello")[0] for client in clients} == {"one"}
        deploy(server, "two")
        for client in clients:
            assert client.closed() == (1012, "")
            client.send(close_frame(1012))
            assert client.eof()
        gone(server, 1)
        ended(server, "one", 1012, 20)


def test_w16_closes_are_spread(tmp_path: Path) -> None:
    """A hundred clients do not come back in one instant: the last is closed half a second after the first."""
    extra = """
import time
async def after(scope, receive, send): say(f"CLOSED AT {time.monotonic()}")
"""
    with serving(tmp_path, extra=extra) as (server, address), opened(address, *["/close"] * 100) as clients:
        deploy(server, "two")
        for client in clients:
            assert client.closed() == (1012, "")
            client.send(close_frame(1012))
            assert client.eof()
        gone(server, 1)
        times = [float(at) for at in re.findall("CLOSED AT (.*)", server.log)]
        assert len(times) == 100
        assert max(times) - min(times) > 0.25


def test_w16_a_stop_says_going_away(tmp_path: Path) -> None:
    """1001, whatever the contract: nobody comes after it."""
    with serving(tmp_path) as (server, address), opened(address, "/close", "/rejoin", "/resume") as clients:
        for client in clients:
            ask(client, "hello")
        server.signal(signal.SIGTERM)
        for client in clients:
            assert client.closed() == (1001, "")
            client.send(close_frame(1001))
            assert client.eof()
        assert server.wait_exit() == 0


def test_a_client_that_does_not_answer_the_close_does_not_hold_up_the_drain(tmp_path: Path) -> None:
    """W9: its time is bounded."""
    args = ("--ws-close-timeout", "0.5")
    with serving(tmp_path, *args) as (server, address), WsClient(address, "/close").opened() as client:
        deploy(server, "two")
        assert client.ended() == (1012, "")
        gone(server, 1)


def test_a_handshake_that_is_answered_by_a_draining_worker(tmp_path: Path) -> None:
    """It is opened, and closed at once, as all others."""
    extra = """
async def before(scope, receive, send):
    while not os.path.exists("go-on"):
        await asyncio.sleep(0.01)
"""
    with serving(tmp_path, extra=extra) as (server, address), WsClient(address, "/close") as client:
        with RawClient(address) as other:  # the handshake came before this
            assert other.request("GET", "/").body == b"one"
        deploy(server, "two")
        server.wait_line("gen 1 draining")
        (tmp_path / "go-on").touch()
        assert client.opened().closed() == (1012, "")
        client.send(close_frame(1012))
        gone(server, 1)


# -------------------------------------------------------------------------------------------------------------- rejoin


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@each_flavour
def test_a_socket_goes_on_with_the_next_worker(tmp_path: Path, flavour: tuple[str, str], kind: str) -> None:
    """Without a byte to the client: the second `websocket.accept` is swallowed."""
    offer = [("Sec-WebSocket-Protocol", "a, b")]
    with (
        serving(tmp_path, *flags(flavour), "--workers", "2", kind=kind) as (server, address),
        opened(address, *["/rejoin"] * 30, headers=offer) as clients,
    ):
        for version in ("one", "two", "three"):
            if version != "one":
                replace(server, version)
            for number, client in enumerate(clients):
                got = {ask(client, f"message {number} {turn}") for turn in range(3)}
                assert {each[0] for each in got} == {version}
                assert {each[2] for each in got} == {1, 2, 3}, "the application was called anew, once"
        for client in clients:
            assert client.silent()
            assert client.part(1000, b"bye") == (1000, "bye")
        ended(server, "one", 1012, 30)
        ended(server, "three", 1000, 30)


@each_flavour
def test_the_scope_is_the_same(tmp_path: Path, flavour: tuple[str, str]) -> None:
    """Address, headers, path, query, subprotocols; only the state of the lifespan is the new worker's."""
    extra = """
async def before(scope, receive, send):
    say(f"SCOPE { {key: scope[key] for key in sorted(scope)} }")
"""
    headers = [("X-Odd", "caf\xe9"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("Sec-WebSocket-Protocol", "one, two")]
    with (
        serving(tmp_path, *flags(flavour), extra=extra) as (server, address),
        WsClient(address, "/rejoin/caf%C3%A9?x=%20y", headers).opened() as client,
    ):
        ask(client, "hello")
        replace(server, "two", extra)
        assert ask(client, "hello")[0] == "two"
        first, second = re.findall("SCOPE (.*)", server.log)
        assert first == second
        assert "caf\\xe9" in first


@each_flavour
@pytest.mark.parametrize("cut", [1, 5, 6, 9, 11])
def test_a_frame_that_is_half_received_goes_on(tmp_path: Path, flavour: tuple[str, str], cut: int) -> None:
    """What was read of it travels, and so does what comes while the socket moves."""
    whole = frame(TEXT, b"abcdef")
    with serving(tmp_path, *flags(flavour)) as (server, address), WsClient(address, "/rejoin").opened() as client:
        ask(client, "first")
        client.send(whole[:cut])
        deploy(server, "two")
        gone(server, 1)
        client.send(whole[cut:] + frame(PING, b"still there?"))
        assert client.read_frame() == Frame(PONG, b"still there?")  # by the server, before the application has its turn
        assert answer(client, "abcdef")[0] == "two"


@each_flavour
def test_a_fragmented_message_is_finished_first(tmp_path: Path, flavour: tuple[str, str]) -> None:
    """A socket moves at the end of a message; the one after it is the next worker's."""
    with serving(tmp_path, *flags(flavour)) as (server, address), WsClient(address, "/rejoin").opened() as client:
        ask(client, "first")
        client.send(frame(TEXT, b"one ", fin=False) + frame(CONTINUED, b"two ", fin=False))
        deploy(server, "two")
        ended(server, "one", 1012, 1)
        client.send(frame(CONTINUED, b"three") + frame(TEXT, b"next"))
        assert answer(client, "one two three")[0] == "two"
        assert answer(client, "next")[0] == "two"
        gone(server, 1)


@each_flavour
def test_what_the_application_has_not_received_is_for_the_next(tmp_path: Path, flavour: tuple[str, str]) -> None:
    """In its order, once: what it was busy with is answered by the old one, all the rest by the new one."""
    args = ("--log-level", "debug", *flags(flavour))
    with serving(tmp_path, *args) as (server, address), WsClient(address, "/rejoin").opened() as client:
        client.say("hold")
        assert client.hear() == "holding"
        texts = [f"{number} {'x' * number}" for number in range(200)]
        client.say(*texts[:100])
        deploy(server, "two")
        server.wait_line("the WebSocket of .* is to move")
        client.say(*texts[100:])
        (tmp_path / "go-on").touch()
        assert answer(client, "hold")[0] == "one"
        assert [answer(client, text)[::2] for text in texts] == [("two", number) for number in range(1, 201)]


def test_the_ping_that_is_not_answered_travels(tmp_path: Path) -> None:
    """And the time that is left for its answer: the next worker takes it, or closes."""
    args = ("--ws-ping-interval", "0.5", "--ws-ping-timeout", "6")  # much more than a reload takes
    begun = time.monotonic()
    with (
        serving(tmp_path, *args) as (server, address),
        WsClient(address, "/rejoin").opened() as answers,
        WsClient(address, "/rejoin").opened() as silent,
    ):
        pings = [client.read_frame() for client in (answers, silent)]
        assert [ping.opcode for ping in pings] == [PING, PING]
        deploy(server, "two")
        gone(server, 1)
        answers.send(frame(PONG, pings[0].payload))
        assert silent.ended() == (1011, "no answer to a ping")
        assert time.monotonic() - begun > 6, "it had all of its time"
        again = answers.read_frame()
        assert again.opcode == PING
        assert again.payload != pings[0].payload


def test_compressed_sockets_move(tmp_path: Path) -> None:
    """W14: with any state of the compressor on either side. The window of the client is not kept by agreement."""
    with (
        serving(tmp_path) as (server, address),
        connect_websocket(f"ws://127.0.0.1:{address}/rejoin", proxy=None) as client,
    ):
        assert "client_no_context_takeover" in client.response.headers["Sec-WebSocket-Extensions"]  # type: ignore[union-attr]
        for version in ("one", "two", "three"):
            if version != "one":
                replace(server, version)
            for turn in range(5):
                client.send(f"{'the same again and again ' * 40} {turn}")
                assert str(client.recv(DEADLINE)).split()[0] == version


def test_sockets_move_when_a_worker_is_retired(tmp_path: Path) -> None:
    """TTOU: the other worker of the same generation takes them."""
    with serving(tmp_path, "--workers", "2") as (server, address), opened(address, *["/rejoin"] * 20) as clients:
        before = {ask(client, "hello")[1] for client in clients}
        server.signal(signal.SIGTTOU)
        server.wait_line("gen 1 gone")
        after = {ask(client, "hello")[1] for client in clients}
        assert len(before) == 2
        assert len(after) == 1


@each_flavour
def test_a_storm_of_reloads_loses_no_message(tmp_path: Path, flavour: tuple[str, str]) -> None:
    """Sockets that talk all the time, through deploys on deploys: no close, no message lost, doubled or reordered."""
    stop = threading.Event()
    failures: list[str] = []

    def talk(number: int, address: Address) -> None:
        turn = 0
        try:
            with WsClient(address, "/resume").opened() as client:
                while not stop.is_set():
                    texts = [f"{number} {turn + each}" for each in range(3)]
                    client.say(*texts)
                    for text in texts:
                        turn += 1
                        assert answer(client, text)[2] == turn
                    stop.wait(0.03)
                assert client.part() == (1000, "")
        except BaseException as exc:
            failures.append(f"client {number}, turn {turn}: {exc!r}")

    with serving(tmp_path, *flags(flavour), "--workers", "2") as (server, address):
        threads = [threading.Thread(target=talk, args=(number, address)) for number in range(20)]
        for thread in threads:
            thread.start()
        for number in range(6):
            deploy(server, f"v{number}")
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
        assert not failures
        assert len(re.findall("ended .*1012", server.log)) >= 20 * 5


# -------------------------------------------------------------------------------------------------------------- resume


@each_flavour
def test_the_state_that_is_left_is_found(tmp_path: Path, flavour: tuple[str, str]) -> None:
    """Each client's count goes on, over three deploys, and over a move that nobody asked for."""
    with (
        serving(tmp_path, *flags(flavour), "--workers", "2") as (server, address),
        opened(address, *["/resume"] * 10) as clients,
    ):
        for turn, version in enumerate(("one", "two", "three"), 1):
            if turn > 1:
                replace(server, version)
            assert [ask(client, "count")[::2] for client in clients] == [(version, turn)] * 10
        server.signal(signal.SIGTTOU)
        server.wait_line("gen 3 gone")
        assert {ask(client, "count")[2] for client in clients} == {4}


@pytest.mark.parametrize(
    ("state", "code"),
    [('b"x" * 65536', None), ('b"x" * 65537', 1012), ('"text"', 1012), ("{}", 1012), ("None", None)],
    ids=["largest", "too large", "text", "a dict", "none"],
)
def test_what_is_no_state_closes(tmp_path: Path, state: str, code: int | None) -> None:
    """Never a silent zombie: it is said in the log, and the client is told."""
    extra = """
async def after(scope, receive, send):
    scope["extensions"]["apphost.resume"]["state"] = STATE
async def before(scope, receive, send):
    say(f"FOUND {len(scope['extensions']['apphost.resume']['state'] or b'')}")
    if VERSION == "two":
        scope["extensions"]["apphost.resume"]["state"] = None
""".replace("STATE", state)
    with serving(tmp_path, extra=extra) as (server, address), WsClient(address, "/resume").opened() as client:
        ask(client, "hello")
        deploy(server, "two", extra)
        if code is None:
            assert ask(client, "hello")[::2] == ("two", 1)
            server.wait_line(f"FOUND {65536 if 'x' in state else 0}$")
        else:
            assert client.closed() == (code, "")
            client.send(close_frame(code))
            server.wait_line("left a state that is not bytes, 65536 of them at most")
        gone(server, 1)


def test_a_state_that_is_taken_away_is_none(tmp_path: Path) -> None:
    """The dict of the extension is the application's to change as it likes."""
    extra = """
async def before(scope, receive, send):
    say(f"FOUND {scope['extensions']['apphost.resume']['state']}")
async def after(scope, receive, send):
    scope["extensions"]["apphost.resume"].clear()
"""
    with serving(tmp_path, extra=extra) as (server, address), WsClient(address, "/resume").opened() as client:
        ask(client, "hello")
        replace(server, "two", extra)
        assert ask(client, "hello")[::2] == ("two", 1)
        assert server.log.count("FOUND None") == 2


# ---------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("async def before(scope, receive, send): await send({'type': 'websocket.close', 'code': 4000})", 1012),
        (_DENIES, 1012),
        ("async def before(scope, receive, send): raise RuntimeError('no more')", 1011),
        ("def subprotocol(scope): return scope['subprotocols'][1]", 1012),
        ("app_ = app\nasync def app(scope, receive, send):\n    if scope['type'] != 'websocket': await app_(scope, receive, send)", 1012),  # noqa: E501
    ],
    ids=["denied", "denied with a response", "raised", "another subprotocol", "returned"],
)  # fmt: skip
def test_an_application_that_does_not_take_it_again(tmp_path: Path, extra: str, code: int) -> None:
    """The client is told, with a whole closing handshake; it cannot be denied any more."""
    headers = [("Sec-WebSocket-Protocol", "a, b")]
    with serving(tmp_path) as (server, address), WsClient(address, "/rejoin", headers).opened() as client:
        ask(client, "hello")
        deploy(server, "two", extra)
        assert client.closed() == (code, "")
        client.send(close_frame(code))
        assert client.eof()
        gone(server, 1)


def test_an_application_that_closes_before_it_hears_that_it_is_to_part(tmp_path: Path) -> None:
    """W9: it has the last word, and the worker goes once the client has answered."""
    extra = """
async def app_(scope, receive, send, app=app):
    async def reply(event):
        if "hold" in (event.get("text") or "") and "holding" not in event["text"]:
            event = {"type": "websocket.close", "code": 4000}
        await send(event)
    await app(scope, receive, reply)
app = app_
"""
    args = ("--log-level", "debug")
    with (
        serving(tmp_path, *args, extra=extra) as (server, address),
        WsClient(address, "/rejoin").opened() as client,
    ):
        client.say("hold")
        assert client.hear() == "holding"
        deploy(server, "two")
        server.wait_line("the WebSocket of .* is to move")
        (tmp_path / "go-on").touch()
        assert client.part(4000) == (4000, "")
        gone(server, 1)


def test_an_application_that_does_not_finish(tmp_path: Path) -> None:
    """Its socket is closed after a while, and its worker goes at the end of its drain."""
    extra = "async def after(scope, receive, send): await asyncio.sleep(600)"
    args = ("--graceful-timeout", "2")
    with serving(tmp_path, *args, extra=extra) as (server, address), WsClient(address, "/rejoin").opened() as client:
        ask(client, "hello")
        deploy(server, "two")
        assert client.closed() == (1012, "")
        server.wait_line("gen 1 gone")


def test_the_next_settings_serve_no_websockets(tmp_path: Path) -> None:
    """Nobody takes them, so they are closed."""
    args = ("--graceful-timeout", "3")
    with serving(tmp_path, *args) as (server, address), WsClient(address, "/rejoin").opened() as client:
        ask(client, "hello")
        (tmp_path / "apphost.toml").write_text('ws = "none"\n')
        deploy(server, "two")
        assert client.closed() == (1012, "")
        client.send(close_frame(1012))
        gone(server, 1)


@pytest.mark.parametrize("moment", ["held", "moved"])
def test_the_worker_that_took_it_is_killed(tmp_path: Path, moment: str) -> None:
    """Its sockets are lost with it, and only they; the server goes on."""
    with serving(tmp_path) as (server, address), WsClient(address, "/rejoin").opened() as client:
        pid = ask(client, "hello")[1]
        if moment == "held":
            client.say("hold")
            assert client.hear() == "holding"
            server.signal(signal.SIGUSR1)
            server.wait_line("gen 1 draining")
        else:
            replace(server, "two")
            pid = ask(client, "hello")[1]
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            assert client.eof()
        with WsClient(address, "/rejoin").opened() as again:
            ask(again, "hello")


def test_a_stop_while_sockets_move(tmp_path: Path) -> None:
    """Each one is closed by the old worker or by the new one, and the server ends in time."""
    with serving(tmp_path) as (server, address), opened(address, *["/rejoin"] * 200) as clients:
        for client in clients:
            ask(client, "hello")
        server.reload(wait=False)
        server.wait_line("gen 1 draining")
        server.signal(signal.SIGTERM)
        for client in clients:
            assert client.closed()[0] in (1001, 1012)
            client.send(close_frame(1001))
            assert client.eof()
        assert server.wait_exit() == 0


def test_a_client_that_closes_while_its_application_parts(tmp_path: Path) -> None:
    """W8: the next call of the application gets what came before, and hears of the close, which is answered."""
    extra = """
async def app_(scope, receive, send, app=app):
    async def hear():
        event = await receive()
        say(f"HEARD {event.get('text')}")
        return event
    await app(scope, hear, send)
app = app_
"""
    args = ("--log-level", "debug")
    with serving(tmp_path, *args) as (server, address), WsClient(address, "/rejoin").opened() as client:
        client.say("hold")
        assert client.hear() == "holding"
        deploy(server, "two", extra)
        server.wait_line("the WebSocket of .* is to move")
        client.say("last")
        client.send(close_frame(4001, b"enough"))
        (tmp_path / "go-on").touch()
        assert answer(client, "hold")[0] == "one"
        assert client.ended() == (4001, "enough")
        server.wait_line("^HEARD last$")


def test_a_large_message_that_nobody_has_received(tmp_path: Path) -> None:
    """More than can travel: closed, as nothing may be lost silently."""
    with serving(tmp_path) as (server, address), WsClient(address, "/rejoin").opened() as client:
        client.say("hold")
        assert client.hear() == "holding"
        client.send(frame(BINARY, bytes(600_000)))
        with RawClient(address) as other:  # that message came before this
            assert other.request("GET", "/").status == 200
        deploy(server, "two")
        (tmp_path / "go-on").touch()
        assert answer(client, "hold")[0] == "one"
        assert client.closed() == (1012, "")
        client.send(close_frame(1012))
        gone(server, 1)
