"""Scores against a naive loop; selection's ties; the registry."""

from __future__ import annotations

import math

import pytest
import torch

from dartprune.names import Registry, unknown
from dartprune.proxy import cached_forward_proxy, forward_proxy, forward_proxy_flops
from dartprune.scoring import keep_above_mean, keep_top, register_scorer, scorer, scorer_names


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


def test_names():
    assert "did you mean 'magnitude'? " in str(unknown("scorer", "magnitud", ["magnitude", "peak"]))
    assert "did you mean" not in str(unknown("scorer", "zzz", ["magnitude"]))
    registry: Registry[int] = Registry("thing")
    registry.register("one", 1)
    assert registry.get("one") == 1 and registry.name_of(1) == "one"
    with pytest.raises(ValueError, match="unknown thing 'two'"):
        registry.get("two")
    with pytest.raises(ValueError, match="not a registered thing"):
        registry.name_of(3)


def test_the_proxy_in_blocks_and_from_disk(tmp_path, monkeypatch):
    import dartprune.proxy as proxy

    down, unembedding = torch.randn(11, 8), torch.randn(37, 8).bfloat16()
    whole = (down @ unembedding.float().t()).abs()
    monkeypatch.setattr(proxy, "BLOCK", 40)
    highest, mean = forward_proxy(down, unembedding)
    torch.testing.assert_close(highest, whole.amax(1))
    torch.testing.assert_close(mean, whole.mean(1))
    assert forward_proxy_flops(11, 8, 37) == 2 * 11 * 8 * 37
    first = cached_forward_proxy(down, unembedding, tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(proxy, "forward_proxy", lambda *a: pytest.fail("the cache was not used"))
    again = cached_forward_proxy(down, unembedding, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(proxy, "forward_proxy", forward_proxy)
    cached_forward_proxy(down + 1, unembedding, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    path.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="worked out again"):
        again = cached_forward_proxy(down, unembedding, tmp_path)
    assert torch.equal(again[0], first[0])
