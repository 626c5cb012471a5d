"""Arms by name: what each builds, what a wrong name says, and masks that are the same for every sequence."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dartprune import Dart, Dense, DepthAware, Griffin, Pruner, Relearn, Release, scoring
from dartprune.evaluation.arms import (
    Calibration,
    arm,
    arm_kinds,
    arm_names,
    check_arms,
    cut,
    default_arms,
    needs_calibration,
)
from dartprune.pruner import presets
from letters import tiny

PLAIN = [name for name in default_arms() if name != "dense"]


@pytest.fixture
def forgotten_scorers():
    """Scorers that a test registers are taken out again."""
    before = set(scoring.scorer_names())
    yield
    for name in set(scoring.scorer_names()) - before:
        del scoring._scorers._values[name]


@pytest.mark.parametrize("name", PLAIN)
def test_every_arm_prunes_as_much_as_it_is_told_and_is_plain_data(name):
    found = arm(name)
    assert found.prunes and found.name == name
    for sparsity in (0.5, 0.8):
        pruner = found.build(sparsity)
        assert pruner.sparsity == sparsity
        assert Pruner.from_dict(json.loads(json.dumps(pruner.to_dict()))) == pruner


def test_every_preset_is_an_arm():
    assert set(presets.names()) <= set(default_arms()) and len(set(default_arms())) == len(default_arms())
    assert arm("griffin").build(0.6) == Griffin(sparsity=0.6)
    assert not arm("dense").prunes and arm("dense").build(0.0) == Dense()
    listed = arm_names()
    assert "dart-release@N" in listed and all(listed.values())
    assert {name.partition("@")[0] for name in listed} >= set(default_arms())


def test_variations_of_dart():
    assert arm("dart-relearn@20").build(0.5).refresh == Relearn(tokens=20)
    assert arm("dart-relearn").build(0.5).refresh == Relearn(tokens=50)
    assert arm("dart-release@7").build(0.5).refresh == Release(at=7)
    clock, dart = arm("clock-replay@30").build(0.5), Dart(sparsity=0.5)
    assert clock.refresh.every == 30 and not clock.refresh.detects
    assert (clock.refresh.replay_tokens, clock.refresh.replay_memory) == (dart.refresh.tokens, dart.refresh.memory)
    assert (clock.scorer, clock.budget) == (dart.scorer, dart.budget)
    assert arm("dart-depth-aware").build(0.5) == replace(dart, budget=DepthAware())


def test_the_settings_of_the_reference_code():
    pruner = arm("dart-reference").build(0.7)
    d = pruner.detector
    assert (d.window, d.delta, d.min_drop, d.patience, d.leave_one_out) == (5, 0.1, 0.1, 1, False)
    assert pruner.refresh == Relearn(tokens=50) and pruner.sparsity == 0.7


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("drat", "unknown arm 'drat': did you mean 'dart'"),
        ("dart-relaern@50", "did you mean 'dart-relearn'"),
        ("dart-release", "needs a number of tokens: write dart-release@100"),
        ("dart-release@", "a whole number of tokens"),
        ("dart-release@-3", "a whole number of tokens"),
        ("dart-release@0", "a whole number of tokens"),
        ("clock-replay@x", "as in clock-replay@100"),
        ("static@3", "static takes no number"),
        ("calibrated-wanda@3", "takes no number"),
        ("calibrated-wanda", "needs a calibration text: give --calibration"),
        ("", "unknown arm ''"),
    ],
)
def test_wrong_names(name, said):
    with pytest.raises(ValueError, match=said):
        arm(name)


def test_names_are_checked_before_the_work():
    check_arms(["dart", "calibrated-wanda"], calibrated=True)
    with pytest.raises(ValueError, match="named once, got dart, dart"):
        check_arms(["dart", "dart"], calibrated=False)
    with pytest.raises(ValueError, match="no arm is made from it: add one of calibrated-magnitude"):
        check_arms(["dart"], calibrated=True)
    assert needs_calibration("calibrated-wanda") and not needs_calibration("dart")


def test_the_example_of_the_guide(capsys):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    try:
        exec(code, {})
    finally:
        arm_kinds._values.pop("dart-memory", None)
    assert "memory=0.5" in capsys.readouterr().out


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
                model(input_ids=tokens[:, step : step + 1], past_key_values=cache)
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
