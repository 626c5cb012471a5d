"""Running statistics of the dense tokens, per layer and per slot (DART section 3.1; GRIFFIN for the normalised ones).

All sums are float32 whatever the weights. A statistic is three functions: what a block of tokens adds, how two blocks
join, and how a replay blends old and new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dartprune.runtime.slot_tensors import SlotTensors

CHUNK = 1 << 19  # float32 elements of one temporary: larger ones fall out of the cache
IMPACT_CHUNK = 1 << 17  # the same where an impact has several


def _energy(a: Tensor, weight: Tensor, decay: float) -> Tensor:
    return (a.square() * weight[..., None]).sum(1)


def _normalised(a: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    unit: Tensor = a / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return unit


def _normalised_energy(a: Tensor, weight: Tensor, decay: float) -> Tensor:
    return _energy(_normalised(a), weight, decay)


def _normalised_peak(a: Tensor, weight: Tensor, decay: float) -> Tensor:
    return (_normalised(a).abs() * weight[..., None]).amax(1)


def _average(a: Tensor, weight: Tensor, decay: float) -> Tensor:
    # token t of n counted ones carries (1 - decay) * decay^(n - 1 - t); tokens that do not count carry nothing
    later = weight.flip(1).cumsum(1).flip(1) - weight
    return (a.abs() * ((1 - decay) * decay**later * weight)[..., None]).sum(1)


def _mean_sum(a: Tensor, weight: Tensor, decay: float) -> Tensor:
    return (a * weight[..., None]).sum(1)


def _add(old: Tensor, new: Tensor, tokens: Tensor, decay: float) -> Tensor:
    return old + new


def _maximum(old: Tensor, new: Tensor, tokens: Tensor, decay: float) -> Tensor:
    return torch.maximum(old, new)


def _continue_average(old: Tensor, new: Tensor, tokens: Tensor, decay: float) -> Tensor:
    return old * (decay**tokens)[:, None] + new


def _blend_sums(old: Tensor, n_old: Tensor, new: Tensor, n_new: Tensor, memory: float, decay: float) -> Tensor:
    # with nothing remembered the buffer alone decides
    share = ((n_old > 0).float() * memory)[:, None]
    old_mean = old / n_old.clamp_min(1)[:, None]
    new_mean = new / n_new.clamp_min(1)[:, None]
    return (share * old_mean + (1 - share) * new_mean) * (n_old + n_new)[:, None]


def _blend_peaks(old: Tensor, n_old: Tensor, new: Tensor, n_new: Tensor, memory: float, decay: float) -> Tensor:
    return torch.maximum(memory * old, new)


def _blend_averages(old: Tensor, n_old: Tensor, new: Tensor, n_new: Tensor, memory: float, decay: float) -> Tensor:
    share = ((n_old > 0).float() * memory)[:, None]
    whole = (1 - decay**n_new).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return share * old + (1 - share) * new / whole


@dataclass(frozen=True)
class Statistic:
    """add: (a [B,T,I], weight [B,T], decay) -> [B,I]; join and blend act on rows [B,I] with token counts [B]."""

    add: Callable[[Tensor, Tensor, float], Tensor]
    join: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    blend: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


STATISTICS: dict[str, Statistic] = {
    "energy": Statistic(_energy, _add, _blend_sums),
    "normalised_energy": Statistic(_normalised_energy, _add, _blend_sums),
    "normalised_peak": Statistic(_normalised_peak, _maximum, _blend_peaks),
    "average": Statistic(_average, _continue_average, _blend_averages),
    "total": Statistic(_mean_sum, _add, _blend_sums),  # of a itself, for mean compensation
}


def impact_terms(y: Tensor, z: Tensor, *, residual: bool, raw: Tensor | None = None) -> Tensor:
    """What the FFN does to the residual stream, per token (DART section 3.2).

    Args:
        y: residual stream before the FFN's norm, [..., H].
        z: what the FFN adds to it, [..., H].
        residual: compare y with y + z instead of z.
        raw: what the down projection gave, [..., H], where a norm or a factor makes another z of it.

    Returns:
        float32 [..., 3]: `1 - cos(y, z)`, `|z - y| / |y|` and `log(|y|^2 |raw|^2 / |z|^2)`: the size of the stream as
        the down projection's output must be compared with it.
    """
    parts = [part.reshape(-1, y.shape[-1]) for part in (y, z, raw) if part is not None]
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return _terms(*parts, residual=residual).view(*y.shape[:-1], 3)
    size = max(1, IMPACT_CHUNK // y.shape[-1])
    blocks = zip(*(part.split(size) for part in parts), strict=True)
    return torch.cat([_terms(*block, residual=residual) for block in blocks]).view(*y.shape[:-1], 3)


def _terms(y: Tensor, z: Tensor, raw: Tensor | None = None, *, residual: bool) -> Tensor:
    """`impact_terms` of [n, H], float32 [n, 3]."""
    y32, z32 = y.float(), z.float()
    tiny = torch.finfo(torch.float32).tiny
    norm_y = torch.linalg.vector_norm(y32, dim=-1).clamp_min(tiny)
    stream = 2 * norm_y.log()
    if raw is not None:
        made = torch.linalg.vector_norm(z32, dim=-1).clamp_min(tiny)
        stream = stream + 2 * (torch.linalg.vector_norm(raw.float(), dim=-1).clamp_min(tiny) / made).log()
    if residual:
        z32 = y32 + z32
    norm_z = torch.linalg.vector_norm(z32, dim=-1).clamp_min(tiny)
    # one after the other: the product of two tiny norms is 0
    cosine = (y32 * z32).sum(-1) / norm_y / norm_z
    change = torch.linalg.vector_norm(z32 - y32, dim=-1) / norm_y
    return torch.stack((1 - cosine, change, stream), dim=-1)


@dataclass(frozen=True)
class MeanImpact:
    """Means over a sequence's tokens, see `impact_terms`.

    angle: of `1 - cos(y, z)`.  change: of `|z - y| / |y|`.  stream: the stream's square, geometric mean over the traced
    tokens. Shapes are those of the sums without their last axis.
    """

    angle: Tensor
    change: Tensor
    stream: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> MeanImpact:
        """From rows of `LayerTrace.impact`, [..., 5]."""
        angle, change, tokens, log_stream, traced = sums.unbind(-1)
        tokens, traced = tokens.clamp_min(1), traced.clamp_min(1)
        return cls(angle / tokens, change / tokens, (log_stream / traced).exp())


class LayerTrace(SlotTensors):
    """The statistics of one layer: the named ones [slots, I], impact sums [slots, 5] and counts [slots]."""

    impact: Tensor
    tokens: Tensor

    def __init__(self, statistics: tuple[str, ...], neurons: int, decay: float, device: torch.device) -> None:
        super().__init__(device)
        self.statistics = statistics
        self.decay = decay
        for name in statistics:
            self._allocate(name, (neurons,), torch.float32)
        # sums of the first two terms and how many tokens, sum of the third and how many tokens
        self._allocate("impact", (5,), torch.float32)
        self._allocate("tokens", (), torch.float32)

    def measure(self, a: Tensor, weight: Tensor, *, padded: bool = False) -> dict[str, Tensor]:
        """The statistics of a block on its own: a [B, T, I], weight [B, T] of 0 and 1 -> [B, I] each.

        padded: whether tokens of weight 0 may hold anything, NaN included, so that multiplying by 0 is not enough.
        """
        lines, length, neurons = a.shape
        if not self.statistics:
            return {}
        step = max(1, CHUNK // max(1, lines * neurons))
        parts: dict[str, Tensor] = {}
        for first in range(0, length, step):
            w = weight[:, first : first + step]
            block = a[:, first : first + step]
            if padded:
                block = torch.where((w > 0)[..., None], block, 0.0)
            block = block.float()
            count = w.sum(1)
            for name in self.statistics:
                kind = STATISTICS[name]
                new = kind.add(block, w, self.decay)
                parts[name] = kind.join(parts[name], new, count, self.decay) if name in parts else new
        return parts

    def add(self, a: Tensor, slots: Tensor, weight: Tensor, *, padded: bool = False) -> None:
        """Count tokens: a [B, T, I] into the rows `slots` (int64 [B], no slot twice), weight [B, T] of 0 and 1."""
        count = weight.sum(1)
        for name, new in self.measure(a, weight, padded=padded).items():
            rows: Tensor = getattr(self, name)
            joined = STATISTICS[name].join(rows.index_select(0, slots), new, count, self.decay)
            rows.index_copy_(0, slots, joined)
        self.tokens.index_add_(0, slots, count)

    def add_impact(self, terms: Tensor, slots: Tensor, weight: Tensor, traced: Tensor) -> None:
        """Count impact terms [B, T, 3]: the first two of tokens of weight [B, T], the third of the traced [B, T].

        The first token of a text is not traced: its residual stream may be a thousand times as large as any other.
        """
        weights = torch.stack((weight, weight, weight, traced, traced), dim=-1)
        ones = torch.ones_like(terms[..., :1])
        values = torch.cat((terms[..., :2], ones, terms[..., 2:], ones), dim=-1)
        self.impact.index_add_(0, slots, torch.where(weights > 0, values, 0.0).sum(1))

    def blend(self, a: Tensor, slots: Tensor, weight: Tensor, memory: float) -> None:
        """Renew the statistics from replayed tokens: `memory` of the old mean, the rest of the block's mean."""
        n_new = weight.sum(1)
        n_old = self.tokens.index_select(0, slots)
        for name, new in self.measure(a, weight).items():
            rows: Tensor = getattr(self, name)
            old = rows.index_select(0, slots)
            rows.index_copy_(0, slots, STATISTICS[name].blend(old, n_old, new, n_new, memory, self.decay))
        self.tokens.index_copy_(0, slots, n_old + n_new)
