"""Named shapes are what they are named after; what does not fit is refused before it is built."""

from __future__ import annotations

import pytest
import torch

from dartprune.bench import models
from dartprune.bench.costs import LLAMA_3_1_8B, Shape
from dartprune.bench.device import BandwidthProbe, device_of, free_bytes, last_level_cache, resident_bytes
from dartprune.bench.models import build, check_room, config_of, dtype_of, fill, prompts, shapes, subject

# parameters as published, in millions
PUBLISHED = {"llama-3.2-1b": 1235.8, "llama-3.2-3b": 3212.7, "llama-3.1-8b": 8030.3, "qwen3-0.6b": 596.0, "gpt2": 124.4}


@pytest.mark.parametrize("name", shapes.names())
def test_shapes_have_the_published_number_of_parameters(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.1)
    shape = Shape.of(model)
    if name == "llama-3.1-8b":
        assert (shape.layers, shape.hidden, shape.neurons) == (32, 4096, 14336)
        assert shape.step_bytes == pytest.approx(LLAMA_3_1_8B.step_bytes, rel=1e-4)


def test_a_built_model_is_random_in_its_dtype_and_decodes(monkeypatch):
    small = shapes.get("qwen3-0.6b") | {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    small |= {"bos_token_id": 1, "eos_token_id": 2}
    monkeypatch.setattr(models, "shapes", {"small": small})
    made = build("small", dtype="bfloat16", layers=2)
    assert (made.layers, made.all_layers, made.dtype) == (2, 28, "bfloat16") and "2 of the 28 layers" in made.notes[0]
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16} and not made.model.training
    up, down = made.model.model.layers[0].mlp.up_proj.weight, made.model.model.layers[1].mlp.down_proj.weight
    assert up.detach().float().std() == pytest.approx(0.02, rel=0.1) and not torch.equal(up.flatten(), down.flatten())
    out = made.model.generate(prompts(made.model, 2, 6), max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 9) and torch.isfinite(made.model(out).logits).all()


def test_filling_covers_tensors_larger_than_the_block(monkeypatch):
    monkeypatch.setattr(models, "_BLOCK", 101)
    tensors = [torch.full((30, 40), float("nan")), torch.full((7,), float("nan"), dtype=torch.bfloat16)]
    fill(tensors, 2.0)
    assert all(torch.isfinite(t).all() for t in tensors) and tensors[0].std() == pytest.approx(2.0, rel=0.2)
    assert tensors[0].view(-1)[0] == tensors[0].view(-1)[101]
    # the next one goes on where the last one ended
    torch.testing.assert_close(tensors[1], tensors[0].view(-1)[1200 - 1111 :][:7].bfloat16())


def test_what_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: 10 * 2**20)
    monkeypatch.setattr(models, "_randomise", lambda model: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=r"gpt2 in float32 needs 0.6 GB on cpu, 0.0 GB are free"):
        build("gpt2", dtype="float32")
    monkeypatch.setattr(models, "free_bytes", lambda device: None)
    check_room("anything", 10**15, torch.device("cpu"))  # a system that does not tell


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None, "shape": "lama-3.1-8b"}, "did you mean 'llama-3.1-8b'"),
        ({"model": None, "shape": "gpt2", "layers": 13}, "gpt2 has 12 layers"),
        ({"model": None, "shape": "gpt2", "dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"model": "x", "shape": "gpt2"}, "either --model or --shape"),
        ({"model": None, "shape": None, "layers": 2}, "--layers goes with --shape"),
        ({"model": None, "shape": "gpt2", "device": "nonsense"}, "device 'nonsense' cannot be used"),
        ({"model": None, "shape": "gpt2", "device": "meta"}, "write cpu or cuda"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ValueError, match=message):
        subject(**given)


def test_prompts_are_random_the_same_and_no_longer_than_the_context(tiny_subject):
    model = tiny_subject().model
    tokens = prompts(model, 3, 20)
    assert (
        tokens.shape == (3, 20) and torch.equal(tokens, prompts(model, 3, 20)) and not torch.equal(tokens[0], tokens[1])
    )
    assert int(tokens.min()) >= 0 and int(tokens.max()) < model.config.vocab_size
    with pytest.raises(ValueError, match="more than the model's context of 256"):
        prompts(model, 1, 257)


def test_the_device_tells_what_it_has():
    device = device_of(None)
    assert device.type == "cpu" and last_level_cache(device) >= 2**16 and free_bytes(device) > 2**20
    before = resident_bytes()
    held = torch.ones(2**24)
    assert resident_bytes() - before > 0.9 * held.nbytes
    assert dtype_of("float16") is torch.float16
    stream = BandwidthProbe(device, 2**20)
    assert stream.bytes == 2**20 and stream.bandwidth(turns=3).lower > 0
