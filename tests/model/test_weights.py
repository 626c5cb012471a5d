"""Rows of FFN weights are views of the model's own, or a reason says why they cannot be read."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from dartprune.ffn.backend import activation
from dartprune.ffn.weights import FFNWeights
from dartprune.model.families import describe
from dartprune.model.weights import row_weights
from tiny import FAMILIES


def layer_of(model):
    return describe(model).layers[0]


def by_hand(x, weights):
    """The FFN from its rows."""
    up = nn.functional.linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        a = activation(weights.activation, up)
    else:
        a = activation(weights.activation, nn.functional.linear(x, weights.gate, weights.gate_bias)) * up
    out = a @ weights.down
    return out if weights.down_bias is None else out + weights.down_bias


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_rows_are_views_and_give_the_ffn(family):
    layer = layer_of(FAMILIES[family]())
    weights = row_weights(layer)
    assert isinstance(weights, FFNWeights), weights
    assert weights.down.data_ptr() == layer.down.weight.data_ptr()
    first = weights.gate if layer.fused else weights.up
    assert first is not None and first.data_ptr() == layer.up.weight.data_ptr()
    if layer.fused:
        assert weights.up.data_ptr() == layer.up.weight[layer.neurons :].data_ptr()
    if layer.gate is not None:
        assert weights.gate.data_ptr() == layer.gate.weight.data_ptr()
    for bias, module in ((weights.up_bias, layer.up), (weights.down_bias, layer.down)):
        assert (bias is None) == (getattr(module, "bias", None) is None)
    assert {tuple(m.shape) for m in (weights.gate, weights.up, weights.down) if m is not None} == {
        (layer.neurons, layer.hidden)
    }
    assert not weights.up.requires_grad
    x = torch.randn(5, layer.hidden, generator=torch.Generator().manual_seed(0))
    want = layer.down(layer.activations(x))
    torch.testing.assert_close(by_hand(x, weights), want, rtol=1e-4, atol=1e-4)
    # a view follows its weight
    layer.down.weight.zero_()
    assert weights.down.abs().sum() == 0


def test_a_fused_projection_with_a_bias():
    model = FAMILIES["phi3"]()
    old = model.model.layers[0].mlp.gate_up_proj
    new = nn.Linear(old.in_features, old.out_features, bias=True)
    model.model.layers[0].mlp.gate_up_proj = new
    weights = row_weights(layer_of(model))
    assert weights.gate_bias.data_ptr() == new.bias.data_ptr()
    assert torch.equal(weights.up_bias, new.bias[weights.neurons :])


def test_conv1d_lies_the_other_way():
    layer = layer_of(FAMILIES["gpt2"]())
    weights = row_weights(layer)
    assert type(layer.up) is Conv1D
    assert weights.down.is_contiguous() and not weights.up.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_plain_float(dtype):
    assert row_weights(layer_of(FAMILIES["llama"]().to(dtype))).up.dtype == dtype


class Doubled(nn.Linear):
    """Like a quantised layer: a linear layer by type only."""

    def forward(self, x):
        return 2 * super().forward(x)


class Packed(torch.Tensor):
    """Like a quantised tensor: a subclass."""


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapter(mlp, model):
    model.add_adapter(peft.LoraConfig(target_modules=["down_proj"], r=2))


def other_type(mlp, model):
    mlp.down_proj = Doubled(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)


def subclass(mlp, model):
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().as_subclass(Packed), requires_grad=False)


def integers(mlp, model):
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight.to(torch.int8), requires_grad=False)


def offloaded(mlp, model):
    mlp.down_proj.to("meta")


def mixed(mlp, model):
    mlp.down_proj.to(torch.bfloat16)


def parametrized(mlp, model):
    parametrize.register_parametrization(mlp.down_proj, "weight", Twice())


def pruned(mlp, model):
    prune.l1_unstructured(mlp.down_proj, "weight", amount=0.3)


def hooked(mlp, model):
    mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)


REASONS = {
    adapter: "adapter",
    other_type: "Doubled",
    subclass: "Packed",
    integers: "int8",
    offloaded: "meta",
    mixed: "differ in dtype",
    parametrized: "ParametrizedLinear",
    pruned: "hooks",
    hooked: "hooks",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_the_reason_in_one_line(change):
    model = FAMILIES["llama"]()
    change(model.model.layers[0].mlp, model)
    reason = row_weights(layer_of(model))
    assert isinstance(reason, str) and REASONS[change] in reason and "\n" not in reason
