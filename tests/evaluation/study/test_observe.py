"""Vectors are those that pass the modules; hooks are gone afterwards, whatever happened."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart
from dartprune.evaluation.study.observe import Observer, Point, points_of
from dartprune.model.caches import handed
from oracle import assert_untouched, snapshot
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_of_every_family(family):
    model = FAMILIES[family]()
    points = points_of(model, ("first", "last"), ("attention", "residual"))
    ids = torch.randint(2, 120, (2, 6))
    with torch.no_grad(), Observer(model, points) as observer:
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        seen = observer.take(2)
    assert seen.shape == (4, 2, 6, 32) and seen.dtype == torch.float32
    where = dict(zip(points, seen, strict=True))
    if family in ("llama", "qwen3", "mistral"):
        # the residual before the FFN is the layer's input and what its attention adds
        assert torch.allclose(
            where[Point(0, "residual")], hidden[0] + where[Point(0, "attention")], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("backend", ["cpu", "reference", "masked"])
def test_a_run_goes_on_as_without_observer(backend):
    model = FAMILIES["llama"]()
    ids = torch.randint(2, 120, (2, 24))
    before = snapshot(model)
    logits = []
    for watched in (False, True):
        observer = Observer(model, points_of(model, ("0", "middle", "last"), ("attention", "residual")))
        if watched:
            observer.__enter__()
        with torch.no_grad(), Dart(sparsity=0.5)(model, backend=backend) as run:
            with run.phase("prefill"):
                cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
            with run.phase("decode"):
                logits.append([model(input_ids=ids[:, t : t + 1], **handed(cache)).logits for t in (20, 21)])
            if watched:
                assert observer.take(2).shape == (6, 2, 20, 32)  # the first forward that was not taken
            assert run.report().backend == backend
        if watched:
            observer.__exit__(None, None, None)
    for a, b in zip(*logits, strict=True):
        assert torch.equal(a, b)
    assert_untouched(model, before)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_exception():
    model = FAMILIES["llama"]()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), Observer(model, points_of(model, ("last",), ("attention", "residual"))):
        assert hooks(model) == 2
        raise KeyboardInterrupt
    assert hooks(model) == 0
    assert_untouched(model, before)
    broken = Observer(model, [Point(0, "attention"), Point(99, "attention")])
    with pytest.raises(IndexError), broken:
        pass
    assert hooks(model) == 0


def test_places_that_are_not_there():
    model = FAMILIES["llama"]()
    assert [p.layer for p in points_of(model, ("last", "2", "middle", "first"), ("attention",))] == [0, 1, 2]
    for layer in ("3", "-1", "lst"):
        with pytest.raises(ValueError, match="unknown layer"):
            points_of(model, (layer,), ("attention",))
    with Observer(model, [Point(0, "attention")]) as observer, pytest.raises(RuntimeError, match="passed no vector"):
        observer.take(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_is_refused():
    model = torch.compile(FAMILIES["llama"]())
    with pytest.raises(ValueError, match="compiled model"):
        Observer(model, [Point(0, "attention")])
