"""Batch invariance: in bf16 too a request gets the bits it gets alone, where its model's steps are the kernels'."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, Dense, Detector, GatedDart, Relearn, Replay, SketchDart, Static
from dartprune.loading import load
from dartprune.model.caches import handed
from dartprune.serving.engine import Limits
from serving.conftest import PROMPTS, asked, engine_of
from tiny import FAMILIES

pytest.importorskip("numba")
EAGER = Detector(window=4, delta=0.0, min_drop=0.0)
METHODS = [
    Dense(),
    Static(sparsity=0.5, min_traced=4),
    SketchDart(sparsity=0.5),
    GatedDart(sparsity=0.4),
    Dart(sparsity=0.5, min_traced=4, detector=EAGER, refresh=Replay(tokens=8, settle=8)),
    Dart(sparsity=0.5, min_traced=4, detector=EAGER, refresh=Relearn(tokens=6)),
]


@pytest.fixture(scope="module")
def half():
    """The model inside in bfloat16."""
    torch.set_num_threads(1)
    return load(dtype="bfloat16")


def chances(heard):
    return [chance for piece in heard.pieces for chance in piece.chances]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{type(method.refresh).__name__}")
def test_a_request_gets_the_bits_it_gets_alone(half, method):
    """Beside others of other lengths, and beside dense ones."""
    with engine_of(half, method, Limits(batch=8, chunk=16, invariant=True)) as engine:
        assert engine.separate is None
        alone = [asked(engine, prompt, 30 + 4 * n, logprobs=2).wait() for n, prompt in enumerate(PROMPTS)]
        together = [asked(engine, prompt, 30 + 4 * n, logprobs=2) for n, prompt in enumerate(PROMPTS)]
        dense = asked(engine, PROMPTS[0], 40, sparsity=0.0)
        for one, other in zip(alone, together, strict=True):
            assert chances(one) == chances(other.wait()) and one.text == other.text
            left, right = one.ended[0].report, other.ended[0].report
            assert [e.decoded for e in left.events] == [e.decoded for e in right.events]
            assert left.realised_sparsity == right.realised_sparsity
        assert dense.wait().ended[0].report.dense_tokens == 39
        if method in METHODS[-2:]:
            assert any(heard.ended[0].report.events for heard in alone), "the detector never fired: nothing was tried"


@pytest.mark.parametrize("family", ["llama-bias", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_steps_of_every_size_have_the_same_bits(family):
    """One to nine lines of one length, pruned, and the same lines one by one."""
    import transformers as t

    model = FAMILIES[family]().to(torch.bfloat16)
    ids = torch.randint(2, 128, (9, 12))

    def step(run, lines):
        slots = run.sequences.open(len(lines))
        joined = None
        caches = []
        for slot, line in zip(slots, lines, strict=True):
            caches.append(t.DynamicCache(config=model.config))
            with run.phase("prefill", slots=(slot,)):
                model(input_ids=ids[line : line + 1], **handed(caches[-1]), use_cache=True)
        joined = t.DynamicCache(config=model.config)
        for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            joined.update(*(torch.cat([getattr(part, name) for part in layers]) for name in ("keys", "values")), number)
        with run.phase("decode", slots=slots):
            logits = model(input_ids=ids[lines, :1], **handed(joined), use_cache=True).logits
        assert {report.pruned_tokens for report in run.sequences.close(slots)} == {1}
        return logits

    with Static(sparsity=0.5, min_traced=4)(model) as run:
        assert run.make_batch_invariant() is None
        alone = torch.cat([step(run, [line]) for line in range(9)])
        for lines in range(2, 10):
            assert torch.equal(step(run, list(range(lines))), alone[:lines]), lines


def test_what_the_kernels_do_not_compute_is_named_and_decodes_apart(small):
    """float32: no kernels for its step; requests decode in forwards of their own, several at a time."""
    with engine_of(small, limits=Limits(batch=4, chunk=16, invariant=True)) as engine:
        assert engine.separate == (
            "for batch invariance the kernels of a step are for bfloat16 and float16, this model is float32"
        )
        alone = [asked(engine, prompt, logprobs=1).wait() for prompt in PROMPTS]
        together = [asked(engine, prompt, logprobs=1) for prompt in PROMPTS]
        assert [chances(heard.wait()) for heard in together] == [chances(heard) for heard in alone]
        first, last = (heard.pieces for heard in (together[0], together[2]))
        assert first and last


def test_other_families_are_named():
    model = FAMILIES["gpt2"]().to(torch.bfloat16)
    with Static(sparsity=0.5)(model) as run:
        reason = run.make_batch_invariant()
    assert reason == "the kernels do not compute the model (GPT2LMHeadModel)"


def test_it_ends_with_the_run(half):
    model, _ = half
    with Static(sparsity=0.5)(model) as run:
        assert run.make_batch_invariant() is None
    with Dense()(model) as run:
        assert not run._step.mode.invariant


@pytest.mark.parametrize("backend", ["masked", "reference"])
def test_other_backends_are_refused(half, backend):
    model, _ = half
    with Static(sparsity=0.5)(model, backend=backend) as run:
        assert run.make_batch_invariant() == f"layer 0: its backend is {backend}"
        assert not run._step.mode.invariant
