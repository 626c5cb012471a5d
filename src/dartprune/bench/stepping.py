"""Reads prompts and decodes tokens, with a pruner attached or without."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dartprune.run import Run


def read(model: Any, tokens: Tensor, run: Run | None, cache: Any = None) -> Any:
    """Read prompts [B, T], attached or not; gives the model's output for the last token, with the cache."""
    options = {"input_ids": tokens, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    if run is None:
        return model(**options)
    with run.phase("prefill"):
        return model(**options)


def steps(model: Any, output: Any, count: int, run: Run | None) -> Any:
    """Decode `count` tokens greedily after `output`; gives the last output."""
    for _ in range(count):
        token = output.logits[:, -1:].argmax(-1)
        options = {"input_ids": token, "past_key_values": output.past_key_values, "use_cache": True}
        if run is None:
            output = model(**options)
        else:
            with run.phase("decode"):
                output = model(**options)
    return output
