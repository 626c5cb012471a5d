"""Answers in OpenAI's form, from what the engine tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dartprune.report import SequenceReport
from dartprune.serving.request import Done, Figures, Piece, TokenChance


def usage_of(prompt_tokens: int, ended: Sequence[Done]) -> dict[str, Any]:
    """Tokens, and what was pruned: of all choices together."""
    tokens = sum(end.tokens for end in ended)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached for end in ended)},
        "dart": pruned_of([end.report for end in ended]),
    }


def pruned_of(reports: Sequence[SequenceReport]) -> dict[str, Any]:
    """Realised sparsity over all decoded tokens, dense and pruned tokens, refreshes, and why tokens were dense."""
    dense, pruned = sum(r.dense_tokens for r in reports), sum(r.pruned_tokens for r in reports)
    saved = sum(r.realised_sparsity * (r.dense_tokens + r.pruned_tokens) for r in reports)
    causes: dict[str, int] = {}
    for report in reports:
        for name, count in report.dense_because.items():
            causes[name] = causes.get(name, 0) + count
    return {
        "realised_sparsity": round(saved / (dense + pruned), 6) if dense + pruned else 0.0,
        "dense_tokens": dense,
        "pruned_tokens": pruned,
        "events": sum(len(r.events) for r in reports),
        "dense_because": causes,
    }


def figures_of(figures: Figures) -> dict[str, Any]:
    """What a page draws."""
    return {
        "decoded": figures.decoded,
        "similarities": [list(item) for item in figures.similarities],
        "events": list(figures.events),
        "active": None if figures.active is None else [round(share, 4) for share in figures.active],
    }


@dataclass
class Form:
    """Writes the chunks and the whole answers of one request; `chat` says in which of the two forms."""

    id: str
    created: int
    model: str
    tokenizer: Any
    chat: bool
    others: int | None = None  # likeliest tokens that are told with each

    def _token(self, token: int) -> str:
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def _logs(self, chances: Sequence[TokenChance], offset: int) -> dict[str, Any] | None:
        if self.others is None:
            return None
        if self.chat:
            return {"content": [self._chat_token(chance) for chance in chances], "refusal": None}
        names = [self._token(chance.token) for chance in chances]
        offsets = [offset + sum(map(len, names[:n])) for n in range(len(names))]
        return {
            "tokens": names,
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [{self._token(t): log for t, log in chance.likeliest} for chance in chances],
            "text_offset": offsets,
        }

    def _chat_token(self, chance: TokenChance) -> dict[str, Any]:
        likeliest = [self._named(token, log) for token, log in chance.likeliest]
        return {**self._named(chance.token, chance.logprob), "top_logprobs": likeliest}

    def _named(self, token: int, log: float) -> dict[str, Any]:
        text = self._token(token)
        return {"token": text, "logprob": log, "bytes": list(text.encode())}

    def chunk(self, piece: Piece, *, first: bool, offset: int) -> dict[str, Any]:
        """A part of a stream."""
        choice: dict[str, Any] = {"index": piece.choice, "finish_reason": None}
        if self.chat:
            delta = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
            choice |= {"delta": delta, "logprobs": self._logs(piece.chances, offset)}
        else:
            choice |= {"text": piece.text, "logprobs": self._logs(piece.chances, offset)}
        chunk = self._chunk([choice])
        if piece.figures is not None:
            chunk["dart"] = figures_of(piece.figures)
        return chunk

    def end(self, ended: Done) -> dict[str, Any]:
        """The last part of one choice."""
        choice: dict[str, Any] = {"index": ended.choice, "finish_reason": ended.reason, "logprobs": None}
        nothing: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk([choice | nothing])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The part of a stream that holds the usage."""
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer in one piece."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(number, choice) for number, choice in enumerate(choices)],
            "usage": usage,
        }

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        logs = self._logs(choice.chances, 0)
        out = {"index": number, "finish_reason": choice.ended.reason if choice.ended else None, "logprobs": logs}
        if self.chat:
            return out | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return out | {"text": choice.text}


@dataclass
class Choice:
    """One choice as it grows."""

    text: str = ""
    chances: list[TokenChance] = field(default_factory=list)
    ended: Done | None = None

    def add(self, piece: Piece) -> None:
        """New text."""
        self.text += piece.text
        self.chances += piece.chances
