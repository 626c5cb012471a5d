"""`dartprune bench` as a user meets it: tables, JSON, pictures, and one clear line for every mistake."""

from __future__ import annotations

import json

import pytest
import torch

from dartprune.bench import device as bench_device


@pytest.fixture
def bench(run, monkeypatch):
    """Call `dartprune bench` with a small stream."""
    monkeypatch.setattr(bench_device, "STREAM", 2**16)
    monkeypatch.setattr(bench_device, "last_level_cache", lambda device: 2**13)
    return lambda *args: run("bench", *args, columns=200)


KERNEL = ("kernel", "--hidden", 16, "--neurons", 32, "--layers", 2, "--turns", 2)


def test_kernel(bench, tmp_path):
    picture, out = tmp_path / "kernel.png", tmp_path / "kernel.json"
    args = (*KERNEL, "--dtype", "float32", "--sparsity", "0.5,0.75", "--batch", "1,2", "--backend", "reference")
    code, text, _ = bench(*args, "--plot", picture, "--out", out)
    assert code == 0 and "zero-copy" in text and "packed copy" in text and "cpu streams" in text
    assert text.count("masked") == 4 and picture.stat().st_size > 5000
    data = json.loads(out.read_text())
    assert data["command"].startswith("dartprune bench kernel --hidden 16") and len(data["rows"]) == 16
    code, text, _ = bench(*args, "--json", "--plain", "--activation", "relu2")
    rows = json.loads(text)["rows"]
    assert code == 0 and {row["extra"]["activation"] for row in rows} == {"relu2"}
    assert not any(row["extra"]["gated"] for row in rows)


def test_decode_on_the_small_model(bench):
    code, text, _ = bench(
        "decode", "--turns", 1, "--new", 4, "--prompt", 20, "--refresh-every", 4, "--method", "static,dart,dense"
    )
    assert code == 0, text
    assert all(
        part in text for part in ("tokens/s", "static", "dart, replay every 4", "dense, attached", "of the limit")
    )
    assert "of a dense step's time" in text


def test_refresh_trace_and_memory(bench):
    code, text, _ = bench("refresh", "--turns", 1, "--prompt", 20)
    assert code == 0 and "products" in text and "attach" in text
    code, text, _ = bench("trace", "--turns", 1, "--prompt", "12,16", "--json")
    assert code == 0 and len(json.loads(text)["rows"]) == 6
    code, text, _ = bench("memory", "--turns", 1, "--prompt", 16, "--method", "static", "--json")
    assert code == 0 and json.loads(text)["rows"][0]["reported"] > 0


def test_help_shows_examples(bench):
    for command in ("kernel", "decode", "refresh", "trace", "memory"):
        code, out, _ = bench(command, "--help")
        assert code == 0 and f"Example: dartprune bench {command}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("kernel", "--sparsity", "1.2"), "sparsity must lie in [0, 1), got 1.2"),
        (("kernel", "--sparsity", "a,b"), "--sparsity a,b: write numbers with commas between them"),
        (("kernel", "--batch", "0"), "batch must be at least 1"),
        (("kernel", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("kernel", "--layers", "0"), "--layers must be at least 1"),
        (("kernel", "--turns", "0"), "--turns must be at least 1"),
        (("kernel", "--backend", "maskd"), "did you mean 'masked'"),
        (("kernel", "--backend", "masked"), "no backend reads single rows here"),
        (("kernel", "--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("decode", "--shape", "llama-3.1-8"), "did you mean 'llama-3.1-8b'"),
        (("decode", "--shape", "gpt2", "--layers", "99"), "gpt2 has 12 layers"),
        (("decode", "--batch", "0"), "batch must be at least 1"),
        (("decode", "--method", "drat"), "did you mean 'dart'"),
        (("decode", "--sparsity", "1.5"), "sparsity must be a number in [0, 1)"),
        (("decode", "--refresh-every", "64"), "no refresh would come within 32 new tokens"),
        (("decode", "--refresh-every", "0"), "every 0 tokens makes no sense"),
        (("decode", "--prompt", "3"), "makes no mask"),
        (("decode", "--graphs"), "--graphs needs CUDA"),
        (("decode", "--plot", "a.gif"), "must end in .png"),
        (("decode", "--out", "/no/such/folder/a.json"), "there is no folder /no/such/folder"),
        (("refresh", "--method", "static"), "Static never replays"),
        (("trace", "--prompt", "0"), "must be at least 1"),
        (("memory", "--method", "dense"), "holds nothing for a sequence"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(bench, args, message):
    if torch.cuda.is_available() and "--graphs" in args:
        pytest.skip("graphs are no mistake here")
    code, out, err = bench(*args)
    assert code == 2, (out, err)
    assert message in err.replace("\n", ""), err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_model_that_does_not_fit(bench, monkeypatch):
    from dartprune.bench import models

    monkeypatch.setattr(models, "free_bytes", lambda device: 10**9)
    code, _, err = bench("decode", "--shape", "llama-3.1-8b")
    assert code == 2 and "llama-3.1-8b in bfloat16 needs 18.5 GB on cpu, 1.0 GB are free" in err
