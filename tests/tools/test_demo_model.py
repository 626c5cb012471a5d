"""The scripts that make the demo model, on a corpus of two toy domains."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dartprune.loading import load

TOOLS = Path(__file__).parents[2] / "tools" / "demo_model"


@pytest.fixture
def tools(monkeypatch):
    """The scripts as modules, found as they find each other when run."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import assess
    import card
    import corpus
    import train

    return {"assess": assess, "card": card, "corpus": corpus, "train": train}


def words(seed: int, letters: str, count: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join("".join(draw.choice(list(letters), 4)) for _ in range(count))


@pytest.fixture
def prepared(tools, tmp_path):
    """A prepared corpus: one domain of low letters, one of high ones."""
    texts = tmp_path / "texts"
    texts.mkdir()
    seeds = iter(range(100))
    for name, letters in (("low", "abcd"), ("high", "wxyz")):
        for split, count in (("train", 6), ("valid", 3)):
            documents = [words(next(seeds), letters, 400) for _ in range(count)]
            (texts / f"{name}.{split}.txt").write_text("\n<|doc|>\n".join(documents))
    tools["corpus"].prepare([texts], tmp_path / "corpus", None, 300)
    return tmp_path / "corpus"


def never() -> bool:
    return False


def small(tools):
    train = tools["train"]
    return train.Shape(hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, context=256), train.Recipe(
        batch=512, short=128, long=256, shortest_stretch=16, warmup=2
    )


def training(tools, corpus, out):
    return tools["train"].Training(corpus, out, *small(tools), torch.device("cpu"))


def test_documents_are_cleaned(tools):
    clean, long = tools["corpus"].clean, "a text that is long enough to be learnt from, "
    train = {"a": ["too short", long + "one", long + "ONE  ", long + "held out"], "b": [long + "one"]}
    assert clean(train, {"a": [long + "Held\nout"]}) == {"a": [long + "one"]}


def test_the_corpus_is_tokens_that_read_back(tools, prepared):
    tokenizer = tools["train"].AutoTokenizer.from_pretrained(prepared / "tokenizer")
    about = json.loads((prepared / "corpus.json").read_text())
    assert about["vocabulary"] == len(tokenizer) == 300
    for name, row in about["domains"].items():
        tokens = np.load(prepared / f"{name}.train.npy")
        assert len(tokens) == row["train_tokens"] and row["documents"] == (tokens == 0).sum() == 6
        text = tokenizer.decode(tokens[1:50].tolist())
        assert set(text) <= set("abcd " if name == "low" else "wxyz ")


def test_half_of_the_sequences_change_their_domain(tools, prepared):
    train = tools["train"]
    recipe = small(tools)[1]
    sequences = train.Sequences(prepared, recipe)
    assert torch.equal(sequences.batch(3, 128), sequences.batch(3, 128))
    assert not torch.equal(sequences.batch(3, 128), sequences.batch(4, 128))
    mine = {name: set(np.unique(tokens)) - {0} for name, tokens in sequences.tokens.items()}
    only = {name: mine[name] - mine["high" if name == "low" else "low"] for name in mine}
    changing = bare = rows = 0
    for number in range(60):
        for row in sequences.batch(number, 128).tolist():
            assert row[0] == 0
            at = {name: [i for i, token in enumerate(row) if token in only[name]] for name in only}
            rows += 1
            changing += all(at.values())
            bare += all(at.values()) and row.count(0) == 1
    assert 0.4 < changing / rows < 0.6
    assert 0 < bare < changing


def test_a_resumed_run_equals_one_that_never_stopped(tools, prepared, tmp_path):
    tokens = 6 * 512
    whole = training(tools, prepared, tmp_path / "whole")
    assert whole.run(tokens, never, compiled=False)
    parts = training(tools, prepared, tmp_path / "parts")
    assert not parts.run(tokens, lambda: parts.step == 3, compiled=False)
    again = training(tools, prepared, tmp_path / "parts")
    assert again.step == 3 and again.run(tokens, never, compiled=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_run_with_other_settings_is_refused(tools, prepared, tmp_path):
    training(tools, prepared, tmp_path).save()
    shape, _ = small(tools)
    with pytest.raises(ValueError, match="other settings"):
        tools["train"].Training(prepared, tmp_path, shape, tools["train"].Recipe(batch=1024), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no corpus\.json"):
        tools["train"].domains(tmp_path)


def test_the_rate_rises_holds_and_falls(tools):
    train = tools["train"]
    recipe = train.Recipe(warmup=10, decay_from=0.5)
    scale = [train.rate_scale(step, 100, recipe) for step in range(100)]
    assert scale[0] == pytest.approx(0.1) and scale[10:51] == [1.0] * 41
    assert all(a > b for a, b in pairwise(scale[50:])) and scale[-1] == pytest.approx(0.02)


def test_learning_assessment_card_and_curve(tools, prepared, tmp_path):
    run = training(tools, prepared, tmp_path / "run")
    before = tools["train"].held_out(run.model, prepared, run.device, windows=2, length=128)
    assert run.run(40 * 512, never, compiled=False)
    after = tools["train"].held_out(run.model, prepared, run.device, windows=2, length=128)
    assert all(after[name] < before[name] - 0.5 for name in before)
    folder = run.export()
    model, _ = load(str(folder))
    assert model.dtype == torch.bfloat16
    tools["assess"].main(
        ["--corpus", str(prepared), "--model", f"toy={folder}", "--out", str(tmp_path / "run" / "assessment.json")]
    )
    tools["card"].main(
        [
            *("--run", str(tmp_path / "run"), "--assessment", str(tmp_path / "run" / "assessment.json")),
            *("--machine", "a test", "--note", "It was stopped once.", "--out", str(tmp_path / "card")),
        ]
    )
    text = (tmp_path / "card" / "MODEL_CARD.md").read_text()
    assert "\nIt was stopped once.\n" in text
    assert text.startswith("# toy\n") and "$" not in text and "on a test" in text
    assert "| low | given on the command line |" in text and "**high**" in text
    assert (tmp_path / "card" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train", ["--corpus", "nowhere", "--out", "o", "--tokens", "5"], "at least one batch of 8192, got 5"),
        ("corpus", ["--texts", "nowhere", "--out", "o"], "there is no such file or folder"),
        ("assess", ["--corpus", "nowhere", "--model", "x", "--out", "o"], "NAME=FOLDER"),
        ("card", ["--run", "nowhere", "--assessment", "a", "--machine", "m", "--out", "o"], "is missing"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tools, script, argv, message):
    with pytest.raises(SystemExit) as caught:
        tools[script].main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)
