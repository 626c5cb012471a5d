"""Refresh, trace and memory: complete rows, the right arms, and clear errors."""

from __future__ import annotations

import gc

import pytest
import torch

from dartprune import Clock, Dart, Dense, Detector, Static
from dartprune.bench import memory, refresh, trace
from dartprune.bench.costs import Shape, memory_per_sequence
from dartprune.bench.memory import HeldBytes
from dartprune.bench.refresh import STEPS, ReplayTimer, part_of
from dartprune.bench.trace import ARMS, LazyRun


def test_a_replay_in_dense_steps_and_in_parts(tiny_subject, stream, finite):
    subject = tiny_subject()
    result = refresh.measure(subject, Dart(), prompt=20, batch=2, turns=2, backend="reference", stream=stream)
    assert [row.arm for row in result.rows] == ["dense step", "replay", "attach", "detach"]
    finite(result.rows)
    dense, replay = result.rows[:2]
    assert replay.extra["dense_steps"] == pytest.approx(replay.seconds.median / dense.seconds.median)
    assert replay.bytes_moved == 2 * 3 * 72 * 32 * 4  # gate and up of three layers in float32
    parts = replay.extra["parts"]
    assert set(parts) == {"products", "selection", "statistics and lists"} and min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(replay.seconds.median)


def test_the_timer_sees_every_replay_of_a_batch_once(tiny_subject):
    from dartprune.bench.models import prompts
    from dartprune.bench.pace import Paced
    from dartprune.bench.stepping import read, steps

    model = tiny_subject().model
    timer = ReplayTimer(model)
    with torch.no_grad(), Dart(refresh=Paced(every=2))(model, backend="reference") as run:
        run.on_event(timer.event)
        steps(model, read(model, prompts(model, 3, 20), run), 2 * STEPS, run)
    assert len(timer.seconds) == STEPS and len(run.report().events) == 3 * STEPS
    timer.remove()
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("dartprune::replay", "products"),
        ("aten::topk", "selection"),
        ("aten::add_", "statistics and lists"),
        ("cudaLaunchKernel", "statistics and lists"),
    ],
)
def test_parts(operator, part):
    assert part_of(operator) == part


def test_trace_compares_three_ways_of_reading(tiny_subject, finite):
    result = trace.measure(tiny_subject(), Dart(), (12, 20), turns=3, backend="cpu")
    assert [row.arm for row in result.rows] == [*ARMS, *ARMS]
    finite(result.rows)
    plain, _, traced = result.rows[:3]
    assert plain.extra == {"overhead": 0.0}
    assert traced.extra["overhead"] == pytest.approx(traced.seconds.median / plain.seconds.median - 1)
    assert traced.extra["overhead_of_tracing_as_reported"] > 0 and "overhead_of_tracing" in traced.extra


def test_a_lazy_run_attaches_only_when_asked(tiny_subject):
    model = tiny_subject().model
    held = LazyRun(model, Static(), "cpu")
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.is_contiguous()
    run = held.on()
    assert held.on() is run and not down.is_contiguous()  # laid out by rows
    held.off()
    held.off()
    assert down.is_contiguous() and held.on() is not run
    held.off()


def test_memory_counts_what_sequences_hold(tiny_subject, monkeypatch):
    """Resident bytes come in pages, which tiny tensors do not fill: tensors themselves are counted here."""
    # as many as fill all windows that the detector keeps
    detector = Detector(window=4)
    pruners = {"static": Static(detector=detector), "dart": Dart(detector=detector)}
    subject = tiny_subject()
    gc.freeze()  # only what comes from here on is looked through

    def tensors():
        gc.collect()
        seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _real(t)}
        return sum(seen.values())

    monkeypatch.setattr(memory, "resident_bytes", tensors)
    try:
        result = memory.measure(subject, pruners, batch=2, prompt=140, new=5, turns=1, backend="reference")
    finally:
        gc.unfreeze()
    static, dart = result.rows
    for row, pruner in zip(result.rows, pruners.values(), strict=True):
        assert row.reported == memory_per_sequence(Shape.of(subject.model), pruner)
        assert row.all_layers_reported == row.reported
        # beside it the run keeps which of the prompt's tokens count, and small change
        assert row.reported <= row.added.median <= row.reported + 140 * 4 + 512
        assert row.all_layers_measured == pytest.approx(row.added.median)
        assert row.attached.median - row.unattached.median == pytest.approx(row.added.median)
    assert dart.added.median > static.added.median
    cache, logits = 3 * 2 * 2 * 8 * 4 * 144, 128 * 4
    assert static.unattached.median == pytest.approx(cache + logits, rel=0.01)


def _real(thing):
    return type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta


def test_a_part_of_the_layers_stands_for_all(tiny_subject, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(memory, "resident_bytes", iter(range(0, 10**9, 1000)).__next__)
    subject = replace(tiny_subject(), all_layers=30)
    (row,) = memory.measure(subject, {"static": Static()}, batch=1, prompt=16, new=4, turns=1, backend="reference").rows
    assert row.all_layers_reported == memory_per_sequence(replace(Shape.of(subject.model), layers=30), Static())
    assert "3 of 30 layers" in row.case


def test_resident_bytes_see_what_is_held():
    held = HeldBytes(torch.device("cpu"))
    before = held.before()
    block = torch.ones(2**22)
    assert held.after() - before >= 0.9 * block.nbytes


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: refresh.check(Static(), 1, 64), "Static never replays"),
        (lambda: refresh.check(Clock(), 1, 64), "Clock never replays"),
        (lambda: refresh.check(Dart(), 1, 12), "too short for a replay of 16"),
        (lambda: refresh.check(Dart(), 0, 64), "batch must be at least 1"),
        (lambda: trace.check(Dart(), (), 1), "must be at least 1"),
        (lambda: trace.check(Dart(), (0, 5), 1), "must be at least 1"),
        (lambda: trace.check(Dense(), (5,), 1), "traces nothing"),
        (lambda: memory.check({"dense": Dense()}, 1, 32, 8), "holds nothing for a sequence"),
        (lambda: memory.check({"dart": Dart()}, 1, 5, 8), "makes no mask"),
    ],
)
def test_mistakes(check, message):
    with pytest.raises(ValueError, match=message):
        check()
