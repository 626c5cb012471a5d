"""The next token of each line: the likeliest, or drawn, by transformers' own rules."""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.serving.request import Sampling, TokenChance

COLDEST = 1e-4  # below it the likeliest token is certain, and logits divided by it would be infinite


class Drawer:
    """Draws the tokens of one choice; with a seed always the same, whatever else is in the batch."""

    def __init__(self, sampling: Sampling, choice: int) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.greedy = sampling.temperature < COLDEST
        self._generator = torch.Generator("cpu")
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + choice) % (1 << 63))
        self._rules = LogitsProcessorList()
        if not self.greedy:
            if sampling.temperature != 1:
                self._rules.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._rules.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._rules.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: Tensor) -> int:
        """A token by logits float32 [V] on the host."""
        if self.greedy:
            return int(logits.argmax())
        line = logits[None]
        scores: Tensor = self._rules(torch.empty(1, 0, dtype=torch.int64), line)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def chance(logits: Tensor, token: int, others: int) -> TokenChance:
    """What the model's own probabilities were, before any rule, from logits float32 [V]."""
    logs = logits.log_softmax(-1)
    best = logs.topk(min(others, logs.shape[0]))
    likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenChance(token, float(logs[token]), likeliest)
