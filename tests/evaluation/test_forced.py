"""Given tokens decoded in blocks see the masks that they would see one by one."""

from __future__ import annotations

import pytest
import torch

from dartprune import Clock, Dart, Dense, Detector, Relearn, Release, Replay, Sketch, SketchDart, Static
from dartprune.evaluation.arms import arm, arm_names
from dartprune.evaluation.forced import forced_losses, forced_steps
from test_matrix import tokens
from tiny import FAMILIES

FAST = {"detector": Detector(window=4, delta=0.0, min_drop=0.0, patience=1)}
METHODS = {
    "fires-often": Dart(sparsity=0.5, refresh=Replay(tokens=8, settle=16), **FAST),
    "relearn": Dart(sparsity=0.5, refresh=Relearn(tokens=7), **FAST),
    "release": Static(sparsity=0.5, refresh=Release(at=13)),
    "released-by-the-detector": Static(sparsity=0.5, refresh=Release(), **FAST),
    "sketch-replay": SketchDart(sparsity=0.4, token=Sketch(bits=2), refresh=Replay(tokens=8), **FAST),
    "clock": Clock(sparsity=0.5),
    "late-start": Static(sparsity=0.5, start=5),
}


def both_ways(pruner, prompt=20, length=90, family="llama"):
    model = FAMILIES[family]()
    text = tokens(model, lines=2, length=length, seed=4)
    return [forced_losses(model, pruner, text, prompt, block=block, backend="masked") for block in (1, None)]


def agree(pruner, *, exactly=True, **options):
    (losses, report), (by_block, other) = both_ways(pruner, **options)
    if exactly:
        torch.testing.assert_close(by_block, losses, rtol=1e-3, atol=1e-3)
    assert float(by_block.mean()) == pytest.approx(float(losses.mean()), abs=0.01)
    assert [(e.kind, e.sequence, e.decoded) for e in other.events] == [
        (e.kind, e.sequence, e.decoded) for e in report.events
    ]
    assert (other.dense_tokens, other.pruned_tokens) == (report.dense_tokens, report.pruned_tokens)
    assert other.realised_sparsity == pytest.approx(report.realised_sparsity, abs=1e-5)
    return report


@pytest.mark.parametrize("name", sorted(name for name in arm_names() if not name.startswith("calibrated")))
def test_every_arm(name):
    numbered = f"{name}@9" if name.partition("@")[2] else name
    agree(arm(numbered.replace("@N@9", "@9")).build(0.5), exactly=name != "sketch-dart")  # see below


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_event(name):
    # an input that lies between two 8-bit floats of the ring may fall to either side, and another neuron be chosen
    report = agree(METHODS[name], exactly=name != "sketch-replay")
    assert report.events or name == "late-start"


def test_a_short_prompt():
    assert agree(Dart(sparsity=0.5), prompt=4).dense_tokens == 2 * 6


def test_how_long_the_blocks_are():
    model = FAMILIES["llama"]()
    text = tokens(model, lines=1, length=80, seed=4)
    sizes = {}
    for name, pruner in {
        "dense": Dense(),
        "static": Static(sparsity=0.5),
        "window": Dart(sparsity=0.5, detector=Detector(window=8, opening=0)),
        "clock": Clock(sparsity=0.5),
    }.items():
        with pruner(model, backend="masked") as run:
            sizes[name] = [logits.shape[1] for _, logits in forced_steps(model, run, text, 20, block=None)]
        assert sum(sizes[name]) == 60
    assert sizes["dense"] == sizes["static"] == [60]
    assert sizes["window"] == [8] * 7 + [4]
    assert sizes["clock"] == [8, 16, 4, 16, 4, 12]
