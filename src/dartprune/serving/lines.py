"""Lines that decode, and the batches in which they do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dartprune.serving.drawing import Drawer
from dartprune.serving.joined import JoinedCache
from dartprune.serving.request import Ticket
from dartprune.serving.words import Words


@dataclass(eq=False)
class Line:
    """One choice that decodes: its slot, and the token that comes next."""

    ticket: Ticket
    choice: int
    slot: int
    words: Words
    drawer: Drawer
    token: int = -1
    tokens: int = 0


@dataclass
class Batch:
    """Lines that go through one forward, and their caches in the same order."""

    lines: list[Line] = field(default_factory=list)
    joined: JoinedCache = field(default_factory=JoinedCache)


class Batches:
    """All lines, those with the same key in one batch."""

    def __init__(self, key: Callable[[Line], Hashable]) -> None:
        """Set up; `key` tells which lines may share a forward, and may change from token to token."""
        self._key = key
        self._batches: dict[Hashable, Batch] = {}

    def __iter__(self) -> Iterator[Batch]:
        return iter(list(self._batches.values()))

    def __len__(self) -> int:
        return sum(len(batch.lines) for batch in self._batches.values())

    @property
    def lines(self) -> list[Line]:
        """Every line."""
        return [line for batch in self._batches.values() for line in batch.lines]

    def add(self, cache: Any, length: int, lines: list[Line]) -> None:
        """Add lines that all go on from one cache of that many tokens, which is not used by itself any longer."""
        keys = [self._key(line) for line in lines]
        if len(set(keys)) == 1:
            batch = self._batches.setdefault(keys[0], Batch())
            batch.joined.join(cache, length, len(lines))
            batch.lines += lines
            return
        copies = [cache, *(copy.deepcopy(cache) for _ in lines[1:])]
        for line, own in zip(lines, copies, strict=True):
            self.add(own, length, [line])

    def sort(self) -> None:
        """Bring lines whose key has changed into the batch where they belong."""
        for key, batch in list(self._batches.items()):
            for line in [line for line in batch.lines if self._key(line) != key]:
                place = batch.lines.index(line)
                cache, length = batch.joined.taken(place), batch.joined.lengths[place]
                self.drop([line])
                self.add(cache, length, [line])

    def drop(self, lines: Iterable[Line]) -> None:
        """Take lines out."""
        gone = set(lines)
        for key, batch in list(self._batches.items()):
            kept = [place for place, line in enumerate(batch.lines) if line not in gone]
            if len(kept) < len(batch.lines):
                batch.joined.keep(kept)
                batch.lines = [batch.lines[place] for place in kept]
            if not kept:
                del self._batches[key]
