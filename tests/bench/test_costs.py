"""What is claimed for 8 B parameters by arithmetic, and the arithmetic against models that are really run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dartprune import Dart, Detector, GatedDart, Griffin, Never, Replay, Sketch, SketchDart, Static, quantise
from dartprune.bench.costs import LLAMA_3_1_8B, Shape, memory_per_sequence, overhead_flops_per_token, replay_flops
from dartprune.loading import load
from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.model.packed import Packed
from dartprune.model.sizes import count
from test_matrix import tokens
from tiny import FAMILIES


def test_under_ten_megabytes_for_eight_billion_parameters():
    assert LLAMA_3_1_8B.parameters == pytest.approx(8.03e9, rel=0.01)
    assert memory_per_sequence(LLAMA_3_1_8B, Dart()) < 10e6
    assert memory_per_sequence(LLAMA_3_1_8B, Dart(), masks=True) < 10e6
    assert memory_per_sequence(LLAMA_3_1_8B, SketchDart()) < 10e6
    assert memory_per_sequence(LLAMA_3_1_8B, Static()) < memory_per_sequence(LLAMA_3_1_8B, Dart())


PRUNERS = [
    Dart(),
    Static(),
    Griffin(),
    Dart(compensate="mean"),
    Dart(selection="threshold"),
    GatedDart(),
    SketchDart(sparsity=0.4),
    SketchDart(sparsity=0.4, refresh=Never()),
    SketchDart(sparsity=0.4, token=Sketch(calibrate=False)),
    SketchDart(sparsity=0.4, compensate=None),
]


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memory_by_arithmetic_is_what_is_held(family, backend, pruner):
    model = FAMILIES[family]()
    with pruner(model, backend=backend) as run:
        model.generate(tokens(model), max_new_tokens=4)
        report = run.report()
    want = memory_per_sequence(Shape.of(model), pruner, masks=backend == "masked")
    assert report.overhead_bytes_per_sequence == want
    assert report.overhead_bytes == 2 * want + report.overhead_bytes_per_model


def test_a_tenth_of_a_percent_of_arithmetic():
    share = overhead_flops_per_token(LLAMA_3_1_8B, Dart(), prompt=512, decoded=256) / LLAMA_3_1_8B.step_flops
    assert share < 1e-3
    # a replay takes fewer operations than the FFNs of two dense steps would need for as many tokens as it replays
    assert replay_flops(LLAMA_3_1_8B, Dart()) < 16 * LLAMA_3_1_8B.step_flops


def test_replay_operations_are_counted():
    model = FAMILIES["llama"]()
    eager = Detector(window=4, patience=1, min_drop=0.0, delta=0.0)
    pruner = Dart(sparsity=0.5, detector=eager, refresh=Replay(tokens=8))
    with torch.no_grad(), pruner(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=tokens(model, lines=1), use_cache=True).past_key_values
        with run.phase("decode"):
            model(input_ids=tokens(model, lines=1, length=30, seed=3), **handed(cache))
        report = run.report()
        replays = sum(event.kind in ("replay", "settle") for event in report.events)
        assert replays > 0 and report.refresh_flops == replays * replay_flops(Shape.of(model), pruner)


def test_shapes_of_models(demo_config):
    model, _ = load()
    shape = Shape.of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    ffn = demo_config["num_hidden_layers"] * demo_config["intermediate_size"] * demo_config["hidden_size"]
    assert shape.ffn_parameters == 3 * ffn and shape.ffn_weight_bytes == shape.outside_weight_bytes == 2
    assert shape.ffn_bytes / shape.step_bytes == pytest.approx(
        2 * shape.ffn_parameters / (2 * shape.parameters), rel=0.01
    )
    gpt2 = Shape.of(FAMILIES["gpt2"]())
    assert gpt2.matrices == 2 and gpt2.neurons == 128


@pytest.mark.parametrize(("family", "bits", "whole"), [("llama", 4, True), ("gpt2", 8, True), ("phi3", 4, False)])
def test_shapes_of_quantised_models(family, bits, whole):
    pytest.importorskip("numba")
    model = FAMILIES[family]()
    plain = Shape.of(model)
    packed = quantise(model, bits, whole=whole)
    shape = Shape.of(model)
    sizes = {"ffn_weight_bytes": 0, "outside_weight_bytes": 0}
    assert replace(shape, **sizes) == replace(plain, **sizes)  # as many weights
    ffn = sum(layer.weight_bytes for layer in describe(model).layers)
    assert shape.ffn_bytes == ffn != plain.ffn_bytes
    unread = count(model.get_input_embeddings())[1] if shape.other_parameters else 0
    tables = [t for part in model.modules() if not isinstance(part, Packed) for t in part.buffers(recurse=False)]
    assert shape.step_bytes == pytest.approx(packed.bytes - unread - sum(t.nbytes for t in tables), rel=1e-3)
