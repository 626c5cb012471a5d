"""On a real pretrained model, in the precision in which it runs: what is claimed holds outside of toy models."""

from __future__ import annotations

import sys

import pytest
import torch

from dartprune import Dart, Dense, PerToken, Sketch, SketchDart
from dartprune.cli.main import main
from dartprune.demo import pairs
from dartprune.evaluation.forced import forced_losses

pytestmark = [pytest.mark.real, pytest.mark.slow]
CONTEXT, HALF = 64, 128


@pytest.fixture(scope="module")
def texts(smollm2):
    """Three texts that change their topic, [3, 2 HALF], and what the dense model loses on them."""
    model, tokenizer = smollm2
    rows = []
    for _, text, _, other in pairs()[:3]:
        halves = [tokenizer(part, add_special_tokens=False)["input_ids"][: HALF - 1] for part in (text, other)]
        rows.append([tokenizer.eos_token_id, *halves[0], tokenizer.eos_token_id, *halves[1]])
    length = min(len(row) for row in rows)
    tokens = torch.tensor([row[:length] for row in rows])
    return tokens, forced_losses(model, Dense(), tokens, CONTEXT, block=32)[0]


def over_dense(smollm2, texts, pruner, block=32, backend="auto"):
    """Mean loss over dense, and the report."""
    tokens, dense = texts
    losses, report = forced_losses(smollm2[0], pruner, tokens, CONTEXT, block=block, backend=backend)
    return float((losses - dense).mean()), report


def test_the_model_is_what_it_is_said_to_be(smollm2, texts):
    model, _ = smollm2
    assert model.dtype is torch.bfloat16 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert 2.5 < float(texts[1].mean()) < 4.0


def test_the_context_calibrates_the_sketch(smollm2, texts):
    """Half of the FFN's bytes unread: a fraction of a nat, and well under what the plain sketch loses."""
    calibrated, report = over_dense(smollm2, texts, SketchDart(sparsity=0.5, token=Sketch(bits=2)))
    plain, other = over_dense(smollm2, texts, SketchDart(sparsity=0.5, token=Sketch(bits=2, calibrate=False)))
    ceiling, _ = over_dense(smollm2, texts, PerToken(sparsity=0.5))
    assert ceiling < calibrated < 0.7 * plain and calibrated < 0.4 and ceiling < 0.1
    for made in (report, other):
        assert made.realised_sparsity == pytest.approx(0.5, abs=0.005) and made.dense_tokens == 0


def test_kernels_and_masks_agree(smollm2, texts):
    for pruner in (Dart(sparsity=0.5), SketchDart(sparsity=0.5, token=Sketch(bits=2))):
        by_rows, report = over_dense(smollm2, texts, pruner, block=8, backend="cpu")
        by_masks, _ = over_dense(smollm2, texts, pruner, block=8, backend="masked")
        assert report.saves_time and by_rows == pytest.approx(by_masks, abs=0.1)


def test_it_answers_as_before(smollm2):
    model, tokenizer = smollm2
    message = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    plain = model.generate(**asked, max_new_tokens=8, do_sample=False)
    with SketchDart(sparsity=0.5)(model) as run:
        pruned = model.generate(**asked, max_new_tokens=8, do_sample=False)
        assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.generate(**asked, max_new_tokens=8, do_sample=False), plain)
    assert "Paris" in tokenizer.decode(plain[0]) and "Paris" in tokenizer.decode(
        pruned[0, asked["input_ids"].shape[1] :]
    )


def test_the_chat_demo(smollm2, tmp_path, capsys, monkeypatch):
    options = ["--model", "smollm2", "--sparsity", "0.5", "-n", "24", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["dartprune", "demo", *options])
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr().out
    assert "Dense, 24 tokens" in said and "SketchDart" in said and "tokens/s" in said
    assert (tmp_path / "demo-chat.png").stat().st_size > 20_000
