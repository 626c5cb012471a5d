"""Before anything is parsed: who may ask, how large a body may be, and how long it may take to come."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from dartprune.serving.errors import Rejected

Scope: TypeAlias = "dict[str, Any]"
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]
HEARD = 8  # times the largest body are read, and dropped, before the connection is closed on a client that sends more
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/docs")


class Guard:
    """Wraps an ASGI application: API keys compared in constant time, a body read within bounds before it is called."""

    def __init__(self, app: Any, keys: Sequence[str], most_bytes: int, seconds: float) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.most_bytes = most_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            open_to_all = not self.keys or scope["path"] in OPEN
            known = open_to_all or self._is_known(headers.get(b"authorization", b""))
            # a client that waits to be asked for its body can be refused at once, others are heard out
            if scope["method"] in ("POST", "PUT", "PATCH") and (known or b"expect" not in headers):
                receive = await self._read(headers, receive)
            if not known:
                raise Rejected(
                    401, "a known API key is needed: Authorization: Bearer KEY", None, "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        except Rejected as rejected:
            await _refuse(send, rejected)
            return
        except _GoneError:
            return
        await self.app(scope, receive, send)

    def _is_known(self, given: bytes) -> bool:
        kind, _, key = given.partition(b" ")
        # all keys are compared, each in constant time
        same = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return kind.lower() == b"bearer" and any(same)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """The body, and a `receive` that gives it once and then goes on."""
        told = headers.get(b"content-length", b"0")
        heard = self.most_bytes if b"expect" in headers else HEARD * self.most_bytes
        if told.isdigit() and int(told[:20]) > heard:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._whole(receive), self.seconds)
        except asyncio.TimeoutError:
            raise Rejected(408, f"the body did not come within {self.seconds:g} seconds") from None
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _whole(self, receive: Receive) -> bytes:
        # what is too much is read and dropped: who is cut off while sending never sees the answer that says why
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            part = message.get("body", b"")
            size += len(part)
            if size <= self.most_bytes:
                body += part
            if size > HEARD * self.most_bytes or (size > self.most_bytes and not message.get("more_body")):
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> Rejected:
        return Rejected(413, f"the body is larger than {self.most_bytes} bytes")


class _GoneError(Exception):
    """The client hung up while it sent."""


async def _refuse(send: Send, rejected: Rejected) -> None:
    body = json.dumps(rejected.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers | rejected.headers).items()]
    await send({"type": "http.response.start", "status": rejected.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
