"""Trajectories of vectors as numbers: how far they are from the first topic, and from what the dense model has there.

Everything is a stream statistic: a sum of the first topic, the sums of the window under way, the mean of the window
before it. What a text leaves behind is a handful of numbers for each window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.drift import cosine

AGAINST = ("cosine", "distance", "norm_ratio", "overlap")
TOKEN_MEASURES = tuple(f"{name}_to_{what}" for what in ("first_topic", "dense") for name in AGAINST)
WINDOW_MEASURES = (*TOKEN_MEASURES, "stuck")
SKIP = 1  # first tokens of a text that are no part of the centroid: large models park enormous values on them
_SMALLEST = 1e-18


def top_dimensions(hidden: int, top: int) -> int:
    """Dimensions whose overlap is counted: `top`, but at most an eighth of them, so that chance stays low."""
    return max(1, min(top, hidden // 8))


def against(vectors: Tensor, other: Tensor, top: int) -> Tensor:
    """Four measures of vectors against others of the same shape [..., H]: float32 [..., 4].

    Cosine; Euclidean distance; norm of the vector over norm of the other; share of the `top` dimensions of largest
    absolute value that both have in common.
    """
    distance = torch.linalg.vector_norm(vectors - other, dim=-1)
    norm = torch.linalg.vector_norm(vectors, dim=-1)
    ratio = norm / torch.linalg.vector_norm(other, dim=-1).clamp_min(_SMALLEST)
    marks = torch.zeros(2, *vectors.shape, dtype=torch.bool, device=vectors.device)
    for mark, values in zip(marks, (vectors, other), strict=True):
        mark.scatter_(-1, values.abs().topk(top, dim=-1).indices, True)
    overlap = (marks[0] & marks[1]).sum(-1) / top
    return torch.stack((cosine(vectors, other), distance, ratio, overlap), dim=-1)


class Trajectory:
    """Measures of one batch of texts at some points, as the tokens come.

    The centroid is the mean of the arm's own vectors of the first topic: the prompt and the decoded tokens before the
    change. Up to the change it is what came before the token or window that is compared; nothing is compared with a
    mean that it is part of, so the values before and after the change can be set beside each other.
    """

    def __init__(self, window: int, before: int, top: int) -> None:
        """Set up. window: tokens.  before: decoded tokens that belong to the first topic.  top: see `against`."""
        self.window = window
        self.before = before
        self.top = top
        self._step = 0
        self._sum: Tensor | None = None
        self._count: Tensor | None = None  # of tokens in it, float32 [lines, 1]
        self._base: Tensor | None = None  # centroid when the window under way began
        self._own: Tensor | None = None
        self._dense: Tensor | None = None
        self._last: Tensor | None = None

    def begin(self, prompt: Tensor, real: Tensor) -> None:
        """Take the prompt's vectors.

        Args:
            prompt: [points, lines, tokens, H].
            real: bool [lines, tokens], which are no padding; more than one of each line.
        """
        counted = (real & (real.cumsum(1) > SKIP)).to(prompt.device)
        self._sum = prompt.masked_fill(~counted[..., None], 0.0).sum(2)
        self._count = counted.sum(1, keepdim=True).float()

    def step(self, own: Tensor, dense: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take one decoded token.

        Args:
            own: the arm's vectors [points, lines, H].
            dense: the dense model's, reading the same tokens.

        Returns:
            float32 [points, lines, 8] of this token, and [points, lines, 9] where it ends a window: the same of the
            window's mean, and its cosine with the mean of the window before (NaN for the first).
        """
        assert self._sum is not None and self._count is not None, "begin() comes first"
        centroid = self._sum / self._count
        if self._step % self.window == 0:
            self._base = centroid
            self._own, self._dense = torch.zeros_like(own), torch.zeros_like(dense)
        assert self._base is not None and self._own is not None and self._dense is not None
        token = self._compare(own, dense, centroid)
        self._own, self._dense = self._own + own, self._dense + dense
        if self._step < self.before:
            self._sum, self._count = self._sum + own, self._count + 1
        self._step += 1
        if self._step % self.window:
            return token, None
        mean = self._own / self.window
        stuck = torch.full(mean.shape[:-1], torch.nan, device=mean.device)
        if self._last is not None:
            stuck = cosine(mean, self._last)
        self._last = mean
        whole = self._compare(mean, self._dense / self.window, self._base)
        return token, torch.cat((whole, stuck[..., None]), dim=-1)

    def _compare(self, own: Tensor, dense: Tensor, centroid: Tensor) -> Tensor:
        return torch.cat((against(own, centroid, self.top), against(own, dense, self.top)), dim=-1)

    def bytes_held(self) -> int:
        """Bytes of the state between tokens; the same however long the text is."""
        return sum(t.nbytes for t in (self._sum, self._base, self._own, self._dense, self._last) if t is not None)
