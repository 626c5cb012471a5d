"""Quantised models written to a folder, and the rows that are made of GGUF files once."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

import dartprune
from dartprune import loading
from dartprune.errors import UserError
from dartprune.gguf_files import ffn_bits
from dartprune.loading import load
from dartprune.model.sizes import count, dtype_name
from dartprune.packed_file import NAME, load_packed, save_packed
from tiny import FAMILIES

pytest.importorskip("numba", reason="needs the extra cpu")
IDS = torch.tensor([[5, 9, 77, 3, 64, 21, 12, 90, 45, 33, 2, 8, 41, 7, 19, 88, 60, 14, 71, 27]])


def written(model, **options):
    return model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_saved_model_computes_the_same_bits(family, tmp_path):
    for bits, whole in ((4, True), (8, False), (8, True)):
        model = FAMILIES[family]()
        dartprune.quantise(model, bits, whole=whole)
        folder = tmp_path / f"{bits}-{whole}"
        model.save_pretrained(folder)
        again = load_packed(folder)
        assert dtype_name(again) == f"int{bits}" and not again.training
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(again(IDS[:, :3]).logits, model(IDS[:, :3]).logits)
        assert count(again) == count(model)  # what was shared still is
        assert {n: p.requires_grad for n, p in again.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }


@torch.no_grad()
def test_methods_run_on_a_mapped_model(tmp_path):
    model = FAMILIES["llama"]()
    dartprune.quantise(model)
    model.generation_config.max_length = 77
    save_packed(model, tmp_path)
    again = load_packed(tmp_path)
    assert again.generation_config.max_length == 77
    with dartprune.SketchDart(0.3)(model), dartprune.SketchDart(0.3)(again) as run:
        assert torch.equal(written(again), written(model))
        assert run.report().realised_sparsity > 0.2
        with pytest.raises(ValueError, match="is attached: call"):
            again.save_pretrained(tmp_path / "other")
    again.save_pretrained(tmp_path / "other")  # from one mapped file to another
    assert torch.equal(load_packed(tmp_path / "other")(IDS).logits, model(IDS).logits)
    again.save_pretrained(tmp_path)  # and over its own
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.fixture
def packed(tmp_path):
    """A folder with the small model inside in 4 bits, and its tokenizer."""
    model, tokenizer = load(dtype="int4")
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def one_line(folder, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        load(str(folder), **options)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_folder_in_rows_is_loaded_by_name(packed):
    for dtype in ("auto", "int4"):
        model, tokenizer = load(str(packed), dtype=dtype)
        assert dtype_name(model) == "int4" and tokenizer.padding_side == "left"
    fresh, _ = load(dtype="int4")
    assert torch.equal(model(IDS).logits, fresh(IDS).logits)
    one_line(packed, "holds weights of int4: its dtype is auto or int4, got 'int8'", dtype="int8")
    one_line(packed, "holds weights of int4: its dtype is auto or int4, got 'float32'", dtype="float32")
    one_line(packed, "are for the CPU, not for device 'meta'", device="meta")


def test_what_is_wrong_with_such_a_folder_is_one_line(packed, tmp_path):
    data = (packed / NAME).read_bytes()
    for damaged in (b"", b"no such thing", data[: len(data) // 2], data[:-5000]):
        (packed / NAME).write_bytes(damaged)
        one_line(packed, r"packed\.pt cannot be read: it is damaged")
    held = {"format": 99}
    torch.save(held, packed / NAME)
    one_line(packed, "is of format 99, this version of dartprune reads 2")
    (packed / NAME).write_bytes(data)
    config = json.loads((packed / "config.json").read_text())
    for changed in ({"num_hidden_layers": 9}, {"num_hidden_layers": 2}, {"hidden_size": 64}):
        (packed / "config.json").write_text(json.dumps(config | changed))
        one_line(packed, "does not fit the configuration beside it")
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "generation_config.json").write_text("no such thing")
    one_line(packed, "does not fit the configuration beside it")
    (packed / "generation_config.json").unlink()
    for path in packed.glob("tokenizer*"):
        path.unlink()
    one_line(packed, "no tokenizer could be loaded from")
    with pytest.raises(ValueError, match="cannot be written to"):
        save_packed(load_packed(packed), tmp_path / "packed" / NAME / "inside")


# ---- GGUF files


@pytest.fixture
def cached(tmp_path, monkeypatch, caplog):
    """Where rows of GGUF files are kept."""
    pytest.importorskip("gguf", reason="needs the extra gguf")
    caplog.set_level(logging.WARNING, "dartprune")
    monkeypatch.setenv("DARTPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def file(tmp_path, kind, name="tiny.gguf", **changes):
    from gguf_file import write_gguf

    model = FAMILIES["llama"](intermediate_size=96, **changes)
    write_gguf(model, tmp_path / name, kind)
    return model, tmp_path / name


KINDS = {"Q8_0": "int8", "Q5_0": "int8", "Q4_0": "int4", "Q4_1": "int4", "F16": "bfloat16"}


@pytest.mark.parametrize(("kind", "kept"), list(KINDS.items()))
@torch.no_grad()
def test_a_gguf_file_stays_in_as_many_bits_as_it_has(tmp_path, cached, caplog, monkeypatch, kind, kept):
    _, path = file(tmp_path, kind)
    model, tokenizer = load(str(path))
    assert dtype_name(model) == kept and tokenizer.padding_side == "left"
    whole, _ = load(str(path), dtype="bfloat16")
    assert dtype_name(whole) == "bfloat16"
    if kept == "bfloat16":
        assert not caplog.records and ffn_bits(path) == 16
        return
    assert caplog.text.count("packing tiny.gguf into rows of") == 1
    dartprune.quantise(whole, int(kept[-1]))
    assert torch.equal(model(IDS).logits, whole(IDS).logits)
    # from now on it is mapped: nothing reads the file
    monkeypatch.setattr(loading, "_load", None)
    monkeypatch.setattr("gguf.GGUFReader", None)
    for dtype in ("auto", kept):
        again, tokenizer = load(str(path), dtype=dtype)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert caplog.text.count("packing") == 1 and tokenizer.pad_token_id is not None


@torch.no_grad()
def test_another_file_of_the_same_name_is_packed_anew(tmp_path, cached, caplog):
    _, path = file(tmp_path, "Q8_0")
    first = load(str(path))[0](IDS).logits
    file(tmp_path, "Q4_0", num_hidden_layers=2)
    os.utime(path, ns=(1, 1))
    model, _ = load(str(path))
    assert dtype_name(model) == "int4" and model.config.num_hidden_layers == 2
    assert not torch.equal(model(IDS).logits, first) and caplog.text.count("packing") == 2
    load(str(path), dtype="int8")  # asked for: kept beside the other
    assert sorted(p.name for p in next((cached / "packed").iterdir()).glob("int*")) == ["int4", "int8"]


@torch.no_grad()
def test_where_nothing_can_be_kept_the_model_is_there_nonetheless(tmp_path, cached, caplog, monkeypatch):
    _, path = file(tmp_path, "Q8_0")
    cached.write_text("a file where the folder should be")
    model, _ = load(str(path))
    assert dtype_name(model) == "int8" and "are not kept" in caplog.text
    cached.unlink()
    monkeypatch.setattr("dartprune.quantisation.describe", lambda model: pytest.fail("not asked for"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "numba" else object())
    assert dtype_name(load(str(path))[0]) == "bfloat16"


@torch.no_grad()
def test_an_ffn_that_cannot_be_in_rows_is_unpacked_and_said_so(tmp_path, cached, caplog, monkeypatch):
    _, path = file(tmp_path, "Q8_0")

    def unnamed(path):
        raise UserError("no tensor is named as an FFN's is")

    def refuse(model, bits):
        raise UserError("layer 0 cannot be quantised: so it is")

    monkeypatch.setattr("dartprune.quantisation.quantise", refuse)
    with pytest.raises(ValueError, match="layer 0 cannot be quantised"):
        load(str(path), dtype="int8")
    with monkeypatch.context() as patch:  # a file of experts, whose weights have three sides
        patch.setattr("dartprune.gguf_files.ffn_bits", unnamed)
        assert dtype_name(load(str(path))[0]) == "bfloat16"
    model, _ = load(str(path))
    assert dtype_name(model) == "bfloat16"
    assert "tiny.gguf is unpacked to bfloat16: layer 0 cannot be quantised: so it is" in caplog.text
