"""The layout by rows: same values, shapes and Parameter objects while it lasts, bit-identical afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from dartprune import Static
from dartprune.model.families import describe
from dartprune.model.layout import RowLayout, scattered, shared_weights, storage_owners
from dartprune.model.weights import row_weights
from oracle import assert_untouched, snapshot
from test_matrix import tokens
from tiny import FAMILIES


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "falcon"])
@torch.no_grad()
def test_there_and_back(family):
    model = FAMILIES[family]()
    before = snapshot(model)
    parameters = [id(p) for p in model.parameters()]
    plain = model(input_ids=tokens(model)).logits
    layout = RowLayout()
    for layer in describe(model).layers:
        modules = scattered(layer)
        # GPT-2 keeps its weights the other way round: there it is the first projection that must turn
        assert modules == [layer.up if family == "gpt2" else layer.down]
        layout.apply(modules)
        weights = row_weights(layer)
        assert all(rows.is_contiguous() for rows in (weights.gate, weights.up, weights.down) if rows is not None)
        assert scattered(layer) == []
    assert [id(p) for p in model.parameters()] == parameters
    for name, value in model.state_dict().items():
        assert torch.equal(value, before["weights"][name]) and value.shape == before["weights"][name].shape
    torch.testing.assert_close(model(input_ids=tokens(model)).logits, plain, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=tokens(model)).logits, model(input_ids=tokens(model)).logits)
    layout.undo()
    layout.undo()
    assert_untouched(model, before)
    assert torch.equal(model(input_ids=tokens(model)).logits, plain)


def test_shared_weights_are_left_alone():
    model = FAMILIES["llama"]()
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    before = snapshot(model)
    parts = describe(model).layers
    owners = storage_owners(model)
    assert "shares its weights" in shared_weights(owners, [parts[0].down])
    assert shared_weights(owners, [parts[2].down]) is None
    with Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=4, min_new_tokens=4)
        report = run.report()
    assert set(report.backend.split("+")) == {"masked", "cpu"} and not report.saves_time
    assert any("shares its weights" in note for note in report.notes)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot be used: the FFN shares its weights"):
        Static().attach(model, backend="cpu")
    assert_untouched(model, before)


def test_an_attach_that_fails_half_way_puts_everything_back(monkeypatch):
    from dartprune.ffn.cpu.backend import CpuBackend

    model = FAMILIES["llama"]()
    before = snapshot(model)
    calls = []

    def prepare(self, weights):
        calls.append(weights)
        if len(calls) == 2:
            raise MemoryError("no room")

    monkeypatch.setattr(CpuBackend, "prepare", prepare)
    with pytest.raises(MemoryError):
        Static().attach(model, backend="cpu")
    assert_untouched(model, before)
    monkeypatch.undo()
    Static().attach(model).detach()


def test_files_behind_weights_are_not_written(tmp_path):
    from safetensors.torch import load_file

    made = FAMILIES["llama"]()
    made.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.chmod(0o444)
    content = file.read_bytes()
    made.load_state_dict(load_file(file), strict=False, assign=True)  # the parameters now lie in the mapped file
    made.tie_weights()
    before = snapshot(made)
    mapped = made.model.layers[0].mlp.down_proj.weight.data_ptr()
    run = Static(sparsity=0.5).attach(made, backend="cpu")
    assert made.model.layers[0].mlp.down_proj.weight.data_ptr() != mapped
    made.generate(tokens(made), max_new_tokens=4, min_new_tokens=4)
    made.save_pretrained(tmp_path / "again")
    run.detach()
    assert_untouched(made, before)
    assert file.read_bytes() == content
    again = type(made).from_pretrained(tmp_path / "again").state_dict()
    for name, value in before["weights"].items():
        assert torch.equal(again[name], value), name


def test_memory_mapped_weights(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model = type(FAMILIES["llama"]()).from_pretrained(tmp_path).eval()
    before = snapshot(model)
    with Static(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=4, min_new_tokens=4)
        assert run.report().backend == "cpu"
    assert_untouched(model, before)
