"""What others keep of a model, or of a cache, while a run is attached: shallow copies and bound methods."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from dartprune import Static
from dartprune.model.caches import handed
from oracle import assert_untouched, snapshot
from test_matrix import tokens
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def generated(generate, ids):
    return generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
def test_a_shallow_copy_of_a_model_is_that_model(llama, backend):
    ids, before = tokens(llama), snapshot(llama)
    want = generated(llama.generate, ids)
    run = Static(sparsity=0.8).attach(llama, backend=backend)
    pruned = generated(llama.generate, ids)
    twin = copy.copy(llama)
    assert torch.equal(generated(twin.generate, ids), pruned) and not torch.equal(pruned, want)
    assert run.report().pruned_tokens == 2 * 22
    run.detach()
    assert torch.equal(generated(twin.generate, ids), want)
    assert torch.equal(twin(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert_untouched(llama, before)


def test_methods_that_were_taken_while_attached(llama):
    ids = tokens(llama)
    with torch.no_grad():
        plain = generated(llama.generate, ids), llama(ids).logits, llama.model(ids).last_hidden_state
        with Static(sparsity=0.8)(llama):
            generate, forward, decoder = llama.generate, llama.forward, llama.model.forward
            prepare = llama.prepare_inputs_for_generation
        assert torch.equal(generated(generate, ids), plain[0])
        assert torch.equal(forward(ids).logits, plain[1])
        assert torch.equal(decoder(ids).last_hidden_state, plain[2])
        assert torch.equal(prepare(ids, is_first_iteration=True)["input_ids"], ids)
        # and in the next run they are its own
        with Static(sparsity=0.8)(llama) as run:
            generated(generate, ids)
            assert run.report().pruned_tokens == 2 * 11


def test_a_method_of_a_model_that_is_gone_says_so():
    model = FAMILIES["llama"]()
    with Static()(model):
        generate = model.generate
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="belongs to a model that is gone"):
        generate(torch.ones(1, 3, dtype=torch.int64))


def test_a_shallow_copy_of_a_cache_brings_its_trace(llama):
    ids = tokens(llama)
    with torch.no_grad(), Static(sparsity=0.5)(llama) as run:
        cache = run.prefill(ids)
        own = copy.copy(cache)
        assert type(own) is type(copy.copy(own))
        with run.phase("decode"):
            got = llama(input_ids=ids[:, :1], **handed(own)).logits
        other = run.prefill(ids)
        with run.phase("decode"):
            want = llama(input_ids=ids[:, :1], **handed(other)).logits
        report = run.report()
    assert torch.equal(got, want)
    assert report.pruned_tokens == 4 and not report.notes
