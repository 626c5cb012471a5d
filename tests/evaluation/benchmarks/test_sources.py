"""Texts and summaries by name: local ones are read, the rest ends in one clear line."""

from __future__ import annotations

import json
import sys

import pytest

from dartprune.evaluation.benchmarks.sources import corpus, named_texts, summaries


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"wikitext by name needs the package datasets: pip install 'dartprune\["):
        named_texts("wikitext", split="test")


def test_without_network(monkeypatch):
    pytest.importorskip("datasets")
    from huggingface_hub import HfApi, constants

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(ValueError, match=r"wikitext: .*cannot be reached; connect, or give a local file"):
        named_texts("wikitext:raw", split="test")


@pytest.mark.parametrize("offline", [True, False])
def test_a_local_data_set(tmp_path, no_network, monkeypatch, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)  # what is there is read row by row, or as a whole
    rows = [{"text": "one"}, {"text": "  "}, {"text": "two"}, {"text": "three"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert named_texts(str(tmp_path), split="test") == ["one", "two", "three"]
    assert named_texts(str(tmp_path), split="test", documents=1) == ["one"]
    with pytest.raises(ValueError, match="no text in a field 'body'; it has text"):
        named_texts(str(tmp_path), split="test", field="body")
    with pytest.raises(ValueError, match=r"the data set cannot be loaded \(.*train"):
        named_texts(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{oops", "line 1: not JSON"),
        ("a.jsonl", '{"document": "x"}', "needs text under 'document' and 'summary'"),
        ("a.jsonl", "\n", "holds no line"),
        ("a.txt", "x", "ends in .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        summaries(str(path))


def test_sources_that_cannot_be_had(tmp_path, no_network, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'xsum'"):
        summaries("xsumm")
    with pytest.raises(ValueError, match="did you mean 'wikitext-2'"):
        corpus("wikitext2")
    with pytest.raises(ValueError, match="no such file or folder"):
        corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match=r"c4: the data set cannot be loaded .*connect, or give a local file"):
        corpus("c4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"xsum by name needs the package datasets: pip install 'dartprune\[eval\]'"):
        summaries("xsum")
