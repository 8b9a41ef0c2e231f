"""The built-in interfaces, noting when a request's application is called: for access logs that tell the time before.

Chosen when a worker starts, so that a log without that field costs nothing. A plug-in may note it itself, with
`Stream.note_call`; else the log has no time there.
"""

from __future__ import annotations

from typing import Any

from apphost.interfaces.asgi import AsgiInterface
from apphost.interfaces.asgi_http import AsgiRequest
from apphost.interfaces.asgi_websocket import AsgiWebSocket
from apphost.interfaces.wsgi import WsgiInterface, WsgiRequest


class _TimedAsgiRequest(AsgiRequest):
    __slots__ = ()

    def scope(self) -> dict[str, Any]:
        self.stream.note_call()
        return super().scope()


class _TimedAsgiWebSocket(AsgiWebSocket):
    __slots__ = ()

    def scope(self) -> dict[str, Any]:
        self.stream.note_call()
        return super().scope()


class _TimedAsgi(AsgiInterface):
    request_type = _TimedAsgiRequest
    websocket_type = _TimedAsgiWebSocket


class _TimedWsgiRequest(WsgiRequest):
    __slots__ = ()

    def _call(self) -> None:
        self.stream.note_call()
        super()._call()


class _TimedWsgi(WsgiInterface):
    request_type = _TimedWsgiRequest


_TIMED: dict[Any, Any] = {AsgiInterface: _TimedAsgi, WsgiInterface: _TimedWsgi}


def timed(interface: Any) -> Any:
    """The class that notes the time, for the class of an interface; one that is not ours as it is."""
    return _TIMED.get(interface, interface)
