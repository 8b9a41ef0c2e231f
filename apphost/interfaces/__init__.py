"""How applications are called. One copy of the rules of ASGI and of WSGI, whatever protocol carries the request."""
