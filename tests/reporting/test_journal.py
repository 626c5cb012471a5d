"""A journal gives back what was finished, and nothing else."""

from __future__ import annotations

import pytest

from dartprune.reporting.journal import Journal


def test_continues_where_it_was_killed(tmp_path):
    path = tmp_path / "deep" / "work.jsonl"
    first = Journal(path, {"model": "m", "streams": 3})
    first.add("dense", {"loss": [1.0, 2.5]})
    first.add("dart", (1, 2))
    with path.open("a") as file:
        file.write('{"key": "static", "va')  # the kill
    again = Journal(path, {"streams": 3, "model": "m"})
    assert list(again) == ["dense", "dart"] and len(again) == 2
    assert again["dense"] == {"loss": [1.0, 2.5]} and again["dart"] == first["dart"] == [1, 2]
    assert "static" not in again
    again.add("static", 3)
    assert list(Journal(path, {"model": "m", "streams": 3})) == ["dense", "dart", "static"]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "work.jsonl"
    Journal(path, {"model": "m", "streams": 3})
    with pytest.raises(ValueError, match=r"other settings \(seed, streams\)"):
        Journal(path, {"model": "m", "streams": 4, "seed": 0})


@pytest.mark.parametrize("content", ["hello\n", "[]\n", '{"journal": 99, "settings": {}}\n', "\n"])
def test_another_file_is_left_alone(tmp_path, content):
    path = tmp_path / "work.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a journal"):
        Journal(path, {})
    assert path.read_text() == content


def test_a_key_counts_once():
    journal = Journal(None, {})
    journal.add("a", 1)
    with pytest.raises(ValueError, match="'a' already"):
        journal.add("a", 2)
    assert journal["a"] == 1


@pytest.mark.parametrize("written", ["", '{"jour', '{"journal": 1, "sett'])
def test_killed_in_the_first_line(tmp_path, written):
    path = tmp_path / "work.jsonl"
    path.write_text(written)
    Journal(path, {"seed": 1}).add("a", 1)
    assert list(Journal(path, {"seed": 1})) == ["a"]
