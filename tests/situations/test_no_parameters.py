"""Projections that hold no parameter: packed by dynamic quantisation, or in buffers alone. They are masked."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dartprune import Static, presets
from dartprune.model.families import describe
from dartprune.model.layer import place
from test_matrix import tokens
from tiny import FAMILIES


class Buffered(nn.Module):
    """As AutoGPTQ and its like keep a linear layer: integers and scales, as buffers, under names of their own."""

    def __init__(self, linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.register_buffer("scales", linear.weight.detach().abs().amax(1) / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scales[:, None]).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight.float() * self.scales[:, None]).to(x.dtype))


class Sealed(nn.Module):
    """Holds its weight where torch cannot see it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = [linear.weight.detach()]

    def forward(self, x):
        return nn.functional.linear(x, self.packed[0].to(x.dtype))


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the end of torch.ao
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def with_layers(kind):
    def change(model):
        for layer in model.model.layers:
            for part, names in ((layer.mlp, ("gate_proj", "up_proj", "down_proj")), (layer.self_attn, ("o_proj",))):
                for name in names:
                    setattr(part, name, kind(getattr(part, name)))
        return model

    return change


KINDS = {"dynamic": dynamic, "buffered": with_layers(Buffered), "sealed": with_layers(Sealed)}


@torch.no_grad()
@pytest.mark.parametrize("preset", presets.names())
@pytest.mark.parametrize("kind", KINDS)
def test_such_layers_are_masked_and_said_so(kind, preset):
    model = KINDS[kind](FAMILIES["llama"]()).eval()
    ids = tokens(model)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    pruner = presets.get(preset)() if preset == "dense" else presets.get(preset)(sparsity=0.5)
    with pruner(model) as run:
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
        report = run.report()
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)
    if preset == "dense":
        assert torch.equal(out, plain)
        return
    assert report.backend == "masked" and not report.saves_time and report.bytes_saved == 0
    assert report.pruned_tokens > 0 and report.realised_sparsity > 0.05
    if not pruner.token or not pruner.token.ceiling:
        assert any("projection is a" in note for note in report.notes)


@torch.no_grad()
def test_recognised_by_structure_too(monkeypatch):
    monkeypatch.setattr("dartprune.model.families.FAMILIES", {})
    model = KINDS["buffered"](FAMILIES["llama"]())
    with Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=6, min_new_tokens=6)
        assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", [Buffered, Sealed])
def test_the_dtype_is_that_of_what_stands_beside(kind):
    model = with_layers(kind)(FAMILIES["llama"]()).to(torch.bfloat16)
    layer = describe(model).layers[0]
    assert place(layer) == (torch.device("cpu"), torch.bfloat16)
    assert layer.weight_bytes == layer.weights
    with torch.no_grad(), Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=6, min_new_tokens=6)
        assert run.report().pruned_tokens == 10
