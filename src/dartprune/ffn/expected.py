"""What a neuron is expected to give where the context tells how wrong its sketch is (docs/token-selection.md).

Over tokens of the context both the exact products and the sketch's are known, and so are the mean `b` and the variance
`v` of each neuron's errors. With `g~ = g^ + b_g`, likewise for u, and errors that are taken for normal and independent,
the root of

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
        errors: [N, 4, I], mean and variance of the errors (exact less estimate) of gate, then of up; for a plain FFN
            [N, 2, I], of up. In any float dtype; bf16 holds them well enough.
    """
    parts = errors.float().unbind(1)
    if gate is None:
        return _mean_square(act, up, *parts).sqrt()
    up = up + parts[2]
    return (_mean_square(act, gate, *parts[:2]) * (up.square() + parts[3])).sqrt()


def _mean_square(act: Act, estimate: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E[act(z)^2] for z normal around the corrected estimate."""
    middle = estimate + mean
    reach = (3 * variance).sqrt()
    sides = act(middle + reach).square() + act(middle - reach).square()
    return 2 / 3 * act(middle).square() + 1 / 6 * sides


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


def mean_and_variance(moments: Tensor) -> Tensor:
    """Of means and mean squares [..., 4 or 2, I], in turn, what `expected_sizes` takes, float32."""
    mean, square = moments[..., ::2, :], moments[..., 1::2, :]
    return torch.stack((mean, (square - mean.square()).clamp_min(0.0)), dim=-2).flatten(-3, -2)


def mean_and_square(errors: Tensor) -> Tensor:
    """The inverse of `mean_and_variance`, float32."""
    mean, variance = errors[..., ::2, :].float(), errors[..., 1::2, :].float()
    return torch.stack((mean, variance + mean.square()), dim=-2).flatten(-3, -2)
