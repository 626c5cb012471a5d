"""Attention outputs -> has the context moved? (DART section 3.4, with a leave-one-out reference)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.errors import UserError

KEPT_WINDOWS = 32


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis, float32; 0 where a vector is zero."""
    a32, b32 = a.float(), b.float()
    # squares below this vanish in float32: a smaller floor would let the quotient grow far above 1
    floor = 1e-18
    norm_a = torch.linalg.vector_norm(a32, dim=-1).clamp_min(floor)
    norm_b = torch.linalg.vector_norm(b32, dim=-1).clamp_min(floor)
    out: Tensor = ((a32 / norm_a[..., None]) * (b32 / norm_b[..., None])).sum(-1)
    return out


class AttentionDrift:
    """Tells when decoded tokens have left the topic of the reference tokens; state of one sequence.

    The reference is a sum, a count and the means of the last 32 complete windows. Each window's cosine with the mean of
    the other reference tokens gives mu and sigma; a decoded window whose cosine lies `max(delta * sigma, min_drop)`
    below mu has drifted; `patience` drifted windows, counted up and down, fire.
    """

    def __init__(
        self,
        window: int = 8,
        delta: float = 0.5,
        min_drop: float = 0.02,
        patience: int = 2,
        leave_one_out: bool = True,
        opening: int = 0,
    ) -> None:
        """Set up.

        Args:
            window: tokens of a window.
            delta: standard deviations that a drifted window lies below the mean, at least.
            min_drop: the same as a difference of cosines.
            patience: drifted windows that fire.
            leave_one_out: compare a reference window with the other tokens only; False compares it with all of them.
            opening: tokens that the first reference must hold before anything is judged; decoded windows make up for
                what a shorter prompt lacks.

        Raises:
            ValueError: a setting that makes no sense.
        """
        for name, whole in (("window", window), ("patience", patience)):
            if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
                raise UserError(f"detector: {name} must be a whole number of at least 1, got {whole!r}")
        if isinstance(opening, bool) or not isinstance(opening, int) or opening < 0:
            raise UserError(f"detector: opening must be a whole number of tokens, 0 for none, got {opening!r}")
        for name, value in (("delta", delta), ("min_drop", min_drop)):
            if not math.isfinite(value) or value < 0:
                raise UserError(f"detector: {name} must be a number of at least 0, got {value!r}")
        self.window = window
        self.delta = delta
        self.min_drop = min_drop
        self.patience = patience
        self.leave_one_out = leave_one_out
        self.opening = opening
        self.reference_tokens = 0
        self._sum: Tensor | None = None
        self._means: list[Tensor] = []
        self._partial: Tensor | None = None
        self._observed: Tensor | None = None
        self._counter = 0

    @property
    def ready(self) -> bool:
        """Whether the reference has the two complete windows without which nothing can be judged, and its opening."""
        return len(self._means) >= 2 and self.reference_tokens >= self.opening

    def reference(self, vectors: Tensor) -> None:
        """Add tokens to the reference: [T, H], any float dtype; a window may span calls."""
        if vectors.shape[0] == 0:
            return
        v = vectors.detach().float()
        total = v.sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self.reference_tokens += v.shape[0]
        windows, self._partial = self._cut(self._partial, v)
        self._keep(windows[-KEPT_WINDOWS:])

    def observe(self, vectors: Tensor) -> bool:
        """Judge decoded tokens [T, H], a window may span calls; True if the detector fired within them."""
        self._partial = None
        windows, self._observed = self._cut(self._observed, vectors.detach().float())
        fired = False
        for mean in windows:
            if not self.ready:
                self.absorb(mean)
                continue
            fired |= self.decide(*self.compare(mean).tolist())
        return fired

    def compare(self, mean: Tensor) -> Tensor:
        """Cosine of a window's mean [H] with the reference mean, mu and sigma: float32 [3], on the device."""
        total = self._total()
        stacked = torch.stack(self._means)
        others = total[None] - self.window * stacked if self.leave_one_out else total.expand_as(stacked)
        each = cosine(stacked, others)
        mu = each.mean()
        sigma = (each - mu).square().mean().sqrt()
        return torch.stack((cosine(mean, total), mu, sigma))

    def decide(self, cosine: float, mu: float, sigma: float) -> bool:
        """Count one judged window; True, with the counter back at 0, when `patience` is reached."""
        self._partial = None  # decoded tokens lie between it and whatever joins the reference next
        if cosine - mu <= -max(self.delta * sigma, self.min_drop):
            self._counter += 1
        else:
            self._counter = max(0, self._counter - 1)
        if self._counter < self.patience:
            return False
        self._counter = 0
        return True

    def similarity_threshold(self, mu: float, sigma: float) -> float:
        """Cosine at and below which a window has drifted."""
        return mu - max(self.delta * sigma, self.min_drop)

    def absorb(self, mean: Tensor) -> None:
        """Add one decoded window, by its mean [H], to the reference."""
        self._partial = None
        m = mean.detach().float()
        self._sum = self.window * m if self._sum is None else self._sum + self.window * m
        self.reference_tokens += self.window
        self._keep([m])

    def restart(self, means: Sequence[Tensor]) -> None:
        """Begin a new reference that consists of these windows; only the first one has an opening."""
        self.opening = 0
        self._sum, self._means, self._partial, self._observed = None, [], None, None
        self.reference_tokens = self._counter = 0
        for mean in means:
            self.absorb(mean)

    def copy(self) -> AttentionDrift:
        """An independent twin, for a beam; tensors are never changed in place, so they are shared."""
        twin = copy.copy(self)
        twin._means = list(self._means)
        return twin

    def bytes_held(self, hidden: int) -> int:
        """Bytes that a full reference holds for vectors of `hidden` values."""
        return 4 * hidden * (KEPT_WINDOWS + 1)

    def _total(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("the detector has no reference yet: call reference() first")
        return self._sum

    def _keep(self, windows: Sequence[Tensor]) -> None:
        # clones: a view would keep every window of a long prompt alive, or change with its owner
        self._means = [*self._means, *(mean.clone() for mean in windows)][-KEPT_WINDOWS:]

    def _cut(self, partial: Tensor | None, vectors: Tensor) -> tuple[list[Tensor], Tensor | None]:
        joined = vectors if partial is None else torch.cat((partial, vectors))
        whole = joined.shape[0] // self.window
        means = joined[: whole * self.window].reshape(whole, self.window, joined.shape[-1]).mean(1)
        rest = joined[whole * self.window :]
        return list(means.unbind(0)), rest.clone() if rest.shape[0] else None
