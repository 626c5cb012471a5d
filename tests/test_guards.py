"""Bad input ends in one clear line and an untouched model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import dartprune
from dartprune import Dart, Dense, Pruner, Static, Table, presets
from dartprune.model.caches import handed
from dartprune.run import check_transformers
from oracle import assert_untouched, held_by, snapshot
from test_matrix import tokens
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.7, float("nan"), float("inf"), "0.5", None, True])
def test_sparsity_must_be_a_share(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got"):
        Dart(sparsity=sparsity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "magnitud"}, "did you mean 'magnitude'"),
        ({"selection": "topp"}, "did you mean 'topk'"),
        ({"impact": "output"}, "ffn_output"),
        ({"compensate": "mea"}, "did you mean 'mean'"),
        ({"start": -1}, "start must be"),
        ({"min_traced": 0}, "min_traced must be"),
        ({"decay": 1.0}, "decay must lie"),
        ({"budget": "uniform"}, "budget must be"),
    ],
)
def test_unknown_settings_name_the_nearest(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Dart(**options)


def test_dicts_go_both_ways():
    for name in presets.names():
        pruner = presets.get(name)()
        data = pruner.to_dict()
        assert data["version"] == 1 and data["preset"] == name
        assert Pruner.from_dict(data) == pruner
    custom = Dart(sparsity=0.42, budget=Table("all:0.5"), compensate="mean", skip_first=2)
    assert Pruner.from_dict(custom.to_dict()) == custom
    with pytest.raises(ValueError, match=r"'sparsty'.*did you mean 'sparsity'"):
        Pruner.from_dict({"version": 1, "sparsty": 0.5})
    with pytest.raises(ValueError, match=r"'tokns'.*did you mean 'tokens'"):
        Pruner.from_dict({"version": 1, "refresh": {"kind": "replay", "tokns": 8}})
    with pytest.raises(ValueError, match="did you mean 'replay'"):
        Pruner.from_dict({"version": 1, "refresh": {"kind": "reply"}})
    with pytest.raises(ValueError, match="version 7"):
        Pruner.from_dict({"version": 7})
    with pytest.raises(ValueError, match="by definition"):
        Dense(sparsity=0.5)


def test_a_second_attach_says_so(llama):
    before = snapshot(llama)
    with Dart()(llama):
        with pytest.raises(ValueError, match=r"already attached \(by Dart\)"):
            Static().attach(llama)
        assert llama.generate(tokens(llama), max_new_tokens=3).shape[1] == 17
    assert_untouched(llama, before)
    Static().attach(llama).detach()


def test_a_table_of_the_wrong_length_names_the_layer(llama):
    before = snapshot(llama)
    with Dart(budget=Table("0-9:0.5"))(llama), pytest.raises(ValueError, match="9"):
        llama.generate(tokens(llama), max_new_tokens=3)
    assert_untouched(llama, before)


def test_training_mode_is_refused(llama):
    llama.train()
    with pytest.raises(ValueError, match="training mode"):
        Dart().attach(llama)
    llama.eval()
    with Dart()(llama):
        llama.train()
        with pytest.raises(ValueError, match="training mode"):
            llama.generate(tokens(llama), max_new_tokens=3)
        llama.eval()
        llama.generate(tokens(llama), max_new_tokens=3)


def test_unknown_backends_name_the_known(llama):
    before = snapshot(llama)
    with pytest.raises(ValueError, match="did you mean 'masked'"):
        Dart().attach(llama, backend="maskd")
    assert_untouched(llama, before)


def test_a_direct_call_needs_a_phase(llama):
    with Dart()(llama) as run:
        with pytest.raises(ValueError, match=r"run\.phase"):
            llama(input_ids=tokens(llama))
        with pytest.raises(ValueError, match="unknown phase 'decoding'"), run.phase("decoding"):
            pass
        with run.phase("prefill"), pytest.raises(ValueError, match="use_cache=False"):
            llama(input_ids=tokens(llama), use_cache=False)
        with pytest.raises(ValueError, match="use_cache=False"):
            llama.generate(tokens(llama), use_cache=False, max_new_tokens=3)
        with pytest.raises(ValueError, match="not filled inside"):
            run.slots_of(object())


def test_the_call_decides_about_the_cache_before_the_config(llama):
    llama.config.use_cache = False
    with Dart()(llama) as run, run.phase("prefill"), torch.no_grad():
        with pytest.raises(ValueError, match="use_cache=False"):
            llama(input_ids=tokens(llama))
        assert llama(input_ids=tokens(llama), use_cache=True).past_key_values is not None


def test_a_prompt_beyond_the_context(llama):
    most = llama.config.max_position_embeddings
    text = tokens(llama, lines=1, length=most + 1)
    free = llama.generate(text, max_new_tokens=3, do_sample=False)
    with Dense()(llama) as run:  # as without a pruner: positions of this kind go on
        assert torch.equal(llama.generate(text, max_new_tokens=3, do_sample=False), free)
    assert f"a text of {most + 1} tokens is longer than the model's context of {most}" in run.report().notes


def test_copies_pickles_and_adapters_are_refused_while_attached(llama):
    before = snapshot(llama)
    with Dart()(llama) as run:
        for attempt in (
            lambda: copy.deepcopy(llama),
            lambda: pickle.dumps(llama),
            lambda: copy.deepcopy(run),
        ):
            with pytest.raises(RuntimeError, match=r"run\.detach"):
                attempt()
        for name in ("load_adapter", "add_adapter"):
            with pytest.raises(RuntimeError, match="adapters cannot be changed"):
                getattr(llama, name)("anything")
    assert_untouched(llama, before)
    copy.deepcopy(llama)
    pickle.dumps(llama)


def test_moving_to_another_dtype_while_attached(llama):
    with Static()(llama) as run:
        llama.generate(tokens(llama), max_new_tokens=4, min_new_tokens=4)
        llama.to(torch.bfloat16)
        with pytest.raises(ValueError, match=r"moved to cpu, bfloat16 while attached: call run\.detach\(\)"):
            llama.generate(tokens(llama), max_new_tokens=4, min_new_tokens=4)
        assert run.report().pruned_tokens == 6
    with Static()(llama):
        llama.generate(tokens(llama), max_new_tokens=4, min_new_tokens=4)


def test_saving_while_attached(llama, tmp_path):
    with Static()(llama):
        llama.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(llama.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_float16_activations_above_256_do_not_overflow():
    model = FAMILIES["llama"]()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 300
            layer.mlp.down_proj.weight /= 3000
    model.half()
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].abs().max()))
    with Static(sparsity=0.5)(model) as run, torch.no_grad():
        with run.phase("prefill"):
            cache = model(input_ids=tokens(model), use_cache=True).past_key_values
        energy = run.layers[0].trace.tensors()["energy"]
        assert max(seen) > 256, "the test's activations are too small to show anything"
        assert energy.max() > 65504 and torch.isfinite(energy).all()
        with run.phase("decode"):
            model(input_ids=tokens(model)[:, :1], **handed(cache))
        assert all(kept is not None for kept in run.selection(0))
    handle.remove()


def test_sparsity_zero_keeps_everything(llama):
    plain = llama.generate(tokens(llama), max_new_tokens=8, do_sample=False)
    with Dart(sparsity=0.0)(llama) as run:
        assert torch.equal(llama.generate(tokens(llama), max_new_tokens=8, do_sample=False), plain)
        assert run.report().realised_sparsity == 0.0


def test_detach_twice_and_report_after(llama):
    run = Dart().attach(llama, backend="masked")
    llama.generate(tokens(llama), max_new_tokens=4, min_new_tokens=4)
    run.detach()
    run.detach()
    report = run.report()
    assert report.pruned_tokens == 6
    text = str(report)
    assert "realised sparsity" in text and "saves no time" in text
    assert report.to_dict()["layers"][0]["neurons"] == report.layers[0].neurons


def test_public_names_exist():
    for name in dartprune.__all__:
        assert getattr(dartprune, name) is not None


def test_one_token_changed_at_the_end_leaves_earlier_logits(llama):
    """Causality: the prompt's own logits never depend on masks or on later tokens."""
    ids = tokens(llama, lines=1, length=20)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % llama.config.vocab_size
    logits = []
    for text in (ids, other):
        with Dart(sparsity=0.8)(llama) as run, torch.no_grad(), run.phase("prefill"):
            logits.append(llama(input_ids=text, use_cache=True).logits)
    assert torch.equal(logits[0][:, :-1], logits[1][:, :-1])
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])
    # and a decoded token's mask knows nothing of the token itself
    for pair in (ids[:, -1:], other[:, -1:]):
        with Static(sparsity=0.5)(llama) as run, torch.no_grad():
            with run.phase("prefill"):
                cache = llama(input_ids=ids[:, :-1], use_cache=True).past_key_values
            with run.phase("decode"):
                llama(input_ids=pair, **handed(cache))
            logits.append([k.tolist() for k in run.selection(0)])
    assert logits[2] == logits[3]


@torch.no_grad()
def test_sequences_that_ended_hold_no_vectors():
    """A server ends many sequences; what the report keeps of each must not grow with the model's width."""
    model = FAMILIES["llama"]()
    with Dart(sparsity=0.5)(model) as run:
        held = []
        for _ in range(3):
            model.generate(tokens(model, length=40), max_new_tokens=4)
            held.append(sum(tensor.numel() >= model.config.hidden_size for tensor in held_by(run)))
        assert held[0] == held[1] == held[2] > 0 and len(run.report().sequences) == 6


def test_a_release_of_transformers_that_is_not_known_is_refused(monkeypatch):
    """Doors that moved would leave every token dense, as new names of caches once did."""
    with pytest.raises(ValueError, match=r"transformers 5\.25\.0\.dev0 is newer than .*'transformers<5\.25'"):
        check_transformers("5.25.0.dev0")
    check_transformers("5.24.1")
    monkeypatch.setattr("dartprune.run.UNKNOWN_TRANSFORMERS", (5, 0))
    with pytest.raises(ValueError, match="is newer than this version of dartprune knows"):
        Static(sparsity=0.5).attach(FAMILIES["llama"]())
