"""Arms by name: what each builds, what a wrong name says, and lists of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dartprune import Dart, Dense, DepthAware, Detector, Griffin, Pruner, Relearn, Release, SketchDart, Static
from dartprune.evaluation.arms import (
    arm,
    arm_kinds,
    arm_list,
    arm_names,
    arms_at,
    check_arms,
    default_arms,
    parse_arms,
)
from dartprune.pruner import presets
from dartprune.refresh import Never

PLAIN = [name for name in default_arms() if name != "dense"]


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
    assert arm("dart-frozen").build(0.5) == replace(dart, refresh=Never()) != Static(sparsity=0.5)
    frozen = arm("sketch-dart-frozen").build(0.5)
    assert frozen == replace(SketchDart(sparsity=0.5), refresh=Never()) != SketchDart(sparsity=0.5)
    assert arm("sketch-dart-zero").build(0.5) == replace(frozen, compensate=None)
    assert arm("dart-depth-aware").build(0.5) == replace(dart, budget=DepthAware())


def test_the_settings_of_the_reference_code():
    pruner = arm("dart-reference").build(0.7)
    d = pruner.detector
    assert (d.window, d.delta, d.min_drop, d.patience, d.leave_one_out) == (5, 0.1, 0.1, 1, False)
    assert pruner.refresh == Relearn(tokens=50) and pruner.sparsity == 0.7


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("drat", "unknown method 'drat': did you mean 'dart'"),
        ("dart-relaern@50", "did you mean 'dart-relearn'"),
        ("dart-release", "needs a number of tokens: write dart-release@100"),
        ("dart-release@", "a whole number of tokens"),
        ("dart-release@-3", "a whole number of tokens"),
        ("dart-release@0", "a whole number of tokens"),
        ("clock-replay@x", "as in clock-replay@100"),
        ("static@3", "static takes no number"),
        ("calibrated-wanda@3", "takes no number"),
        ("calibrated-wanda", "needs a calibration text: give --calibration"),
        ("", "unknown method ''"),
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


def test_the_example_of_the_guide(capsys):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    try:
        exec(code, {})
    finally:
        arm_kinds._values.pop("dart-memory", None)
    assert "memory=0.5" in capsys.readouterr().out


def names(text):
    return [one.name for one in parse_arms(text, 0.6)]


def test_lists_of_numbers_are_spelled_out():
    released = [f"dart-release@{t}" for t in (100, 200, 300, 400, 500, 600)]
    assert names("dart-frozen,dart-release@100,200,...,600,dart") == ["dense", "dart-frozen", *released, "dart"]
    assert names("release@100,...,350") == ["dense", *released[:3], "dart-release@350"], "as it was once written"
    assert names("dart, dense ,dart-release@5,9") == ["dense", "dart", "dart-release@5", "dart-release@9"]
    assert arm_list("static,clock-replay@8,16,dart") == ["static", "clock-replay@8", "clock-replay@16", "dart"]


def test_arms_at_one_sparsity():
    text = "dense,dart-frozen,static,dart-release@40,dart,dart-relearn,griffin,clock"
    arms = {one.name: one for one in parse_arms(text, 0.6)}
    assert not arms["dense"].pruner.prunes and arms["dense"].pruner.sparsity == 0
    assert all(arms[name].frozen for name in ("dart-frozen", "static", "griffin"))
    assert not arms["dart-release@40"].frozen and arms["dart-release@40"].release == 40 and arms["dart"].release is None
    assert not any(one.frozen for one in parse_arms("sketch-dart,gated-dart,per-token", 0.6)), "they choose each token"
    assert {one.pruner.sparsity for name, one in arms.items() if name != "dense"} == {0.6}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drat", "unknown method 'drat': did you mean 'dart'"),
        ("dart-release@0", "a whole number of tokens"),
        ("200", "unknown method '200'"),
        ("dart-release@100,...", "needs a number after it, as in dart-release@100,...,600"),
        ("dart-release@100,200,...,150", "must rise"),
        ("dart,dart", "named once"),
        (" , ", "no arms"),
    ],
)
def test_wrong_lists(text, said):
    with pytest.raises(ValueError, match=said):
        parse_arms(text, 0.6)


def test_every_arm_at_every_sparsity_and_the_dense_one_once():
    pruners = arms_at(("dart", "dense", "griffin", "dart-relearn@20"), (0.5, 0.7))
    later = Detector(opening=64)  # an alarm costs dense tokens there
    relearn = {s: Dart(sparsity=s, refresh=Relearn(tokens=20), detector=later) for s in (0.5, 0.7)}
    assert list(pruners.items()) == [
        ("dense", Dense()),
        ("dart 0.5", Dart(sparsity=0.5)),
        ("griffin 0.5", Griffin(sparsity=0.5)),
        ("dart-relearn@20 0.5", relearn[0.5]),
        ("dart 0.7", Dart(sparsity=0.7)),
        ("griffin 0.7", Griffin(sparsity=0.7)),
        ("dart-relearn@20 0.7", relearn[0.7]),
    ]


@pytest.mark.parametrize(
    ("methods", "sparsities", "said"),
    [
        (("drat",), (0.5,), "did you mean 'dart'"),
        (("calibrated-wanda",), (0.5,), "which dartprune compare takes"),
        (("dart",), (1.0,), "sparsity must be a number in"),
        (("dart",), (), "nothing to measure"),
        ((), (0.5,), "nothing to measure"),
    ],
)
def test_what_cannot_be_measured(methods, sparsities, said):
    with pytest.raises(ValueError, match=said):
        arms_at(methods, sparsities)
