"""Masks from a calibration text are the same for every sequence."""

from __future__ import annotations

import pytest
import torch

from dartprune import Pruner, scoring
from dartprune.evaluation.arms import arm
from dartprune.evaluation.calibration import Calibration, cut
from dartprune.model.caches import handed
from letters import tiny


@pytest.fixture
def forgotten_scorers():
    """Scorers that a test registers are taken out again."""
    before = set(scoring.scorer_names())
    yield
    for name in set(scoring.scorer_names()) - before:
        del scoring._scorers._values[name]


def energies(model, pieces):
    """Energy of every neuron over the pieces by hooks, the first token of each left out."""
    layers = model.model.layers
    total = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]

    def count(number):
        def hook(_, inputs):
            total[number].add_(inputs[0][0, 1:].square().sum(0))

        return hook

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(count(i)) for i, layer in enumerate(layers)]
    with torch.no_grad():
        for piece in pieces:
            model(input_ids=torch.tensor([piece]))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", ["calibrated-magnitude", "calibrated-wanda"])
def test_calibrated_masks_are_those_of_the_text_for_every_sequence(name, forgotten_scorers):
    model = tiny()
    generator = torch.Generator().manual_seed(6)
    pieces = torch.randint(2, 128, (3, 70), generator=generator).tolist()
    pruner = arm(name, Calibration(model, pieces)).build(0.75)
    want = [e.sqrt() for e in energies(model, pieces)]
    if name == "calibrated-wanda":
        norms = [layer.mlp.down_proj.weight.detach().norm(dim=0) for layer in model.model.layers]
        want = [score * norm for score, norm in zip(want, norms, strict=True)]
    want = [score.topk(18).indices.sort().values.tolist() for score in want]
    tokens = torch.randint(2, 128, (2, 12), generator=generator)
    with torch.no_grad(), pruner(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=tokens, use_cache=True).past_key_values
        for step in range(6):
            with run.phase("decode"):
                model(input_ids=tokens[:, step : step + 1], **handed(cache))
            for slot in run.slots_of(cache):
                assert [kept.tolist() for kept in run.selection(slot)] == want
        assert run.report().realised_sparsity == pytest.approx(0.75) and run.report().dense_tokens == 0


def test_a_calibrated_pruner_elsewhere_is_a_clear_error(forgotten_scorers):
    calibration = Calibration(tiny(), [list(range(2, 80))])
    pruner = arm("calibrated-magnitude", calibration).build(0.5)
    assert Pruner.from_dict(pruner.to_dict()) == pruner, "here it is known"
    assert arm("calibrated-magnitude", Calibration(tiny(), [list(range(2, 80))])).build(0.5) == pruner
    del scoring._scorers._values[pruner.scorer]
    with pytest.raises(ValueError, match="unknown scorer 'calibrated-magnitude-"):
        Pruner.from_dict(pruner.to_dict())


def test_a_calibration_text_is_cut_into_windows():
    assert cut(list(range(100))) == [list(range(100))]
    assert cut(list(range(600))) == [list(range(256)), list(range(256, 512))]
    many = cut(list(range(256 * 300)))
    assert len(many) <= 128 and many[0][0] == 0 and many[-1][0] > 256 * 290
    assert all(len(piece) == 256 and piece[0] % 256 == 0 for piece in many)
    with pytest.raises(ValueError, match="has 63 tokens: give at least 64"):
        cut(list(range(63)))
