"""Row views of weights, and layers whose rows cannot be read: adapters, quantised, offloaded."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dartprune import Dart, Static
from dartprune.ffn import backend_names, choose
from dartprune.ffn.weights import FFNWeights
from dartprune.model.families import describe
from dartprune.model.weights import row_weights
from test_matrix import tokens
from tiny import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_rows_are_views_and_compute_the_ffn(family):
    model = FAMILIES[family]()
    for layer in describe(model).layers:
        weights = row_weights(layer)
        assert isinstance(weights, FFNWeights)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for view in (weights.gate, weights.up, weights.down):
            if view is not None:
                assert view.untyped_storage().data_ptr() in storages
                assert view.shape == (layer.neurons, layer.hidden) and not view.requires_grad
        x = torch.randn(5, layer.hidden)
        up = x @ weights.up.t() + (weights.up_bias if weights.up_bias is not None else 0)
        if weights.gate is None:
            a = weights.act(up)
        else:
            gate = x @ weights.gate.t() + (weights.gate_bias if weights.gate_bias is not None else 0)
            a = weights.act(gate) * up
        torch.testing.assert_close(a, layer.activations(x), rtol=1e-4, atol=1e-4)
        out = a @ weights.down + (weights.down_bias if weights.down_bias is not None else 0)
        torch.testing.assert_close(out, layer.down(a), rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ValueError, match=r"backend 'reference' cannot be used: .*Quantised, not plain linear layers"):
        Dart().attach(model, backend="reference")
    with Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=6, min_new_tokens=6)
        report = run.report()
    assert report.backend == "masked" and not report.saves_time and report.bytes_saved == 0
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="reads the down projection"):
        Dart(scorer="weight-aware").attach(model)


@torch.no_grad()
def test_lora_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about transformers
        model = peft.get_peft_model(FAMILIES["llama"](), config).eval()
    plain = model.generate(input_ids=tokens(model), max_new_tokens=6, do_sample=False)
    assert "adapters" in str(row_weights(describe(model).layers[0]))
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
    assert row_weights(describe(model).layers[0]) == "the FFN's weights are offloaded"
    with Static(sparsity=0.5)(model) as run:
        got = model.generate(tokens(model), max_new_tokens=8, do_sample=False)
        assert run.report().backend == "masked"
    assert torch.equal(got, want)


def test_reasons():
    layer = describe(FAMILIES["llama"]()).layers[0]
    layer.down.weight.data = layer.down.weight.data.to(torch.float8_e4m3fn)
    assert row_weights(layer) == "the FFN's weights are float8_e4m3fn"
    meta = describe(FAMILIES["llama"]().to("meta")).layers[0]
    assert row_weights(meta) == "the FFN's weights are offloaded"
    assert {"masked", "reference"} <= set(backend_names())
    with pytest.raises(ValueError, match="unknown backend 'nope'"):
        choose("nope", "no rows", torch.device("cpu"))
