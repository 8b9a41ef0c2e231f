"""The WSGI environ (PEP 3333; RFC 3875 for the CGI variables). Pure but for the objects it is handed."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_to_bytes

from apphost.interfaces.wsgi_io import ErrorLog, FileWrapper
from apphost.protocols.base import Headers, Stream

_SPECIAL = {b"content-type": "CONTENT_TYPE", b"content-length": "CONTENT_LENGTH"}
# Never a variable: `Proxy` would become HTTP_PROXY, which HTTP clients inside the application obey (CVE-2016-5385).
_NEVER = frozenset((b"proxy",))
_VARIABLES: dict[bytes, str] = {}
_VARIABLES_MAX = 1024  # clients choose header names: a bound, so that made-up ones cost no memory


_OF_EACH = (
    "REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "REQUEST_URI", "RAW_URI", "SERVER_PROTOCOL", "wsgi.url_scheme",
    "wsgi.input", "SERVER_NAME", "SERVER_PORT", "REMOTE_ADDR",
)  # fmt: skip
_PROTOCOLS = {"1.0": "HTTP/1.0", "1.1": "HTTP/1.1"}


def base_environ(root_path: str, errors: ErrorLog, *, multithread: bool, multiprocess: bool) -> dict[str, Any]:
    """What all requests of a worker have in common, and the names of what each of them fills in: a copy of a dict that
    has its full size need not grow."""
    return {
        **dict.fromkeys(_OF_EACH),
        "SCRIPT_NAME": root_path.encode("utf-8").decode("latin-1"),
        "wsgi.version": (1, 0),
        "wsgi.errors": errors,
        "wsgi.multithread": multithread,
        "wsgi.multiprocess": multiprocess,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        "wsgi.file_wrapper": FileWrapper,
        "SERVER_SOFTWARE": "apphost",
    }


def request_environ(base: dict[str, Any], stream: Stream, root_path: str, body: object) -> dict[str, Any]:
    """The environ of one request: a new builtin dict that the application may do with as it likes."""
    head = stream.head
    environ = base.copy()
    environ["REQUEST_METHOD"] = head.method
    environ["PATH_INFO"] = path_info(head.raw_path, root_path)
    environ["QUERY_STRING"] = head.query.decode("latin-1")
    # What was asked for, undecoded: no standard, but what gunicorn, uWSGI and Werkzeug agree on.
    environ["REQUEST_URI"] = environ["RAW_URI"] = head.target.decode("latin-1")
    environ["SERVER_PROTOCOL"] = _PROTOCOLS[head.version]
    environ["wsgi.url_scheme"] = scheme = stream.scheme
    if scheme == "https":
        environ["HTTPS"] = "on"  # PEP 3333: as many of Apache's variables as are known
    environ["wsgi.input"] = body
    host, port = stream.server
    if port is None:
        host = "localhost"  # the path of a Unix socket is no host name
    environ["SERVER_NAME"] = f"[{host}]" if ":" in host else host  # RFC 3875, 4.1.14: as it stands in a URL
    environ["SERVER_PORT"] = str(port) if port is not None else ("443" if scheme == "https" else "80")
    client = stream.client
    if client is None:
        environ["REMOTE_ADDR"] = ""
    else:
        environ["REMOTE_ADDR"] = client[0]
        environ["REMOTE_PORT"] = str(client[1])
    fields = head.fields
    if fields.headers is not head.headers:  # a trusted proxy has told better, for this request alone
        environ.update(_variables(head.headers))
        return environ
    variables = fields.variables
    if variables is None:
        variables = fields.variables = _variables(head.headers)
    environ.update(variables)
    return environ


def _variables(headers: Headers) -> dict[str, str]:
    """The CGI variables of the fields of a request; repeated ones are one variable (RFC 3875, 4.1.18)."""
    known = _VARIABLES
    variables: dict[str, str] = {}
    for name, value in headers:
        variable = known.get(name)
        if variable is None:
            variable = _variable(name)
        text = value.decode("latin-1")
        if variable in variables:
            text = variables[variable] + ("; " if name == b"cookie" else ",") + text
        variables[variable] = text
    variables.pop("", None)
    return variables


def _variable(name: bytes) -> str:
    """The CGI variable of a header name; empty for one that must not become a variable."""
    if name in _NEVER:
        return ""
    variable = _SPECIAL.get(name) or "HTTP_" + name.decode("latin-1").upper().replace("-", "_")
    if len(_VARIABLES) < _VARIABLES_MAX:
        _VARIABLES[name] = variable
    return variable


def path_info(raw_path: bytes, root_path: str) -> str:
    """The decoded path without the root path, in PEP 3333's "bytes as latin-1" form.

    A proxy may have stripped the root path or left it; a path that does not begin with it is taken as it is.
    """
    path = unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path
    if root_path:
        root = root_path.encode("utf-8")
        if path == root or path.startswith(root + b"/"):
            path = path[len(root) :]
    return path.decode("latin-1")
