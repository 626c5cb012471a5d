"""One cache for all sequences that decode together: they join and leave it between two steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dartprune.model.caches import handed


def can_join(model: Any) -> bool:
    """Whether lines of different lengths can decode in one batch: positions may be given, layers hold all tokens."""
    from transformers import DynamicCache

    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer).__name__ == "DynamicLayer" for layer in layers)


class JoinedCache:
    """Caches of B sequences side by side, filled up on the left to the longest.

    cache: of the model.  lengths: tokens of each line.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.lengths: list[int] = []

    @property
    def width(self) -> int:
        """Tokens of the longest line."""
        return max(self.lengths, default=0)

    def join(self, cache: Any, length: int, times: int = 1) -> None:
        """Add lines: the cache of one sequence of that many tokens, not used by itself any longer, so many times."""
        if not self.lengths and times == 1:
            self.cache, self.lengths = cache, [length]  # of whatever kind
            return
        width = max(self.width, length)
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                lines = _filled(getattr(layer, name), width).expand(times, -1, -1, -1)
                if self.lengths:
                    mine = self.cache.layers[number]
                    setattr(mine, name, torch.cat((_filled(getattr(mine, name), width), lines)))
                else:
                    setattr(layer, name, lines.contiguous())
        if not self.lengths:
            self.cache = cache
        self.lengths += [length] * times

    def keep(self, lines: Sequence[int]) -> None:
        """Leave only these lines, in this order, and no more room on the left than the longest needs."""
        before = self.width
        self.lengths = [self.lengths[line] for line in lines]
        if not lines:
            self.cache = None
            return
        surplus = before - self.width
        order = torch.tensor(lines, dtype=torch.int64, device=self.cache.layers[0].keys.device)
        for layer in self.cache.layers:
            layer.keys = layer.keys[:, :, surplus:].index_select(0, order)
            layer.values = layer.values[:, :, surplus:].index_select(0, order)

    def taken(self, line: int) -> Any:
        """A cache of one line alone, without what fills it up; the line stays here too."""
        from transformers import DynamicCache

        if len(self.lengths) == 1:
            return self.cache
        first, alone = self.width - self.lengths[line], DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            parts = (part[line : line + 1, :, first:].clone() for part in (layer.keys, layer.values))
            alone.update(*parts, number)
        return alone

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
        """What a forward of one more token for each line is given."""
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(tokens, dtype=torch.int64, device=device)[:, None],
            **handed(self.cache),
            "use_cache": True,
        }
        width = self.width
        if min(self.lengths) < width:
            inputs["position_ids"] = torch.tensor(self.lengths, dtype=torch.int64, device=device)[:, None]
            first = torch.tensor([width - length for length in self.lengths], dtype=torch.int64, device=device)
            inputs["attention_mask"] = (torch.arange(width + 1, device=device) >= first[:, None]).long()
        return inputs

    def grew(self) -> None:
        """A forward has run: every line is one token longer."""
        self.lengths = [length + 1 for length in self.lengths]


def _filled(part: Tensor, width: int) -> Tensor:
    """Keys or values [B, heads, T, D] with zeros before them, up to `width` tokens."""
    return F.pad(part, (0, 0, width - part.shape[2], 0))
