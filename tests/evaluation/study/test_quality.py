"""Figures of written text on texts whose figures are known."""

from __future__ import annotations

import pytest

from dartprune.evaluation.study import quality
from dartprune.evaluation.study.quality import distinct, names, naming, repetition, text_quality


def test_counts_by_hand():
    assert distinct("a b a b", 1) == 0.5 and distinct("a b a b", 2) == pytest.approx(2 / 3) and distinct("a", 2) == 0
    assert repetition("a b c d e f") == 0 and repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("go " * 50) == pytest.approx(46 / 47) and repetition("too short") == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_against_the_dense_text():
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    same = text_quality(["the cat sat on the mat today"] * 2, ["the cat sat on the mat today"] * 2)
    assert same["rouge1"] == same["rouge2"] == same["rougeL"] == 1 and same["bleu"] == pytest.approx(100)
    assert same["repetition"] == 0 and same["distinct1"] == pytest.approx(6 / 7)
    half = text_quality(["the cat sat down here"], ["the cat sat on the mat"])
    assert half["rouge1"] == pytest.approx(2 * 3 / (5 + 6)) and half["bleu"] < 50
    assert text_quality(["x"], ["entirely other words"])["rougeL"] == 0


@pytest.mark.parametrize(
    ("text", "topic", "named"),
    [
        ("A reef is built by corals.", "coral reefs", True),
        ("The VIOLIN has four strings.", "the violin", True),
        ("Violinists practise.", "the violin", False),
        ("Its history is long, and a city grew.", "the history of chocolate", False),
        ("Chocolates came from Mexico.", "the history of chocolate", True),
        ("", "comets", False),
    ],
)
def test_what_a_text_names(text, topic, named):
    assert names(text, topic) is named


def test_shares_of_texts_that_name_their_topics():
    topics = [("comets", "opera"), ("opera", "comets")]
    wrote = ["A comet has a tail.", "An opera about comets is rare."]
    assert naming(wrote, topics) == {"names_first": 1.0, "names_second": 0.5}
    assert naming(wrote, [("first topic", "second topic")] * 2) == {}, "nobody said what the topics are"


def test_without_the_libraries(monkeypatch):
    monkeypatch.setattr(quality, "LIBRARIES", ("rouge_score", "no_such_library"))
    with pytest.raises(ValueError, match=r"needs the package no_such_library: pip install"):
        quality.check_libraries()
