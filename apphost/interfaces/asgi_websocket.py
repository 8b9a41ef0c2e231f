"""One WebSocket as a call of an ASGI application: its scope, receive and send. Spec version 2.5."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from apphost.interfaces.asgi_http import AsgiRequest, Event, as_bytes, http_scope, raised
from apphost.lifecycle import Policy
from apphost.logs import show_target
from apphost.protocols.base import ClientDisconnected, ResponseError, Stream
from apphost.protocols.capsule import STATE_MAX
from apphost.protocols.frames import may_be_sent
from apphost.protocols.response import ResponseHead
from apphost.protocols.websocket import WebSocket

if TYPE_CHECKING:
    from apphost.interfaces.asgi import AsgiInterface

RESUME = "apphost.resume"  # the extension of the scope: {"state": bytes or None}, to be read, and to be set
_DENIAL = "websocket."  # what is in front of the events of the denial response, which else are those of a response


class Heard(enum.Enum):
    """What the application has received of those events that come once, in this order."""

    NOTHING = enum.auto()
    CONNECT = enum.auto()
    DISCONNECT = enum.auto()


# Looking a member up in its enum costs 0.1 us before Python 3.12.
_NOTHING, _CONNECT, _DISCONNECT = Heard.NOTHING, Heard.CONNECT, Heard.DISCONNECT


class AsgiWebSocket(AsgiRequest):
    """A request until the application has answered the handshake: a denial is its response. From then on, `socket`."""

    __slots__ = ("heard", "resume", "socket")

    def __init__(self, interface: AsgiInterface, stream: Stream) -> None:
        self.heard = _NOTHING
        self.resume: dict[str, Any] | None = None  # of the scope: the state that it finds, and may leave
        self.socket: WebSocket | None = None
        super().__init__(interface, stream)

    def describe(self) -> str:
        return f"WebSocket {show_target(self.stream.head.target)}"

    def scope(self) -> dict[str, Any]:
        scope = http_scope(self.stream, self.interface.root_path, self.interface.state)
        del scope["method"]
        scope["type"] = "websocket"
        scope["scheme"] = "wss" if self.stream.scheme == "https" else "ws"
        scope["subprotocols"] = [*self.stream.opening.subprotocols]
        scope["extensions"]["websocket.http.response"] = {}
        if self.stream.opening.policy is Policy.RESUME:
            self.resume = scope["extensions"][RESUME] = {"state": self.stream.opening.state}
        return scope

    # -- the application's side

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self.stream.opening.release()

    async def receive(self) -> Event:
        """`websocket.connect`, then messages; `websocket.disconnect` from the end on, again and again."""
        if self.heard is _NOTHING:
            self.heard = _CONNECT
            return {"type": "websocket.connect"}
        while True:
            socket = self.socket
            if socket is not None:
                if socket.messages and self.heard is _CONNECT and not socket.moving:
                    message = socket.take()
                    if type(message) is bytes:
                        return {"type": "websocket.receive", "bytes": message, "text": None}
                    return {"type": "websocket.receive", "bytes": None, "text": message}
                if socket.ended:
                    self.heard = _DISCONNECT
                    return {"type": "websocket.disconnect", "code": socket.code, "reason": socket.reason}
            elif self.gone or self.stream.complete:
                self.heard = _DISCONNECT
                return {"type": "websocket.disconnect", "code": 1006, "reason": ""}
            await self._wait()

    async def send(self, event: Event) -> None:
        """Take an event of the application. Raises as with a response; `ClientDisconnected` after any close, too."""
        kind = event["type"]
        socket = self.socket
        if kind == "websocket.send" and socket is not None and socket.open and self.heard is not _DISCONNECT:
            socket.send(_message(event))
            if not socket.writable:
                await self._drained()
            return
        if self.heard is _DISCONNECT or (not self._undecided if socket is None else not socket.open):
            raise ClientDisconnected("the WebSocket is closed")
        act = _EVENTS.get(kind)
        if act is not None:
            act(self, event)
        elif kind.startswith(_DENIAL + "http.response.") and socket is None:
            if self.stream.opening.rejoins:
                self._deny()
            else:
                await super().send({**event, "type": kind.removeprefix(_DENIAL)})
        else:
            raise ResponseError(f"{kind!r} was not expected {'after' if socket else 'before'} websocket.accept")

    @property
    def _undecided(self) -> bool:
        """Whether an answer to the handshake can still reach the client."""
        return self.stream.opening.rejoins or self.stream.connected

    async def _drained(self) -> None:
        socket = self.socket
        if socket is None:
            await super()._drained()
            return
        while not socket.writable and socket.open:
            await self._wait()

    def _accept(self, event: Event) -> None:
        self.socket = self.stream.opening.accept(self, event.get("subprotocol"), event.get("headers") or ())

    def _close(self, event: Event) -> None:
        code = event.get("code")
        code = 1000 if code is None else code
        reason = event.get("reason") or ""
        if self.socket is None and self.started:
            raise ResponseError("websocket.close came within a denial response")
        if self.socket is None:
            self._deny()
        elif not may_be_sent(code):
            raise ValueError(f"a WebSocket cannot be closed with code {code!r} (RFC 6455, 7.4)")
        elif not isinstance(reason, str):
            raise TypeError(f"the reason of a close must be str, not {type(reason).__name__}")
        else:
            self.socket.close(code, reason)
            self._wake()

    def _deny(self) -> None:
        if self.stream.opening.rejoins:
            self.stream.opening.abandon(1012)
            return
        self.stream.start(ResponseHead(403, ()))
        self.stream.write(b"", False)
        self._wake()

    # -- its end

    def _returned(self) -> None:
        if self._parts():
            return
        if self.socket is not None:
            self.socket.close(1000)
        elif self._undecided and not self.started:
            self._deny()
        else:
            super()._returned()

    def _end(self, excused: bool) -> None:
        if self._parts():
            return
        if self.stream.opening.rejoins or (self.socket is not None and self.socket.open):
            self.stream.context.errors += 1
        if self.socket is not None:
            self.socket.close(1011)
        self.stream.opening.abandon(1011)
        super()._end(excused)

    def _parts(self) -> bool:
        """Whether it has finished because another worker's call of the application goes on with the socket."""
        socket = self.socket
        if socket is None or not socket.moving or self.heard is not _DISCONNECT:
            return False
        state = self.resume.get("state") if self.resume is not None else None
        if state is None or (isinstance(state, bytes) and len(state) <= STATE_MAX):
            socket.part(state)
        else:
            self._say(f"left a state that is not bytes, {STATE_MAX} of them at most; the WebSocket is closed with 1012")
            socket.dismiss(1012, "its state cannot travel")
        return True

    def _over(self) -> bool:
        return self.heard is _DISCONNECT or (super()._over() if self.socket is None else not self.socket.open)

    def _failure(self, exc: BaseException) -> str:
        socket = self.socket
        if socket is None and not self.stream.opening.rejoins:
            return super()._failure(exc)
        if socket is not None and not socket.open:
            return raised(exc, "the WebSocket had ended")
        if socket is not None and socket.moving and self.heard is _DISCONNECT:
            return raised(exc, "the WebSocket moves to another worker all the same")
        return raised(exc, "the WebSocket was closed with 1011")


_EVENTS: dict[str, Callable[[AsgiWebSocket, Event], None]] = {
    "websocket.accept": AsgiWebSocket._accept,
    "websocket.close": AsgiWebSocket._close,
}


def _message(event: Event) -> str | bytes:
    """Raises `ValueError` or `TypeError`."""
    data, text = event.get("bytes"), event.get("text")
    if (data is None) == (text is None):
        raise ValueError("websocket.send needs either bytes or text")
    if data is not None:
        return data if type(data) is bytes else as_bytes(data)
    if not isinstance(text, str):
        raise TypeError(f"the text of a message must be str, not {type(text).__name__}")
    return text
