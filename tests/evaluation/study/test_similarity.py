"""Similarity by a tiny local encoder, and the matching on vectors made by hand."""

from __future__ import annotations

import pytest
import torch

from dartprune.evaluation.study.similarity import Encoder, greedy_match, sentences, similarity

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "dogs",
    "bark",
    "loud",
    ".",
    "!",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab_file=str(path / "vocab.txt")).save_pretrained(path)
    return path


def test_the_same_text_is_like_itself(folder):
    encoder = Encoder(folder)
    text = "the cat sat on the mat. dogs bark loud!"
    same = similarity(encoder, [text], [text])
    assert same == pytest.approx({"document_cosine": 1, "match_f": 1, "coverage": 1}, abs=1e-5)
    assert encoder.tokens(text).shape == (11, 16), "without the special tokens"
    assert encoder.tokens("cat " * 100).shape[0] <= 32, "long texts are cut"
    assert encoder.tokens("").shape[1] == 16
    other = similarity(encoder, ["dogs bark loud!"], [text])
    assert other["document_cosine"] < 0.999 and other["match_f"] < 0.999


def test_greedy_matching_by_hand():
    x, y = torch.eye(3)[:2], torch.eye(3)[:1]
    assert greedy_match(x, y) == pytest.approx((0.5, 1.0, 2 / 3))
    assert greedy_match(torch.eye(3)[:1], torch.eye(3)[1:2]) == (0, 0, 0)


def test_sentences():
    assert sentences("One. Two!  Three\nfour") == ["One.", "Two!", "Three", "four"] and sentences("") == [""]


def test_no_encoder(tmp_path):
    with pytest.raises(ValueError, match="holds no encoder"):
        Encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Encoder(tmp_path)
