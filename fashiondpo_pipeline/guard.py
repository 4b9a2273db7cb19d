"""What stands before the studio's page: it answers its own page alone, takes small plain messages, and no file from anybody."""

import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST = 1 << 20  # bytes of a message; a click has some hundred
# What the page needs; gradio has routes for files, uploads, proxies, components and more, and they answer 404.
_READ = {"/", "/config", "/theme.css", "/gradio_api/startup-events", "/gradio_api/queue/data", "/gradio_api/info", "/gradio_api/app_id"}
_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_SAID = {"/gradio_api/queue/join", "/gradio_api/reset", "/gradio_api/cancel"}
POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; img-src 'self' data: blob:; "
          "form-action 'none'; frame-ancestors 'none'; base-uri 'self'")
SEALS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class Refused(Exception):
    """A request that is answered with a bare status."""

    def __init__(self, status: int):
        self.status = status


class Guard:
    """An ASGI application around the page's: lets through what the page needs, from the page's own origin, in messages that hold no object
    within another, as every file that a client could name is one; and forbids the browser to load anything from elsewhere."""

    def __init__(self, app: Any, host: str):
        self.app, self.hosts, self.open = app, {*LOOPBACK, host.lower()}, host not in LOOPBACK

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":  # the page has none
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            try:
                scope, receive = await self._admit(scope, receive)
            except Refused as refused:
                ends = [(b"content-length", b"0"), (b"connection", b"close")]  # what is left of the message is not read
                await send({"type": "http.response.start", "status": refused.status, "headers": ends})
                await send({"type": "http.response.body", "body": b""})
                return
            await self.app(scope, receive, _sealed(send))

    async def _admit(self, scope: dict, receive: Receive) -> tuple[dict, Receive]:
        """The request as the page gets it, its message read and written anew. Raises Refused."""
        if status := self.refuses(scope):
            raise Refused(status)
        headers = _headers(scope)
        if scope["method"] != "POST":
            if headers.get(b"content-length", "0") != "0" or b"transfer-encoding" in headers:
                raise Refused(413)
            return scope, _after(b"", receive)
        body = plain(await _read(headers, receive))
        rest = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"content-length", b"content-type", b"transfer-encoding")]
        ours = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        return scope | {"headers": [*rest, *ours]}, _after(body, receive)

    def refuses(self, scope: dict) -> int:
        """The status to answer a request with because of its method, address or origin; 0: let it through."""
        headers = _headers(scope)
        host, origin, method = headers.get(b"host", ""), headers.get(b"origin"), scope.get("method", "GET")
        try:
            name, apart = urlsplit(f"//{host}").hostname or "", bool(origin) and urlsplit(origin).netloc != host
        except ValueError:
            return 403
        if apart or not (name in self.hosts or (self.open and _is_address(name))):
            return 403  # another name that leads here: a page elsewhere would be this page's equal
        if method == "POST" and not origin:
            return 403  # every browser says where a message comes from
        path = scope["path"].rstrip("/") or "/"
        if ".." in path.split("/") or "//" in path or "\\" in path:
            return 404
        known = path in _SAID if method == "POST" else method in ("GET", "HEAD") and (path in _READ or path.startswith(_BELOW))
        return 0 if known else 404


def plain(body: bytes) -> bytes:
    """A message of the page, written anew: one object of texts, numbers and nothings, and of a list of such as `data`.

    Raises Refused for any other, before the framework has seen it. What is handed on is what was looked at: two readers of JSON can
    differ over a key that stands twice.

    >>> plain(b'{"fn_index": 1, "data": ["ann", null]}')
    b'{"fn_index": 1, "data": ["ann", null]}'
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400) from None
    if not isinstance(said, dict):
        raise Refused(400)
    data = said.get("data", [])
    if not isinstance(data, list) or any(isinstance(value, dict | list) for value in (*data, *(v for k, v in said.items() if k != "data"))):
        raise Refused(400)
    try:
        return json.dumps(said, allow_nan=False).encode()
    except ValueError:  # infinity, or a number of thousands of digits
        raise Refused(400) from None


async def _read(headers: dict[bytes, str], receive: Receive) -> bytes:
    """The message, however it comes. Raises Refused as soon as it is too long, or where it ends before its end."""
    told = headers.get(b"content-length", "0")
    if not told.isascii() or not told.isdigit() or len(told) > 12 or int(told) > MOST:
        raise Refused(413)
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400)
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MOST:
            raise Refused(413)
        more = message.get("more_body", False)
    return b"".join(pieces)


def _after(body: bytes, receive: Receive) -> Receive:
    """What gives this message, and then what `receive` says but no more of any message."""
    given = False

    async def receiving() -> dict:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        while (message := await receive())["type"] == "http.request":
            pass
        return message

    return receiving


def _sealed(send: Send) -> Send:
    async def sending(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message["headers"], *SEALS]}
        await send(message)

    return sending


def _headers(scope: dict) -> dict[bytes, str]:
    return {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _is_address(name: str) -> bool:
    """Whether this is an IP address, which nobody else can make lead here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
