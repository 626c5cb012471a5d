"""Forwards that `generate()` does not announce: soft prompts, guidance, nested generations, drafts."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dartprune import Dart, Dense, Never, Static
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def soft(kind, model):
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
    if kind == "prompt":
        config = peft.PromptTuningConfig(**common)
    elif kind == "prefix":
        config = peft.PrefixTuningConfig(**common)
    else:
        config = peft.PromptEncoderConfig(**common, encoder_hidden_size=16)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:Position ids are not supported"
)
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_soft_prompts_are_prompt(llama, kind):
    model = soft(kind, llama)
    ids = tokens(llama, lines=2, length=16)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    free = model.generate(**call)
    with Dense()(model) as run:
        assert torch.equal(model.generate(**call), free)
    report = run.report()
    assert report.dense_tokens == 10 and len(report.sequences) == 2
    with Static(sparsity=0.5)(model) as run:
        for _ in range(2):  # peft puts a method of its own in place while it generates
            model.generate(**call)
    report = run.report()
    # without the first token, which counts nowhere; a prefix lies in the cache and is never read
    text = 16 if kind == "prefix" else 22
    assert [s.prompt_tokens for s in report.sequences] == [text] * 4
    assert [s.traced_tokens for s in report.sequences] == [text - (kind != "prefix")] * 4
    assert (report.pruned_tokens, report.dense_tokens) == (20, 0)
    assert torch.equal(model.generate(**call), free)


@pytest.mark.parametrize("pruner", [Dense(), Static(sparsity=0.5, min_traced=1)])
def test_guidance_has_a_stream_of_its_own(llama, pruner):
    ids = tokens(llama, lines=2, length=16)
    negative = tokens(llama, lines=2, length=12, seed=5)
    call = {"max_new_tokens": 8, "do_sample": False, "guidance_scale": 1.5, "negative_prompt_ids": negative}
    free = llama.generate(ids, **call)
    with pruner(llama) as run:
        out = llama.generate(ids, **call)
    report = run.report()
    assert [s.prompt_tokens for s in report.sequences] == [16, 16, 12, 12]
    assert {s.dense_tokens + s.pruned_tokens for s in report.sequences} == {7}
    if not pruner.prunes:
        assert torch.equal(out, free)
        return
    assert report.pruned_tokens == 28
    # by hand: each stream with the masks of its own text
    assert torch.equal(out, guided(llama, pruner, ids, negative, 8))


def guided(model, pruner, ids, negative, new):
    def read(run, text):
        with run.phase("prefill"):
            return model(input_ids=text, use_cache=True)

    with torch.no_grad(), pruner(model) as run:
        with_text, without = read(run, ids), read(run, negative)
        out = ids
        for _ in range(new):
            a, b = (o.logits[:, -1].log_softmax(-1) for o in (with_text, without))
            out = torch.cat((out, (1.5 * (a - b) + b).argmax(-1, keepdim=True)), 1)
            if out.shape[1] < ids.shape[1] + new:
                with run.phase("decode"):
                    caches = with_text.past_key_values, without.past_key_values
                    with_text, without = (model(input_ids=out[:, -1:], **handed(c)) for c in caches)
    return out


def test_early_exit_equals_greedy(llama):
    ids = tokens(llama, lines=1, length=16)
    pruner = Static(sparsity=0.5)
    call = {"max_new_tokens": 12, "do_sample": False}
    with pruner(llama):
        greedy = llama.generate(ids, **call)
    with pruner(llama) as run:
        assert torch.equal(llama.generate(ids, assistant_early_exit=1, **call), greedy)
    report = run.report()
    assert len(report.sequences) == 1  # drafts are no text of their own
    assert report.pruned_tokens + report.dense_tokens == 11
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.02)


class Rewrites(StoppingCriteria):
    """Generates something else at every step, and ends the first line early."""

    def __init__(self, model, text):
        self.model, self.text, self.made = model, text, []

    def __call__(self, input_ids, scores, **kwargs):
        self.made.append(self.model.generate(self.text, max_new_tokens=3, do_sample=False))
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        done[0] = input_ids.shape[1] >= 20
        return done


def test_a_generation_inside_a_generation(llama):
    ids, other = tokens(llama, lines=2, length=16), tokens(llama, lines=3, length=11, seed=4)
    call = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with Static(sparsity=0.5)(llama) as run:
        alone = llama.generate(other, max_new_tokens=3, do_sample=False)
        free = llama.generate(ids, **call)
    with Dart(sparsity=0.5, refresh=Never(), compensate=None)(llama) as run:
        criterion = Rewrites(llama, other)
        out = llama.generate(ids, stopping_criteria=StoppingCriteriaList([criterion]), **call)
    assert all(torch.equal(made, alone) for made in criterion.made)
    assert torch.equal(out[1], free[1]) and torch.equal(out[0, :20], free[0, :20])
    outer = run.report().sequences[:2]
    # the line that ended went on as padding, which counts nowhere
    assert [s.pruned_tokens for s in outer] == [3, 9]


def test_soft_prompts_by_hand(llama):
    ids = tokens(llama, lines=1, length=10)
    embedded = torch.cat((torch.randn(1, 7, 32) * 0.02, llama.get_input_embeddings()(ids)), dim=1)
    for call in ({"inputs_embeds": embedded}, {"inputs_embeds": embedded, "input_ids": ids}):
        call = {**call, "attention_mask": torch.ones(1, 17), "max_new_tokens": 6, "do_sample": False}
        free = llama.generate(**call)
        with Dense()(llama):
            assert torch.equal(llama.generate(**call), free)
        with Static(sparsity=0.5)(llama) as run:
            llama.generate(**call)
        (sequence,) = run.report().sequences
        assert (sequence.prompt_tokens, sequence.traced_tokens, sequence.pruned_tokens) == (17, 16, 5)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_where_it_is_called(llama, name):
    with Static(sparsity=0.5)(llama), pytest.raises(ValueError, match="continuous batching cannot be pruned"):
        getattr(llama, name)([[1, 2, 3]])


def test_a_manager_of_continuous_batching_made_by_hand_is_refused_where_it_is_made(llama):
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    settings = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0), ContinuousBatchingConfig()
    before = llama.config._attn_implementation
    for attention in ("sdpa", "eager"):
        llama.set_attn_implementation(attention)
        with Static(sparsity=0.5)(llama), pytest.raises(ValueError, match="continuous batching cannot be pruned"):
            ContinuousBatchingManager(llama, *settings)
        assert llama.config._attn_implementation == attention
    llama.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="in the hands of continuous batching"):
        Static(sparsity=0.5).attach(llama)
    llama.set_attn_implementation(before)
    with Static(sparsity=0.5)(llama):
        llama.set_attn_implementation("eager")
    assert llama.config._attn_implementation == "eager"
