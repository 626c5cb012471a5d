"""The detector: against a naive form, on crafted changes of topic, streaming, and in its corner cases."""

from __future__ import annotations

import math

import pytest
import torch

from dartprune import Dart, Detector
from dartprune.drift import KEPT_WINDOWS, AttentionDrift, cosine
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES


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


def test_with_the_defaults_a_change_fires_within_three_windows_and_not_before():
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 256, generator=g)
        drift = AttentionDrift()
        drift.reference(topic(g, 128, a))
        before = [drift.observe(topic(g, 8, a)) for _ in range(16)]
        after = [drift.observe(topic(g, 8, b)) for _ in range(3)]
        assert not any(before), f"seed {seed} fired on the first topic"
        assert any(after), f"seed {seed} did not notice the change"


def test_one_call_fires_if_any_of_its_pieces_does():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 64, generator=g)
        reference = topic(g, 90, a, 2.0)
        decoded = torch.cat((topic(g, 21, a, 2.0), topic(g, 8 * (seed % 5), b, 2.0), topic(g, 19, a, 2.0)))
        decisions = []
        for pieces in ([len(decoded)], [1] * len(decoded), [7] * 20, [3, 30, 100], [16, 1, 1, 100]):
            drift = AttentionDrift()
            for part in reference.split(sum(pieces[:1]) + 3):
                drift.reference(part)
            fired, start = [], 0
            for size in pieces:
                fired.append(drift.observe(decoded[start : start + size]))
                start += size
            decisions.append((any(fired), drift._counter, drift.reference_tokens))
        assert len(set(decisions)) == 1, (seed, decisions)


def test_empty_pieces_change_nothing():
    g = torch.Generator().manual_seed(0)
    drift = AttentionDrift()
    drift.reference(torch.zeros(0, 16))
    assert drift.reference_tokens == 0 and not drift.observe(torch.zeros(0, 16))
    drift.reference(topic(g, 20, torch.randn(16, generator=g)))
    assert drift.reference_tokens == 20 and drift.ready


def test_only_the_last_windows_are_kept_and_nothing_behind_them():
    g = torch.Generator().manual_seed(4)
    a = torch.randn(24, generator=g)
    reference = topic(g, 8 * 100 + 5, a, 2.0)
    drift = AttentionDrift()
    drift.reference(reference)
    assert len(drift._means) == KEPT_WINDOWS and drift.reference_tokens == 805
    torch.testing.assert_close(drift._means[0], reference[8 * 68 : 8 * 69].mean(0))
    held = {mean.untyped_storage().data_ptr(): mean.untyped_storage().nbytes() for mean in drift._means}
    assert sum(held.values()) == KEPT_WINDOWS * 24 * 4, "a view keeps the whole prompt's windows alive"
    assert sum(held.values()) + 24 * 4 == drift.bytes_held(24)


def test_a_reference_does_not_change_with_its_source():
    g = torch.Generator().manual_seed(4)
    source = topic(g, 16, torch.randn(24, generator=g))
    drift = AttentionDrift()
    drift.restart([source[:8].mean(0), source[8:].mean(0)])
    mean = torch.randn(24, generator=g)
    drift.absorb(mean)
    before = drift.compare(source[3])
    mean.zero_()
    source_copy = source[3].clone()
    source.zero_()
    assert torch.equal(drift.compare(source_copy), before)


def test_leave_one_out_by_hand():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    out, within = AttentionDrift(window=2), AttentionDrift(window=2, leave_one_out=False)
    out.reference(reference)
    within.reference(reference)
    half = math.sqrt(0.5)
    assert out.compare(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([half, 0.0, 0.0], abs=1e-6)
    assert within.compare(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([half, half, 0.0], abs=1e-6)


def test_tokens_beside_the_windows_count_in_the_mean():
    drift = AttentionDrift(window=2)
    drift.reference(torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 4.0]]))
    assert len(drift._means) == 2 and drift.reference_tokens == 5
    assert drift.compare(torch.tensor([0.0, 1.0]))[0] == pytest.approx(math.sqrt(0.5))
    assert drift.compare(torch.tensor([0.0, 1.0]))[1] == pytest.approx(2 / math.sqrt(20))


def test_the_published_settings():
    drift = AttentionDrift(window=5, delta=0.1, min_drop=0.1, patience=1, leave_one_out=False)
    g = torch.Generator().manual_seed(6)
    a, b = torch.randn(2, 64, generator=g)
    drift.reference(topic(g, 50, a))
    assert not drift.observe(topic(g, 50, a)) and drift.observe(topic(g, 5, b))
    assert drift.similarity_threshold(0.9, 0.2) == pytest.approx(0.8)
    assert drift.similarity_threshold(0.9, 2.0) == pytest.approx(0.7)


def test_the_threshold_is_where_decide_turns():
    for mu, sigma in ((0.9, 0.0), (0.6, 0.2), (0.1, 1.0)):
        threshold = AttentionDrift(patience=1).similarity_threshold(mu, sigma)
        assert AttentionDrift(patience=1).decide(threshold - 1e-6, mu, sigma)
        assert not AttentionDrift(patience=1).decide(threshold + 1e-6, mu, sigma)


def test_the_counter_starts_again_after_it_fired_and_after_a_restart():
    drift = AttentionDrift(patience=2)
    assert [drift.decide(0.0, 0.9, 0.0) for _ in range(6)] == [False, True] * 3
    drift.decide(0.0, 0.9, 0.0)
    drift.restart([torch.ones(4), torch.ones(4)])
    assert not drift.decide(0.0, 0.9, 0.0)
    for _ in range(5):
        drift.decide(0.9, 0.9, 0.0)
    assert not drift.decide(0.0, 0.9, 0.0), "good windows do not pile up below zero, one bad one is one"
    assert drift.decide(0.0, 0.9, 0.0)


@pytest.mark.parametrize("tokens", [0, 3, 8, 15])
def test_fewer_than_two_windows_absorb_and_then_judge(tokens):
    g = torch.Generator().manual_seed(tokens)
    a, b = torch.randn(2, 64, generator=g)
    drift = AttentionDrift(patience=1)
    if tokens:
        drift.reference(topic(g, tokens, a))
    windows = 0
    while not drift.ready:
        # even another topic can not fire before there is a reference to leave
        assert not drift.observe(topic(g, 8, b if windows == 0 and tokens < 8 else a))
        windows += 1
    assert windows == 2 - tokens // 8
    assert drift.reference_tokens == tokens + 8 * windows
    assert drift.observe(topic(g, 8, -a))


def test_the_split_form_follows_observe_through_a_whole_life():
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 32, generator=g)
        one, two = AttentionDrift(), AttentionDrift()
        for length, direction in ((11, a), (21, a), (5, b)):
            reference = topic(g, length, direction, 2.0)
            one.reference(reference)
            two.reference(reference)
            for window in topic(g, 64, b, 2.0).split(8):
                mean = window.mean(0)
                fired = two.decide(*two.compare(mean).tolist()) if two.ready else two.absorb(mean) or False
                assert one.observe(window) == fired
        assert one.reference_tokens == two.reference_tokens and one._counter == two._counter
        torch.testing.assert_close(one.compare(a), two.compare(a))


def test_a_window_never_spans_decoded_tokens():
    drift = AttentionDrift(window=4)
    drift.reference(torch.ones(10, 2))
    drift.observe(torch.ones(4, 2))
    drift.reference(torch.full((4, 2), 2.0))
    assert drift.reference_tokens == 14
    assert torch.equal(drift._means[-1], torch.full((2,), 2.0)), "two old tokens slipped into the new window"


def test_a_copy_lives_its_own_life():
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(2, 32, generator=g)
    drift = AttentionDrift()
    drift.reference(topic(g, 64, a))
    drift.observe(topic(g, 8 + 3, b))  # a counter of one and three tokens of the next window
    twin = drift.copy()
    probe = torch.randn(32, generator=g)
    before = drift.compare(probe)
    twin.observe(topic(g, 40, b))
    twin.reference(topic(g, 64, b))
    twin.restart([b, b])
    assert torch.equal(drift.compare(probe), before)
    assert drift.observe(topic(g, 5, b)), "the second bad window fires in the first one, whatever its copy did"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    g = torch.Generator().manual_seed(8)
    a, b = 2000 * torch.randn(2, 64, generator=g)
    reference, same, other = (topic(g, n, d, 600.0).to(dtype) for n, d in ((512, a), (64, a), (24, b)))
    assert reference.abs().max() > 256 and not torch.isfinite(reference.half().square().sum())
    half, full = AttentionDrift(), AttentionDrift()
    half.reference(reference)
    full.reference(reference.float())
    assert torch.equal(half.compare(same[0]), full.compare(same[0].float()))
    assert torch.isfinite(half.compare(same[0])).all()
    assert not half.observe(same) and half.observe(other)


def test_zero_and_tiny_vectors():
    for size in (0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e18):
        v = torch.full((64,), size)
        for pair in ((v, torch.ones(64)), (torch.ones(64), v), (v, v), (v, -v)):
            assert -1 - 1e-5 <= float(cosine(*pair)) <= 1 + 1e-5, size
    assert float(cosine(torch.zeros(4), torch.zeros(4))) == 0.0
    drift = AttentionDrift(patience=1)
    drift.reference(torch.ones(64, 16))
    figures = drift.compare(torch.zeros(16))
    assert figures.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    assert drift.observe(torch.zeros(8, 16)), "silence is not the topic"
    mixed = AttentionDrift()
    mixed.reference(torch.cat((torch.zeros(32, 16), torch.ones(32, 16))))
    assert torch.isfinite(mixed.compare(torch.ones(16))).all()


def test_sigma_is_the_population_deviation():
    drift = AttentionDrift(window=1, leave_one_out=False)
    drift.reference(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    each = [2 / math.sqrt(5), 2 / math.sqrt(5), 1 / math.sqrt(5)]
    mu = sum(each) / 3
    sigma = math.sqrt(sum((value - mu) ** 2 for value in each) / 3)
    assert drift.compare(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1 / math.sqrt(5), mu, sigma], abs=1e-6)


def test_one_good_window_takes_back_one_bad_one_only():
    drift = AttentionDrift(patience=3)
    pattern = [True, True, False, True, True]
    assert [drift.decide(0.0 if low else 1.0, 0.9, 0.0) for low in pattern] == [False, False, False, False, True]


def test_a_restart_forgets_the_tokens_of_the_window_under_way():
    drift = AttentionDrift(patience=1, window=4)
    drift.reference(torch.ones(16, 2))
    drift.observe(-torch.ones(3, 2))
    drift.restart([torch.ones(2), torch.ones(2)])
    assert not drift.observe(torch.ones(3, 2)) and not drift.observe(torch.ones(1, 2))
    assert not drift.observe(-torch.ones(3, 2)) and drift.observe(-torch.ones(1, 2))


def test_a_short_prompt_opens_the_reference_with_decoded_windows():
    one, other = torch.randn(2, 16)
    prompt = one + 0.1 * torch.randn(20, 16)
    answer = other + 0.1 * torch.randn(80, 16)  # an answer is another kind of text than its question
    fired = []
    for drift in (AttentionDrift(), AttentionDrift(opening=64)):
        drift.reference(prompt)
        fired.append([t for t in range(0, 80, 8) if drift.observe(answer[t : t + 8])])
    assert fired[0][0] == 8 and not fired[1]
    # six decoded windows make the first multiple of 8 that brings 20 tokens to 64
    assert drift.reference_tokens == 20 + 48
    assert [drift.observe(-(one + other).expand(8, -1)) for _ in range(2)] == [False, True]


def test_a_long_prompt_has_its_opening_already():
    prompt, decoded = torch.randn(64, 16) + 1, torch.randn(200, 16)
    said = []
    for drift in (AttentionDrift(delta=0.5), AttentionDrift(delta=0.5, opening=64)):
        drift.reference(prompt)
        said.append([drift.observe(part) for part in decoded.split(8)])
    assert said[0] == said[1] and any(said[0])
    drift.restart([decoded[:8].mean(0), decoded[8:16].mean(0)])
    assert drift.ready and drift.reference_tokens == 16, "only the first reference has an opening"


@pytest.mark.parametrize("opening", [-1, 2.5, True])
def test_an_opening_is_a_number_of_tokens(opening):
    with pytest.raises(ValueError, match="opening must be a whole number of tokens, 0 for none"):
        AttentionDrift(opening=opening)


@torch.no_grad()
def test_dart_does_not_replay_at_the_beginning_of_an_answer():
    model = FAMILIES["llama"]()
    ids, new = tokens(model, lines=1, length=24), tokens(model, lines=1, length=48, seed=2)
    found = []
    for opening in (0, 64):
        eager = Detector(patience=1, delta=0.0, min_drop=0.0, opening=opening)
        with Dart(sparsity=0.5, detector=eager)(model) as run:
            cache = run.prefill(ids)
            with run.phase("decode"):
                model(input_ids=new, **handed(cache))
            found.append(run.report().sequences[0].similarities)
    assert found[0][0][0] == 8  # judged from the first window on
    assert found[1][0][0] == 48  # 24 + 40 tokens first
    assert Dart().detector.opening == 64
