"""The server's pages: OpenAI's completions and chats, health, metrics, and a page that shows what is pruned."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dartprune import __version__
from dartprune.serving.door import Door, Work
from dartprune.serving.errors import Rejected, explained
from dartprune.serving.guard import Guard
from dartprune.serving.metrics import Metrics
from dartprune.serving.schemas import ChatRequest, Common, CompletionRequest, ModelCard, ModelList, Problem

log = logging.getLogger("dartprune.serving")
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true its parts as server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": said}
    for status, said in {
        400: "The request cannot be answered",
        401: "No known API key",
        404: "No such model",
        408: "The body did not come in time",
        413: "The body is too large",
        429: "Too many requests wait",
        500: "The server failed",
        503: "The server is shutting down",
        504: "The request took too long",
    }.items()
}


def build_app(
    door: Door,
    metrics: Metrics,
    *,
    keys: tuple[str, ...] = (),
    body_bytes: int = 4 << 20,
    body_seconds: float = 30.0,
) -> Any:
    """The ASGI application.

    Args:
        door: to the engine.
        metrics: that the engine's work is counted in.
        keys: API keys, of which one is needed; none: everybody may ask.
        body_bytes: that a request may have.
        body_seconds: within which they must have come.
    """
    app = FastAPI(title="dartprune", version=__version__, docs_url=None, redoc_url=None)
    created, terms = int(time.time()), door.terms
    card = ModelCard(
        id=terms.name,
        created=created,
        dart={
            "method": terms.method,
            "sparsity": terms.sparsity,
            "lowest": terms.lowest,
            "highest": terms.highest,
            "detects": door.engine.run.method.refresh.detects,
            "context": door.engine.context,
            "batch": door.engine.most,
            "dense_above": door.engine.dense_above,
        },
    )
    page = files("dartprune.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _problem(explained(error.errors()))

    @app.exception_handler(Rejected)
    async def rejected(request: Request, error: Rejected) -> Response:
        return _problem(error)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> Response:
        allowed = dict(error.headers or {})
        return _problem(Rejected(error.status_code, str(error.detail), headers=allowed))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show() -> str:
        return page

    @app.get("/health", responses={503: _PROBLEMS[503]})
    async def health() -> dict[str, str]:
        """Whether the server lives."""
        if not door.engine.alive:
            raise Rejected(503, "the engine has stopped", None, "engine_stopped")
        return {"status": "ok"}

    @app.get("/ready", responses={503: _PROBLEMS[503]})
    async def ready() -> dict[str, str]:
        """Whether the server takes requests."""
        if not door.engine.well:
            raise Rejected(503, "the server is shutting down", None, "shutting_down")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def counted() -> Response:
        """Counters in Prometheus' text form."""
        return Response(metrics.page(door.engine.waiting, door.engine.decoding), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses={401: _PROBLEMS[401]})
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", responses={401: _PROBLEMS[401], 404: _PROBLEMS[404]})
    async def model(name: str) -> ModelCard:
        """The served model, by its name."""
        _check_model(name, terms.name)
        return card

    @app.post("/v1/completions", responses=_EVENTS | _PROBLEMS)
    async def completions(request: Request, body: CompletionRequest) -> Any:
        """Continue a text."""
        return await _answered(door, request, body, chat=False)

    @app.post("/v1/chat/completions", responses=_EVENTS | _PROBLEMS)
    async def chats(request: Request, body: ChatRequest) -> Any:
        """Answer a conversation."""
        return await _answered(door, request, body, chat=True)

    _own_schema(app, door)
    return Guard(app, keys, body_bytes, body_seconds)


async def _answered(door: Door, request: Request, body: Common, *, chat: bool) -> Response:
    began, client = time.monotonic(), request.client.host if request.client else ""
    _check_model(body.model, door.terms.name)
    asks = door.chat(body, client) if isinstance(body, ChatRequest) else door.completion(_completion(body), client)
    form = door.form(body, asks[0].logprobs, chat=chat)
    work = door.submit(asks)
    if not body.stream:
        try:
            answer = await door.whole(work, form, request.is_disconnected)
        except Rejected as error:
            _tell(form.id, work, began, error.code or "error")
            raise
        _tell(form.id, work, began, "cancelled" if answer is None else "ok")
        return Response(status_code=499) if answer is None else JSONResponse(answer)
    usage = bool(body.stream_options and body.stream_options.include_usage)

    async def events() -> AsyncIterator[str]:
        how = "cancelled"
        try:
            async for event in door.stream(work, form, usage=usage):
                yield event
            how = "ok" if len(work.ended) == work.choices else "failed"
        finally:
            work.cancel()
            _tell(form.id, work, began, how)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _completion(body: Common) -> CompletionRequest:
    assert isinstance(body, CompletionRequest)
    return body


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise Rejected(404, f"there is no model {asked!r} here, only {served!r}", "model", "model_not_found")


def _tell(name: str, work: Work, began: float, how: str) -> None:
    """One line for the log: figures, never text."""
    from dartprune.serving.answers import pruned_of

    facts: dict[str, Any] = {"event": "request", "id": name, "outcome": how, "choices": work.choices}
    facts |= {"prompt_tokens": work.prompt_tokens, "tokens": sum(end.tokens for end in work.ended)}
    facts |= {"seconds": round(time.monotonic() - began, 3), "dart": pruned_of([end.report for end in work.ended])}
    log.info(json.dumps(facts))


def _problem(error: Rejected) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _own_schema(app: FastAPI, door: Door) -> None:
    """The OpenAPI page says what this server takes, and 400 in OpenAI's form instead of FastAPI's 422."""
    schema = app.openapi()
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation.get("responses", {}).pop("422", None)
    parts, terms = schema["components"]["schemas"], door.terms
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    for name in ("CompletionRequest", "ChatRequest"):
        properties = parts[name]["properties"]
        properties["model"]["const"] = terms.name
        properties["n"]["anyOf"][0]["maximum"] = door.engine.most
        for tokens in {"max_tokens", "max_completion_tokens"} & set(properties):
            properties[tokens]["anyOf"][0]["maximum"] = door.engine.context - 1
    _at_most(parts["CompletionRequest"]["properties"]["prompt"], door.engine.vocabulary - 1)
    dart = parts["Pruning"]["properties"]
    dart["method"]["anyOf"][0]["enum"] = sorted({terms.method, "dense"})
    allowed = {"type": "number", "minimum": terms.lowest, "maximum": terms.highest}
    dart["sparsity"]["anyOf"] = [allowed, {"const": 0}, {"type": "null"}]
    dense = {"required": ["method"], "properties": {"method": {"const": "dense"}}}
    parts["Pruning"] |= {"if": dense, "then": {"properties": {"sparsity": {"enum": [0, None]}}}}
    app.openapi_schema = schema


def _at_most(schema: Any, highest: int) -> None:
    """Bound every integer of a schema."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema["maximum"] = highest
        for part in schema.values():
            _at_most(part, highest)
    elif isinstance(schema, list):
        for part in schema:
            _at_most(part, highest)
