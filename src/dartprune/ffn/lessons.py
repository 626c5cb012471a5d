"""What tokens of the context teach a sketch: how wrong its estimates were, and what dropped neurons gave.

Sums over tokens, by the quickest way there is; plain torch where there is no other (docs/token-selection.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dartprune.ffn.cpu.threads import kept_threads
from dartprune.ffn.dropped import Drops, dropped_sums
from dartprune.ffn.expected import error_moments
from dartprune.ffn.sketch import Products, estimated_sizes


@dataclass(frozen=True)
class Activation:
    """The activation of an FFN: `act`, and its canonical `name`, which may say nothing to the kernels."""

    act: Callable[[Tensor], Tensor]
    name: str


def lesson_sums(
    activation: Activation, exact: Products, estimates: Products, weight: Tensor, drops: Drops | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over each line's tokens.

    Args:
        activation: of the FFN.
        exact: products of gate (None for a plain FFN) and up, biases added, [B * m, I] in one float dtype.
        estimates: the same by the sketch, float32.
        weight: float32 [B, m] of 0 and 1; of tokens that weigh 0 the products may be anything.
        drops: None where nothing stands in the place of dropped neurons.

    Returns:
        Errors (exact less estimate) and their squares, of gate, then of up: float32 [B, 4 or 2, I].
        What neurons gave in the tokens that drop them, and in how many: float32 [B, 2, I]; None without drops.
    """
    if weight.device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from dartprune.ffn.cpu import lessons as cpu_lessons

        if cpu_lessons.knows(activation.name, exact[1].dtype):
            with kept_threads():
                return cpu_lessons.lesson_sums(activation.name, exact, estimates, weight, drops)
    return reference_sums(activation, exact, estimates, weight, drops)


def reference_sums(
    activation: Activation, exact: Products, estimates: Products, weight: Tensor, drops: Drops | None
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch, right on every device."""
    shape = (*weight.shape, -1)
    errors = [
        error_moments(of_matrix.view(shape), estimate.view(shape), weight)
        for of_matrix, estimate in zip(exact, estimates, strict=True)
        if of_matrix is not None and estimate is not None
    ]
    return torch.cat(errors, dim=1), _dropped(activation.act, exact, estimates, weight, drops)


def _dropped(
    act: Callable[[Tensor], Tensor], exact: Products, estimates: Products, weight: Tensor, drops: Drops | None
) -> Tensor | None:
    if drops is None:
        return None
    gate, up = exact
    a = act(up) if gate is None else act(gate) * up
    scores = estimated_sizes(act, *estimates, None) * drops.importance
    shape = (*weight.shape, -1)
    return dropped_sums(a.view(shape), scores.view(shape), drops.kept, weight)
