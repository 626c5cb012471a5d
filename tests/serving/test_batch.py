"""`dartprune batch`: order, bad lines, restarts."""

from __future__ import annotations

import json

import pytest

from dartprune.serving.batch import BatchJob, whole_lines
from dartprune.serving.door import Door, Terms
from serving.conftest import PROMPTS, asked, engine_of

TERMS = Terms("small", "dart", 0.4, 0.4, 0.8, None)


def job(engine, tmp_path):
    return BatchJob(Door(engine, TERMS), tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def write(path, lines):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(answer):
    """Without logarithms, whose last digits depend on who decoded beside it."""
    return [(choice["text"], choice["finish_reason"]) for choice in answer.get("choices", [])]


LINES = [
    {"id": "a", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0},
    {"id": 2, "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 3, "temperature": 0},
    b"{no json",
    {"prompt": "", "id": "empty"},
    b"",
    {"prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0, "n": 2, "logprobs": 1, "dart": {"sparsity": 0.6}},
    {"prompt": [PROMPTS[0], PROMPTS[1]]},
    {"prompt": PROMPTS[0], "stream": True},
    b"\xff\xfe",
    {"prompt": PROMPTS[2], "max_tokens": 2, "temperature": 0, "id": "last"},
]


def test_answers_in_order_and_bad_lines_as_errors(small, tmp_path):
    write(tmp_path / "in.jsonl", LINES)
    with engine_of(small) as engine:
        counts = job(engine, tmp_path).run()
        want = asked(engine, PROMPTS[0], 12).wait().text[0]
    answers = read(tmp_path / "out.jsonl")
    assert [answer["line"] for answer in answers] == list(range(1, 11))
    assert (counts.done, counts.bad, counts.before) == (10, 6, 0)
    assert [a["id"] for a in answers] == ["a", 2, None, "empty", None, None, None, None, None, "last"]
    assert answers[0]["choices"] == [{"index": 0, "text": want, "finish_reason": "length"}]
    assert answers[0]["usage"]["dart"]["realised_sparsity"] == pytest.approx(0.4, abs=0.01)
    assert len(answers[5]["choices"]) == 2 and len(answers[5]["choices"][0]["logprobs"]) == 5
    assert answers[5]["usage"]["dart"]["realised_sparsity"] == pytest.approx(0.6, abs=0.01)
    for number, said in (
        (2, "no JSON"),
        (3, "at least 1"),
        (6, "one prompt a line"),
        (7, "leave stream out"),
        (8, "no JSON"),
    ):
        assert said in answers[number]["error"]["message"]


def test_it_goes_on_where_it_was_stopped(small, tmp_path):
    write(tmp_path / "in.jsonl", LINES)
    with engine_of(small) as engine:
        job(engine, tmp_path).run()
        whole = read(tmp_path / "out.jsonl")
        lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
        # stopped in the middle of a line
        (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:7])
        counts = job(engine, tmp_path).run()
        assert (counts.before, counts.done) == (4, 6)
        again = read(tmp_path / "out.jsonl")
        assert [answer.get("error") for answer in again] == [answer.get("error") for answer in whole]
        assert [texts(answer) for answer in again] == [texts(answer) for answer in whole]
        assert job(engine, tmp_path).run().done == 0


def test_a_file_of_something_else_is_left_alone(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    with pytest.raises(ValueError, match="line 1 is no answer of a batch"):
        whole_lines(other)
    other.write_text("my notes, without an end of the line")
    with pytest.raises(ValueError, match="line 1 is no answer of a batch"):
        whole_lines(other)
    assert other.read_text().startswith("my notes, ") and whole_lines(tmp_path / "none") == 0
