"""Layers whose rows cannot be read: quantised, with adapters, offloaded. They are masked, and the report says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dartprune import Dart, Static
from dartprune.model.families import describe
from dartprune.model.probe import down_square
from dartprune.model.weights import row_weights
from test_matrix import tokens
from tiny import FAMILIES


class Quantised(nn.Module):
    """Stands for any linear layer whose weight is no plain matrix: 8 bits with a scale per row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Buffer(linear.weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@torch.no_grad()
def test_quantised_layers_are_masked_and_said_so():
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Quantised(getattr(layer.mlp, name)))
    with pytest.raises(ValueError, match=r"backend 'reference' cannot be used: .*Quantised"):
        Dart().attach(model, backend="reference")
    with Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=6, min_new_tokens=6)
        report = run.report()
    assert report.backend == "masked" and not report.saves_time and report.bytes_saved == 0
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="reads the down projection"):
        Dart(scorer="weight-aware").attach(model)


@torch.no_grad()
def test_the_size_of_a_quantised_down_projection_is_estimated():
    layer = describe(FAMILIES["llama"]()).layers[0]
    place = (torch.device("cpu"), torch.float32)
    known = down_square(layer, row_weights(layer), *place)
    assert known == pytest.approx(float(layer.down.weight.square().sum(0).mean()), rel=1e-5)
    estimated = down_square(layer, "quantised", *place)
    assert estimated == down_square(layer, "quantised", *place) == pytest.approx(known, rel=0.2)
    assert estimated != known


@torch.no_grad()
def test_lora_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about transformers
        model = peft.get_peft_model(FAMILIES["llama"](), config).eval()
    plain = model.generate(input_ids=tokens(model), max_new_tokens=6, do_sample=False)
    assert "adapter" in str(row_weights(describe(model).layers[0]))
    with Static(sparsity=0.5)(model) as run:
        out = model.generate(input_ids=tokens(model), max_new_tokens=6, do_sample=False)
        report = run.report()
    assert report.pruned_tokens == 10 and report.backend == "masked"
    assert not torch.equal(out, plain)
    assert torch.equal(model.generate(input_ids=tokens(model), max_new_tokens=6, do_sample=False), plain)


@torch.no_grad()
def test_offloaded_layers():
    accelerate = pytest.importorskip("accelerate")
    model = FAMILIES["llama"]()
    with Static(sparsity=0.5)(model, backend="masked"):
        want = model.generate(tokens(model), max_new_tokens=8, do_sample=False)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert "offloaded" in str(row_weights(describe(model).layers[0]))
    with Static(sparsity=0.5)(model) as run:
        got = model.generate(tokens(model), max_new_tokens=8, do_sample=False)
        assert run.report().backend == "masked"
    assert torch.equal(got, want)
