"""Beginnings of prompts that were read before: their keys and values, and what was traced when they ended."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartprune.run import Run


@dataclass
class Chunk:
    """One chunk of a prompt, after all that stands before it.

    parts: its keys and values [1, heads, chunk, D] of each layer.  slot: a sequence of the run that has read as far and
    no further; None where nothing was traced.
    """

    parts: list[tuple[Tensor, Tensor]]
    slot: int | None
    bytes: int


class Prefixes:
    """Whole chunks of prompts, each known by all tokens up to its end; those that were not used for longest go first.

    A prompt is read in the same chunks whether it is known or not, so that what comes out has the same bits.
    """

    def __init__(self, run: Run, chunk: int, most_bytes: int) -> None:
        """Set up; 0 bytes: nothing is kept."""
        self.chunk = chunk
        self.most_bytes = most_bytes
        self.bytes = 0
        self._run = run
        self._chunks: OrderedDict[tuple[int, ...], Chunk] = OrderedDict()

    def find(self, ids: tuple[int, ...], *, traced: bool) -> list[Chunk]:
        """The known chunks that a prompt begins with, all but its last token at most; `traced`: with their traces."""
        found: list[Chunk] = []
        for end in range(self.chunk, len(ids), self.chunk):
            chunk = self._chunks.get(ids[:end])
            if chunk is None or (traced and chunk.slot is None):
                break
            found.append(chunk)
        self._used(ids, len(found))
        return found

    def keep(self, ids: tuple[int, ...], cache: Any, slot: int | None) -> None:
        """Remember a prompt whose last whole chunk ends with `ids`, which `cache` holds and `slot` has traced."""
        known, end = self._chunks.get(ids), len(ids)
        if not end or end % self.chunk or (known is not None and (slot is None or known.slot is not None)):
            return
        if end > self.chunk and ids[: -self.chunk] not in self._chunks:
            return  # what stands before it was forgotten: it would never be found
        parts = [(layer.keys, layer.values) for layer in cache.layers]
        size = sum(part[:, :, end - self.chunk :].nbytes for pair in parts for part in pair)
        size += 0 if slot is None else self._run.bytes_per_sequence
        if size > self.most_bytes:
            return
        if known is not None:
            self._forget(ids)
        cut = [
            (keys[:, :, end - self.chunk :].clone(), values[:, :, end - self.chunk :].clone()) for keys, values in parts
        ]
        self._chunks[ids] = Chunk(cut, None if slot is None else self._run.sequences.fork([slot])[0], size)
        self.bytes += size
        self._used(ids, end // self.chunk)
        while self.bytes > self.most_bytes:
            self._forget(next(iter(self._chunks)))

    def cache(self, known: list[Chunk], config: Any) -> Any:
        """A cache that holds these chunks."""
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
        for number, layers in enumerate(zip(*(chunk.parts for chunk in known), strict=True)):
            keys, values = (torch.cat(parts, dim=2) for parts in zip(*layers, strict=True))
            cache.update(keys, values, number)
        return cache

    def clear(self) -> None:
        """Forget all."""
        for ids in list(self._chunks):
            self._forget(ids)

    def _used(self, ids: tuple[int, ...], chunks: int) -> None:
        """The longer ones first: a chunk is never forgotten before those that stand on it."""
        for number in range(chunks, 0, -1):
            self._chunks.move_to_end(ids[: number * self.chunk])

    def _forget(self, ids: tuple[int, ...]) -> None:
        chunk = self._chunks.pop(ids)
        self.bytes -= chunk.bytes
        if chunk.slot is not None:
            self._run.sequences.close([chunk.slot])
