"""From a request in OpenAI's words to asks for the engine, and from what it tells to an answer or a stream."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dartprune.serving.answers import Choice, Form, usage_of
from dartprune.serving.engine import Engine
from dartprune.serving.errors import Rejected
from dartprune.serving.request import Ask, Done, Failed, News, Piece, Refusal, Sampling, Ticket
from dartprune.serving.schemas import ChatRequest, Common, CompletionRequest

LOOK = 0.5  # seconds between two looks whether the client is still there


@dataclass(frozen=True)
class Terms:
    """What the server offers.

    name: of the model.  method: of all requests that are pruned.  sparsity: where a request names none.
    lowest, highest: what it may name instead; dense it may always be.  seconds: that a request may take.
    """

    name: str
    method: str
    sparsity: float
    lowest: float
    highest: float
    seconds: float | None = 600.0


class Door:
    """Takes requests to the engine and brings back what it tells."""

    def __init__(self, engine: Engine, terms: Terms) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.terms = terms

    # ---- what is asked

    def completion(self, request: CompletionRequest, client: str) -> list[Ask]:
        """One ask for each prompt."""
        prompt = request.prompt
        prompts: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
        asked = 16 if request.max_tokens is None else request.max_tokens
        asks = [
            self._ask(request, self._ids(text), client, asked, request.logprobs, place=f"prompt.{number}")
            for number, text in enumerate(prompts)
        ]
        self._check_choices(sum(ask.choices for ask in asks))
        return asks

    def chat(self, request: ChatRequest, client: str) -> list[Ask]:
        """The messages in the chat template, as one ask."""
        if not getattr(self.tokenizer, "chat_template", None):
            said = f"{self.terms.name} has no chat template: use /v1/completions"
            raise Rejected(404, said, "messages", "no_chat_template")
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # what templates raise for what they do not take is their own business
            raise Rejected(400, f"the chat template refuses these messages: {error}", "messages") from None
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
        others = (request.top_logprobs or 0) if request.logprobs else None
        ask = self._ask(request, tuple(ids), client, max(limits, default=None), others, place="messages")
        ask = replace(ask, most=min([ask.most, *limits]))
        self._check_choices(ask.choices)
        return [ask]

    def _ids(self, text: Any) -> tuple[int, ...]:
        if isinstance(text, str):
            return tuple(self.tokenizer(text)["input_ids"])
        size = self.engine.vocabulary
        wrong = next((token for token in text if token >= size), None)
        if wrong is not None:
            raise Rejected(400, f"token {wrong} is none of the model's {size}", "prompt")
        return tuple(text)

    def _ask(
        self, request: Common, ids: tuple[int, ...], client: str, asked: int | None, others: int | None, place: str
    ) -> Ask:
        room = self.engine.context - len(ids)
        if not ids:
            raise Rejected(400, "the prompt is empty", place)
        if room < 1 or (asked or 1) > room:
            raise Rejected(
                400,
                f"the prompt has {len(ids)} tokens and {asked or 1} are asked for: together at most "
                f"{self.engine.context} fit",
                place,
                "context_length_exceeded",
            )
        stop = request.stop
        return Ask(
            prompt=ids,
            most=room if asked is None else asked,
            sampling=Sampling(
                1.0 if request.temperature is None else request.temperature,
                1.0 if request.top_p is None else request.top_p,
                request.top_k or 0,
                request.seed,
            ),
            choices=request.n or 1,
            stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=others,
            sparsity=self._sparsity(request),
            watch=request.dart is not None and request.dart.watch,
            client=request.user or client,
            seconds=self.terms.seconds,
        )

    def _sparsity(self, request: Common) -> float:
        terms, asked = self.terms, request.dart
        if asked is None:
            return terms.sparsity
        if asked.method not in (None, "dense", terms.method):
            raise Rejected(400, f"this server prunes by {terms.method}: ask for that, or for dense", "dart.method")
        if asked.method == "dense":
            if asked.sparsity:
                raise Rejected(400, f"dense leaves nothing out, and {asked.sparsity:g} is asked for", "dart.sparsity")
            return 0.0
        sparsity = terms.sparsity if asked.sparsity is None else asked.sparsity
        if sparsity and not terms.lowest <= sparsity <= terms.highest:
            raise Rejected(
                400,
                f"{sparsity:g} is outside of what this server allows: 0, or {terms.lowest:g} to {terms.highest:g}",
                "dart.sparsity",
            )
        return sparsity

    def _check_choices(self, choices: int) -> None:
        if choices > self.engine.most:
            raise Rejected(400, f"{choices} choices at once: this server decodes at most {self.engine.most}", "n")

    # ---- what is answered

    def submit(self, asks: Sequence[Ask]) -> Work:
        """Give asks to the engine; 429 or 503 where it takes none."""
        work = Work(asyncio.get_running_loop(), asks)
        try:
            for number, ask in enumerate(asks):
                work.tickets.append(self.engine.submit(ask, work.teller(number)))
        except Refusal as refusal:
            work.cancel()
            if refusal.after is None:
                raise Rejected(503, str(refusal), None, "shutting_down") from None
            headers = {"Retry-After": str(math.ceil(refusal.after))}
            raise Rejected(429, str(refusal), None, "queue_full", headers) from None
        return work

    def form(self, request: Common, others: int | None, *, chat: bool) -> Form:
        """How one request is answered."""
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return Form(name, int(time.time()), self.terms.name, self.tokenizer, chat, others)

    async def whole(self, work: Work, form: Form, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any] | None:
        """The answer in one piece; None where the client has gone."""
        choices, looked = [Choice() for _ in range(work.choices)], time.monotonic()
        try:
            while any(choice.ended is None for choice in choices):
                news = await work.next(LOOK)
                if time.monotonic() - looked >= LOOK:  # also where one piece follows another
                    looked = time.monotonic()
                    if await gone():
                        return None
                if news is None:
                    continue
                if isinstance(news, Failed):
                    raise _failed(news)
                elif isinstance(news, Piece):
                    choices[news.choice].add(news)
                else:
                    choices[news.choice].ended = news
        finally:
            work.cancel()
        return form.whole(choices, usage_of(work.prompt_tokens, work.ended))

    async def stream(self, work: Work, form: Form, *, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        begun: dict[int, int] = {}
        try:
            while len(work.ended) < work.choices:
                news = await work.next(None)
                assert news is not None
                if isinstance(news, Failed):
                    yield _event(_failed(news).body)
                    yield "data: [DONE]\n\n"
                    return
                if isinstance(news, Piece):
                    chunk = form.chunk(news, first=news.choice not in begun, offset=begun.get(news.choice, 0))
                    begun[news.choice] = begun.get(news.choice, 0) + len(news.text)
                else:
                    chunk = form.end(news)
                yield _event(chunk | ({"usage": None} if usage else {}))
            if usage:
                yield _event(form.usage(usage_of(work.prompt_tokens, work.ended)))
            yield "data: [DONE]\n\n"
        finally:
            work.cancel()


class Work:
    """The tickets of one request, and what the engine has told of them; choices are counted through all prompts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, asks: Sequence[Ask]) -> None:
        self.tickets: list[Ticket] = []
        self.choices = sum(ask.choices for ask in asks)
        self.prompt_tokens = sum(len(ask.prompt) for ask in asks)
        self.ended: list[Done] = []
        self._first = [sum(ask.choices for ask in asks[:number]) for number in range(len(asks))]
        self._loop = loop
        self._news: asyncio.Queue[News] = asyncio.Queue()

    def teller(self, number: int) -> Callable[[News], None]:
        """What the engine calls with news of that prompt."""
        first = self._first[number]

        def tell(news: News) -> None:
            if not isinstance(news, Failed):
                news = replace(news, choice=news.choice + first)
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

        return tell

    async def next(self, seconds: float | None) -> News | None:
        """What comes next; None if nothing comes within so many seconds."""
        try:
            news = await asyncio.wait_for(self._news.get(), seconds)
        except asyncio.TimeoutError:
            return None
        if isinstance(news, Done):
            self.ended.append(news)
        return news

    def cancel(self) -> None:
        """Nobody waits any longer; without effect where all is done."""
        for ticket in self.tickets:
            ticket.cancel()


def _failed(failed: Failed) -> Rejected:
    status, code = {"timeout": (504, "timeout"), "cancelled": (499, "cancelled")}.get(failed.kind, (500, "internal"))
    return Rejected(status, failed.message, None, code)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
