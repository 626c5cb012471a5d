"""Text of tokens that come one by one, up to the first string that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # part of a character
_CONTEXT = 6  # tokens before the new ones that are decoded with them: tokenizers write spaces between two


class Words:
    """The text of one choice.

    stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids = list(prompt[-_CONTEXT:])
        self._told = len(self._ids)  # tokens whose text is known
        self._held = ""  # it might be the beginning of a stop string

    def add(self, token: int, *, last: bool = False) -> str:
        """The text that is certain after one more token; with `last` all that is left of it."""
        self._ids.append(token)
        return self._released(self._fresh(last=last), last=last)

    def end(self) -> str:
        """What is left, where no more tokens come."""
        return self._released(self._fresh(last=True), last=True)

    def _fresh(self, *, last: bool) -> str:
        first = max(0, self._told - _CONTEXT)
        before = self._decoded(self._ids[first : self._told])
        whole = self._decoded(self._ids[first:])
        if whole.endswith(_UNFINISHED) and not last:
            return ""
        self._told = len(self._ids)
        del self._ids[:first]
        self._told -= first
        return whole[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _released(self, fresh: str, *, last: bool) -> str:
        text, self._held = self._held + fresh, ""
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not last:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            self._held, text = text[len(text) - held :], text[: len(text) - held]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
