"""Request heads through httptools, the Python binding of llhttp: compiled and fast (`pip install apphost[fast]`)."""

from __future__ import annotations

import httptools

from apphost.protocols.base import BadRequest, Headers, RequestHead


class HttptoolsParser:
    """A `HeadParser` on httptools. One llhttp state machine serves all heads; it is replaced when a head leaves it
    inside a message (a body follows) or in an error, because it is not fed anything but heads."""

    __slots__ = ("_headers", "_machine", "_reusable", "_target")

    def __init__(self) -> None:
        self._headers: Headers = []
        self._target = b""
        self._reusable = False
        self._machine = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_message_complete(self) -> None:
        # After a message that ends its connection llhttp refuses every further byte; asked here, because it has
        # forgotten the message by the time that `feed_data` returns.
        self._reusable = self._machine.should_keep_alive()

    def parse(self, head: bytes) -> RequestHead:
        machine = self._machine
        self._headers = []
        self._target = b""
        self._reusable = False
        try:
            machine.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._reusable = False
        except httptools.HttpParserError:
            self._reusable = False
            raise BadRequest(400, "the request head is malformed") from None
        finally:
            if not self._reusable:
                self._machine = httptools.HttpRequestParser(self)
        method = machine.get_method().decode("ascii")
        return RequestHead(method, self._target, machine.get_http_version(), self._headers)
