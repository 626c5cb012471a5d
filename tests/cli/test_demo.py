"""The demo: what it prints is what it measured."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dartprune import Dart, Dense, Static
from dartprune.cli import demo
from dartprune.cli.options import saved
from dartprune.demo import pairs, passages
from dartprune.demo.chat import write_in_turn
from dartprune.evaluation.forced import forced_losses
from dartprune.loading import load


def test_passages_fit_the_demo():
    _, tokenizer = load()
    by_domain = passages()
    assert sorted(by_domain) == ["code", "medicine", "novels", "speeches", "stories", "wiki"]
    assert all(len(texts) >= 2 for texts in by_domain.values())
    for first, text, second, other in pairs():
        assert first != second
        for part in (text, other):
            assert len(tokenizer(part, add_special_tokens=False)["input_ids"]) >= demo.HALF - 1, (first, second)


def test_the_demo_in_small(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "HALF", 96)
    demo.demo(sparsity=0.5, out=tmp_path / "new", backend="auto", as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert [arm["arm"] for arm in data["arms"]] == ["Dense", "Static", "Dart", "GatedDart", "SketchDart"]
    dense, static, dart, gated, sketched = data["arms"]
    tokens = 6 * (2 * 96 - 64)
    assert dense["dense_tokens"] == tokens and dart["pruned_tokens"] == static["pruned_tokens"] == tokens
    assert dart["realised_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert dense["perplexity_after"] < dart["perplexity_after"] and static["events_after"] == 0
    assert dart["events_after"] > 0 and (tmp_path / "new" / "demo.png").stat().st_size > 20_000
    assert gated["realised_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert sketched["realised_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert sketched["perplexity_after"] < gated["perplexity_after"] < dart["perplexity_after"]
    assert len(data["sample"]["text"]) > 20


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.70349, "0.703"), (0.0, "0.000"), (-0.0, "0.000"), (-1e-5, "0.000"), (-0.0312, "none (3.1% more read)")],
)
def test_what_is_saved_is_never_negative(share, said):
    assert saved(share) == said


def test_the_demo_says_why_a_batch_saves_less_bytes_than_neurons(capsys):
    row = {
        **{"arm": "Dart", "perplexity_before": 9.0, "perplexity_after": 9.0, "realised_sparsity": -0.0},
        **{"bytes_saved": -0.02, "events_before": 0, "events_after": 0, "tokens_until_noticed": None},
    }
    data = {
        **{"texts": ["a to b", "b to a"], "prompt_tokens": 4, "decoded_tokens_of_each_half": [4, 4], "backend": "cpu"},
        **{"parameters": 10**7, "arms": [row] * 5, "saves_time": True, "picture": "p.png"},
        "sample": {"domain": "a", "prompt_ends": "x", "text": "y"},
    }
    demo._show(data)
    out = " ".join(capsys.readouterr().out.split())
    assert "a step reads the union" in out and "none (2.0%" in out and "-0." not in out


@torch.no_grad()
def test_forced_losses_equal_a_plain_forward_when_dense():
    model, tokenizer = load()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:100] for _, text, _, _ in pairs()[:2]]
    tokens = torch.tensor(rows)
    model = model.float()
    losses, report = forced_losses(model, Dense(), tokens, 40)
    logits = model(input_ids=tokens).logits
    want = torch.nn.functional.cross_entropy(logits[:, 39:-1].flatten(0, 1), tokens[:, 40:].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), want, rtol=1e-3, atol=1e-3)
    assert report.dense_tokens == 2 * 60
    pruned, report = forced_losses(model, Static(sparsity=0.8), tokens, 40)
    assert report.realised_sparsity == pytest.approx(0.8, abs=0.01)
    assert pruned[:, 0].sub(losses[:, 0]).abs().max() > 1e-3, "the first scored token was not pruned"
    with pytest.raises(ValueError, match="context must lie between 2 and 99"):
        forced_losses(model, Dense(), tokens, 100)


@torch.no_grad()
def test_valid_texts_that_change_their_domain(shared):
    """Real input: DART loses less than the prompt's mask after a change of domain, at the same realised sparsity."""
    import lzma

    model, tokenizer = load()
    halves = {}
    for name in ("medicine", "stories", "code", "novels"):
        text = lzma.decompress((shared / "data" / "domains" / f"{name}.valid.txt.xz").read_bytes()).decode()
        halves[name] = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    rows = [
        [*halves[a][i * 300 : i * 300 + 200], 0, *halves[b][i * 300 : i * 300 + 199]]
        for i, (a, b) in enumerate(
            [("medicine", "stories"), ("stories", "code"), ("code", "novels"), ("novels", "medicine")]
        )
    ]
    tokens = torch.tensor(rows)
    after = {}
    for pruner in (Dense(), Static(sparsity=0.7), Dart(sparsity=0.7)):
        losses, report = forced_losses(model, pruner, tokens, 100)
        after[pruner.name] = losses[:, 100:].mean()
        if pruner.prunes:
            assert report.realised_sparsity == pytest.approx(0.7, abs=0.005)
            assert report.dense_tokens == 0
    assert after["Dense"] < after["Dart"] < after["Static"]
    assert all(math.isfinite(value) for value in after.values())


@torch.no_grad()
def test_a_model_that_nobody_here_trained(shared):
    model, tokenizer = load(str(shared / "models" / "stories260K"))
    inputs = tokenizer("once upon a time there was a little girl", return_tensors="pt", return_token_type_ids=False)
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    with Dart(sparsity=0.3)(model) as run:
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        report = run.report()
    assert out.shape == plain.shape and report.realised_sparsity > 0.2
    assert torch.equal(model.generate(**inputs, max_new_tokens=40, do_sample=False), plain)


def test_an_answer_of_one_token_has_no_rate():
    model, tokenizer = load()
    prompt = tokenizer("once upon a time there was a dog", return_tensors="pt", return_token_type_ids=False)
    plain = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    found = write_in_turn(model, tokenizer, [Dense(), Static(sparsity=0.5)], prompt, most=3, repetitions=2)
    assert [len(written.rates) for written in found] == [2, 2] and found[0].tokens_per_second > 0
    assert found[0].text == tokenizer.decode(plain[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0].losses.abs().max() == 0 and found[1].losses.shape == (3,)
    model.generation_config.eos_token_id = int(plain[0, prompt["input_ids"].shape[1]])
    (alone,) = write_in_turn(model, tokenizer, [Dense()], prompt, most=3, repetitions=1)
    assert (alone.tokens, alone.tokens_per_second) == (1, None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-n", 50), "--max-new-tokens 50 is for a chat model's answer: name one with --model"),
        (("--model", "demo"), "this model's tokenizer has no chat template"),
        (("--model", "demo", "--sparsity", 1.7), "sparsity must be a number in [0, 1)"),
        (("--model", "/no/such/model"), "there is no model folder or .gguf file at '/no/such/model'"),
        (("--model", "demo", "--backend", "cpux"), "unknown backend 'cpux': did you mean 'cpu'"),
    ],
)
def test_mistakes_of_the_chat_demo_are_one_line(run, tmp_path, args, message):
    code, _, err = run("demo", *args, "--out", tmp_path)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err
