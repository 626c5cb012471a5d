"""Texts of data sets by name: local ones are read, the rest ends in one clear line."""

from __future__ import annotations

import json
import sys

import pytest

from dartprune.evaluation.named_texts import named_texts


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "dartprune\[eval\]", or give files'):
        named_texts("wikitext", split="test")


def test_without_network(monkeypatch):
    pytest.importorskip("datasets")
    from huggingface_hub import HfApi, constants

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(ValueError, match=r"'wikitext'.*cannot be reached; connect, or give files"):
        named_texts("wikitext:raw", split="test")


def test_a_local_data_set(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": "one"}, {"text": "  "}, {"text": "two"}, {"text": "three"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert named_texts(str(tmp_path), split="test") == ["one", "two", "three"]
    assert named_texts(str(tmp_path), split="test", documents=1) == ["one"]
    with pytest.raises(ValueError, match="no text in a field 'body'; it has text"):
        named_texts(str(tmp_path), split="test", field="body")
    with pytest.raises(ValueError, match="split 'train': cannot be read"):
        named_texts(str(tmp_path), split="train")
