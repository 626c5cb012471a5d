"""Masks are those that the run holds."""

from __future__ import annotations

import torch

from dartprune import Dense, Static
from dartprune.evaluation.masks import kept_masks, prompt_masks
from dartprune.model.caches import handed
from letters import tiny


def test_masks_of_a_prompt_are_the_selections():
    model, tokens = tiny(), torch.randint(2, 120, (2, 20), generator=torch.Generator().manual_seed(1))
    pruner = Static(sparsity=0.5)
    masks = prompt_masks(model, pruner, tokens)
    with pruner(model) as run, torch.no_grad():
        cache = run.prefill(tokens[:, :-1])
        with run.phase("decode"):
            model(input_ids=tokens[:, -1:], **handed(cache))
        slots = run.slots_of(cache)
        for line, slot in enumerate(slots):
            for mask, index in zip(masks, run.selection(slot), strict=True):
                assert mask[line].nonzero().flatten().tolist() == index.tolist() and 0 < len(index) < mask.shape[1]
        sizes = [mask.shape[1] for mask in masks]
        assert all(torch.equal(a, b) for a, b in zip(masks, kept_masks(run, slots, sizes), strict=True))


def test_nothing_pruned_is_everything_kept():
    assert all(bool(mask.all()) for mask in prompt_masks(tiny(), Dense(), torch.full((1, 6), 5)))
