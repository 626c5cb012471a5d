"""Every preset on every family: pruned equals masked by hand, generate() works, the model comes back untouched."""

from __future__ import annotations

import pytest
import torch

from dartprune import presets
from dartprune.model.caches import handed
from oracle import MaskedTwin, assert_untouched, masks_of, means_of, rule_of, snapshot
from tiny import FAMILIES

PROMPT = 14


def tokens(model, lines=2, length=PROMPT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(5, vocabulary, (lines, length), generator=generator)


# decoded tokens: Clock begins at the ninth, is dense again after the 24th and pruned again from the 29th on
LENGTHS = {"clock": 32, "gated-dart": 5, "sketch-dart": 5, "per-token": 5}


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("preset", presets.names())
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_pruned_logits_equal_masked_dense(family, preset, backend):
    model, twin = FAMILIES[family](), MaskedTwin(FAMILIES[family]())
    ids = tokens(model)
    new = tokens(model, length=LENGTHS.get(preset, 12), seed=1)
    pruner = presets.get(preset)()
    compared = []  # the decoded tokens at which some neurons were left out
    with pruner(model, backend=backend) as run:
        with run.phase("prefill"):
            got = model(input_ids=ids, use_cache=True)
        torch.testing.assert_close(got.logits, twin.read(ids), rtol=1e-4, atol=1e-4)
        cache = got.past_key_values
        slots = run.slots_of(cache)
        for t in range(new.shape[1]):
            before, events = masks_of(run, slots), len(run.report().events)
            with run.phase("decode"):
                got = model(input_ids=new[:, t : t + 1], **handed(cache), use_cache=True).logits
            # masks are made before the token that they serve, and changed by an event after it
            masks = masks_of(run, slots) if len(run.report().events) == events else before
            pruned = not all(mask.all() for mask in masks)
            fill = None
            if pruner.compensate == "mean":
                fill = twin.means if pruner.token is None else means_of(run, slots)
            want = twin.step(new[:, t : t + 1], masks, rule_of(pruner, run), fill=fill)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            if pruned or (pruner.token is not None):
                compared.append(t)
        report = run.report()
    assert report.dense_tokens + report.pruned_tokens == new.numel()
    assert report.pruned_tokens == 2 * len(compared)
    if preset == "dense":
        assert not compared and report.realised_sparsity == 0
        return
    first = {"clock": 8}.get(preset, 0)
    assert compared[0] == first and len(compared) > 1, "no pruned step was compared"
    assert preset != "clock" or compared == [*range(8, 24), *range(28, 32)]
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
