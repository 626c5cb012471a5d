"""How much the kept neurons of two texts have in common: within a domain, between domains, and along a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dartprune.budget import Uniform
from dartprune.evaluation.masks import prompt_masks
from dartprune.evaluation.texts import Stream
from dartprune.pruner import Static

PIECE = 32  # tokens, at least, of a piece of a text


def overlaps(
    model: Any, streams: Sequence[Stream], prompt: int, keep: float, *, size: int = 8, backend: str = "auto"
) -> dict[str, Any]:
    """Shares of kept neurons in common.

    Args:
        model: a decoder in evaluation mode, not attached.
        streams: texts of equal length on one topic each.
        prompt: tokens that a mask is made from.
        keep: share of the neurons that every layer keeps.
        size: texts at a time.
        backend: how the pruned FFN is computed.

    Returns:
        chance: what two random masks have in common, about `keep`.  same_domain, other_domain: means over pairs of
        texts, [layer], None without such pairs.  over_time: mean over texts and layers for two pieces of `piece` tokens
        of a text that lie 1, 2, ... pieces apart, each piece read by itself.
    """
    whole = [list(stream.tokens) for stream in streams]
    masks = kept(model, [text[:prompt] for text in whole], keep, size=size, backend=backend)
    common = _common(masks, masks)
    domains = [stream.domains[0] for stream in streams]
    same = torch.tensor([[a == b for b in domains] for a in domains])
    pairs = torch.ones(len(whole), len(whole), dtype=torch.bool).triu(1)
    piece = max(PIECE, prompt // 8)
    count = min(map(len, whole)) // piece
    # piece by piece, so that row p * N + n is piece p of text n
    pieces = [text[p * piece : (p + 1) * piece] for p in range(count) for text in whole]
    by_piece = kept(model, pieces, keep, size=size, backend=backend).view(count, *masks.shape)
    return {
        "keep": keep,
        "piece": piece,
        "chance": keep,
        "same_domain": _mean(common, pairs & same),
        "other_domain": _mean(common, pairs & ~same),
        "over_time": [
            float(torch.stack([_each(by_piece[p], by_piece[p + d]) for p in range(count - d)]).mean())
            for d in range(1, count)
        ],
    }


def kept(model: Any, texts: Sequence[Sequence[int]], keep: float, *, size: int = 8, backend: str = "auto") -> Tensor:
    """Which neurons a prompt's mask keeps: bool [N, L, I], the layers' neurons padded with False to the widest.

    Args: as of `overlaps`; the texts are prompts of equal length.
    """
    pruner = Static(sparsity=1 - keep, budget=Uniform())
    tokens = torch.tensor([[*text, text[-1]] for text in texts])  # the masks come from all but the last
    parts = [prompt_masks(model, pruner, rows, backend=backend) for rows in tokens.split(size)]
    layers = [torch.cat(masks) for masks in zip(*parts, strict=True)]
    widest = max(mask.shape[1] for mask in layers)
    return torch.stack([pad(mask, (0, widest - mask.shape[1])) for mask in layers], dim=1)


def _common(a: Tensor, b: Tensor) -> Tensor:
    """Share of kept neurons in common of each pair: bool [N, L, I] twice -> float32 [N, N, L]."""
    together = torch.einsum("nli,mli->nml", a.float(), b.float())
    return together / a.float().sum(-1)[:, None]


def _each(a: Tensor, b: Tensor) -> Tensor:
    """The same text by text: [N, L]."""
    return (a & b).float().sum(-1) / a.float().sum(-1)


def _mean(common: Tensor, pairs: Tensor) -> list[float] | None:
    """Mean over some pairs of each layer."""
    return [float(x) for x in common[pairs].mean(0)] if bool(pairs.any()) else None
