"""What a generation has written so far, also where it is interrupted."""

from __future__ import annotations

from typing import Any

from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer


class TextSoFar(BaseStreamer):  # type: ignore[misc]
    """Collects new tokens; live, also prints their text."""

    def __init__(self, tokenizer: Any, *, live: bool) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._printer = TextStreamer(tokenizer, skip_special_tokens=True) if live else None
        self._begun = False

    def put(self, value: Any) -> None:
        """The prompt first, then a token at a time."""
        if self._begun:
            self.tokens += value.flatten().tolist()
        self._begun = True
        if self._printer is not None:
            self._printer.put(value)

    def end(self) -> None:
        """The text is whole."""
        if self._printer is not None:
            self._printer.end()

    @property
    def text(self) -> str:
        """What was written, special tokens left out."""
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
