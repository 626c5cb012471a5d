"""Arms at every sparsity by name."""

from __future__ import annotations

import pytest

from dartprune import Dart, Dense, Griffin
from dartprune.evaluation.benchmarks.results import arms
from dartprune.refresh import Relearn


def test_every_arm_at_every_sparsity_and_the_dense_one_once():
    found = arms(("dart", "dense", "griffin", "dart-relearn@20"), (0.5, 0.7))
    relearn = {s: Dart(sparsity=s, refresh=Relearn(tokens=20)) for s in (0.5, 0.7)}
    assert list(found.items()) == [
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
        arms(methods, sparsities)
