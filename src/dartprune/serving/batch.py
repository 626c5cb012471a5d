"""Prompts from a file of JSON lines, answers into another: in the same order, and where it was stopped it goes on."""

from __future__ import annotations

import json
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dartprune.errors import UserError
from dartprune.serving.answers import Choice, usage_of
from dartprune.serving.door import Door
from dartprune.serving.errors import Rejected, explained
from dartprune.serving.request import Done, Failed, News, Piece
from dartprune.serving.schemas import ChatRequest, CompletionRequest

AHEAD = 4  # times the engine's batch: lines that are under way or wait for an earlier one


@dataclass
class Counts:
    """What became of the lines: answered in this run, bad ones among them, and those that an earlier run had done."""

    done: int = 0
    bad: int = 0
    before: int = 0


@dataclass
class Pending:
    """One line under way; `record`: what is written for it, once it is known."""

    number: int
    id: Any = None
    record: dict[str, Any] | None = None
    prompt_tokens: int = 0
    others: int | None = None
    choices: list[Choice] = field(default_factory=list)


class BatchJob:
    """Runs the lines of a file through an engine.

    A line is a request as `/v1/completions` or `/v1/chat/completions` takes it (without `model` and `stream`), and may
    have an `id`. Its answer is one line: `line`, `id`, `choices` (text and finish_reason), `usage`; or `error`.
    """

    def __init__(self, door: Door, source: Path, target: Path) -> None:
        self.door = door
        self.source = source
        self.target = target
        self.counts = Counts()
        self._news: queue.SimpleQueue[tuple[Pending, News]] = queue.SimpleQueue()

    def run(self, told: Callable[[Counts], None] = lambda counts: None) -> Counts:
        """Answer every line that has no answer yet; `told` hears of each that is written."""
        self.counts.before = whole_lines(self.target)
        lines = self._lines(self.counts.before)
        under_way: deque[Pending] = deque()
        with self.target.open("a", encoding="utf-8") as out:
            more = True
            while more or under_way:
                while more and len(under_way) < AHEAD * self.door.engine.most:
                    pending = next(lines, None)
                    more = pending is not None
                    if pending is not None:
                        under_way.append(pending)
                while under_way and under_way[0].record is not None:
                    done = under_way.popleft()
                    out.write(json.dumps(done.record, ensure_ascii=False) + "\n")
                    out.flush()
                    self.counts.done += 1
                    self.counts.bad += "error" in (done.record or {})
                    told(self.counts)
                if under_way and under_way[0].record is None:
                    self._hear(*self._news.get())
        return self.counts

    def _lines(self, skip: int) -> Iterator[Pending]:
        """The lines that are left, each given to the engine; empty ones count as lines and are bad."""
        with self.source.open("rb") as file:
            for number, raw in enumerate(file):
                if number >= skip:
                    yield self._begun(number, raw)

    def _begun(self, number: int, raw: bytes) -> Pending:
        pending = Pending(number)
        try:
            data = _parsed(raw)
            pending.id = data.pop("id", None)
            ask = self._ask(data)
        except Rejected as rejected:
            pending.record = self._record(pending) | rejected.body
            return pending
        pending.prompt_tokens, pending.others = len(ask.prompt), ask.logprobs
        pending.choices = [Choice() for _ in range(ask.choices)]
        self.door.engine.submit(ask, lambda news: self._news.put((pending, news)))
        return pending

    def _ask(self, data: dict[str, Any]) -> Any:
        known = {"model": self.door.terms.name, **data}
        if known.get("stream"):
            raise Rejected(400, "a line of a batch is answered in one piece: leave stream out", "stream")
        try:
            if "messages" in known:
                (ask,) = self.door.chat(ChatRequest.model_validate(known), "")
                return ask
            request = CompletionRequest.model_validate(known)
        except ValidationError as error:
            raise explained(error.errors()) from None
        asks = self.door.completion(request, "")
        if len(asks) != 1:
            raise Rejected(400, "one prompt a line: write the others on lines of their own", "prompt")
        return asks[0]

    def _hear(self, pending: Pending, news: News) -> None:
        if isinstance(news, Piece):
            pending.choices[news.choice].add(news)
        elif isinstance(news, Failed):
            pending.record = self._record(pending) | Rejected(500, news.message, None, news.kind).body
        elif isinstance(news, Done):
            pending.choices[news.choice].ended = news
            if all(choice.ended for choice in pending.choices):
                pending.record = self._record(pending) | self._answer(pending)

    def _record(self, pending: Pending) -> dict[str, Any]:
        return {"line": pending.number + 1, "id": pending.id}

    def _answer(self, pending: Pending) -> dict[str, Any]:
        ended = [choice.ended for choice in pending.choices if choice.ended is not None]
        choices = []
        for number, (choice, end) in enumerate(zip(pending.choices, ended, strict=True)):
            choices.append({"index": number, "text": choice.text, "finish_reason": end.reason})
            if pending.others is not None:
                choices[-1]["logprobs"] = [[c.token, c.logprob, list(map(list, c.likeliest))] for c in choice.chances]
        return {"choices": choices, "usage": usage_of(pending.prompt_tokens, ended)}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise Rejected(400, f"no JSON: {error}") from None
    if not isinstance(data, dict):
        raise Rejected(400, "no JSON object")
    return data


def _is_begun(raw: bytes, line: int) -> bool:
    """Whether this is the beginning of the answer to that line, cut off while it was written."""
    head = b'{"line": %d, ' % line
    return raw.startswith(head) or head.startswith(raw)


def whole_lines(path: Path) -> int:
    """Answers that a file holds; a last line that was cut off is taken out. ValueError for a file of something else."""
    if not path.exists():
        return 0
    count, end = 0, 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n") and _is_begun(raw, count + 1):
                break
            try:
                line = json.loads(raw)["line"]
            except (ValueError, KeyError, TypeError):
                line = None
            if line != count + 1:
                raise UserError(
                    f"{path}: line {count + 1} is no answer of a batch: move the file away, or name another"
                )
            count, end = count + 1, end + len(raw)
    os.truncate(path, end)
    return count
