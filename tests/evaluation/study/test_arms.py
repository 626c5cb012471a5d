"""Arms by name: lists of release times, presets, and the nearest name for a wrong one."""

from __future__ import annotations

import pytest

from dartprune.evaluation.study.arms import parse_arms
from dartprune.evaluation.study.settings import Settings


def names(text):
    return [arm.name for arm in parse_arms(text, 0.6)]


def test_release_times_are_spelled_out():
    assert names("static,release@100,200,...,600,dart") == [
        "dense",
        "static",
        *(f"release@{t}" for t in (100, 200, 300, 400, 500, 600)),
        "dart",
    ]
    assert names("release@100,...,350") == ["dense", "release@100", "release@200", "release@300", "release@350"]
    assert names("dart, dense ,release@5,9") == ["dense", "dart", "release@5", "release@9"]


def test_what_the_names_stand_for():
    arms = {arm.name: arm for arm in parse_arms("dense,static,release@40,dart,dart-relearn,griffin,clock", 0.6)}
    assert arms["dense"].is_dense and arms["dense"].pruner.sparsity == 0
    assert arms["static"].frozen and arms["griffin"].frozen and not arms["release@40"].frozen
    chosen = parse_arms("sketch-dart,gated-dart,per-token", 0.6)
    assert not any(arm.frozen for arm in chosen), "they choose for each token"
    assert arms["release@40"].release == 40 and arms["release@40"].pruner.refresh.at == 40
    assert arms["dart"].pruner.refresh.kind == "replay" and arms["dart-relearn"].pruner.refresh.kind == "relearn"
    assert {arm.pruner.sparsity for name, arm in arms.items() if name != "dense"} == {0.6}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drat", "unknown arm 'drat': did you mean 'dart'"),
        ("release@", "a release needs a decoded token"),
        ("release@0", "a release needs a decoded token"),
        ("release@soon", "a release needs a decoded token"),
        ("200", "unknown arm '200'"),
        ("release@100,...", "needs a release time after it"),
        ("release@100,200,...,150", "must rise"),
        ("dart,dart", "named twice"),
        (" , ", "no arms"),
    ],
)
def test_wrong_names(text, said):
    with pytest.raises(ValueError, match=said):
        parse_arms(text, 0.6)


def test_a_release_after_the_end():
    settings = Settings(before=40, after=60)
    settings.check_arms(parse_arms("release@90", 0.7))
    with pytest.raises(ValueError, match=r"'release@91': the text ends at decoded token 100"):
        settings.check_arms(parse_arms("release@91", 0.7))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"before": 10}, "before the change has 10 decoded tokens, fewer than two windows of 10"),
        ({"after": 0}, "after the change has 0 decoded tokens"),
        ({"after": 55}, "multiple of the window"),
        ({"mode": "fre"}, "did you mean 'free'"),
        ({"spaces": ("attenton",)}, "did you mean 'attention'"),
        ({"layers": ()}, "at least one layer"),
        ({"prompt": 2}, "prompt must be at least 4"),
        ({"recovered": 0.0}, "recovered must lie"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_settings_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        Settings(**options)
