"""What a layer study measures, against masks applied by hand and sets counted by hand."""

from __future__ import annotations

import json

import pytest
import torch

from dartprune import Static, Uniform
from dartprune.evaluation.layers.overlap import kept, overlaps
from dartprune.evaluation.layers.report import tables, write
from dartprune.evaluation.layers.run import rank_correlation, settings_of, study_layers, thirds
from dartprune.evaluation.texts import streams
from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.reporting.journal import Journal
from oracle import masked_by_hand
from tiny import FAMILIES

PROMPT = 32


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(4)
    # two domains with different words
    tokens = {
        name: [torch.randint(low, low + 60, (200,), generator=generator).tolist() for _ in range(3)]
        for name, low in (("low", 2), ("high", 64))
    }
    return streams(tokens, (64,), 6, seed=1)


@pytest.fixture(scope="module")
def found(model, drawn):
    return study_layers(model, drawn, prompt=PROMPT, keeps=[0.75, 0.25], groups={"first two": (0, 1)}, size=4)


def plain_losses(model, tokens):
    with torch.no_grad():
        cache = model(input_ids=tokens[:, : PROMPT - 1], use_cache=True).past_key_values
        return cache, tokens[:, PROMPT - 1 : -1], tokens[:, PROMPT:]


def by_hand(model, tokens, masks):
    """Mean loss after the prompt with masks bool [B, I] of each layer."""
    cache, inputs, targets = plain_losses(model, tokens)
    with torch.no_grad(), masked_by_hand(model, masks):
        logits = model(input_ids=inputs, **handed(cache)).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_one_layer_and_all_but_one(model, drawn, found):
    tokens = torch.tensor([stream.tokens for stream in drawn])
    sizes = [layer.neurons for layer in describe(model).layers]
    everything = [torch.ones(len(drawn), n, dtype=torch.bool) for n in sizes]
    chosen = kept(model, tokens[:, : PROMPT - 1].tolist(), 0.25)
    masks = [chosen[:, layer, :n] for layer, n in enumerate(sizes)]
    dense = by_hand(model, tokens, everything)
    assert found.dense_loss == pytest.approx(dense, abs=1e-4)
    for layer in range(3):
        alone = [masks[i] if i == layer else everything[i] for i in range(3)]
        assert found.alone[layer][1] == pytest.approx(by_hand(model, tokens, alone) - dense, abs=1e-4)
        spared = [everything[i] if i == layer else masks[i] for i in range(3)]
        saved = by_hand(model, tokens, masks) - by_hand(model, tokens, spared)
        assert found.spared[layer][1] == pytest.approx(saved, abs=1e-4)
    two = [masks[0], masks[1], everything[2]]
    assert found.groups["first two"][1] == pytest.approx(by_hand(model, tokens, two) - dense, abs=1e-4)
    assert found.realised["all layers"] == pytest.approx([0.25, 0.75])
    assert found.realised["first two"] == pytest.approx([0.25 * 2 / 3, 0.5])
    assert found.errors["all layers"][1] > 0 and max(map(abs, found.alone[0])) > 1e-3
    assert found.foretold["alone"][1] == rank_correlation(found.sensitivity, [row[1] for row in found.alone])


def test_sensitivity_is_that_of_the_prompts(model, drawn, found):
    run_means = []
    with Static(sparsity=0.5)(model) as run:
        for stream in drawn:
            with torch.no_grad(), run.phase("prefill"):
                cache = model(input_ids=torch.tensor([stream.tokens[:PROMPT]])).past_key_values
            run_means.append(run.impact(run.slots_of(cache)[0]))
    means = torch.tensor(run_means).mean(0)
    assert found.sensitivity == pytest.approx((means[:, 0] * means[:, 1]).tolist(), rel=1e-4)


def test_overlap_against_sets(model, drawn, found):
    prompts = [list(stream.tokens[:PROMPT]) for stream in drawn]
    sets = []
    with Static(sparsity=0.5, budget=Uniform())(model) as run:
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            with torch.no_grad(), run.phase("prefill"):
                cache = model(input_ids=tokens).past_key_values
            with torch.no_grad(), run.phase("decode"):
                model(input_ids=tokens[:, :1], **handed(cache))
            sets.append([set(index.tolist()) for index in run.selection(run.slots_of(cache)[0])])
    data = overlaps(model, drawn, PROMPT, 0.5, size=4)
    for key, same in (("same_domain", True), ("other_domain", False)):
        for layer in range(3):
            shares = [
                len(sets[a][layer] & sets[b][layer]) / len(sets[a][layer])
                for a in range(6)
                for b in range(a + 1, 6)
                if (drawn[a].domains == drawn[b].domains) is same
            ]
            assert data[key][layer] == pytest.approx(sum(shares) / len(shares))
    assert len(data["over_time"]) == 1 and data["chance"] == 0.5
    one = [stream for stream in drawn if stream.domains == ("low",)]
    assert overlaps(model, one, PROMPT, 0.5)["other_domain"] is None


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # by hand: ranks 0, 1.5, 1.5, 3 against 1, 0, 2, 3
    assert rank_correlation([1, 5, 5, 9], [2, 1, 3, 4]) == pytest.approx(0.6324555)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_thirds_and_what_cannot_be(model, drawn):
    assert thirds(32) == {"layers 0-10": (0, 10), "layers 11-20": (11, 20), "layers 21-31": (21, 31)}
    assert thirds(2) == {"layers 0-0": (0, 0), "layers 1-1": (1, 1)}
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        settings_of(3, [0.5, 1.0], {})
    with pytest.raises(ValueError, match="the model has layers 0 to 2"):
        settings_of(3, [0.5], {"too far": (1, 3)})
    with pytest.raises(ValueError, match="makes no mask"):
        study_layers(model, drawn, prompt=6, keeps=[0.5])


def test_continues_where_it_was_killed(model, drawn, found, tmp_path, monkeypatch):
    from dartprune.evaluation.layers import run as module

    how = {"prompt": PROMPT, "keeps": [0.75, 0.25], "groups": {"first two": (0, 1)}, "size": 4}
    done = []

    def killed(number):
        done.append(number)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_layers(model, drawn, **how, journal=Journal(tmp_path / "journal.jsonl", {}), progress=killed)
    seen = []
    original = module.forced_losses
    monkeypatch.setattr(module, "forced_losses", lambda *a, **k: (seen.append(1), original(*a, **k))[1])
    again = study_layers(model, drawn, **how, journal=Journal(tmp_path / "journal.jsonl", {}))
    assert again.to_dict() == found.to_dict()
    settings = len(settings_of(3, how["keeps"], how["groups"]))
    assert len(seen) == 2 * (1 + settings - 5), "two batches for dense and for each setting that was left"


def test_written(found, tmp_path):
    settings = {"seed": 1, "dtype": "bfloat16", "begins_with": 2}
    paths = write(found, tmp_path, "a <tiny> model", settings)
    drawn = [f"{name}.{ending}" for name in ("curves", "sensitivity", "overlap") for ending in ("png", "svg")]
    assert [path.name for path in paths] == ["report.html", "results.json", *drawn]
    data = json.loads(paths[1].read_text())
    assert data["alone"] == found.alone and data["settings"] == settings
    page = paths[0].read_text()
    assert "a &lt;tiny&gt; model" in page and page.count("<img") == 3
    assert "The weights are bfloat16." in page and "Each begins with token 2," in page
    single, several, ranks = tables(found)
    assert len(single.rows) == 3 and single.columns[0] == "layer" and len(several.rows) == len(ranks.rows) == 2
    assert single.rows[0][2].startswith(f"{found.alone[0][0]:.3f}"), "75 % is the middle one of two"
