"""Text of tokens that come one by one."""

from __future__ import annotations

import random

import pytest

from dartprune.serving.words import Words

TEXTS = [
    "Hello, world! It is 5 o'clock.",
    "naïve café — déjà vu 🙂🙃 done",
    "  two  spaces\n\n\tand tabs",
    "日本語のテキスト",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_together_are_the_whole_text(small, text):
    tokenizer = small[1]
    prompt, ids = tokenizer("A prompt:")["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    words = Words(tokenizer, prompt, [])
    pieces = [words.add(token) for token in ids] + [words.end()]
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    assert "".join(pieces) == whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]
    assert "\ufffd" not in "".join(pieces)


class Letters:
    """A tokenizer of one token a letter."""

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("seed", range(40))
def test_the_first_stop_string_ends_the_text_wherever_tokens_are_cut(seed):
    draw = random.Random(seed)
    text = "".join(draw.choice("abc") for _ in range(30))
    stops = ["".join(draw.choice("abc") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
    words, out = Words(Letters(), [], stops), ""
    for n, letter in enumerate(text):
        out += words.add(ord(letter), last=n == len(text) - 1)
        if words.stopped:
            break
    ends = [text.find(stop) for stop in stops if stop in text]
    assert words.stopped == bool(ends)
    if ends:
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert out == text[: min(p for stop in stops if (p := text[:first].find(stop)) >= 0)]
    else:
        assert out == text
