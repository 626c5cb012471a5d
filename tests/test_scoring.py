"""Scores against a naive loop; selection's ties; the registry of scorers."""

from __future__ import annotations

import math

import pytest
import torch

from dartprune.runtime.selection import keep_above_mean, keep_top
from dartprune.scoring import register_scorer, scorer, scorer_names


def test_every_scorer_against_a_loop():
    neurons = 7
    facts = {
        name: torch.rand(neurons) + 0.1
        for name in ("energy", "normalised_energy", "normalised_peak", "average", "noise")
    } | {name: torch.rand(neurons) + 0.1 for name in ("down_norm", "proxy_max", "proxy_mean")}
    f = {name: value.tolist() for name, value in facts.items()}
    naive = {
        "magnitude": [math.sqrt(f["energy"][i]) for i in range(neurons)],
        "average": f["average"],
        "token-normalised": [math.sqrt(f["normalised_energy"][i]) for i in range(neurons)],
        "peak": f["normalised_peak"],
        "weight-aware": [math.sqrt(f["energy"][i]) * f["down_norm"][i] for i in range(neurons)],
        "max": [math.sqrt(f["energy"][i]) * f["proxy_max"][i] for i in range(neurons)],
        "mean": [math.sqrt(f["energy"][i]) * f["proxy_mean"][i] for i in range(neurons)],
        "combined": [math.sqrt(f["energy"][i]) * (f["proxy_max"][i] + f["proxy_mean"][i]) for i in range(neurons)],
        "product": [f["energy"][i] * f["proxy_max"][i] * f["proxy_mean"][i] for i in range(neurons)],
        "random": f["noise"],
    }
    assert sorted(naive) == scorer_names()
    for name, want in naive.items():
        known = scorer(name)
        got = known.function(**{key: facts[key] for key in known.inputs})
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_top_neurons_and_ties():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert keep_top(scores, 2).tolist() == [1, 2]
    assert keep_top(scores, 3).tolist() == [1, 2, 4]
    assert keep_top(scores, 0).tolist() == [] and keep_top(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert keep_top(scores, 2).dtype is torch.int32
    same = torch.zeros(5000)
    same[4000] = 1.0
    assert keep_top(same, 100).tolist() == [*range(99), 4000]
    batch = torch.rand(3, 2, 50)
    assert torch.equal(keep_top(batch, 9)[2, 1], keep_top(batch[2, 1], 9))
    for k in (-1, 6):
        with pytest.raises(ValueError, match=f"cannot keep {k} of 5 neurons"):
            keep_top(scores, k)


def test_above_the_mean():
    assert keep_above_mean(torch.tensor([0.0, 4.0, 2.0, 2.0])).tolist() == [1, 2, 3]
    assert keep_above_mean(torch.full((4,), 2.0)).tolist() == [0, 1, 2, 3]


def test_a_new_scorer_is_a_function_and_a_line():
    @register_scorer("test-only")
    def mine(energy, down_norm):
        return energy + down_norm

    assert scorer("test-only").inputs == ("energy", "down_norm")
    with pytest.raises(ValueError, match="registered already"):
        register_scorer("test-only")(mine)
    with pytest.raises(ValueError, match="asks for 'energie'"):
        register_scorer("another")(lambda energie: energie)
    from dartprune import scoring

    del scoring._scorers._values["test-only"]


def by_sorting(scores, k):
    """Straight from the words: highest first, the lower neuron first among equals."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@pytest.mark.parametrize("seed", range(30))
def test_top_neurons_against_plain_sorting(seed):
    g = torch.Generator().manual_seed(seed)
    neurons = int(torch.randint(1, 400, (1,), generator=g))
    # every third case has few different values, so that most cuts fall among equals
    scores = torch.rand(neurons, generator=g) if seed % 3 else torch.randint(0, 4, (neurons,), generator=g).float()
    for k in {0, 1, neurons // 3, neurons - 1, neurons}:
        assert keep_top(scores, k).tolist() == by_sorting(scores.tolist(), k)


def test_top_neurons_of_a_whole_layer_with_many_equal_scores():
    scores = torch.randint(0, 5, (3, 14336), generator=torch.Generator().manual_seed(0)).float()
    kept = keep_top(scores, 4300)
    for line, row in zip(kept, scores, strict=True):
        assert line.tolist() == by_sorting(row.tolist(), 4300)
    assert keep_top(torch.zeros(14336), 4300).tolist() == list(range(4300))
    assert keep_top(scores[:, ::2], 9).shape == (3, 9)


def test_top_neurons_of_batches_are_those_of_each_line():
    scores = torch.rand(2, 3, 4, 61)
    for k in (0, 17, 61):
        kept = keep_top(scores, k)
        assert kept.shape == (2, 3, 4, k) and kept.dtype is torch.int32
        for line, row in zip(kept.reshape(24, k), scores.reshape(24, 61), strict=True):
            assert line.tolist() == by_sorting(row.tolist(), k)


def test_scores_that_are_not_numbers_still_give_k_neurons():
    scores = torch.rand(3, 50)
    scores[0, 4] = float("nan")
    scores[1] = float("nan")
    kept = keep_top(scores, 20)
    assert kept.shape == (3, 20) and 4 in kept[0].tolist()
    assert all(len(set(line.tolist())) == 20 for line in kept)
    assert kept[2].tolist() == by_sorting(scores[2].tolist(), 20)


def test_equal_scores_are_all_at_the_mean_whatever_its_rounding():
    for value in torch.rand(50, generator=torch.Generator().manual_seed(1)):
        assert keep_above_mean(value.repeat(14336)).numel() == 14336


def test_unknown_scorers_name_the_nearest():
    with pytest.raises(ValueError, match="unknown scorer 'magnitud': did you mean 'magnitude'"):
        scorer("magnitud")
