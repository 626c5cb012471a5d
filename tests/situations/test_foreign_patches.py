"""Others patch the same modules while we are there, and leave in another order: each takes off only what is his own."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

from dartprune import Static
from oracle import assert_untouched, snapshot
from test_matrix import tokens
from tiny import FAMILIES

hooks = pytest.importorskip("accelerate.hooks")


class Counting(hooks.ModelHook):
    """A hook of accelerate that counts what passes."""

    def __init__(self):
        self.passed = 0

    def pre_forward(self, module, *args, **kwargs):
        self.passed += 1
        return args, kwargs


PLACES = {
    "ffn": lambda model: model.model.layers[1].mlp,
    "down": lambda model: model.model.layers[1].mlp.down_proj,
    "gate": lambda model: model.model.layers[1].mlp.gate_proj,
    "norm": lambda model: model.model.layers[1].post_attention_layernorm,
    "attention": lambda model: model.model.layers[2].self_attn.o_proj,
    "model": lambda model: model,
    "layer": lambda model: model.model.layers[1],
}


def generated(model):
    return model.generate(tokens(model), max_new_tokens=8, min_new_tokens=8, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["masked", "cpu"])
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_comes_while_attached_and_goes_afterwards(place, backend):
    model = FAMILIES["llama"]()
    before, plain = snapshot(model), generated(model)
    with Static(sparsity=0.5)(model, backend=backend):
        pruned = generated(model)
    module, hook = PLACES[place](model), Counting()
    run = Static(sparsity=0.5).attach(model, backend=backend)
    hooks.add_hook_to_module(module, hook)
    assert torch.equal(generated(model), pruned)
    passed = hook.passed
    assert passed == 8
    report = run.report()
    assert report.pruned_tokens == 14 and report.realised_sparsity == pytest.approx(0.5, abs=0.05)
    run.detach()
    assert torch.equal(generated(model), plain)
    assert hook.passed == passed + 8, "the hook was taken off"
    assert place in ("gate", "layer") or any("patched by somebody else" in note for note in run.report().notes)
    copy.deepcopy(model)
    with Static(sparsity=0.5)(model) as run:
        assert torch.equal(generated(model), pruned)
        assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.05)
    hooks.remove_hook_from_module(module)
    assert torch.equal(generated(model), plain)
    copy.deepcopy(model)
    pickle.dumps(model)
    vars(module).pop("forward")  # accelerate leaves the class's own behind
    assert_untouched(model, before)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_comes_and_goes_while_attached(place):
    model = FAMILIES["llama"]()
    plain = generated(model)
    with Static(sparsity=0.5)(model):
        pruned = generated(model)
    module = PLACES[place](model)
    run = Static(sparsity=0.5).attach(model)
    hooks.add_hook_to_module(module, Counting())
    hooks.remove_hook_from_module(module)
    assert torch.equal(generated(model), pruned)
    run.detach()
    assert torch.equal(generated(model), plain)
    with Static(sparsity=0.5)(model):
        assert torch.equal(generated(model), pruned)


@torch.no_grad()
@pytest.mark.parametrize("place", ["ffn", "down", "norm", "attention", "model"])
def test_a_hook_that_was_there_before_and_goes_while_attached(place):
    """It takes our wrapper off with it, so that the layer would run unpruned."""
    model = FAMILIES["llama"]()
    before, plain = snapshot(model), generated(model)
    module = PLACES[place](model)
    hooks.add_hook_to_module(module, Counting())
    run = Static(sparsity=0.5).attach(model)
    generated(model)
    hooks.remove_hook_from_module(module)
    with pytest.raises(ValueError, match=r"the .*forward.* was replaced while attached: call run\.detach"):
        generated(model)
    assert run.report().pruned_tokens == 14
    run.detach()
    assert torch.equal(generated(model), plain)
    vars(module).pop("forward")  # accelerate leaves the class's own behind
    assert_untouched(model, before)


@torch.no_grad()
@pytest.mark.parametrize("place", ["ffn", "down", "gate"])
def test_a_hook_that_stays_all_the_time(place):
    model = FAMILIES["llama"]()
    hook = Counting()
    hooks.add_hook_to_module(PLACES[place](model), hook)
    before, plain = snapshot(model), generated(model)
    hook.passed = 0
    with Static(sparsity=0.5)(model) as run:
        generated(model)
        assert hook.passed >= 8 and run.report().backend == "cpu+masked"
    assert torch.equal(generated(model), plain)
    assert_untouched(model, before)


@torch.no_grad()
def test_hooks_that_only_move_inputs_do_not_hinder_the_row_kernels():
    model = FAMILIES["llama"]()
    with Static(sparsity=0.5)(model):
        pruned = generated(model)
    for module in model.model.layers.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    with Static(sparsity=0.5)(model) as run:
        assert torch.equal(generated(model), pruned)
        assert run.report().backend == "cpu"


def closure(module):
    inner = module.forward

    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    return forward


def partial(module):
    return functools.partial(closure(module))


@torch.no_grad()
@pytest.mark.parametrize("wrap", [closure, partial])
def test_plain_functions_around_ours_that_outlive_us(wrap):
    model = FAMILIES["llama"]()
    plain = generated(model)
    with Static(sparsity=0.5)(model):
        pruned = generated(model)
    module = model.model.layers[1].mlp
    run = Static(sparsity=0.5).attach(model)
    module.forward = wrap(module)
    assert torch.equal(generated(model), pruned)
    run.detach()
    assert torch.equal(generated(model), plain)
    with Static(sparsity=0.5)(model) as run:
        generated(model)
        assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.05)
    assert torch.equal(generated(model), plain)


@torch.no_grad()
def test_a_forward_that_knows_nothing_of_ours():
    model = FAMILIES["llama"]()
    module = model.model.layers[1].mlp
    run = Static(sparsity=0.5).attach(model)
    module.forward = lambda x: torch.zeros_like(x)
    with pytest.raises(ValueError, match=r"layer 1's FFN \(LlamaMLP\) was replaced while attached"):
        generated(model)
    run.detach()
    assert torch.equal(module(torch.ones(1, 32)), torch.zeros(1, 32)), "what is not ours was taken off"
