"""What each refresh policy does to a live sequence, and that events change all layers at one token boundary."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dartprune import Clock, Dart, Detector, Never, Pruner, Relearn, Release, Replay, Static
from dartprune.drift import AttentionDrift
from dartprune.model.caches import handed
from dartprune.refresh import Action, Periodic, Refresh, refresh_kinds
from test_matrix import tokens
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


@pytest.fixture
def fires_once(monkeypatch):
    """Every detector fires at its third judged window, and never again in that run."""
    seen = []

    def decide(self, cosine, mu, sigma):
        seen.append(cosine)
        return len(seen) == 3

    monkeypatch.setattr(AttentionDrift, "decide", decide)
    return seen


def decode(model, pruner, steps, *, prompt=24, each=None, backend="masked"):
    """Decode given tokens one by one; `each(run, slot, t)` looks at the run after every token."""
    ids, new = tokens(model, lines=1, length=prompt), tokens(model, lines=1, length=steps, seed=4)
    with torch.no_grad(), pruner(model, backend=backend) as run:
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        slot = run.slots_of(cache)[0]
        for t in range(steps):
            with run.phase("decode"):
                model(input_ids=new[:, t : t + 1], **handed(cache))
            if each is not None:
                each(run, slot, t)
        return run.report()


FAST = Detector(window=4)


def test_replay_has_no_dense_token_and_prunes_every_layer(llama, fires_once):
    kept = []

    def look(run, slot, t):
        kept.append([None if k is None else k.tolist() for k in run.selection(slot)])

    report = decode(llama, Dart(sparsity=0.6, detector=FAST, refresh=Replay(tokens=8, settle=20)), 40, each=look)
    assert report.dense_tokens == 0 and report.pruned_tokens == 40
    assert [(e.kind, e.decoded, e.position) for e in report.events] == [
        ("replay", 12, 36),
        (
            "settle",
            24,
            48,
        ),  # the new reference starts with the buffer's 8 tokens and grows by three windows of 4
    ]
    assert all(e.changed > 0 for e in report.events)
    keep = report.sequences[0].keep
    for t, layers in enumerate(kept):
        assert [len(k) for k in layers] == keep, f"after token {t} a layer is not at its budget"
    changes = [t for t in range(1, 40) if kept[t] != kept[t - 1]]
    assert changes == [11, 23], "masks change at events only, all layers at the same token"
    assert report.realised_sparsity == pytest.approx(0.6, abs=0.02)
    assert report.refresh_flops > 0


def test_relearn_runs_dense_then_rebuilds(llama, fires_once):
    states = []

    def look(run, slot, t):
        states.append([k is None for k in run.selection(slot)])

    report = decode(llama, Dart(sparsity=0.6, detector=FAST, refresh=Relearn(tokens=6)), 40, each=look)
    assert report.dense_tokens == 6 and report.pruned_tokens == 34
    assert [(e.kind, e.decoded) for e in report.events] == [("relearn", 12)]
    assert report.events[0].changed > 0
    for t, dense in enumerate(states):
        assert len(set(dense)) == 1, f"after token {t} some layers are pruned and some are not"
        assert dense[0] == (11 <= t < 18), t
    assert report.sequences[0].traced_tokens == 6
    assert report.realised_sparsity == pytest.approx(0.6 * 34 / 40, abs=0.02)


def test_release_at_a_token_and_at_an_event(llama, fires_once):
    report = decode(llama, Dart(sparsity=0.6, refresh=Release(at=10)), 30)
    assert (report.pruned_tokens, report.dense_tokens) == (10, 20)
    assert [(e.kind, e.decoded) for e in report.events] == [("release", 10)]
    report = decode(llama, Dart(sparsity=0.6, detector=FAST, refresh=Release()), 30)
    assert (report.pruned_tokens, report.dense_tokens) == (12, 18)


def test_the_clock_takes_turns(llama):
    report = decode(llama, Clock(sparsity=0.5), 8 + 3 * 20)
    assert report.dense_tokens == 8 + 3 * 4 and report.pruned_tokens == 3 * 16
    assert [e.decoded for e in report.events] == [24, 44, 64]
    report = decode(llama, Dart(sparsity=0.5, refresh=Periodic(every=10, dense=None, replay=8)), 35)
    assert report.dense_tokens == 0
    assert [(e.kind, e.decoded) for e in report.events] == [("replay", 10), ("replay", 20), ("replay", 30)]


def test_a_replay_comes_at_an_event_or_when_the_masks_are_old(llama, fires_once):
    references = []
    report = decode(
        llama,
        Dart(sparsity=0.6, detector=FAST, refresh=Replay(tokens=8, settle=0, every=10)),
        40,
        each=lambda run, slot, t: references.append(run._pool.live[slot].detection.drift.reference_tokens),
    )
    assert report.dense_tokens == 0
    # the event at 12 starts the ten tokens anew, and the reference with them; without an event it goes on
    assert [(e.kind, e.decoded) for e in report.events] == [("replay", d) for d in (10, 12, 22, 32)]
    assert [e.similarity is not None for e in report.events] == [False, True, False, False]
    assert references[9] == references[8] == 24 and references[11] < 24
    assert all(late >= early for early, late in pairwise(references[11:]))


def test_never_keeps_the_mask_of_the_prompt(llama, fires_once):
    kept = []
    decode(
        llama,
        Static(sparsity=0.5),
        30,
        each=lambda run, slot, t: kept.append([k.tolist() for k in run.selection(slot)]),
    )
    assert all(k == kept[0] for k in kept)
    assert not fires_once, "the detector must not run where nothing listens"


def test_replayed_masks_come_from_the_last_tokens(llama):
    """Memory 0: after a replay the masks are those of the last inputs alone."""
    pruner = Dart(sparsity=0.5, refresh=Periodic(every=8, dense=None, replay=8, memory=0.0), compensate=None)
    ids, new = tokens(llama, lines=1, length=24), tokens(llama, lines=1, length=8, seed=4)
    inputs = {}
    with torch.no_grad(), pruner(llama, backend="masked") as run:
        layers = run.layers
        with run.phase("prefill"):
            cache = llama(input_ids=ids, use_cache=True).past_key_values
        handles = [
            layer.parts.down.register_forward_pre_hook(
                lambda module, args, i=i: inputs.setdefault(i, []).append(args[0].detach().clone())
            )
            for i, layer in enumerate(layers)
        ]
        with run.phase("decode"):
            for t in range(8):
                llama(input_ids=new[:, t : t + 1], **handed(cache))
        for handle in handles:
            handle.remove()
        slot = run.slots_of(cache)[0]
        for i in range(len(layers)):
            # the hook sees `a` before the mask, computed from the same inputs as the replay's
            a = torch.cat(inputs[i][:8], dim=1)[0]
            energy, kept = a.square().sum(0), run.selection(slot)[i].long()
            dropped = torch.ones_like(energy).index_fill(0, kept, 0.0).bool()
            # buffered inputs are rounded to eight bits, so that nearly equal neurons may change places
            assert len(kept) == run.report().sequences[0].keep[i] < len(energy)
            assert float(energy[kept].min()) > 0.9 * float(energy[dropped].max()), i


def test_callbacks_see_events(llama, fires_once):
    seen = []
    ids, new = tokens(llama, lines=1, length=24), tokens(llama, lines=1, length=20, seed=4)
    with torch.no_grad(), Dart(detector=FAST, refresh=Replay(tokens=8))(llama) as run:
        run.on_event(seen.append)
        with run.phase("prefill"):
            cache = llama(input_ids=ids, use_cache=True).past_key_values
        with run.phase("decode"):
            for t in range(20):
                llama(input_ids=new[:, t : t + 1], **handed(cache))
        assert [(e.kind, e.decoded) for e in seen] == [("replay", 12)]
        assert seen[0].changed == run.report().events[0].changed
        assert seen[0].similarity is not None and seen[0].threshold is not None


def test_one_sequence_of_a_batch_can_relearn_alone(llama, monkeypatch):
    """While one line runs dense, its neighbour stays pruned with its own masks."""
    ids, new = tokens(llama, lines=2, length=24), tokens(llama, lines=2, length=24, seed=4)
    monkeypatch.setattr(AttentionDrift, "decide", lambda self, *figures: getattr(self, "doomed", False))
    pruner = Dart(sparsity=0.5, detector=FAST, refresh=Relearn(tokens=6))
    build, built = Detector.build, []

    def of_each_line(settings):
        built.append(build(settings))
        built[-1].doomed = len(built) == 2
        return built[-1]

    with torch.no_grad(), pruner(llama, backend="reference") as run:
        monkeypatch.setattr(Detector, "build", of_each_line)
        with run.phase("prefill"):
            cache = llama(input_ids=ids, use_cache=True).past_key_values
        slots = run.slots_of(cache)
        with run.phase("decode"):
            for t in range(8):
                llama(input_ids=new[:, t : t + 1], **handed(cache))
        assert run.selection(slots[1]) == [None] * 3
        assert all(kept is not None for kept in run.selection(slots[0]))
        report = run.report()
    assert [s.dense_tokens for s in report.sequences] == [0, 4]
    assert [s.pruned_tokens for s in report.sequences] == [8, 4]


def test_a_new_policy_is_one_class():
    class Sometimes(Refresh):
        kind = "sometimes"

        def due(self, decoded, since_mask, fired):
            return Action.RELEASE if decoded == 5 else None

    assert "sometimes" not in refresh_kinds.names()
    report = decode(FAMILIES["llama"](), Pruner(sparsity=0.5, refresh=Sometimes()), 10)
    assert report.pruned_tokens == 5 and report.dense_tokens == 5


@torch.no_grad()
def test_a_replay_of_a_batch_reads_the_weights_once(llama):
    saved = []
    pruner = Dart(sparsity=0.5, refresh=Periodic(every=8, dense=None, replay=8))
    for every in (pruner, Static(sparsity=0.5)):
        with every(llama, backend="reference") as run:
            with run.phase("prefill"):
                cache = llama(input_ids=tokens(llama, lines=2, length=24), use_cache=True).past_key_values
            with run.phase("decode"):
                for token in tokens(llama, lines=2, length=8, seed=4).T:
                    llama(input_ids=token[:, None], **handed(cache))
            saved.append((run.report().bytes_saved, len(run.report().events)))
    assert [events for _, events in saved] == [2, 0]
    # both lines replayed together: gate and up, two thirds of the FFN, once in eight steps
    assert saved[1][0] - saved[0][0] == pytest.approx(2 / 3 / 8, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replay(tokens=0), "tokens must be a whole number of at least 1, got 0"),
        (lambda: Replay(memory=1.0), r"memory must lie in \[0, 1\), got 1.0"),
        (lambda: Replay(settle=-1), "settle"),
        (lambda: Replay(every=0), "every must be a whole number of at least 1, got 0"),
        (lambda: Relearn(tokens=2.5), "got 2.5"),
        (lambda: Release(at=0), "at must be"),
        (lambda: Periodic(dense=4, replay=8), "either dense or replay"),
        (lambda: Periodic(dense=None), "either dense or replay"),
        (lambda: Dart(refresh=Replay(tokens=12)), "no multiple of the detector's window of 8"),
        (lambda: Dart(refresh="replay"), "refresh must be a Refresh"),
        (lambda: Never().due, None),
    ],
)
def test_settings_that_make_no_sense(make, message):
    if message is None:
        assert make()(10, 10, True) is None
        return
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_saved_clock_of_before_is_read():
    """The policy was called `Clock` once; its kind is still `clock`."""
    data = Clock(sparsity=0.5).to_dict()
    assert data["refresh"]["kind"] == "clock"
    assert Pruner.from_dict(data).refresh == Periodic() == refresh_kinds.get("clock")()
