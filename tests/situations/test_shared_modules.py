"""One module in two layers: refused by name, the model untouched; modules that hold nothing of a layer may be."""

from __future__ import annotations

import copy

import pytest
import torch

from dartprune import Dense, Static
from dartprune.model.families import describe
from oracle import assert_untouched, snapshot
from test_matrix import tokens
from tiny import FAMILIES


def mlp(layers):
    layers[1].mlp = layers[0].mlp


def down(layers):
    layers[2].mlp.down_proj = layers[1].mlp.down_proj


def norm(layers):
    layers[2].post_attention_layernorm = layers[1].post_attention_layernorm


def block(layers):
    layers[1] = layers[0]


@pytest.mark.parametrize("pruner", [Static(sparsity=0.5), Dense()])
@pytest.mark.parametrize(
    ("share", "named"),
    [
        (mlp, r"layers 0 and 1 share one LlamaMLP"),
        (down, r"layers 1 and 2 share one Linear"),
        (norm, r"layers 1 and 2 share one LlamaRMSNorm"),
        (block, r"layers 0 and 1 share one LlamaMLP"),
    ],
)
@torch.no_grad()
def test_two_layers_share_one_module(share, named, pruner):
    model = FAMILIES["llama"]()
    share(model.model.layers)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=named):
            pruner.attach(model)
        assert_untouched(model, before)
    assert model.generate(tokens(model), max_new_tokens=4, min_new_tokens=4).shape[1] == 18
    model.model.layers = copy.deepcopy(torch.nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers))
    with pruner(model) as run:
        model.generate(tokens(model), max_new_tokens=4, min_new_tokens=4)
        assert run.report().dense_tokens + run.report().pruned_tokens == 6


@torch.no_grad()
def test_by_structure_they_are_refused_too(monkeypatch):
    monkeypatch.setattr("dartprune.model.families.FAMILIES", {})
    model = FAMILIES["llama"]()
    mlp(model.model.layers)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers 0 and 1 share one LlamaMLP"):
        describe(model)
    assert_untouched(model, before)


@torch.no_grad()
def test_a_shared_activation_or_attention_output_is_no_hindrance():
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.mlp.act_fn = model.model.layers[0].mlp.act_fn
        layer.self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    before = snapshot(model)
    with Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=4, min_new_tokens=4)
        assert run.report().backend == "cpu" and run.report().pruned_tokens == 6
    assert_untouched(model, before)
