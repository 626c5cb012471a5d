"""Sketches: made, saved, loaded, refused; the number of bits that is chosen; layers whose rows cannot be read."""

from __future__ import annotations

import pytest
import torch

from dartprune import GatedDart, PerToken, Sketch, SketchDart
from dartprune.ffn.sketch import build_planes
from dartprune.model.families import describe
from dartprune.model.weights import row_weights
from dartprune.selectors import save_sketch
from dartprune.selectors.sketches import matrices_of, sketch_share
from test_matrix import tokens
from test_unreadable import Quantised
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_saved_and_loaded(family, tmp_path):
    model = FAMILIES[family]()
    path = tmp_path / "sketch.safetensors"
    told = []
    save_sketch(model, path, bits=2, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    ids = tokens(model)
    with SketchDart(sparsity=0.4, token=Sketch(bits=2))(model):
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
    pruner = SketchDart(sparsity=0.4, token=Sketch(file=str(path)))
    for _ in range(2):
        with pruner(model) as run:
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)
            assert all(layer.selector.sketch.up.bits == 2 for layer in run.layers)


def test_files_that_do_not_fit(llama, tmp_path):
    path = tmp_path / "sketch.safetensors"
    save_sketch(llama, path, bits=1)
    other = FAMILIES["llama"]()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 3] += 0.5
    with pytest.raises(ValueError, match=r"made from other weights \(layer 1\): make it anew"):
        SketchDart(token=Sketch(file=str(path))).attach(other)
    with pytest.raises(ValueError, match="holds 1 bits, the pruner asks for 3"):
        SketchDart(token=Sketch(bits=3, file=str(path))).attach(llama)
    with pytest.raises(ValueError, match="there is no such file; make it with"):
        SketchDart(token=Sketch(file=str(tmp_path / "none"))).attach(llama)
    (tmp_path / "junk").write_text("junk that is long enough to hold a header")
    with pytest.raises(ValueError, match="no safetensors file"):
        SketchDart(token=Sketch(file=str(tmp_path / "junk"))).attach(llama)
    with pytest.raises(ValueError, match="bits must be one of"):
        save_sketch(llama, path, bits=9)
    # the model is free after every refusal
    with SketchDart(sparsity=0.4, token=Sketch(file=str(path)))(llama):
        pass


def test_progress_is_told_while_attaching(llama):
    told = []
    run = SketchDart(sparsity=0.4).attach(llama, progress=lambda done, of: told.append((done, of)))
    run.detach()
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_bits_depend_on_what_is_left(llama):
    """Little is left at a high sparsity, so fewer bits are affordable."""
    chosen = []
    for sparsity in (0.1, 0.75):
        run = SketchDart(sparsity=sparsity, token=Sketch(bits="auto")).attach(llama)
        chosen.append(run.layers[0].selector.sketch.up.bits)
        run.detach()
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_the_share_is_what_the_bytes_say(family):
    model = FAMILIES[family]()
    for bits in (1, 3):
        for calibrate in (True, False):
            settings = Sketch(bits=bits, calibrate=calibrate)
            run = SketchDart(sparsity=0.2, token=settings, compensate=None).attach(model)
            for layer in run.layers:
                assert layer.selector.fixed_share(0) == pytest.approx(sketch_share(bits, layer.parts, settings))
            run.detach()


def quantised():
    model = FAMILIES["llama-bias"]()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            linear.bias.data.zero_()
            setattr(layer.mlp, name, Quantised(linear))
    return model


@torch.no_grad()
def test_probing_finds_the_weights():
    model = FAMILIES["llama-bias"]()
    layer = describe(model).layers[0]
    place = torch.device("cpu"), torch.float32
    want = matrices_of(layer, row_weights(layer), *place)
    got = matrices_of(layer, "not readable", *place)
    for name in ("gate", "up", "gate_bias", "up_bias"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(build_planes(got.up, 1).planes, build_planes(want.up, 1).planes)


@pytest.mark.parametrize("make", [GatedDart, lambda **o: SketchDart(token=Sketch(bits=1), **o), PerToken])
@torch.no_grad()
def test_layers_that_cannot_be_read_are_masked(make):
    model = quantised()
    with make(sparsity=0.4)(model) as run:
        model.generate(tokens(model), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        report = run.report()
    assert report.backend == "masked" and not report.saves_time and report.bytes_saved == 0
    assert report.realised_sparsity == pytest.approx(0.4, abs=0.03)


@torch.no_grad()
def test_what_cannot_be_read_has_no_file(tmp_path):
    with pytest.raises(ValueError, match="no sketch file of this model: the up projection"):
        save_sketch(quantised(), tmp_path / "sketch", bits=1)
