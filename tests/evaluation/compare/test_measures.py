"""Figures of a batch against plain torch; arms that only say that they prune."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, Dense, Static
from dartprune.evaluation.compare.measures import check_masks, measure, reference
from dartprune.evaluation.forced import forced_steps
from dartprune.runtime import layer_hooks as layer_run
from letters import tiny

TOKENS = torch.randint(2, 128, (3, 40), generator=torch.Generator().manual_seed(2))
CONTEXT = 16


def logits_of(model, pruner):
    with pruner(model, backend="masked") as run:
        parts = [logits for _, logits in forced_steps(model, run, TOKENS, CONTEXT)]
    return torch.cat(parts, dim=1).double()


def test_against_plain_torch():
    model = tiny()
    pruner = Static(sparsity=0.6)
    found = measure(model, pruner, TOKENS, CONTEXT, reference(model, TOKENS, CONTEXT))
    ours, theirs = (logits_of(model, p).log_softmax(-1) for p in (pruner, Dense()))
    divergence = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.divergence.double(), divergence, rtol=1e-3, atol=1e-3)
    losses = -ours.gather(-1, TOKENS[:, CONTEXT:, None])[..., 0]
    torch.testing.assert_close(found.losses.double(), losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.agreement.bool(), ours.argmax(-1) == theirs.argmax(-1))
    assert 0 < found.agreement.mean() < 1 and divergence.mean() > 0.05
    assert found.report.realised_sparsity == pytest.approx(0.6, abs=0.01) and found.short == 0


def test_dense_is_at_no_distance_from_itself():
    model = tiny()
    dense = reference(model, TOKENS, CONTEXT)
    found = measure(model, Dense(), TOKENS, CONTEXT, dense)
    assert float(found.divergence.abs().max()) < 1e-5 and float(found.agreement.min()) == 1
    assert torch.equal(found.losses, dense.losses) and found.report.realised_sparsity == 0
    check_masks("dense", 0.0, found, dense, torch.float32)


def test_all_arms_decode_in_blocks_no_longer_than_asked():
    model, blocks = tiny(), []
    dense = reference(model, TOKENS, CONTEXT, blocks.append, block=5)
    found = measure(model, Static(sparsity=0.5), TOKENS, CONTEXT, dense, progress=blocks.append, block=5)
    assert blocks == [5, 5, 5, 5, 4] * 2
    whole = reference(model, TOKENS, CONTEXT, blocks.append)
    assert blocks[10:] == [24]
    torch.testing.assert_close(whole.losses, dense.losses, rtol=1e-4, atol=1e-4)
    assert found.report.pruned_tokens == 3 * 24


def test_prompts_too_short_to_trace_are_counted():
    model = tiny()
    found = measure(model, Static(sparsity=0.5), TOKENS, 5, reference(model, TOKENS, 5))
    assert found.short == 3 and found.report.dense_tokens > 0
    late = measure(model, Static(sparsity=0.5, start=4), TOKENS, CONTEXT, reference(model, TOKENS, CONTEXT))
    assert late.short == 0 and late.report.dense_tokens == 12


def test_an_arm_that_stays_dense_is_caught():
    model = tiny()
    dense = reference(model, TOKENS, CONTEXT)
    found = measure(model, Dart(sparsity=0.5, start=1000), TOKENS, CONTEXT, dense)
    with pytest.raises(ValueError, match=r"arm 'sleeper' was built for a sparsity of 0.5 and pruned none of 72"):
        check_masks("sleeper", 0.5, found, dense, torch.float32)


def test_an_arm_that_only_says_so_is_caught(monkeypatch):
    model = tiny()
    dense = reference(model, TOKENS, CONTEXT)
    honest = measure(model, Static(sparsity=0.1), TOKENS, CONTEXT, dense)
    check_masks("a little", 0.1, honest, dense, torch.float32)
    monkeypatch.setattr(layer_run, "apply_mask", lambda a, mask: a)
    found = measure(model, Static(sparsity=0.5), TOKENS, CONTEXT, dense)
    assert found.report.realised_sparsity == pytest.approx(0.5, abs=0.01), "what it says of itself"
    with pytest.raises(ValueError, match=r"arm 'liar' reports a realised sparsity of 0.5.*its masks do not act"):
        check_masks("liar", 0.5, found, dense, torch.float32)
