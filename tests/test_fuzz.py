"""A few seconds of the fuzz: it runs, finds nothing, and finds a fault that is put there."""

from __future__ import annotations

import pytest

import fuzz
from dartprune.runtime.masks import Masks


def test_a_few_trials_find_nothing():
    trials, failed = fuzz.fuzz(seconds=4, seed=1000)
    assert trials > 1 and not failed


@pytest.mark.parametrize("call", fuzz.CALLS)
def test_the_same_seed_is_the_same_trial(call):
    seed = next(seed for seed in range(1000) if fuzz.Trial.of(seed).call == call)
    assert str(fuzz.Trial.of(seed)) == str(fuzz.Trial.of(seed))


def test_a_fault_is_found_and_can_be_repeated(monkeypatch, capsys):
    seed = next(
        seed
        for seed in range(1000)
        if (trial := fuzz.Trial.of(seed)).call == "direct"
        and trial.pruner.compensate == "mean"
        and trial.pruner.token is None
        and trial.pruner.sparsity > 0.3
        and trial.dtype.itemsize >= 4
    )
    assert fuzz.fuzz(seconds=0, seed=seed) == (1, [])
    monkeypatch.setattr(Masks, "_compensate", lambda self, layer, slots: None)
    trials, failed = fuzz.fuzz(seconds=0, seed=seed)
    assert trials == 1 and failed[0].startswith(f"make fuzz SEED={seed} SECONDS=0  # ")
    assert failed[0] in capsys.readouterr().out
