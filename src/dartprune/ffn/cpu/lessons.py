"""What tokens teach a sketch, in Numba: one pass over blocks of neurons that stay in the nearer caches."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.cpu.arrays import WORDS, floats, words
from dartprune.ffn.cpu.threads import use_threads
from dartprune.ffn.dropped import SAMPLED, Drops
from dartprune.ffn.sketch import Products

_NONE = numpy.empty(0, numpy.int32)


def lesson_sums(
    activation: str, exact: Products, estimates: Products, weight: Tensor, drops: Drops | None
) -> tuple[Tensor, Tensor | None]:
    """See `lessons.lesson_sums`; the activation by a name that `knows` has seen."""
    from dartprune.ffn.cpu import lesson_kernels as kernels

    gated, (lines, neurons) = exact[0] is not None, (weight.shape[0], exact[1].shape[-1])
    errors = torch.empty(lines, 4 if gated else 2, neurons, dtype=torch.float32, device="cpu")
    dropped = torch.empty(lines if drops is not None else 0, 2, neurons, dtype=torch.float32, device="cpu")
    products = tuple(words("products", part.contiguous()) for part in _both(exact))
    estimated = tuple(part.contiguous().numpy() for part in _both(estimates))
    importance, kept = (floats(None), _NONE) if drops is None else (floats(drops.importance[0]), drops.kept.numpy())
    stride = max(1, neurons // SAMPLED)
    choice = importance, kept, stride
    kind = kernels.ACTIVATIONS[activation]
    filled = errors.numpy(), dropped.numpy()
    kernels.lesson_sums(gated, products, estimated, weight.numpy(), *choice, kind, use_threads(), *filled)
    return errors, None if drops is None else dropped


def knows(activation: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for an activation and products of a dtype."""
    from dartprune.ffn.cpu import lesson_kernels as kernels

    return activation in kernels.ACTIVATIONS and dtype in WORDS


def _both(pair: Products) -> tuple[Any, Any]:
    """Gate and up; up twice where there is no gate."""
    return (pair[1] if pair[0] is None else pair[0]), pair[1]
