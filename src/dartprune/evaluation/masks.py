"""Which neurons are kept, as masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.pruner import Pruner
from dartprune.run import Run


def kept_masks(run: Run, slots: Sequence[int], neurons: Sequence[int]) -> list[Tensor]:
    """The masks in force, bool [B, I] of each layer, on the host; all true where nothing is pruned."""
    masks = [torch.zeros(len(slots), count, dtype=torch.bool) for count in neurons]
    for line, slot in enumerate(slots):
        for mask, index in zip(masks, run.selection(slot), strict=True):
            if index is None:
                mask[line] = True
            else:
                mask[line, index.long().cpu()] = True
    return masks


def prompt_masks(model: Any, pruner: Pruner, tokens: Tensor, *, backend: str = "auto") -> list[Tensor]:
    """The first masks of a pruner: bool [B, I] of each layer.

    Args:
        model: a decoder in evaluation mode, not attached.
        pruner: makes the masks at the first decoded token.
        tokens: int64 [B, T]; the last token is only decoded, so that the masks come from those before it.
        backend: how the pruned FFN is computed.
    """
    tokens = tokens.to(next(model.parameters()).device)
    with pruner(model, backend=backend) as run, torch.no_grad():
        cache = run.prefill(tokens[:, :-1])
        with run.phase("decode"):
            model(input_ids=tokens[:, -1:], **handed(cache), use_cache=True)
        return kept_masks(run, run.slots_of(cache), [layer.neurons for layer in describe(model).layers])
