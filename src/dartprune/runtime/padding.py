"""Which tokens of a forward are no padding, by whatever attention mask it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError


def real_tokens(mask: Any, lines: int, tokens: int, past: int) -> Tensor | None:
    """Which tokens of the forward count, bool [B, T] on the host; None if all do.

    Args:
        mask: None, [B, T], [B, past + T] or longer (a static cache's), or a 4-D mask [B or 1, heads, T, keys] of bool
            or of numbers to be added.
        lines: B.
        tokens: T.
        past: tokens that the cache held before.

    Raises:
        ValueError: the mask fits no such forward.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    real = _of_lines(mask, tokens, past) if mask.dim() == 2 else _of_pairs(mask, tokens, past)
    if real is None or real.shape[0] not in (1, lines) or real.shape[1] != tokens:
        raise UserError(f"an attention mask of shape {tuple(mask.shape)} does not fit {lines} lines of {tokens} tokens")
    return None if bool(real.all()) else real.expand(lines, -1)


def _of_lines(mask: Tensor, tokens: int, past: int) -> Tensor | None:
    if mask.shape[1] > past + tokens:  # as long as a static cache: what comes later is not there yet
        mask = mask[:, : past + tokens]
    return mask[:, -tokens:].to("cpu").bool() if mask.shape[1] >= tokens else None


def _of_pairs(mask: Tensor, tokens: int, past: int) -> Tensor | None:
    """From which query sees which key: padding sees nothing, not even itself, or, so that no row is empty, everything.

    Where every query sees everything, attention runs both ways and nothing is padding.
    """
    if mask.shape[2] != tokens or mask.shape[3] < tokens:
        return None
    keys = min(mask.shape[3], past + tokens)
    sees = mask[:, 0, :, keys - tokens : keys].to("cpu")
    sees = sees if sees.dtype is torch.bool else sees > torch.finfo(sees.dtype).min / 2
    itself = sees.diagonal(dim1=1, dim2=2)
    everything = sees.all(2)
    everything[:, -1] = False  # the last one may
    return itself & (~everything | sees.all(2).all(1, keepdim=True))
