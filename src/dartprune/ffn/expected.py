"""What a neuron is expected to give where the context tells how wrong its sketch is (docs/token-selection.md).

Over tokens of the context both the exact products and the sketch's are known, and so are the mean `b` and the mean
square `s` of each neuron's errors. With `g~ = g^ + b_g`, `v_g = s_g - b_g^2`, likewise for u, and errors that are taken
for normal and independent, the root of

    E[act(g)^2] E[u^2] = (2/3 act(g~)^2 + 1/6 act(g~ + r)^2 + 1/6 act(g~ - r)^2) (u~^2 + v_u),    r = sqrt(3 v_g)

stands for `|act(g) u|`. The three points are Gauss-Hermite's: exact where act squared is a polynomial of degree 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Act = Callable[[Tensor], Tensor]


def expected_sizes(act: Act, gate: Tensor | None, up: Tensor, errors: Tensor) -> Tensor:
    """Root of the expected energy of each neuron's activation, float32 [N, I].

    Args:
        act: the activation.
        gate: estimated products with the gate matrix, bias added, float32 [N, I]; None for a plain FFN.
        up: the same with the up matrix.
        errors: float32 [N, 4, I], mean and mean square of the errors (exact less estimate) of gate, then of up; for a
            plain FFN [N, 2, I], of up.
    """
    parts = errors.unbind(1)
    if gate is None:
        return _mean_square(act, up, *parts).sqrt()
    up = up + parts[2]
    return (_mean_square(act, gate, *parts[:2]) * (up.square() + _variance(*parts[2:]))).sqrt()


def _mean_square(act: Act, estimate: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """E[act(z)^2] for z normal around the corrected estimate."""
    middle = estimate + mean
    reach = (3 * _variance(mean, square)).sqrt()
    sides = act(middle + reach).square() + act(middle - reach).square()
    return 2 / 3 * act(middle).square() + 1 / 6 * sides


def _variance(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp_min(0.0)


def error_moments(exact: Tensor, estimate: Tensor, weight: Tensor) -> Tensor:
    """Sums over tokens of the errors and of their squares, float32 [B, 2, I].

    Args:
        exact: [B, m, I].
        estimate: the same, estimated.
        weight: float32 [B, m]; what weighs 0 may hold anything.
    """
    counted = weight[:, None]
    error = (exact.float() - estimate).masked_fill_(weight[..., None] == 0, 0.0)
    return torch.cat((counted @ error, counted @ error.square()), dim=1)
