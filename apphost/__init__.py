"""apphost: a prefork host for WSGI and ASGI applications whose deploys nobody notices."""

__version__ = "0.1.0"
