"""Whole decode steps: complete rows, refreshes at the rate asked for, limits by hand, graphs that change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dartprune import Dart, Dense, Detector, Griffin, Relearn, Release, Sketch, SketchDart, Static
from dartprune.bench.costs import Shape
from dartprune.bench.decode import Load, check, measure, paced
from dartprune.bench.graphs import GraphedForward, check_graphs
from dartprune.bench.limits import amdahl, cache_bytes_per_token, step_bytes
from dartprune.bench.models import prompts
from dartprune.bench.pace import Paced
from dartprune.bench.stepping import read, steps
from dartprune.model.families import describe

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rows(family, tiny_subject, stream, finite):
    pruners = paced({"static": Static(sparsity=0.5), "dart": Dart(sparsity=0.5)}, 4)
    heard = []
    load = Load(batch=2, prompt=16, new=8)
    subject = tiny_subject(family)
    result = measure(subject, pruners, load, turns=2, backend="reference", stream=stream, progress=heard.append)
    dense, static, dart = result.rows
    assert [row.arm for row in result.rows] == ["dense", "static", "dart, replay every 4"] and heard
    finite(result.rows)
    assert dense.limit is None and dense.times_as_fast.median == 1
    for row in (static, dart):
        assert row.extra["realised_sparsity"] == pytest.approx(0.5, abs=0.02)
        assert row.limit == amdahl(row.extra["ffn_share_of_dense_step"], row.extra["realised_sparsity"])
        assert row.extra["tokens_per_second"] == pytest.approx(2 / row.seconds.median)
    assert static.extra["refreshes_per_sequence"] == 0
    assert dart.extra["refreshes_per_sequence"] == 2  # in 1 + 8 tokens
    shape = Shape.of(subject.model)
    heads = 16 if family == "llama" else 32  # width of all heads of keys; half of the tiny llama's are shared
    cache = 2 * 3 * 2 * heads * 4 * (16 + 8 // 2)  # sequences, layers, keys and values, width, bytes, tokens midway
    assert dense.bytes_moved == shape.step_bytes + cache
    assert static.bytes_moved == step_bytes(shape, static.extra["bytes_saved"], dense.bytes_moved - shape.step_bytes)
    assert result.settings["methods"]["static"]["preset"] == "static"
    assert any("fit into the last cache" in note for note in result.notes)


def test_a_pace_is_kept_exactly(tiny_subject):
    model = tiny_subject().model
    pruner = paced({"dart": Dart(sparsity=0.5, detector=Detector(window=4))}, 5)["dart, replay every 5"]
    with torch.no_grad(), pruner(model, backend="masked") as run:
        steps(model, read(model, prompts(model, 2, 20), run), 21, run)
        events = run.report().events
        similarities = run.report().sequences[0].similarities
    assert [(e.kind, e.decoded) for e in events if e.sequence == 0] == [("replay", n) for n in (5, 10, 15, 20)]
    assert similarities  # the detector has done its work
    assert list(paced({"static": Static(), "dart": Dart()}, 5)) == ["static", "dart, replay every 5"]
    with pytest.raises(ValueError, match="none of static replays"):
        paced({"static": Static()}, 5)
    assert paced({"dart": Dart()}, None) == {"dart": Dart()}
    with pytest.raises(ValueError, match="Paced: every must be a whole number of at least 1, got 0"):
        Paced(every=0)


def test_bytes_of_a_step_by_hand(tiny_subject):
    model = tiny_subject("llama").model
    shape = Shape.of(model)
    assert shape.ffn_bytes == 3 * 3 * 72 * 32 * 4
    assert step_bytes(shape, 0.5, 1000) == shape.step_bytes - shape.ffn_bytes // 2 + 1000
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
            read(model, prompts(model, 3, 10), None, cache)
            assert cache_bytes_per_token(cache) == 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes


@pytest.mark.parametrize(
    ("pruners", "load", "message"),
    [
        ({"dense": Dense()}, Load(), "an arm has that name"),
        ({"dart": Dart(refresh=Paced(every=33))}, Load(new=32), "no refresh would come within 32"),
        ({"static": Static()}, Load(prompt=8), "makes no mask: 9 are needed"),
        ({"static": Static()}, Load(graphs=True), "--graphs needs CUDA, the device is cpu"),
    ],
)
def test_mistakes(pruners, load, message):
    with pytest.raises(ValueError, match=message):
        check(pruners, load, CPU)


def test_a_load_is_checked():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        Load(batch=0)
    with pytest.raises(ValueError, match="more than the model's context"):
        measure_too_long()


def measure_too_long():
    from dartprune.bench.models import Subject
    from tiny import FAMILIES

    measure(Subject(FAMILIES["llama"](), "x", "float32", 3, 3, []), {"static": Static()}, Load(prompt=200, new=60))


@pytest.mark.parametrize("refresh", [Relearn(), Release(at=5)])
def test_graphs_hold_no_method_that_goes_back_to_dense(refresh):
    with pytest.raises(ValueError, match="returns to dense steps"):
        check_graphs(torch.device("cuda"), {"x": refresh})
    check_graphs(
        torch.device("cuda"), {"static": Static().refresh, "griffin": Griffin().refresh, "dart": Dart().refresh}
    )


class Recorded:
    """Stands in for a CUDA graph: what is replayed happens on the device, and hands nothing to the run."""

    def __init__(self, model, cache):
        self.cache, self.replays, self.run, self.inputs = cache, 0, None, []
        self.attention = describe(model).layers[-1].attention_output

    def __call__(self, work):
        self.attention.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0]))
        result = work()
        fixed = self.inputs.pop()
        for layer in self.cache.layers:  # a capture executes nothing: the token is not in the cache yet
            layer.cumulative_length.sub_(1)
        selectors = [layer.selector for layer in self.run.layers if layer.selector] if self.run is not None else []
        counts = [dict(selector._gathered) for selector in selectors]

        def replay():
            self.replays += 1
            result.logits.copy_(work().logits)
            fixed.copy_(self.inputs.pop())  # a graph fills the same memory
            if self.run is not None:
                for layer in self.run.layers:
                    layer.state.attention = None
            for selector, graphs_own in zip(selectors, counts, strict=True):
                for rows, held in graphs_own.items():
                    for mine, new in zip(held, selector._gathered[rows], strict=True):
                        mine.copy_(new)
                selector._gathered, selector._asked = dict(graphs_own), False

        return replay, result


@pytest.mark.parametrize(
    "pruner",
    [
        None,
        Static(sparsity=0.5),
        Dart(sparsity=0.5, detector=Detector(window=4)),
        SketchDart(sparsity=0.4, token=Sketch(bits=1)),
    ],
)
def test_a_graph_around_the_step_changes_nothing(tiny_subject, pruner):
    model = tiny_subject().model
    if pruner is not None and pruner.refresh.replay_tokens:
        pruner = replace(pruner, refresh=Paced(tokens=8, every=6))
    tokens = prompts(model, 2, 16)

    def decode(graphed):
        cache = StaticCache(config=model.config, max_cache_len=48)
        recorded = Recorded(model, cache)
        forward = GraphedForward(model, recorded) if graphed else None
        try:
            if pruner is None:
                logits = _decoded(model, tokens, cache, None)
                return logits, None, recorded.replays
            with pruner(model, backend="reference") as run:
                recorded.run = run
                logits = _decoded(model, tokens, cache, run)
                return logits, run.report(), recorded.replays
        finally:
            if forward is not None:
                forward.remove()

    with torch.no_grad():
        plain, graphed = decode(False), decode(True)
    assert torch.equal(plain[0], graphed[0]) and graphed[2] == 20 and plain[2] == 0
    assert "forward" not in model.__dict__
    if pruner is not None:
        assert [e.decoded for e in plain[1].events] == [e.decoded for e in graphed[1].events]
        assert plain[1].sequences == graphed[1].sequences
        assert plain[1].pruned_tokens == 40


def _decoded(model, tokens, cache, run):
    output = read(model, tokens, run, cache)
    out = []
    for _ in range(20):
        output = steps(model, output, 1, run)
        out.append(output.logits.clone())
    return torch.cat(out, dim=1)
