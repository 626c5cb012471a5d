"""Pruners in folders: what was saved comes back, sketches too; and pipelines of transformers on an attached model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import pipeline

import dartprune
from dartprune import Dart, GatedDart, Pruner, Sketch, SketchDart, Uniform
from dartprune.loading import load
from tiny import FAMILIES


@pytest.mark.parametrize("pruner", [Dart(0.6, budget=Uniform()), GatedDart(0.4), Pruner(sparsity=0.3)])
def test_settings_come_back(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "new" / "folder")
    again = Pruner.from_pretrained(tmp_path / "new" / "folder")
    assert again == pruner and type(again) is type(pruner)
    assert json.loads((tmp_path / "new/folder/dartprune.json").read_text())["dartprune"] == dartprune.__version__


def test_a_sketch_lies_beside_them_and_is_used(tmp_path):
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    pruner = SketchDart(0.4, token=Sketch(bits=2))
    pruner.save_pretrained(tmp_path / "a", model)
    again = Pruner.from_pretrained(tmp_path / "a")
    assert again.token.file == str(tmp_path / "a" / "dartprune-sketch.safetensors")
    ids = torch.arange(3, 23)[None]
    out = []
    for each in (pruner, again):
        with each(model) as run:
            out.append(model.generate(ids, max_new_tokens=12, do_sample=False).tolist())
            assert run.report().realised_sparsity > 0.2
    assert out[0] == out[1]
    again.save_pretrained(tmp_path / "b")  # its file is copied
    again.save_pretrained(tmp_path / "a")  # onto itself: left alone
    for folder in ("a", "b"):
        with Pruner.from_pretrained(tmp_path / folder)(FAMILIES["llama"]() if folder == "none" else model):
            pass


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"holds no dartprune\.json"):
        Pruner.from_pretrained(tmp_path)
    for text, said in (("{", "no JSON"), ("[1]", "this is a list"), ('{"version": 1, "sparsty": 0.3}', "sparsity")):
        (tmp_path / "dartprune.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            Pruner.from_pretrained(tmp_path)
    model = FAMILIES["llama"]()
    for pruner in (Dart(0.5), SketchDart(0.5), SketchDart(0.5, token=Sketch(bits=2, file="somewhere"))):
        with pytest.raises(ValueError, match="to write its sketch"):
            pruner.save_pretrained(tmp_path, model)
    with pytest.raises(ValueError, match="no such file"):
        SketchDart(0.5, token=Sketch(bits=2, file="nowhere.safetensors")).save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="this is a file"):
        Dart(0.5).save_pretrained(tmp_path / "file")


def test_a_pipeline_of_transformers_works_attached():
    model, tokenizer = load()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "return_full_text": False}
    texts = [
        "The patient should take one tablet of this medicine every day",
        "def main(args):\n    parser = ArgumentParser()\n",
    ]
    dense = write(texts, **options)
    with Dart(0.5)(model) as run:
        pruned = write(texts, **options)
        report = run.report()
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.02) and len(report.sequences) == 2
    assert all(len(answer[0]["generated_text"]) > 0 for answer in pruned)
    assert write(texts, **options) == dense
