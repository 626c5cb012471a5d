"""Every preset on every family: pruned equals masked by hand, generate() works, the model comes back untouched."""

from __future__ import annotations

import pytest
import torch

from dartprune import presets
from oracle import assert_untouched, inputs_of_down, masked_by_hand, masks_of, rule_of, snapshot
from tiny import FAMILIES

PROMPT = 14


def tokens(model, lines=2, length=PROMPT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(5, vocabulary, (lines, length), generator=generator)


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("preset", presets.names())
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_pruned_logits_equal_masked_dense(family, preset, backend):
    model = FAMILIES[family]()
    ids = tokens(model)
    pruner = presets.get(preset)()
    # Clock needs some tokens to begin; a selector's choice is compared at the first one
    new = tokens(model, length=12 if pruner.token is None else 4, seed=1)
    compared = 0
    with pruner(model, backend=backend) as run:
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        slots = run.slots_of(cache)
        for t in range(new.shape[1]):
            with run.phase("decode"):
                got = model(input_ids=new[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            if run.report().events or any(kept is None for kept in run.selection(slots[0])):
                continue
            masks = masks_of(run, slots)
            text = torch.cat((ids, new[:, : t + 1]), dim=1)
            if compared == 0 and t == 0:
                # the cache before the first pruned token is dense, so the oracle masks the last token alone
                with run.dense():
                    with inputs_of_down(model) as inputs:
                        plain = model(input_ids=text[:, :-1], use_cache=True).past_key_values
                    means = [a.reshape(*ids.shape, -1)[:, 1:].mean(1) for a in inputs]
                    fill = means if pruner.compensate == "mean" else None
                    with masked_by_hand(model, masks, rule_of(pruner, run), fill):
                        want = model(input_ids=text[:, -1:], past_key_values=plain, use_cache=True).logits[:, -1]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            compared += 1
        report = run.report()
    assert report.dense_tokens + report.pruned_tokens == new.numel()
    if preset == "dense":
        assert compared == 0 and report.realised_sparsity == 0
    else:
        assert compared > 0 and report.pruned_tokens > 0
        share = report.pruned_tokens / new.numel()
        assert report.realised_sparsity == pytest.approx(share * pruner.sparsity, abs=0.02)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_generate_and_come_back(family):
    model = FAMILIES[family]()
    ids = tokens(model)
    before = snapshot(model)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    out = {}
    for backend in ("masked", "reference", "cpu"):
        with presets.get("dart")(sparsity=0.5)(model, backend=backend) as run:
            out[backend] = model.generate(ids, max_new_tokens=10, do_sample=False)
            weights = model.state_dict()
            assert list(weights) == list(before["weights"])
            assert all(torch.equal(weights[name], value) for name, value in before["weights"].items())
            report = run.report()
        assert report.pruned_tokens >= 1 and len(report.sequences) == 2
    assert torch.equal(out["masked"], out["reference"]) and torch.equal(out["cpu"], out["reference"])
    assert_untouched(model, before)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_untouched_after_an_exception(family, error):
    model = FAMILIES[family]()
    before = snapshot(model)

    with pytest.raises(error, match="in the middle"), presets.get("dart")()(model):
        model.generate(tokens(model, lines=1), max_new_tokens=5, streamer=_after(3, error))
    assert_untouched(model, before)


def _after(count, error):
    class Streamer:
        left = count

        def put(self, value):
            self.left -= 1
            if self.left < 0:
                raise error("in the middle")

        def end(self):
            return None

    return Streamer()
