"""Views that each lean on something a host has to get right: sessions, uploads, streaming, cookies, request bodies."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from .models import Upload

PIECES = 4
PAUSE = 0.15  # seconds between two pieces of the stream


def index(request: HttpRequest) -> HttpResponse:
    return render(request, "visits/index.html", {"uploads": Upload.objects.all()[:10]})


def counter(request: HttpRequest) -> HttpResponse:
    count = request.session.get("count", 0) + 1
    request.session["count"] = count
    return render(request, "visits/counter.html", {"count": count})


def upload(request: HttpRequest) -> HttpResponse:
    """GET shows a form with a CSRF token; POST answers with the size and the SHA-256 of the file."""
    if request.method != "POST":
        return render(request, "visits/upload.html")
    file = request.FILES.get("file")
    if file is None:
        return JsonResponse({"error": "no file"}, status=400)
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    record = Upload.objects.create(name=file.name, size=file.size, sha256=digest.hexdigest())
    return JsonResponse({"id": record.pk, "name": record.name, "size": record.size, "sha256": record.sha256})


def _piece(number: int) -> str:
    return f"piece {number} made at {time.time():.6f}\n"


def _pieces() -> Iterator[str]:
    for number in range(PIECES):
        if number:
            time.sleep(PAUSE)
        yield _piece(number)


async def _pieces_async() -> AsyncIterator[str]:
    for number in range(PIECES):
        if number:
            await asyncio.sleep(PAUSE)
        yield _piece(number)


def stream(request: HttpRequest) -> StreamingHttpResponse:
    # Under ASGI Django would first collect a plain iterator as a whole: nothing would stream.
    pieces = _pieces_async() if isinstance(request, ASGIRequest) else _pieces()
    return StreamingHttpResponse(pieces, content_type="text/plain")


def cookies(request: HttpRequest) -> HttpResponse:
    """Sets three cookies, and shows those that came."""
    response = JsonResponse({"received": request.COOKIES})
    response.set_cookie("flavour", "oat, raisin; 2", max_age=3600)
    response.set_cookie("theme", "dark", path="/", samesite="Lax")
    response.set_cookie("token", "a=b", httponly=True)
    return response


@csrf_exempt
@require_POST
def echo(request: HttpRequest) -> HttpResponse:
    """Answers with the JSON that came, and with what the host told about the request."""
    try:
        sent = json.loads(request.body)
    except ValueError as exc:
        return JsonResponse({"error": str(exc)}, status=400)
    return JsonResponse(
        {
            "json": sent,
            "path": request.path,
            "query": request.META["QUERY_STRING"],
            "scheme": request.scheme,
            "peer": [request.META.get("REMOTE_ADDR"), int(request.META.get("REMOTE_PORT") or 0)],
        }
    )
