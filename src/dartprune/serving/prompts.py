"""Prompts are read chunk by chunk, dense and traced; chunks that came before are not read again."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartprune.model.caches import handed
from dartprune.run import Run
from dartprune.serving.prefixes import Prefixes
from dartprune.serving.request import Ticket


@dataclass
class Prompt:
    """A request whose prompt is being read.

    dense: it came when too many decoded already, and is not pruned.  traced: whether masks will be made for it.
    """

    ticket: Ticket
    slot: int
    cache: Any
    dense: bool
    traced: bool
    read: int = 0


class PromptReader:
    """Opens a sequence of the run for each prompt, and reads it."""

    def __init__(self, model: Any, run: Run, chunk: int, prefix_bytes: int) -> None:
        """Set up; `prefix_bytes` are for beginnings of prompts that are kept, 0 for none."""
        self.prefixes = Prefixes(run, chunk, prefix_bytes)
        self._model = model
        self._run = run
        takes = inspect.signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def open(self, ticket: Ticket, *, dense: bool) -> Prompt:
        """A prompt with what is known of its beginning; `dense`: it is not to be pruned."""
        ask = ticket.ask
        sparsity = 0.0 if dense else ask.sparsity
        traced = self._run.method.prunes and sparsity != 0
        known = self.prefixes.find(ask.prompt, traced=traced)
        last = known[-1].slot if traced and known else None
        if last is None:
            (slot,) = self._run.sequences.open(sparsity=sparsity)
        else:
            (slot,) = self._run.sequences.fork([last])
            try:
                self._run.sequences.ask_sparsity([slot], sparsity)
            except ValueError:
                self._run.sequences.close([slot])
                raise
        ticket.cached = len(known) * self.prefixes.chunk
        return Prompt(ticket, slot, self.prefixes.cache(known, self._model.config), dense, traced, ticket.cached)

    def read(self, prompt: Prompt) -> Tensor | None:
        """Read the next chunk; after the last one the logits of the first new token, float32 [V] on the host."""
        ids = prompt.ticket.ask.prompt
        chunk = ids[prompt.read : prompt.read + self.prefixes.chunk]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([chunk], dtype=torch.int64, device=self._model.device),
            **handed(prompt.cache),
            "use_cache": True,
        }
        # nothing is traced for masks that will not be made
        paused = self._run.dense() if prompt.dense else nullcontext()
        with paused, self._run.phase("prefill", slots=(prompt.slot,)):
            logits: Tensor = self._model(**inputs, **self._last_logits).logits[0, -1].float().cpu()
        prompt.read += len(chunk)
        self.prefixes.keep(ids[: prompt.read], prompt.cache, prompt.slot if prompt.traced else None)
        return logits if prompt.read == len(ids) else None
