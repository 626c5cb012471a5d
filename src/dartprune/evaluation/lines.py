"""Sequences that decode side by side on an attached model, each with its own slot, mask and detector."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.model.caches import cache_of, handed
from dartprune.run import Run


class Lines:
    """A batch of texts: prefilled together, decoded token by token, and left one by one.

    A line that is over leaves the batch instead of being fed padding, so that the run counts no token that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run | None,
        contexts: Sequence[Sequence[int]],
        padding: int = 0,
        *,
        hold: bool | None = None,
    ) -> None:
        """Prefill all but the last token of each context, which is held back to be decoded with the masks in force.

        Args:
            model: the model that `run` is attached to.
            run: the run, to which the sequences are new; None: the plain model, or one whose run is paused.
            contexts: tokens of each line, at least two; one where none is held back.
            padding: a token that fills up shorter lines on the left; any will do.
            hold: whether the last token is held back; None: not on the plain model.
        """
        self.opened = len(contexts)  # sequences that the run has opened for it
        self.forwards = 0  # decode forwards so far
        self.tokens = 0  # decoded tokens so far, all lines together
        self._model, self._run = model, run
        self._device = next(model.parameters()).device
        self._held: Tensor | None = None
        texts = [list(context) for context in contexts]
        if hold or (hold is None and run is not None):
            self._held = torch.tensor([line[-1] for line in texts], device=self._device)
            texts = [line[:-1] for line in texts]
        width = max(map(len, texts))
        rows = [[padding] * (width - len(line)) + line for line in texts]
        counts = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in texts], device=self._device)
        # without padding the model needs no mask, and works faster without one
        self._mask = None if all(len(line) == width for line in texts) else counts
        self._lengths = counts.sum(1)
        self.prefilled = counts.bool()  # which of the prefilled tokens are no padding, [B, T]
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        with self._phase("prefill"):
            out = self._forward(torch.tensor(rows, device=self._device), (counts.cumsum(1) - 1).clamp_min(0), None)
        self.cache: Any = cache_of(out)
        self._logits: Tensor = out.logits[:, -1]

    def __len__(self) -> int:
        return int(self._lengths.shape[0])

    def fan_out(self, times: int) -> None:
        """Let each line go on as `times` lines in a row, which cannot influence each other; before `first`."""
        if times == 1:
            return
        self.opened += len(self) * (times - 1)
        self.cache.batch_repeat_interleave(times)
        self._lengths = self._lengths.repeat_interleave(times)
        self._logits = self._logits.repeat_interleave(times, 0)
        if self._held is not None:
            self._held = self._held.repeat_interleave(times)
        if self._mask is not None:
            self._mask = self._mask.repeat_interleave(times, 0)

    def first(self) -> Tensor:
        """Logits [B, V] of the first token after each context, which counts as decoded whatever gave them."""
        if self._held is not None:
            return self.step(self._held)
        self._count()
        return self._logits

    def step(self, tokens: Tensor) -> Tensor:
        """Decode one token of each line, int64 [B]: logits [B, V] of the next."""
        self._count()
        if self._mask is not None:
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(self), 1)), dim=1)
        with self._phase("decode"):
            out = self._forward(tokens.to(self._device)[:, None], self._lengths[:, None], self.cache)
        self._lengths = self._lengths + 1
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, lines: Sequence[int]) -> None:
        """Go on with these lines alone, in this order."""
        if list(lines) == list(range(len(self))):
            return
        index = torch.tensor(lines, dtype=torch.int64, device=self._device)
        self.cache.batch_select_indices(index)
        self._lengths = self._lengths[index]
        if self._mask is not None:
            self._mask = self._mask[index]

    def _count(self) -> None:
        self.forwards += 1
        self.tokens += len(self)

    def _phase(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext() if self._run is None else self._run.phase(phase)

    def _forward(self, tokens: Tensor, positions: Tensor, cache: Any) -> Any:
        options: dict[str, Any] = {"position_ids": positions} if self._positions else {}
        with torch.no_grad():
            return self._model(
                input_ids=tokens,
                attention_mask=self._mask,
                **handed(cache),
                use_cache=True,
                logits_to_keep=1,
                **options,
            )
