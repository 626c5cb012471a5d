"""What a model's weights are kept in, told apart wherever results are kept under its name."""

from __future__ import annotations

import copy

import pytest
import torch

from dartprune import quantise
from dartprune.model.sizes import count, dtype_name, fingerprint
from tiny import FAMILIES


def test_packed_weights_have_a_name_and_count_as_many():
    pytest.importorskip("numba")
    model = FAMILIES["llama"]().bfloat16()
    four, eight = copy.deepcopy(model), copy.deepcopy(model)
    quantise(four, 4)
    quantise(eight, 8)
    assert [dtype_name(each) for each in (model, four, eight)] == ["bfloat16", "int4", "int8"]
    assert len({count(each)[0] for each in (model, four, eight)}) == 1
    assert dtype_name(copy.deepcopy(model).half()) == "float16"
    assert count(model) == (sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters()))


def test_packed_weights_tell_one_checkpoint_from_another():
    """Their norms are alike, and what is journaled of one must not be gone on with by the other."""
    pytest.importorskip("numba")
    first = FAMILIES["llama"]()
    other = copy.deepcopy(first)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, :16] += 1.0
    kinds = [(copy.deepcopy(model), bits) for model in (first, other) for bits in (4, 8)]
    for model, bits in kinds:
        quantise(model, bits)
    seen = [fingerprint(model) for model in (first, other, *(model for model, _ in kinds))]
    assert len({str(each) for each in seen}) == 6
    again = copy.deepcopy(first)
    quantise(again, 4)
    assert fingerprint(again) == seen[2]
