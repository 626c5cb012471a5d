"""Texts are read by domain and cut into the same streams for the same seed."""

from __future__ import annotations

import json
import lzma

import pytest
import torch

from dartprune.evaluation.texts import batch, pieces, read_texts, streams


class Words:
    """A tokenizer that numbers the letters of a text."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats.valid.txt").write_text("aaaa\n<|doc|>\nbbbb says <|doc|> inside\n<|doc|>\n\n<|doc|>\n")
    (tmp_path / "dogs.valid.txt.xz").write_bytes(lzma.compress(b"cccc cccc cccc cccc"))
    (tmp_path / "dogs.train.txt").write_text("never seen")
    (tmp_path / "mixed.valid.jsonl").write_text(
        json.dumps({"text": "dddd", "domain": "birds"}) + "\n\n" + json.dumps({"text": "eeee"}) + "\n"
    )
    (tmp_path / "notes.md").write_text("no text of ours")
    return tmp_path


def test_folder_by_split(folder):
    found = read_texts([folder], split="valid")
    assert found == {
        "cats": ["aaaa", "bbbb says <|doc|> inside"],
        "dogs": ["cccc cccc cccc cccc"],
        "birds": ["dddd"],
        "mixed": ["eeee"],
    }
    assert read_texts([folder])["dogs"] == ["never seen", "cccc cccc cccc cccc"]
    assert read_texts([folder / "cats.valid.txt"]) == {"cats": found["cats"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe\xfa", "cannot be read as text"),
        ("a.txt.xz", b"no archive", "cannot be read as text"),
        ("a.jsonl", b"{oops", "line 1: not JSON"),
        ("a.jsonl", b'{"words": 1}', "needs text under 'text'"),
        ("a.txt", b" \n", "no text in"),
        ("a.pdf", b"x", "must end in one of"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_texts([tmp_path / name])


def test_nothing_there(tmp_path, folder):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_texts([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="of the split 'test'"):
        read_texts([folder], split="test")


def test_short_documents_are_joined():
    found = pieces({"a": ["xy", "z", "w" * 9, "v"], "b": ["short"]}, Words(), 3)
    assert found == {
        "a": [[ord(c) for c in "xyz"], [ord("w")] * 9],
        "b": [[ord(c) for c in "short"]],
    }
    with pytest.raises(ValueError, match="no domain has a text of 20 tokens"):
        pieces({"a": ["xy"]}, Words(), 20)


def test_streams_change_their_topic_where_they_say():
    tokens = {name: [[number] * 50, [number + 10] * 40] for number, name in enumerate(("a", "b", "c"))}
    drawn = streams(tokens, (8, 6), 12, seed=3, separator=99)
    assert len({stream.domains for stream in drawn[:6]}) == 6, "every ordered pair in turn"
    for stream in drawn:
        assert len(stream.tokens) == 14 and stream.change == 8
        assert stream.tokens[0] == stream.tokens[8] == 99
        first, second = ("abc".index(name) for name in stream.domains)
        assert {t % 10 for t in stream.tokens[1:8]} == {first}
        assert {t % 10 for t in stream.tokens[9:]} == {second}
    assert streams(tokens, (8, 6), 12, seed=3, separator=99) == drawn
    assert streams(tokens, (8, 6), 12, seed=4, separator=99) != drawn
    assert batch(drawn).shape == (12, 14) and batch(drawn).dtype == torch.int64


def test_a_stream_may_begin_at_the_last_possible_token():
    starts = {streams({"a": [list(range(10))]}, (4,), 1, seed=seed)[0].tokens[0] for seed in range(80)}
    assert starts == set(range(7))


@pytest.mark.parametrize(
    ("lengths", "domains", "said"),
    [
        ((8, 8), ("a",), "needs two domains"),
        ((1,), ("a",), "at least 2"),
        ((4, 4, 4), ("a", "b"), "one or two"),
        ((80,), ("a",), "a stretch needs 80"),
    ],
)
def test_streams_that_cannot_be(lengths, domains, said):
    with pytest.raises(ValueError, match=said):
        streams({name: [[1] * 20] for name in domains}, lengths, 2)


def test_a_batch_has_one_length():
    tokens = {"a": [[1] * 30]}
    with pytest.raises(ValueError, match="one length"):
        batch([*streams(tokens, (4,), 1), *streams(tokens, (5,), 1)])
