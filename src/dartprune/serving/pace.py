"""From how many sequences on a dense step is faster than a pruned one: measured on the model, before it serves."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

from dartprune.model.caches import handed
from dartprune.run import Run
from dartprune.serving.joined import JoinedCache

PROMPT, STEPS, WARM = 64, 5, 2
NEARLY = 1.02  # times as long as dense may a pruned step take: what is left out costs quality, so it must pay


def measured(above: int | str | None, model: Any, run: Run, most: int) -> int | None:
    """The number of sequences above which steps are dense: as given, None for never, `auto` measured now."""
    if above is None or isinstance(above, int):
        return above
    return dense_above(model, run, most)


def dense_above(model: Any, run: Run, most: int) -> int | None:
    """The largest batch whose pruned steps are not slower than dense ones; None: all are not, or nothing prunes.

    Batches of 1, 2, 4, ... sequences of random tokens decode pruned and dense in turn; medians are compared.
    """
    if not run.method.prunes:
        return None
    fits = 0
    for size in sorted({most, *(2**n for n in range(most.bit_length()) if 2**n <= most)}):
        if _ratio(model, run, size) > NEARLY:
            return fits
        fits = size
    return None


@torch.no_grad()
def _ratio(model: Any, run: Run, lines: int) -> float:
    """Seconds of a pruned step of so many sequences, divided by those of a dense one."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    high = int(model.config.get_text_config().vocab_size)
    joined, slots = JoinedCache(), run.sequences.open(lines)
    try:
        for slot in slots:
            ids = torch.randint(0, high, (1, max(PROMPT, run.method.least_traced)), generator=generator)
            cache = DynamicCache(config=model.config)
            with run.phase("prefill", slots=(slot,)):
                model(input_ids=ids.to(model.device), **handed(cache), use_cache=True)
            joined.join(cache, ids.shape[1])
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * (WARM + STEPS)):
            dense = bool(turn % 2)
            tokens = torch.randint(0, high, (lines,), generator=generator).tolist()
            inputs = joined.inputs(tokens, model.device)
            began = time.perf_counter()
            with run.dense() if dense else nullcontext(), run.phase("decode", slots=slots):
                float(model(**inputs).logits[0, -1, 0])  # waits for the device
            if turn >= 2 * WARM:
                seconds[dense].append(time.perf_counter() - began)
            joined.grew()
    finally:
        run.sequences.close(slots)
    return statistics.median(seconds[False]) / statistics.median(seconds[True])
