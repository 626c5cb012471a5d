"""The share of the FFN in a step, in every form that an FFN takes."""

from __future__ import annotations

import time

import pytest
import torch

from dartprune.bench.models import prompts
from dartprune.bench.share import FfnTimer, ffn_share
from tiny import FAMILIES


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "gemma3"])
def test_every_ffn_is_timed_once_a_step(family):
    model = FAMILIES[family]()
    clock = FfnTimer(model)
    with torch.no_grad():
        for _ in range(2):
            model(prompts(model, 1, 5))
    assert len(clock._spans) == 2 * 3
    assert all(began < end for began, end in clock._spans) and clock.remove() > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert 0 < ffn_share(model, prompts(model, 2, 12), 2) < 1


def test_the_share_is_that_of_the_ffn():
    """An FFN that sleeps takes nearly all of the step, an attention that sleeps takes nearly all of the rest."""
    model = FAMILIES["llama"]()
    tokens = prompts(model, 1, 12)
    for place, holds in (("mlp.up_proj", lambda share: share > 0.5), ("self_attn", lambda share: share < 0.5)):
        slow = [layer.get_submodule(place) for layer in model.model.layers]
        hooks = [module.register_forward_hook(lambda *_: time.sleep(0.02)) for module in slow]
        with torch.no_grad():
            assert holds(ffn_share(model, tokens, 3))
        for hook in hooks:
            hook.remove()
