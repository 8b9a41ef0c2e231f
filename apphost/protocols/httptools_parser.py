"""Request heads through httptools, the Python binding of llhttp: compiled and fast (`pip install apphost[fast]`)."""

from __future__ import annotations

import httptools

from apphost.protocols.base import BadRequest, Headers, RequestHead


class HttptoolsParser:
    """A `HeadParser` on httptools. One llhttp state machine serves all heads; it is replaced when a head leaves it
    inside a message (a body follows) or in an error, because it is not fed anything but heads."""

    __slots__ = ("_complete", "_headers", "_machine", "_target")

    def __init__(self) -> None:
        self._headers: Headers = []
        self._target = b""
        self._complete = False
        self._machine = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_message_complete(self) -> None:
        self._complete = True

    def parse(self, head: bytes) -> RequestHead:
        try:
            return self._parse(head)
        except httptools.HttpParserInvalidMethodError:
            # llhttp knows a fixed list of methods; the strict layer has seen that this one is a token, which is all
            # that RFC 9110 (9.1) asks of a method. So the head is parsed under the name of a method that llhttp knows.
            method, _, rest = head.partition(b" ")
            parsed = self._parse(b"POST " + rest)
            parsed.method = method.decode("ascii")
            return parsed

    def _parse(self, head: bytes) -> RequestHead:
        machine = self._machine
        self._headers = []
        self._target = b""
        self._complete = False
        reusable = False
        try:
            machine.feed_data(head)
            # After a message that ends its connection llhttp refuses every further byte.
            reusable = self._complete and machine.should_keep_alive()
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserInvalidMethodError:
            raise
        except httptools.HttpParserError:
            raise BadRequest(400, "the request head is malformed") from None
        finally:
            if not reusable:
                self._machine = httptools.HttpRequestParser(self)
        method = machine.get_method().decode("ascii")
        return RequestHead(method, self._target, machine.get_http_version(), self._headers)
