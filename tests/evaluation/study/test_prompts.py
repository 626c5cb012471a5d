"""The prompts are always the same, and each is what a prompt must be."""

from __future__ import annotations

import json
import re
import zlib

import pytest

from dartprune.evaluation.study.prompts import TOPICS, generate_prompts, read_prompts


def test_the_hundred_prompts_are_always_the_same():
    rows = repr([vars(made) for made in generate_prompts()])
    assert zlib.crc32(rows.encode()) == 2212440659 and len(generate_prompts()) == 100
    assert generate_prompts(seed=8) != generate_prompts()


def test_every_prompt_is_sensible():
    domain = {topic: name for name, topics in TOPICS.items() for topic in topics}
    assert len(domain) == sum(map(len, TOPICS.values())), "a topic belongs to one domain"
    prompts = generate_prompts()
    for field in ("prompt", "opening", "bridge"):
        for made in prompts:
            text = getattr(made, field)
            assert "{" not in text and "  " not in text.replace("\n\n", "") and text.strip()
            assert not re.search(r"\b(\w+) \1\b", text), "a word twice"
    assert len({(p.first, p.second) for p in prompts}) == len({p.prompt for p in prompts}) == 100
    for made in prompts:
        assert domain[made.first] != domain[made.second]
        assert made.first in made.prompt and made.second in made.prompt
        assert made.first in made.opening and made.second not in made.opening
        assert made.second in made.bridge and made.first not in made.bridge
    assert {domain[p.first] for p in prompts} == {domain[p.second] for p in prompts} == set(TOPICS)


def test_all_pairs_can_be_drawn_and_no_more():
    pairs = sum(map(len, TOPICS.values())) ** 2 - sum(len(t) ** 2 for t in TOPICS.values())
    assert len({(p.first, p.second) for p in generate_prompts(pairs)}) == pairs
    with pytest.raises(ValueError, match=f"1 to {pairs}"):
        generate_prompts(pairs + 1)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([vars(made) for made in generate_prompts(3)]))
    assert read_prompts(path) == generate_prompts(3)
    path.write_text('{"first": "a", "second": "b", "prompt": "Write about a and b."}\n\n')
    assert read_prompts(path)[0].bridge == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{oops", "not JSON"),
        ("[]", "holds no prompts"),
        ("[3]", "prompt 1: needs the fields"),
        (json.dumps([{"first": "a", "second": " A ", "prompt": "x"}]), "both topics are 'a'"),
        (json.dumps([{"first": "a", "second": "b", "promt": "x"}]), "did you mean 'prompt'"),
        (json.dumps([{"first": "a", "prompt": "x"}]), "name both topics"),
        (json.dumps([{"first": "a", "second": "b", "opening": "x"}]), "an 'opening' and a 'bridge'"),
        (json.dumps([{"first": "a", "second": "b", "prompt": 3}]), "must be text"),
    ],
)
def test_wrong_files(tmp_path, content, said):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / "p.json")
