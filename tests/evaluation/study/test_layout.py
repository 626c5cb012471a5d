"""Texts lie as the settings say: what is given, what is written, and where the topic changes."""

from __future__ import annotations

import pytest
import torch

from dartprune.evaluation.study.layout import (
    CHOOSE,
    Text,
    batches,
    check_length,
    chooser,
    fingerprint,
    forced_texts,
    free_texts,
    written,
)
from dartprune.evaluation.study.prompts import TopicPrompt
from dartprune.evaluation.study.settings import Settings
from small_study import SETTINGS, texts

FREE = Settings(**{**vars(SETTINGS), "mode": "free"})
PROMPT = TopicPrompt("cats", "dogs", "p" * 9, "o" * 7, "b" * 5)


class Letters:
    """A tokenizer that numbers letters."""

    bos_token_id = 0
    eos_token_id = 3

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


def test_forced_texts():
    documents = {"a": ["a" * 200], "b": ["b" * 200]}
    kinds = forced_texts(documents, Letters(), SETTINGS, 4, 2, True)
    assert [len(group) for group in kinds.values()] == [4, 2]
    for text in kinds["change"]:
        assert len(text.prompt) == SETTINGS.prompt and len(text.script) == SETTINGS.steps
        first, second = (ord(topic) for topic in text.topics)
        # the step that feeds the last token of the first topic predicts the second topic's first: the separator
        change = SETTINGS.before - 1
        assert text.prompt[0] == 0 and set(text.prompt[1:]) | set(text.script[:change]) == {first}
        assert text.script[change] == 0 and set(text.script[change + 1 :]) == {second}
    for text in kinds["control"]:
        assert set(text.script) == {ord(text.topics[0])} and len(text.topics) == 1
    assert forced_texts(documents, Letters(), SETTINGS, 4, 2, True) == kinds
    plain = forced_texts(documents, Letters(), SETTINGS, 4, 0, False)
    assert list(plain) == ["change"] and all(0 not in text.prompt + text.script for text in plain["change"])


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ({"a": ["x" * 200]}, "two different topics, got only a"),
        ({"a": ["x" * 200], "b": ["x" * 200]}, "'a' and 'b' have the same text"),
        ({"a": ["x" * 200], "b": ["y" * 20]}, "text of 'b' is too short: 33 tokens"),
        ({"a": ["x"], "b": ["y"]}, "no domain has a text of 33 tokens"),
    ],
)
def test_texts_that_cannot_be(documents, said):
    with pytest.raises(ValueError, match=said):
        forced_texts(documents, Letters(), SETTINGS, 2, 0, True)


def test_free_texts():
    kinds = free_texts([PROMPT, PROMPT], Letters(), FREE, 1, one_request=False)
    text, steady = kinds["change"][0], kinds["control"][0]
    change = FREE.before - 1
    assert text.prompt == steady.prompt == (ord("o"),) * 7 and len(text.script) == FREE.steps
    assert set(text.script[:change]) == {CHOOSE} and text.script[change : change + 5] == (ord("b"),) * 5
    assert set(text.script[change + 5 :]) == {CHOOSE} == set(steady.script)
    assert len(kinds["control"]) == 1 and kinds["change"][1].number == 1
    asked = free_texts([PROMPT], Letters(), FREE, 0, one_request=True)["change"][0]
    assert asked.prompt == (ord("p"),) * 9 and set(asked.script) == {CHOOSE}
    with pytest.raises(ValueError, match="bridge of 30 tokens"):
        free_texts([TopicPrompt("a", "b", "", "open", "b" * 30)], Letters(), FREE, 0, one_request=False)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        free_texts([TopicPrompt("a", "b", "", "open", "bridge")], Letters(), FREE, 0, one_request=True)


class Chat(Letters):
    """Letters with a template, whose own special token would begin every text."""

    chat_template = "there is one"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{message['content']}>" for message in messages)


def test_in_the_chat_template_the_request_comes_first():
    def start(one_request):
        kinds = free_texts([PROMPT], Chat(), FREE, 1, one_request=one_request, chat=True)
        assert kinds["control"][0].prompt == kinds["change"][0].prompt
        return "".join(map(chr, kinds["change"][0].prompt))

    assert start(False) == f"<{PROMPT.prompt}>{PROMPT.opening}" and start(True) == f"<{PROMPT.prompt}>"
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        free_texts([PROMPT], Letters(), FREE, 0, one_request=False, chat=True)
    with pytest.raises(ValueError, match="prompt 1 has no 'prompt' that asks for both topics, which a chat needs"):
        free_texts([TopicPrompt("a", "b", "", "open", "bridge")], Chat(), FREE, 0, one_request=False, chat=True)


def test_what_is_chosen():
    group = [Text((5, 6), (CHOOSE, 9), ("a",), 0), Text((5, 6), (CHOOSE, CHOOSE), ("a",), 1)]
    logits = torch.zeros(2, 12)
    logits[:, 3], logits[:, 4] = 9.0, 8.0
    choose = chooser(group, FREE, 3)
    assert choose(1, logits).tolist() == [4, 4], "the end of the text is never written"
    assert choose(2, logits).tolist() == [9, 4]
    warm = Settings(**{**vars(FREE), "temperature": 5.0})

    def drawn(seed):
        pick = chooser(group, Settings(**{**vars(warm), "seed": seed}), 3)
        return [pick(1, logits).tolist() for _ in range(20)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({tuple(pair) for pair in drawn(0)}) > 3 and not any(3 in pair for pair in drawn(0))


def test_batches_and_fingerprint():
    given = texts(5)
    assert [len(group) for group in batches(given["change"], 2)] == [2, 2, 1]
    written_ = free_texts([PROMPT] * 3, Letters(), FREE, 0, one_request=False)
    assert [len(group) for group in batches(written_["change"], 2)] == [2, 1]
    assert fingerprint(given) == fingerprint(texts(5)) != fingerprint(texts(5, seed=1))


def test_what_was_written():
    group = free_texts([PROMPT], Letters(), FREE, 0, one_request=False)["change"]
    change = FREE.before - 1
    row = [ord("x")] * change + [ord("b")] * 5 + [ord("y")] * (FREE.steps - change - 5)
    parts = written(group, torch.tensor([row]).T, FREE, Letters())
    after = FREE.steps - change - 5
    assert parts == {"before": ["x" * change], "after": ["y" * after], "end": ["y" * min(after, FREE.horizon)]}


def test_the_models_context():
    from tiny import FAMILIES

    config = FAMILIES["llama"]().config
    check_length(texts(1), config)
    longer = Settings(**{**vars(SETTINGS), "after": 240})
    with pytest.raises(ValueError, match="272 tokens are longer than the model's context of 256"):
        check_length(texts(1, longer), config)
