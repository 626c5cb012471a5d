"""The detector: against a naive form, on crafted changes of topic, streaming, and in its corner cases."""

from __future__ import annotations

import math

import pytest
import torch

from dartprune.drift import AttentionDrift, cosine


def topic(generator, tokens, direction, noise=0.6):
    return direction + noise * torch.randn(tokens, len(direction), generator=generator)


def naive(reference, decoded, window=8, delta=0.5, min_drop=0.02, patience=2, leave_one_out=True):
    """Straight from the equations: windows at which it fires."""

    def cos(a, b):
        return float(torch.dot(a, b) / (a.norm() * b.norm()))

    whole = [reference[i : i + window] for i in range(0, len(reference) - window + 1, window)][-32:]
    total = reference.sum(0)
    figures = [cos(w.mean(0), total - w.sum(0) if leave_one_out else total) for w in whole]
    mu = sum(figures) / len(figures)
    sigma = math.sqrt(sum((f - mu) ** 2 for f in figures) / len(figures))
    fired, counter = [], 0
    for number, i in enumerate(range(0, len(decoded) - window + 1, window)):
        drifted = cos(decoded[i : i + window].mean(0), total) - mu <= -max(delta * sigma, min_drop)
        counter = counter + 1 if drifted else max(0, counter - 1)
        if counter == patience:
            fired.append(number)
            counter = 0
    return fired


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_against_the_naive_form(seed, leave_one_out):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 64, generator=g)
    reference = topic(g, 70 + seed * 9, a, noise=2.0)
    decoded = torch.cat((topic(g, 40, a, noise=2.0), topic(g, 43, a + b, noise=2.0), topic(g, 40, b)))
    drift = AttentionDrift(leave_one_out=leave_one_out)
    drift.reference(reference)
    fired = [i for i in range(len(decoded) // 8) if drift.observe(decoded[i * 8 : i * 8 + 8])]
    assert fired == naive(reference, decoded, leave_one_out=leave_one_out)


@pytest.mark.parametrize("seed", range(20))
def test_a_change_of_topic_fires_within_three_windows_and_not_before(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 128, generator=g)
    drift = AttentionDrift(min_drop=0.1)
    drift.reference(topic(g, 128, a))
    assert not drift.observe(topic(g, 160, a)), "it fired on the first topic"
    assert drift.observe(topic(g, 24, b)), "it did not notice the change"


@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 200])
def test_streaming_in_any_pieces(chunk):
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 32, generator=g)
    reference, decoded = topic(g, 77, a, 2.0), torch.cat((topic(g, 45, a, 2.0), topic(g, 60, b, 2.0)))
    whole = AttentionDrift(patience=1)
    whole.reference(reference)
    expected = [whole.observe(decoded[i : i + 8]) for i in range(0, len(decoded), 8)]
    drift = AttentionDrift(patience=1)
    for i in range(0, len(reference), chunk):
        drift.reference(reference[i : i + chunk])
    fired = [drift.observe(decoded[i : i + chunk]) for i in range(0, len(decoded), chunk)]
    assert any(expected) and any(fired)
    if chunk == 8:
        assert fired == expected
    if chunk == 1:
        assert [any(fired[i : i + 8]) for i in range(0, len(decoded), 8)] == expected


def test_the_split_form_is_observe():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 32, generator=g)
    reference, decoded = topic(g, 64, a, 2.0), torch.cat((topic(g, 32, a, 2.0), topic(g, 32, b, 2.0)))
    one, two = AttentionDrift(), AttentionDrift()
    one.reference(reference)
    two.reference(reference)
    for i in range(0, 64, 8):
        figures = two.compare(decoded[i : i + 8].mean(0)).tolist()
        assert one.observe(decoded[i : i + 8]) == two.decide(*figures)


def test_too_few_windows_complete_the_reference_first():
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 32, generator=g)
    drift = AttentionDrift(patience=1, min_drop=0.1)
    drift.reference(topic(g, 5, a))
    assert not drift.ready
    assert not drift.observe(topic(g, 16, a))
    assert drift.ready and drift.reference_tokens == 21
    assert drift.observe(topic(g, 8, b))
    empty = AttentionDrift()
    assert not empty.observe(topic(g, 8, a))
    with pytest.raises(RuntimeError, match="no reference yet"):
        AttentionDrift().compare(torch.zeros(4))


def test_restart_absorb_and_copy():
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 32, generator=g)
    drift = AttentionDrift()
    drift.reference(topic(g, 64, a))
    twin = drift.copy()
    drift.restart([topic(g, 8, b).mean(0), topic(g, 8, b).mean(0)])
    drift.absorb(topic(g, 8, b).mean(0))
    assert drift.reference_tokens == 24 and drift.ready and twin.reference_tokens == 64
    mean = topic(g, 8, b).mean(0)
    assert drift.compare(mean)[0] > 0.5 > twin.compare(mean)[0]


def test_no_overflow_and_no_nan():
    half = (300 * torch.randn(64, 16)).half()
    assert half.abs().max() > 256
    drift = AttentionDrift()
    drift.reference(half)
    assert torch.isfinite(drift.compare(half[:8].float().mean(0))).all()
    zero = AttentionDrift()
    zero.reference(torch.zeros(32, 16))
    assert torch.isfinite(zero.compare(torch.zeros(16))).all()
    assert not zero.observe(torch.zeros(64, 16)) or zero.min_drop == 0
    assert float(cosine(torch.zeros(4), torch.ones(4))) == 0.0


def test_patience_counts_up_and_down():
    drift = AttentionDrift(patience=2, min_drop=0.1, delta=0.0)
    pattern = [True, False, True, True, True, False, True]
    fired = [drift.decide(0.0 if low else 1.0, 0.5, 0.0) for low in pattern]
    assert fired == [False, False, False, True, False, False, False]
    assert drift.similarity_threshold(0.5, 0.4) == pytest.approx(0.4)
    assert AttentionDrift(delta=0.5).similarity_threshold(0.5, 0.4) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"patience": 0}, {"window": 2.5}, {"delta": -1}, {"min_drop": float("nan")}]
)
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        AttentionDrift(**options)
