"""What each token of a forward is: lines of tokens, the slot of each line, and which tokens count.

`generate()` and direct calls give one line per sequence. The tensors made here are all that the layers need to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Phase(Enum):
    """What the tokens of a forward are."""

    PREFILL = "prefill"  # given text: dense and traced
    DECODE = "decode"  # new tokens, known to stay
    VERIFY = "verify"  # candidates: only the cache will tell which of them stay


@dataclass
class Rows:
    """One forward: B lines of T tokens.

    phase: of all tokens.  slots: slot of each line.  tokens: T.  valid: bool [B, T] on the host, None if nothing is
    padding.
    """

    phase: Phase
    slots: tuple[int, ...]
    tokens: int
    valid: Tensor | None = None

    def counts(self) -> list[int]:
        """Tokens of each line that are no padding."""
        if self.valid is None:
            return [self.tokens] * len(self.slots)
        return [int(n) for n in self.valid.sum(1)]

    def line(self, index: int) -> Tensor | slice:
        """Which columns of a line count."""
        if self.valid is None:
            return slice(0, self.tokens)
        return self.valid[index].nonzero()[:, 0]

    def _columns(self, index: int) -> Tensor:
        """The columns of a line that count, int64 on the host."""
        return torch.arange(self.tokens, dtype=torch.int64, device="cpu")[self.line(index)]

    def weight(self, skip: Sequence[int]) -> Tensor:
        """float32 [B, T]: 1 for tokens that count, without the first `skip[b]` of line b."""
        weight = torch.zeros(len(self.slots), self.tokens, dtype=torch.float32, device="cpu")
        for b, without in enumerate(skip):
            columns = self._columns(b)
            weight[b, columns[without:]] = 1.0
        return weight

    def tail(self, length: int, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The last `length` counted tokens of each line, for a ring of that length.

        Args:
            length: of the ring.
            places: where the next token of each line goes.

        Returns:
            rows in the flattened [B * T], slots and places, int64 [B * min(length, T)] each; surplus entries go to the
            place `length`.
        """
        most = min(length, self.tokens)
        rows = torch.zeros(len(self.slots), most, dtype=torch.int64, device="cpu")
        slots = torch.tensor(self.slots, dtype=torch.int64, device="cpu")[:, None].expand(-1, most)
        target = torch.full((len(self.slots), most), length, dtype=torch.int64, device="cpu")
        for b, place in enumerate(places):
            columns = self._columns(b)
            kept = columns[-most:]
            n, skipped = len(kept), len(columns) - len(kept)
            rows[b, :n] = b * self.tokens + kept
            target[b, :n] = (place + skipped + torch.arange(n, dtype=torch.int64, device="cpu")) % length
        return rows.flatten(), slots.flatten(), target.flatten()
