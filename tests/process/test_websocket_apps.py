"""WebSockets of Starlette, FastAPI and Django Channels, with the `websockets` library as the client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect, unix_connect

from tests.rawhttp import DEADLINE, RawClient
from tests.support import Server, wait_for, write_app

STARLETTE = '''
import anyio
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

ends = {}


async def echo(websocket):
    """Text as text, bytes as bytes."""
    await websocket.accept()
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"], message["reason"])
            if message.get("text") is not None:
                await websocket.send_text(message["text"])
            else:
                await websocket.send_bytes(message["bytes"])
    except WebSocketDisconnect as exc:
        ends[websocket.query_params.get("name")] = [exc.code, exc.reason]


async def calculator(websocket):
    """JSON; chooses a subprotocol, sets a header, and closes with a code when it is told nonsense."""
    await websocket.accept(subprotocol="calc.v2", headers=[(b"x-calc", b"2")])
    async for order in websocket.iter_json():
        if not isinstance(order, list):
            await websocket.close(code=4400, reason="a list, please")
            return
        await websocket.send_json({"sum": sum(order), "sorted": sorted(order)}, mode=websocket.path_params["mode"])


async def denied(websocket):
    await websocket.close(code=4403, reason="no")


async def denial_response(websocket):
    await websocket.send_denial_response(JSONResponse({"why": "closed on Sundays"}, 423, {"x-day": "Sunday"}))


async def denial_stream(websocket):
    async def pieces():
        for number in range(3):
            yield f"piece {number};"
            await anyio.sleep(0)

    await websocket.send_denial_response(StreamingResponse(pieces(), 429))


async def http_exception(websocket):
    raise HTTPException(404, "no such room", {"x-room": "none"})


async def fails(websocket):
    if "late" in websocket.query_params:
        await websocket.accept()
    raise RuntimeError("out of the endpoint")


async def ticker(websocket):
    """Sends from one task and receives in another; ends both with the client."""
    await websocket.accept()

    async def send():
        number = 0
        while True:
            await websocket.send_text(f"tick {number}")
            number += 1
            await anyio.sleep(0.001)

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(send)
            async for text in websocket.iter_text():
                await websocket.send_text(f"heard {text}")
            group.cancel_scope.cancel()
    finally:
        ends[websocket.query_params.get("name")] = "ticker done"


class Endpoint(WebSocketEndpoint):
    encoding = "json"

    async def on_receive(self, websocket, data):
        await websocket.send_json({"got": data})

    async def on_disconnect(self, websocket, code):
        ends[websocket.query_params.get("name")] = code


async def told(request):
    return JSONResponse(ends)


app = Starlette(
    routes=[
        Route("/ends", told),
        WebSocketRoute("/echo", echo),
        WebSocketRoute("/calculator/{mode}", calculator),
        WebSocketRoute("/denied", denied),
        WebSocketRoute("/denial-response", denial_response),
        WebSocketRoute("/denial-stream", denial_stream),
        WebSocketRoute("/http-exception", http_exception),
        WebSocketRoute("/fails", fails),
        WebSocketRoute("/ticker", ticker),
        WebSocketRoute("/endpoint", Endpoint),
    ]
)
'''

FASTAPI = '''
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Query, WebSocket, WebSocketDisconnect, WebSocketException
from pydantic import BaseModel


@asynccontextmanager
async def lifespan(app):
    yield {"greeting": "hello"}


app = FastAPI(lifespan=lifespan)
rooms: dict[str, list[WebSocket]] = {}
ends = {}


class Order(BaseModel):
    item: str
    count: int


async def user(token: Annotated[str | None, Query()] = None, x_tenant: Annotated[str, Header()] = "none"):
    if token is None:
        raise WebSocketException(1008, "a token, please")
    if token == "expired":
        raise HTTPException(401, "expired", {"www-authenticate": "Token"})
    if token == "late":
        yield "late"
        raise RuntimeError("in the clean-up of a dependency")
    yield f"{token}@{x_tenant}"


@app.websocket("/rooms/{room}/{number:int}")
async def enter(websocket: WebSocket, room: str, number: int, name: Annotated[str, Depends(user)]):
    """Says what it was told, to all that are in the room."""
    await websocket.accept()
    members = rooms.setdefault(room, [])
    members.append(websocket)
    await websocket.send_text(f"{websocket.state.greeting} {name} in {room} {number + 1}")
    try:
        async for text in websocket.iter_text():
            for member in members:
                await member.send_text(f"{name}: {text}")
    finally:
        members.remove(websocket)


@app.websocket("/orders")
async def orders(websocket: WebSocket):
    await websocket.accept()
    try:
        while True:
            order = Order.model_validate_json(await websocket.receive_text())
            await websocket.send_json({"item": order.item, "count": order.count * 2})
    except WebSocketDisconnect as exc:
        ends[websocket.query_params["name"]] = exc.code
    except ValueError:
        raise WebSocketException(1007, "no order")


@app.get("/ends")
async def told():
    return ends


@app.get("/rooms")
def count():
    return {room: len(members) for room, members in rooms.items()}
'''

CHANNELS = '''
import asyncio
import json

from django.conf import settings

settings.configure(SECRET_KEY="k" * 50, ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, DEBUG=False)

import django

django.setup()

from channels.exceptions import AcceptConnection, DenyConnection
from channels.generic.websocket import AsyncJsonWebsocketConsumer, AsyncWebsocketConsumer, WebsocketConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.core.asgi import get_asgi_application
from django.http import JsonResponse
from django.urls import path

ends = {}


class Sync(WebsocketConsumer):
    """In a thread."""

    def connect(self):
        if self.scope["url_route"]["kwargs"]["name"] == "nobody":
            self.close(code=4401)
        elif self.scope["url_route"]["kwargs"]["name"] == "mallory":
            raise DenyConnection
        else:
            self.accept("chat" if "chat" in self.scope["subprotocols"] else None)
            self.send(text_data="welcome " + self.scope["url_route"]["kwargs"]["name"])

    def receive(self, text_data=None, bytes_data=None):
        if text_data == "leave":
            self.close(code=4000, reason="as you wish")
        elif text_data == "fail":
            raise RuntimeError("out of the consumer")
        else:
            self.send(text_data=text_data, bytes_data=bytes_data)

    def disconnect(self, code):
        ends[self.scope["url_route"]["kwargs"]["name"]] = code


class Json(AsyncJsonWebsocketConsumer):
    async def connect(self):
        await self.accept()

    async def receive_json(self, content):
        if content == "leave":
            await self.send_json({"bye": True}, close=4001)
        elif content == "push":
            self.pushing = asyncio.ensure_future(self.push())
        else:
            await self.send_json({"echo": content})

    async def push(self):
        for number in range(5):
            await self.send_json({"number": number})
            await asyncio.sleep(0)

    async def disconnect(self, code):
        ends["json"] = code


class Silent(AsyncWebsocketConsumer):
    """Never answers the handshake, but with an exception."""

    async def connect(self):
        raise RuntimeError("out of connect")


class Implicit(AsyncWebsocketConsumer):
    """The consumer's own connect accepts."""

    async def receive(self, text_data=None, bytes_data=None):
        await self.send(text_data=f"{text_data} {bytes_data}")


def told(request):
    return JsonResponse(ends)


urlpatterns = [path("ends", told)]
app = ProtocolTypeRouter(
    {
        "http": get_asgi_application(),
        "websocket": AllowedHostsOriginValidator(
            URLRouter(
                [
                    path("sync/<name>", Sync.as_asgi()),
                    path("json", Json.as_asgi()),
                    path("silent", Silent.as_asgi()),
                    path("implicit", Implicit.as_asgi()),
                ]
            )
        ),
    }
)
'''

SOURCES = {"starlette": STARLETTE, "fastapi": FASTAPI, "channels": CHANNELS}
PAIRS = [("h11", "asyncio"), ("httptools", "uvloop")]


@dataclass(frozen=True)
class Site:
    server: Server
    socket_path: str

    def open(self, target: str, **options: Any) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.server.port}{target}", proxy=None, **options)

    def ends(self) -> Any:
        with RawClient(self.server.port) as client:
            return json.loads(client.request("GET", "/ends").body)

    def refused(self, target: str, **options: Any) -> Any:
        """The response to a handshake that does not become a WebSocket."""
        with pytest.raises(InvalidStatus) as caught, self.open(target, **options):
            pass
        return caught.value.response


@contextlib.contextmanager
def running(name: str, pair: tuple[str, str], folder: Any) -> Iterator[Site]:
    for module in (name, *pair):
        pytest.importorskip(module)
    write_app(folder, f"{name}_sockets", SOURCES[name])
    path = str(folder / "socket")
    binds = ("--bind", "127.0.0.1:0", "--bind", f"unix:{path}")
    options = ("--http", pair[0], "--loop", pair[1], "--ws-close-timeout", "2s")
    with Server(f"{name}_sockets:app", *binds, *options, cwd=folder) as server:
        yield Site(server, path)
        assert server.stop() == 0


def site(name: str) -> Callable[..., Iterator[Site]]:
    """A fixture: the application of this name, on each pair of parser and loop."""

    @pytest.fixture(scope="module", params=PAIRS, ids="-".join, name=name)
    def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
        with running(name, request.param, tmp_path_factory.mktemp(name)) as found:
            yield found

    return serving


_starlette, _fastapi, _channels = site("starlette"), site("fastapi"), site("channels")


def closed(client: ClientConnection) -> tuple[int, str]:
    """Code and reason of the server's close, which must come next."""
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(timeout=DEADLINE)
    assert caught.value.rcvd is not None, "the connection ended without a closing handshake"
    return caught.value.rcvd.code, caught.value.rcvd.reason


def end_of(site: Site, name: str) -> Any:
    return wait_for(lambda: (ends := site.ends()).get(name) is not None and ends)[name]


# -- Starlette


@pytest.mark.parametrize("compression", ["deflate", None])
def test_starlette_echo(starlette: Site, compression: str | None) -> None:
    """W4 W6 W8 W14"""
    name = f"echo-{compression}"
    messages: list[str | bytes] = ["text", b"bytes", "", b"", "€" * 100000, bytes(500000), "fin"]
    with starlette.open(f"/echo?name={name}", compression=compression) as client:
        for message in messages:
            client.send(message)
            assert client.recv(timeout=DEADLINE) == message
        assert client.ping(b"there?").wait(DEADLINE)
        client.close(4242, "käse")
    assert end_of(starlette, name) == [4242, "käse"]


def test_starlette_on_a_unix_socket(starlette: Site) -> None:
    """W4"""
    with unix_connect(starlette.socket_path, "ws://localhost/echo?name=unix") as client:
        client.send("text")
        assert client.recv(timeout=DEADLINE) == "text"
    assert end_of(starlette, "unix") == [1000, ""]


def test_starlette_hears_of_a_lost_client(starlette: Site) -> None:
    """W8"""
    with starlette.open("/echo?name=lost") as client:
        client.send("text")
        assert client.recv(timeout=DEADLINE) == "text"
        client.socket.shutdown(2)
    assert end_of(starlette, "lost") == [1006, ""]


@pytest.mark.parametrize("mode", ["text", "binary"])
def test_starlette_json(starlette: Site, mode: str) -> None:
    """W5 W9"""
    with starlette.open(f"/calculator/{mode}", subprotocols=["calc.v1", "calc.v2"]) as client:
        assert client.subprotocol == "calc.v2"
        assert client.response is not None
        assert client.response.headers["x-calc"] == "2"
        client.send("[3, 1, 2]")
        answer = client.recv(timeout=DEADLINE)
        assert isinstance(answer, str) == (mode == "text")
        assert json.loads(answer) == {"sum": 6, "sorted": [1, 2, 3]}
        client.send('"nonsense"')
        assert closed(client) == (4400, "a list, please")


def test_starlette_subprotocol_that_was_not_offered(starlette: Site) -> None:
    """W5 W2: the server's exception is the application's end."""
    assert starlette.refused("/calculator/text", subprotocols=["calc.v1"]).status_code == 500


def test_starlette_denials(starlette: Site) -> None:
    """W2 X1"""
    assert starlette.refused("/denied").status_code == 403
    assert starlette.refused("/no-such-route").status_code == 403
    response = starlette.refused("/denial-response")
    assert (response.status_code, response.headers["x-day"]) == (423, "Sunday")
    assert json.loads(response.body) == {"why": "closed on Sundays"}
    response = starlette.refused("/denial-stream")
    assert (response.status_code, response.body) == (429, b"piece 0;piece 1;piece 2;")
    response = starlette.refused("/http-exception")
    assert (response.status_code, response.headers["x-room"], response.body) == (404, "none", b"no such room")


def test_starlette_failures(starlette: Site) -> None:
    """W2 W10: in the log with the traceback."""
    mark = starlette.server.mark()
    assert starlette.refused("/fails").status_code == 500
    with starlette.open("/fails?late") as client:
        assert closed(client)[0] == 1011
    starlette.server.wait_line(r"RuntimeError \(out of the endpoint\).*500.*in WebSocket /fails$", after=mark)
    starlette.server.wait_line(r"RuntimeError \(out of the endpoint\).*1011.*in WebSocket /fails\?late$", after=mark)
    starlette.server.wait_line("starlette_sockets.py", after=mark)


def test_starlette_two_tasks(starlette: Site) -> None:
    """A8 W11: one sends, one receives; the end of the client ends both."""
    mark = starlette.server.mark()
    with starlette.open("/ticker?name=ticker") as client:
        for number in range(20):
            assert client.recv(timeout=DEADLINE) == f"tick {number}"
        client.send("me")
        while not (message := str(client.recv(timeout=DEADLINE))).startswith("heard"):
            pass
        assert message == "heard me"
    assert end_of(starlette, "ticker") == "ticker done"
    assert not [line for line in starlette.server.lines(mark) if " error " in line]


def test_starlette_endpoint(starlette: Site) -> None:
    """W9: nonsense makes the class close with 1003."""
    with starlette.open("/endpoint?name=endpoint") as client:
        client.send('{"a": [1, null]}')
        assert json.loads(client.recv(timeout=DEADLINE)) == {"got": {"a": [1, None]}}
        client.send("nonsense")
        assert closed(client)[0] == 1003
    assert end_of(starlette, "endpoint") == 1011  # Starlette's own word, for the exception that it raises then


# -- FastAPI


def test_fastapi_dependencies_and_path_parameters(fastapi: Site) -> None:
    """W4 H12"""
    with (
        fastapi.open("/rooms/caf%C3%A9/41?token=ann", additional_headers={"X-Tenant": "acme"}) as ann,
        fastapi.open("/rooms/caf%C3%A9/0?token=bob") as bob,
    ):
        assert ann.recv(timeout=DEADLINE) == "hello ann@acme in café 42"
        assert bob.recv(timeout=DEADLINE) == "hello bob@none in café 1"
        ann.send("hi all")
        assert ann.recv(timeout=DEADLINE) == bob.recv(timeout=DEADLINE) == "ann@acme: hi all"
        bob.close()
        ann.send("anyone?")
        assert ann.recv(timeout=DEADLINE) == "ann@acme: anyone?"


def test_fastapi_refusals(fastapi: Site) -> None:
    """W2 X1: from a dependency, from an HTTPException and from a path that does not fit."""
    assert fastapi.refused("/rooms/a/1").status_code == 403
    assert fastapi.refused("/rooms/a/no-number?token=ann").status_code == 403
    response = fastapi.refused("/rooms/a/1?token=expired")
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Token")
    assert json.loads(response.body) == {"detail": "expired"}


def test_fastapi_failure_in_a_dependency(fastapi: Site) -> None:
    """W10 W11: after the client has gone; that is the application's own, and logged."""
    mark = fastapi.server.mark()
    with fastapi.open("/rooms/late/1?token=late") as client:
        assert client.recv(timeout=DEADLINE) == "hello late in late 2"
    fastapi.server.wait_line(r"RuntimeError \(in the clean-up of a .*in WebSocket /rooms/late/1", after=mark)


def test_fastapi_models(fastapi: Site) -> None:
    """W9"""
    with fastapi.open("/orders?name=good") as client:
        client.send('{"item": "käse", "count": 21}')
        assert json.loads(client.recv(timeout=DEADLINE)) == {"item": "käse", "count": 42}
        client.close(1001)
    assert end_of(fastapi, "good") == 1001
    with fastapi.open("/orders?name=bad") as client:
        client.send('{"item": 1}')
        assert closed(client) == (1007, "no order")


def test_fastapi_many_clients(fastapi: Site) -> None:
    """A3 W15: all in one room."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(fastapi.open(f"/rooms/many/1?token=u{number}")) for number in range(40)]
        for number, client in enumerate(clients):
            assert client.recv(timeout=DEADLINE) == f"hello u{number}@none in many 2"
        for number, client in enumerate(clients):
            client.send(f"from {number}")
        expected = {f"u{number}@none: from {number}" for number in range(40)}
        for client in clients:
            assert {client.recv(timeout=DEADLINE) for _ in clients} == expected


# -- Django Channels


def test_channels_sync_consumer(channels: Site) -> None:
    """W5 W6 W8: in a thread."""
    with channels.open("/sync/ann", subprotocols=["x", "chat"]) as client:
        assert client.subprotocol == "chat"
        assert client.recv(timeout=DEADLINE) == "welcome ann"
        for message in ("text", b"bytes", "€" * 50000, bytes(200000)):
            client.send(message)
            assert client.recv(timeout=DEADLINE) == message
        client.close(4002)
    assert end_of(channels, "ann") == 4002


def test_channels_close_from_the_consumer(channels: Site) -> None:
    """W9"""
    with channels.open("/sync/bob") as client:
        assert client.recv(timeout=DEADLINE) == "welcome bob"
        client.send("leave")
        assert closed(client) == (4000, "as you wish")
    assert end_of(channels, "bob") == 4000


def test_channels_denials(channels: Site) -> None:
    """W2: close before accept, DenyConnection, an origin that is not allowed."""
    mark = channels.server.mark()
    assert channels.refused("/sync/nobody").status_code == 403
    assert channels.refused("/sync/mallory").status_code == 403
    with channels.open("/implicit", origin="http://evil.example") as client:  # ALLOWED_HOSTS is *
        client.send("x")
        assert client.recv(timeout=DEADLINE) == "x None"
    assert not [line for line in channels.server.lines(mark) if " error " in line]


def test_channels_failures(channels: Site) -> None:
    """W2 W10"""
    mark = channels.server.mark()
    assert channels.refused("/silent").status_code == 500
    assert channels.refused("/no-such-route").status_code == 500
    with channels.open("/sync/eve") as client:
        assert client.recv(timeout=DEADLINE) == "welcome eve"
        client.send("fail")
        assert closed(client)[0] == 1011
    channels.server.wait_line(r"RuntimeError \(out of connect\).*500.*in WebSocket /silent", after=mark)
    channels.server.wait_line(r"RuntimeError \(out of the consumer\).*1011.*in WebSocket /sync/eve", after=mark)


def test_channels_json_consumer(channels: Site) -> None:
    """W6 W9"""
    with channels.open("/json") as client:
        client.send('{"a": "käse"}')
        assert json.loads(client.recv(timeout=DEADLINE)) == {"echo": {"a": "käse"}}
        client.send('"push"')
        for number in range(5):
            assert json.loads(client.recv(timeout=DEADLINE)) == {"number": number}
        client.send('"leave"')
        assert json.loads(client.recv(timeout=DEADLINE)) == {"bye": True}
        assert closed(client) == (4001, "")
    assert end_of(channels, "json") == 4001


def test_channels_many_clients(channels: Site) -> None:
    """A3: each with a consumer, and a thread, of its own."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(channels.open(f"/sync/user{number}")) for number in range(20)]
        for number, client in enumerate(clients):
            client.send(f"text {number}")
        for number, client in enumerate(clients):
            assert [client.recv(timeout=DEADLINE) for _ in range(2)] == [f"welcome user{number}", f"text {number}"]
