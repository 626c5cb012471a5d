"""One arm beside the dense model: the same losses as forced decoding gives, and nothing that grows with the text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dartprune import Dense
from dartprune.drift import AttentionDrift
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.study.detector import first_events
from dartprune.evaluation.study.layout import CHOOSE, chooser
from dartprune.evaluation.study.lockstep import run_unit
from dartprune.evaluation.study.neurons import own_neurons
from dartprune.evaluation.study.observe import points_of
from dartprune.evaluation.study.settings import Settings
from oracle import assert_untouched, snapshot
from small_study import SETTINGS, Tokenizer, arms, model, texts

POINTS = (("first", "last"), ("attention", "residual"))


def unit(tiny, arm, group, settings=SETTINGS, **options):
    prompts = [text.prompt for text in group]
    choose = chooser(group, settings, Tokenizer.eos_token_id)
    other = [[abs(token) for token in text.script[settings.before :]] for text in group]
    own = [own_neurons(tiny, prompts, 0.5), own_neurons(tiny, other, 0.5)]
    return run_unit(tiny, arm, prompts, choose, settings, points_of(tiny, *POINTS), own, **options)


@pytest.mark.parametrize("arm", arms(), ids=lambda arm: arm.name)
@pytest.mark.parametrize("backend", ["masked", "reference"])
def test_losses_are_those_of_forced_decoding(arm, backend):
    tiny, group = model(), texts(3)["change"]
    before = snapshot(tiny)
    found = unit(tiny, arm, group, backend=backend)
    tokens = torch.tensor([text.prompt + text.script for text in group])
    losses, report = forced_losses(tiny, arm.pruner, tokens, SETTINGS.prompt, backend=backend)
    assert torch.allclose(torch.from_numpy(found.arrays["loss"]).T, losses, atol=1e-5)
    dense, _ = forced_losses(tiny, Dense(), tokens, SETTINGS.prompt)
    assert torch.allclose(torch.from_numpy(found.arrays["dense_loss"]).T, dense, atol=1e-5)
    assert found.realised_sparsity == [s.realised_sparsity for s in report.sequences]
    assert [[e["decoded"] for e in text] for text in found.events] == [
        [e.decoded for e in s.events] for s in report.sequences
    ]
    assert_untouched(tiny, before)


def test_shapes_and_the_dense_arm():
    tiny, group = model(), texts(3)["change"]
    dense = unit(tiny, arms()[0], group)
    s = SETTINGS
    assert {name: array.shape for name, array in dense.arrays.items()} == {
        "tokens": (s.steps, 4, 8, 2),
        "windows": (s.windows, 4, 9, 3),
        "loss": (s.steps, 3),
        "dense_loss": (s.steps, 3),
        "text": (s.steps, 3),
        "judged": (s.steps // 8, 3, 3),
        "overlap": (s.windows, 2, 3, 3),
    }
    assert np.array_equal(dense.arrays["loss"], dense.arrays["dense_loss"])
    assert np.allclose(dense.arrays["windows"][:, :, 4], 1, atol=1e-5), "cosine with itself"
    assert np.all(dense.arrays["overlap"] == 1) and dense.neurons == []
    assert dense.arrays["text"].T.tolist() == [list(text.script) for text in group]


def test_what_a_release_does():
    tiny, group = model(), texts(2)["change"]
    static, released = (unit(tiny, arm, group) for arm in arms()[1:3])
    assert np.array_equal(static.arrays["loss"][:24], released.arrays["loss"][:24])
    assert not np.allclose(static.arrays["loss"][24:], released.arrays["loss"][24:])
    assert [(row["kind"], row["decoded"]) for row in released.neurons] == [("release", 24)] * 2
    for row in released.neurons:
        assert all(dropped == 0 for dropped in row["dropped"])
    # what is kept is recorded at a window's end, so the window that ends with the release shows it
    assert np.all(released.arrays["overlap"][2:] == 1) and np.all(static.arrays["overlap"][:, 0] == 1)
    assert np.all(static.arrays["overlap"][:, 1].mean(1) < 1)
    assert np.array_equal(static.arrays["overlap"][:2], released.arrays["overlap"][:2])


def test_the_first_event_is_the_one_the_replay_of_thresholds_tells():
    tiny, group = model(), texts(6)["change"]
    static, dart = unit(tiny, arms()[1], group), unit(tiny, arms()[3], group)
    found = first_events(static.arrays["judged"], dart_detector := arms()[3].pruner.detector.build())
    real = [next((e["decoded"] for e in text if e["similarity"] is not None), None) for text in dart.events]
    assert isinstance(dart_detector, AttentionDrift)
    assert found == real and any(at is not None for at in real)


@pytest.mark.parametrize("arm", arms(), ids=lambda arm: arm.name)
def test_texts_of_several_lengths_are_each_what_they_are_alone(arm):
    tiny, group = model(), texts(3)["change"]
    # prompts of 16, 11 and 6 tokens; the model writes all but a bridge of four
    script = [CHOOSE] * SETTINGS.steps
    script[SETTINGS.before - 1 : SETTINGS.before + 3] = [70, 80, 90, 100]
    group = [replace(text, prompt=text.prompt[5 * n :], script=tuple(script)) for n, text in enumerate(group)]
    together = unit(tiny, arm, group)
    alone = [unit(tiny, arm, [text]) for text in group]
    assert together.arrays["text"].shape[1] == 3
    for name in ("text", "loss", "dense_loss", "windows", "judged", "overlap"):
        single = np.concatenate([part.arrays[name] for part in alone], axis=-1)
        assert np.allclose(together.arrays[name], single, atol=1e-4, equal_nan=True), name
    assert together.realised_sparsity == [part.realised_sparsity[0] for part in alone]
    assert [[(e["kind"], e["decoded"]) for e in text] for text in together.events] == [
        [(e["kind"], e["decoded"]) for e in part.events[0]] for part in alone
    ]
    assert arm.name != "dart" or any(together.events)


def test_what_is_held_does_not_grow_with_the_text():
    tiny = model()
    held = {}
    for after in (16, 96):
        settings = Settings(**{**vars(SETTINGS), "after": after})
        group = texts(2, settings)["change"]
        held[after] = [unit(tiny, arm, group, settings).held for arm in arms()]
    assert held[16] == held[96]


def test_hooks_and_run_are_gone_after_a_failure():
    tiny, group = model(), texts(2)["change"]
    before = snapshot(tiny)
    steps = []

    def stop(n):
        steps.append(n)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unit(tiny, arms()[3], group, progress=stop)
    assert_untouched(tiny, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())
    unit(tiny, arms()[3], group)
