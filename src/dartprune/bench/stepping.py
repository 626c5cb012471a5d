"""Reads prompts and decodes tokens, with a pruner attached or without."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dartprune.model.caches import cache_of, handed
from dartprune.run import Run


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token of a generation came; given to `generate()` as its streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt first, then a token at a time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept open."""

    @property
    def rates(self) -> list[float]:
        """Tokens a second in the median decode step; none where the prefill's own token was the only one."""
        steps = [after - before for before, after in pairwise(self.times[1:])]
        return [1 / statistics.median(steps)] if steps else []


def read(model: Any, tokens: Tensor, run: Run | None, cache: Any = None) -> Any:
    """Read prompts [B, T], attached or not; gives the model's output for the last token, with the cache."""
    options = {"input_ids": tokens, **handed(cache), "use_cache": True, "logits_to_keep": 1}
    if run is None:
        return model(**options)
    with run.phase("prefill"):
        return model(**options)


def steps(model: Any, output: Any, count: int, run: Run | None) -> Any:
    """Decode `count` tokens greedily after `output`; gives the last output."""
    for _ in range(count):
        token = output.logits[:, -1:].argmax(-1)
        options = {"input_ids": token, **handed(cache_of(output)), "use_cache": True}
        if run is None:
            output = model(**options)
        else:
            with run.phase("decode"):
                output = model(**options)
    return output
