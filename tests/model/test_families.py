"""Rows of the table against what the layers really compute; recognition by structure; refusals."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn

from dartprune.model import families
from dartprune.model.families import Family, activation_name, describe, register_family
from test_matrix import tokens
from tiny import FAMILIES

PARALLEL = {"gpt_neox", "falcon", "falcon-new"}


def record(module, store, key, output):
    def hook(module, args, out):
        store[key] = (out if output else args[0]).detach().clone()

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_the_parts_add_up_to_the_layer(family):
    model = FAMILIES[family]()
    decoder = describe(model)
    assert decoder.recognised == "table" and len(decoder.layers) == 3
    row = families.FAMILIES[model.config.model_type]
    blocks = model.get_submodule(row.layers)
    for layer, block in zip(decoder.layers, blocks, strict=True):
        seen: dict[str, torch.Tensor] = {}
        handles = [
            record(layer.entry, seen, "x", False),
            record(layer.down, seen, "a", False),
            record(layer.contribution, seen, "z", True),
            record(layer.attention_output, seen, "attention", True),
            record(block, seen, "in", False),
        ]
        if layer.norm is not None:
            handles.append(record(layer.norm, seen, "y", False))
        out: dict[str, torch.Tensor] = {}
        handles.append(
            block.register_forward_hook(lambda m, a, o, out=out: out.update(o=o[0] if isinstance(o, tuple) else o))
        )
        model(input_ids=tokens(model))
        for handle in handles:
            handle.remove()
        y = seen.get("y", seen["x"])
        assert layer.hidden == y.shape[-1] and layer.neurons == seen["a"].shape[-1]
        torch.testing.assert_close(layer.activations(seen["x"]), seen["a"], rtol=1e-5, atol=1e-5)
        whole = y.reshape(out["o"].shape) + layer.scale * seen["z"].reshape(out["o"].shape)
        if family in PARALLEL:
            torch.testing.assert_close(y, seen["in"])
            whole = whole + seen["attention"]
        if family == "opt-post":
            whole = block.final_layer_norm(whole)
        if family == "falcon" or family == "falcon-new":
            # Falcon adds the attention to the FFN's own output in place
            whole = y + seen["z"] + seen["attention"]
        torch.testing.assert_close(whole, out["o"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_structure_finds_what_the_table_says(family, monkeypatch):
    model = FAMILIES[family]()
    want = describe(model)
    monkeypatch.delitem(families.FAMILIES, model.config.model_type)
    refused = {"opt", "opt-post", "olmo2", "falcon", "falcon-new"}
    if family in refused:
        with pytest.raises(ValueError, match=r"looked for .* found .*register_family"):
            describe(model)
        return
    got = describe(model)
    assert got.recognised == "structure"
    assert got.layers == want.layers


def test_a_new_row(monkeypatch):
    model = FAMILIES["llama"]()
    row = families.FAMILIES["llama"]
    monkeypatch.setattr(families, "FAMILIES", {k: v for k, v in families.FAMILIES.items() if k != "llama"})
    register_family("llama", row)
    assert describe(model).recognised == "table"
    with pytest.raises(ValueError, match="has a row already"):
        register_family("llama", Family(layers="", entry="", up="", down="", attention_output=""))
    families.FAMILIES["llama"] = row.but(gate="mlp.gate_project")
    with pytest.raises(ValueError, match=r"no 'mlp\.gate_project'"):
        describe(model)


def test_what_is_refused():
    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    t5 = t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        describe(t5)
    with pytest.raises(ValueError, match="MixtralForCausalLM is a mixture-of-experts model"):
        describe(t.MixtralForCausalLM(t.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2)))
    with pytest.raises(ValueError, match="generates text"):
        describe(t.BertModel(t.BertConfig(**small)))
    with pytest.raises(ValueError, match="was not recognised"):
        describe(t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)))
    for thing in (nn.Linear(2, 2), "llama", None):
        with pytest.raises(TypeError, match="a transformers model is needed"):
            describe(thing)


def test_activation_names_by_value():
    from transformers.activations import ACT2FN

    from dartprune.ffn.backend import activation

    x = torch.randn(100)
    for name in ACT2FN:
        if name in ("prelu", "xielu"):
            continue
        canonical = activation_name(ACT2FN[name])
        if canonical != "other":
            torch.testing.assert_close(activation(canonical, x), ACT2FN[name](x), rtol=1e-4, atol=1e-5, msg=name)
    assert activation_name(ACT2FN["gelu_10"]) == "other" and activation_name(ACT2FN["tanh"]) == "other"
    assert activation_name(torch.nn.functional.silu) == "silu"
    assert activation_name(torch.nn.GELU(approximate="tanh")) == "gelu_tanh"
