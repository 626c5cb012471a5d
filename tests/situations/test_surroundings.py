"""What a process has switched on around a run: default dtypes and devices, autocast, seeds; and how weights lie."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dartprune
from dartprune import Dart, Dense, Static, presets
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def generated(model, **options):
    text = tokens(model, lines=2, length=16)
    call = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(text, attention_mask=torch.ones_like(text), **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", presets.names())
def test_every_preset_under_another_default_dtype(llama, name, dtype):
    pruner = presets.get(name)()
    with pruner(llama):
        want = generated(llama)
    torch.set_default_dtype(dtype)
    try:
        with pruner(llama) as run:
            got = generated(llama)
            energies = [trace for layer in run.layers for trace in layer.trace.tensors().values()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert all(part.dtype is torch.float32 for part in energies)


@pytest.mark.parametrize("name", ["dart", "gated-dart", "sketch-dart"])
def test_a_default_device_does_not_matter(llama, name):
    pruner = presets.get(name)()
    text = tokens(llama, lines=2, length=16)
    new = tokens(llama, lines=2, length=3, seed=1)
    outs = []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            with pruner(llama) as run, torch.no_grad():
                with run.phase("prefill"):
                    cache = llama(input_ids=text, position_ids=positions(16), use_cache=True).past_key_values
                with run.phase("decode"):
                    call = {"position_ids": positions(1) + 16, **handed(cache)}
                    outs.append(llama(input_ids=new[:, :1], **call).logits)
                assert run.report().pruned_tokens == 2
        finally:
            torch.set_default_device("cpu")  # None leaves torch 2.6 unable to say which it is
    assert torch.equal(*outs)


def positions(count):
    return torch.arange(count, device="cpu")[None]


@pytest.mark.parametrize("backend", ["reference", "masked", "cpu"])
def test_autocast(llama, backend):
    with torch.autocast("cpu", dtype=torch.bfloat16), Static(sparsity=0.5)(llama, backend=backend) as run:
        out = generated(llama)
    assert out.shape == (2, 28) and run.report().pruned_tokens == 22


@pytest.mark.parametrize("name", presets.names())
def test_models_in_64_bits(name):
    model = FAMILIES["llama"]().double()
    wants = []
    for backend in ("masked", "reference"):
        with presets.get(name)()(model, backend=backend) as run:
            wants.append(generated(model))
            assert run.report().pruned_tokens > 0 or name == "dense"
    assert torch.equal(*wants)


@pytest.mark.parametrize("name", presets.names())
def test_attaching_draws_no_numbers(llama, name):
    before = torch.get_rng_state()
    with presets.get(name)()(llama):
        generated(llama)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_stay_what_they_are(llama):
    torch.manual_seed(3)
    free = generated(llama, do_sample=True, top_k=0)
    torch.manual_seed(3)
    with Dense()(llama):
        assert torch.equal(generated(llama, do_sample=True, top_k=0), free)


def test_weights_are_saved_while_attached(llama, tmp_path):
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    with Static(sparsity=0.5)(llama, backend="cpu"):
        save_file(llama.state_dict(), tmp_path / "weights.safetensors")
        llama.save_pretrained(tmp_path / "model")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(loaded[name], weight) for name, weight in before.items())
    other = type(llama).from_pretrained(tmp_path / "model")
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


def test_shared_storage_is_shared_again(llama):
    twin = FAMILIES["llama"]()
    twin.load_state_dict(llama.state_dict(), assign=True)
    with Static(sparsity=0.5)(llama):
        generated(llama)
    for name, weight in llama.state_dict().items():
        assert weight.data_ptr() == twin.state_dict()[name].data_ptr(), name
    llama.share_memory()
    with Static(sparsity=0.5)(llama):
        generated(llama)
    assert all(weight.is_shared() for weight in llama.parameters())


def test_a_compiled_ffn_works_or_is_refused_by_name(llama):
    for layer in llama.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    free = generated(llama)
    with Dense()(llama):
        assert torch.equal(generated(llama), free)
    with Dart(sparsity=0.5)(llama) as run:
        generated(llama)
    assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.05)


def test_a_lost_handle_is_found_again(llama):
    Dart(sparsity=0.3).attach(llama)
    with pytest.raises(ValueError, match=r"dartprune\.detach\(model\)"):
        Dart(sparsity=0.3).attach(llama)
    run = dartprune.run_of(llama)
    assert "Dart" in repr(run) and "attached" in repr(run)
    dartprune.detach(llama)
    assert dartprune.run_of(llama) is None
    assert all("forward" not in vars(module) for module in llama.modules())
    dartprune.detach(llama)  # nothing is left to do
    with pytest.raises(TypeError, match="a transformers model is needed, got Linear"):
        dartprune.detach(nn.Linear(2, 2))
