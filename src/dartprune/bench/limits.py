"""What is possible at best: Amdahl's law, and the bytes that a decode step must read."""

from __future__ import annotations

from typing import Any

import torch

from dartprune.bench.costs import Shape


def amdahl(share: float, saved: float) -> float:
    """How many times as fast a step can become when `saved` of a part that takes `share` of it is left out."""
    if not (0 <= share <= 1 and 0 <= saved <= 1):
        raise ValueError(f"shares must lie in [0, 1], got {share} and {saved}")
    left = 1 - share * saved
    return 1 / left if left > 0 else float("inf")


def cache_bytes_per_token(cache: Any) -> int:
    """Bytes of keys and values that one token of one sequence holds in all layers of a cache."""
    return sum(
        tensor.nbytes // (tensor.shape[0] * tensor.shape[-2])
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    )


def step_bytes(shape: Shape, bytes_saved: float, cache: int) -> int:
    """Bytes that a decode step must read: the weights but for the FFN's share that was saved, and the cache."""
    return round(shape.step_bytes - shape.ffn_bytes * bytes_saved) + cache
