"""A token selector from outside of the package: settings, and what chooses for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from dartprune import Pruner, Uniform
from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.runtime.selectors.layer_selector import LayerSelector
from dartprune.selectors import TokenSelector, register_selector, register_token, token_kinds
from dartprune.selectors.settings import live_selectors
from oracle import assert_untouched, masked_by_hand, snapshot
from test_matrix import tokens
from tiny import FAMILIES


@dataclass(frozen=True)
class UpOnly(TokenSelector):
    """Neurons by the size of their up product alone."""

    kind: ClassVar[str] = "up-only"
    sharpness: float = 1.0

    def split(self, rows, neurons, *, gated):
        return neurons, round(rows)


class UpOnlyLayer(LayerSelector):
    """Its live form."""

    def scores(self, a, x, slots):
        return self.layer.products(x)[1].float().abs()


PRUNER = Pruner(sparsity=0.5, token=UpOnly(), budget=Uniform())


@pytest.fixture
def registered():
    register_token(UpOnly)
    register_selector(UpOnly)(UpOnlyLayer)
    yield
    del token_kinds._values["up-only"], live_selectors._values["up-only"]


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_it_decodes_as_its_choice_says(family, registered):
    model = FAMILIES[family]()
    before = snapshot(model)
    ids, new = tokens(model), tokens(model, length=1, seed=3)
    whole = [torch.ones(2, layer.neurons, dtype=torch.bool) for layer in describe(model).layers]
    plain = model(input_ids=ids, use_cache=True).past_key_values
    with masked_by_hand(model, whole, best_half):
        want = model(input_ids=new, **handed(plain), use_cache=True).logits
    with PRUNER(model) as run:
        cache = run.prefill(ids)
        with run.phase("decode"):
            got = model(input_ids=new, **handed(cache), use_cache=True).logits
        report = run.report()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.01) and not report.saves_time
    assert "UpOnly has no kernels: its choice is applied as a mask, which saves no time" in report.notes
    assert_untouched(model, before)


def best_half(layer, a, x, candidates):
    """The rule written out."""
    up = type(layer.up).forward(layer.up, x).abs()
    zero = torch.zeros(layer.neurons)
    down = type(layer.down).forward(layer.down, torch.eye(layer.neurons)) - type(layer.down).forward(layer.down, zero)
    score = up * down.norm(dim=1)
    used = torch.zeros(a.shape, dtype=torch.bool)
    return used.scatter(-1, score.topk(round(0.5 * layer.neurons), dim=-1).indices, True)


def test_a_batch_writes_what_each_writes_alone(registered):
    model = FAMILIES["llama"]()
    texts = [tokens(model, lines=1, length=n, seed=n) for n in (9, 20)]
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with PRUNER(model):
        alone = [model.generate(text, **options)[0, -10:].tolist() for text in texts]
    ids = torch.cat([F.pad(text, (20 - text.shape[1], 0)) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (20 - text.shape[1], 0)) for text in texts])
    with PRUNER(model):
        assert model.generate(ids, attention_mask=mask, **options)[:, -10:].tolist() == alone


def test_it_is_saved_and_read(registered):
    pruner = replace(PRUNER, token=UpOnly(sharpness=2.0))
    assert Pruner.from_dict(pruner.to_dict()) == pruner


def test_settings_that_nothing_chooses_for_are_refused_before_anything_is_patched():
    model = FAMILIES["llama"]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"nothing chooses for UpOnly: register .*register_selector"):
        PRUNER.attach(model)
    assert_untouched(model, before)
    with Pruner(sparsity=0.5)(model):
        pass
