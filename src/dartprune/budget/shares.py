"""Layer sensitivity or one ranking -> which share of its neurons each layer leaves out (DART section 3.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.errors import UserError

ALIKE = 0.01  # a spread of sensitivities below this share of their mean says nothing


def sensitivity(angle: Tensor, change: Tensor) -> Tensor:
    """How much a layer's FFN moves the residual stream: `mean(1 - cos) * mean(|z - y| / |y|)`, [L]."""
    return angle * change


def _check(sparsity: float, min_sparsity: float = 0.0, max_sparsity: float = 1.0) -> None:
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity must be a number in [0, 1), got {sparsity!r}; 0.7 leaves out 70 % of the neurons")
    if not 0 <= min_sparsity <= max_sparsity <= 1:
        raise UserError(f"layer bounds must satisfy 0 <= min <= max <= 1, got [{min_sparsity!r}, {max_sparsity!r}]")


def distribute(pressure: Tensor, sparsity: float, min_sparsity: float = 0.1, max_sparsity: float = 0.9) -> Tensor:
    """Pruned fractions in proportion to a pressure, within bounds, with mean `sparsity`.

    Args:
        pressure: how readily each layer is pruned, [L], not negative.
        sparsity: mean of the result.
        min_sparsity: lower bound; widened, with a warning, where `sparsity` lies below it.
        max_sparsity: upper bound; likewise.

    Returns:
        float32 [L] on the host.

    Raises:
        ValueError: `sparsity` outside [0, 1), or bounds that contradict each other.
    """
    _check(sparsity, min_sparsity, max_sparsity)
    p = pressure.detach().cpu().double()
    if 0 < sparsity < min_sparsity or sparsity > max_sparsity:  # 0 means what it says: nothing is pruned
        warnings.warn(
            f"sparsity {sparsity:g} lies outside of the layer bounds [{min_sparsity:g}, {max_sparsity:g}]: "
            "the bound is widened to it",
            stacklevel=3,
        )
    low, high = min(min_sparsity, sparsity), max(max_sparsity, sparsity)
    layers = p.numel()
    total = float(p.sum())
    if layers == 1 or total <= 0 or not math.isfinite(total):
        return torch.full((layers,), float(sparsity), dtype=torch.float32, device="cpu")
    wanted = sparsity * layers
    out = (wanted * p / total).clamp(low, high)
    for _ in range(10 * layers + 100):
        rest = wanted - float(out.sum())
        if abs(rest) < 1e-9 * layers:
            break
        free = out < high - 1e-12 if rest > 0 else out > low + 1e-12
        share = torch.where(free, p, 0.0)
        if float(share.sum()) <= 0:
            share = free.double()
        out = (out + rest * share / share.sum()).clamp(low, high)
    return out.float()


def depth_aware(
    sensitivity: Tensor,
    sparsity: float,
    *,
    early_width: float = 0.3,
    late_width: float = 0.15,
    early_floor: float = 0.25,
    late_floor: float = 0.35,
    min_sparsity: float = 0.1,
    max_sparsity: float = 0.9,
) -> Tensor:
    """Pruned fraction of each layer: insensitive layers give more, the first and the last ones are protected.

    Args:
        sensitivity: [L], any float dtype, see `sensitivity()`.
        sparsity: mean pruned fraction, in [0, 1).
        early_width: share of the depth at the beginning that is protected; 0 for none.
        late_width: the same at the end.
        early_floor: pressure on the very first layer, of 1.
        late_floor: pressure on the very last layer, of 1.
        min_sparsity: least pruned fraction of a layer.
        max_sparsity: greatest pruned fraction of a layer.

    Returns:
        float32 [L] on the host with mean `sparsity` (DART section 3.2).

    Raises:
        ValueError: `sparsity` outside [0, 1), or bounds that contradict each other.
    """
    # 1 - cos of nearly equal vectors may come out a rounding error below 0
    s = sensitivity.detach().cpu().double().clamp_min(0)
    layers = s.numel()
    mean = float(s.mean())
    spread = float(s.max() - s.min())
    if not math.isfinite(mean) or spread < ALIKE * mean or spread == 0:
        readiness = torch.ones(layers, dtype=torch.float64, device="cpu")
    else:
        readiness = 1 - (s - s.min()) / (spread + 1e-6 * mean)
    depth = torch.full((1,), 0.5, dtype=torch.float64, device="cpu")
    if layers > 1:
        depth = torch.linspace(0, 1, layers, dtype=torch.float64, device="cpu")
    protection = torch.ones(layers, dtype=torch.float64, device="cpu")
    early, late = depth < early_width, depth > 1 - late_width
    if early_width > 0:
        protection = torch.where(early, early_floor + (1 - early_floor) * depth / early_width, protection)
    if late_width > 0:
        protection = torch.where(late, late_floor + (1 - late_floor) * (1 - depth) / late_width, protection)
    return distribute(readiness * protection, sparsity, min_sparsity, max_sparsity)


def rank(contributions: Sequence[Tensor], sparsity: float, max_sparsity: float = 1.0) -> Tensor:
    """Pruned fractions from one ranking of all layers' neurons: the highest contributions of the model are kept.

    Args:
        contributions: of each layer, float [I], not negative, comparable between layers, on one device.
        sparsity: mean of the result over all neurons.
        max_sparsity: greatest pruned fraction of a layer; widened to `sparsity` where that is higher.

    Returns:
        float32 [L] on the host (waits for the device once).

    Raises:
        ValueError: `sparsity` outside [0, 1), or a bound outside [0, 1].
    """
    _check(sparsity, 0.0, max_sparsity)
    sizes = [len(part) for part in contributions]
    kept = round((1 - sparsity) * sum(sizes))
    ranked = []
    for part, size in zip(contributions, sizes, strict=True):
        part = part.float().nan_to_num(nan=torch.inf).clone()
        # what a layer keeps in any case stands above all others
        sure = min(size, math.ceil((1 - max(max_sparsity, sparsity)) * size))
        part[part.topk(sure).indices] = torch.inf
        ranked.append(part)
    many = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    owners = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(many).to(ranked[0].device)
    chosen = owners[torch.cat(ranked).topk(kept).indices]
    counts = torch.bincount(chosen, minlength=len(sizes)).cpu()
    return (1 - counts.double() / many).float()


def uniform(layers: int, sparsity: float) -> Tensor:
    """The same pruned fraction in every layer, float32 [L]; ValueError outside [0, 1)."""
    _check(sparsity)
    return torch.full((layers,), float(sparsity), dtype=torch.float32, device="cpu")


def keep_counts(pruned: Tensor, neurons: Sequence[int]) -> list[int]:
    """Neurons that each layer keeps: `round((1 - p_l) * I_l)`."""
    return [round((1 - float(p)) * n) for p, n in zip(pruned.tolist(), neurons, strict=True)]
