"""Tokens of the context that teach a token selector how wrong its estimates are (docs/token-selection.md).

A sample of them is enough: which ones follows from each token's number in its sequence alone, so that the same tokens
teach whether a prompt comes at once or in parts, alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dartprune.model.rows import Rows
from dartprune.runtime.slots import Slot

ALL_OF_THE_FIRST = 16  # then every fourth one up to twice as many, every eighth one up to four times as many, ...


@dataclass
class Sample:
    """Some tokens of a forward: rows int64 [B, m] in its flattened tokens, weight float32 [B, m] of 0 and 1.

    slots: of its lines, int64 [B].
    """

    rows: Tensor
    weight: Tensor
    slots: Tensor

    def to(self, device: torch.device) -> Sample:
        """The same on a device."""
        return Sample(*(part.to(device, non_blocking=True) for part in (self.rows, self.weight, self.slots)))


def is_sampled(numbers: Tensor) -> Tensor:
    """Whether the tokens of these numbers (0 for the first that counts; int64) teach, bool."""
    octave = (numbers.clamp_min(1).double() / ALL_OF_THE_FIRST).log2().floor().clamp_min(-2).long()
    stride = torch.where(octave < 0, 1, 4 * 2 ** octave.clamp_min(0))
    taught: Tensor = numbers % stride == 0
    return taught


def sample(rows: Rows, slots: Sequence[Slot], counted: Tensor) -> Sample | None:
    """What teaches of a forward; None where nothing does.

    Args:
        rows: of the forward.
        slots: of its lines.
        counted: float32 [B, T] of 0 and 1 on the host, the tokens that are traced.
    """
    lines = []
    for slot, line in zip(slots, counted, strict=True):
        columns = line.nonzero()[:, 0]
        numbers = slot.traced + torch.arange(len(columns), dtype=torch.int64, device="cpu")
        lines.append(columns[is_sampled(numbers)])
    most = max(len(columns) for columns in lines)
    if not most:
        return None
    places = torch.zeros(len(lines), most, dtype=torch.int64, device="cpu")
    weight = torch.zeros(len(lines), most, dtype=torch.float32, device="cpu")
    for b, columns in enumerate(lines):
        places[b, : len(columns)] = columns + b * rows.tokens
        weight[b, : len(columns)] = 1.0
    return Sample(places, weight, torch.tensor(rows.slots, dtype=torch.int64, device="cpu"))
