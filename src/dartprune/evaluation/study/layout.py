"""Texts as the study decodes them: a prompt, and for each step the token that is given or the model's to choose."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.evaluation.study.lockstep import Choose
from dartprune.evaluation.study.prompts import TopicPrompt
from dartprune.evaluation.study.settings import Settings
from dartprune.evaluation.texts import Stream, chat_text, opening, pieces, streams
from dartprune.model.context import context_length

CHOOSE = -1  # the model writes this token


@dataclass(frozen=True)
class Text:
    """One text.

    prompt: tokens.  script: for each step the token it predicts, or CHOOSE.  topics: one, or two in order.
    number: its place among the texts, from which it draws.
    """

    prompt: tuple[int, ...]
    script: tuple[int, ...]
    topics: tuple[str, ...]
    number: int = 0

    @property
    def name(self) -> str:
        """Its topics, for people."""
        return " > ".join(self.topics)


def forced_texts(
    documents: Mapping[str, Sequence[str]],
    tokenizer: Any,
    settings: Settings,
    count: int,
    control: int,
    separator: bool,
) -> dict[str, list[Text]]:
    """Given texts, by kind: `count` that change their topic and `control` that keep it, all of one length.

    Args:
        documents: of each topic; every ordered pair of topics in turn.
        tokenizer: makes tokens of them.
        settings: lengths and seed.
        count: texts that change their topic.
        control: texts on one topic.
        separator: begin each stretch with the tokenizer's begin-of-text token, if it has one; always where the
            tokenizer itself puts it before a text.

    Raises:
        ValueError: fewer than two topics, two with the same text, or texts that are too short.
    """
    if len(documents) < 2:
        raise UserError(f"a change of topic needs two different topics, got only {', '.join(documents)}")
    for a, b in combinations(documents, 2):
        if list(documents[a]) == list(documents[b]):
            raise UserError(f"topics {a!r} and {b!r} have the same text: a change of topic needs two different ones")
    mark = stretch_begin(tokenizer, separator)
    first, second = settings.prompt - 1 + settings.before, settings.after + 1
    enough = pieces(documents, tokenizer, max(first, second))
    if len(documents) == 2 and len(enough) < 2:
        raise UserError(
            f"the text of {next(name for name in documents if name not in enough)!r} is too short: "
            f"{max(first, second)} tokens are needed; give longer texts or a smaller --before and --after"
        )
    out = {"change": streams(enough, (first, second), count, seed=settings.seed, separator=mark)}
    if control:
        whole = pieces(documents, tokenizer, first + second)
        out["control"] = streams(whole, (first + second,), control, seed=settings.seed + 1, separator=mark)
    return {kind: [_forced(stream, settings, i) for i, stream in enumerate(drawn)] for kind, drawn in out.items()}


def _forced(stream: Stream, settings: Settings, number: int) -> Text:
    return Text(stream.tokens[: settings.prompt], stream.tokens[settings.prompt :], stream.domains, number)


def stretch_begin(tokenizer: Any, separator: bool) -> int | None:
    """The token that begins each stretch of a given text, None for none; `separator` as in `forced_texts`."""
    token: int | None = tokenizer.bos_token_id if separator or opening(tokenizer) else None
    return token


def free_texts(
    prompts: Sequence[TopicPrompt],
    tokenizer: Any,
    settings: Settings,
    control: int,
    *,
    one_request: bool,
    chat: bool = False,
) -> dict[str, list[Text]]:
    """Texts that the model writes, by kind.

    Args:
        prompts: what to write about.
        tokenizer: makes tokens of them.
        settings: lengths.
        control: how many openings are also continued without the bridge to the second topic.
        one_request: ask for both topics at once, as in the paper; the place of the change is then unknown. Otherwise
            the model continues the opening, and after `before` tokens the bridge to the second topic is given.
        chat: the request for both topics comes first, in the tokenizer's chat template, and the answer begins with the
            opening.

    Raises:
        ValueError: a bridge longer than the text after the change; `chat` without a template or a request.
    """
    texts: list[Text] = []
    for number, prompt in enumerate(prompts):
        whole = one_request or not prompt.bridge
        if chat and not prompt.prompt.strip():
            raise UserError(f"prompt {number + 1} has no 'prompt' that asks for both topics, which a chat needs")
        text = prompt.prompt if whole else prompt.opening
        if chat:
            text = chat_text(tokenizer, prompt.prompt) + ("" if whole else prompt.opening)
        # the template brings the special tokens itself
        start = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
        bridge = [] if whole else tokenizer(prompt.bridge, add_special_tokens=False, verbose=False)["input_ids"]
        if len(start) < 2:
            raise UserError(f"prompt {number + 1} has {len(start)} tokens: a prompt needs at least 2")
        if len(bridge) > settings.after - settings.window:
            raise UserError(f"prompt {number + 1}: its bridge of {len(bridge)} tokens leaves nothing to write after it")
        script = [CHOOSE] * settings.steps
        script[settings.before - 1 : settings.before - 1 + len(bridge)] = bridge
        texts.append(Text(tuple(start), tuple(script), (prompt.first, prompt.second), number))
    kinds = {"change": texts}
    if control:
        free = (CHOOSE,) * settings.steps
        kinds["control"] = [replace(text, script=free, topics=text.topics[:1]) for text in texts[:control]]
    return kinds


def check_length(texts: Mapping[str, Sequence[Text]], config: Any) -> None:
    """ValueError for texts longer than the model's context."""
    longest = max(len(text.prompt) + len(text.script) for group in texts.values() for text in group)
    most = context_length(config)
    if most is not None and most < longest:
        raise UserError(f"texts of {longest} tokens are longer than the model's context of {most}: shorten --after")


def fingerprint(texts: Mapping[str, Sequence[Text]]) -> int:
    """A number that changes with any token of any text."""
    return zlib.crc32(repr([(kind, list(group)) for kind, group in texts.items()]).encode())


def batches(texts: Sequence[Text], size: int) -> list[list[Text]]:
    """Texts cut into batches of at most `size`."""
    return [list(texts[i : i + size]) for i in range(0, len(texts), size)]


def chooser(batch: Sequence[Text], settings: Settings, forbidden: int | None) -> Choose:
    """Gives the token of each step: the given one, else the likeliest or, at a temperature, a drawn one.

    Args:
        batch: the texts.
        settings: temperature and seed; every text draws from its own generator, the same for every arm.
        forbidden: the end-of-text token, which is never written, so that all arms write texts of one length.
    """
    script = torch.tensor([text.script for text in batch])
    draws = [torch.Generator().manual_seed(settings.seed * 1_000_003 + text.number) for text in batch]

    def choose(step: int, logits: Tensor) -> Tensor:
        token = script[:, step - 1].to(logits.device)
        if not bool((script[:, step - 1] == CHOOSE).any()):
            return token
        scores = logits.float()
        if forbidden is not None:
            scores = scores.index_fill(1, torch.tensor([forbidden], device=scores.device), -torch.inf)
        if settings.temperature > 0:
            shares = torch.softmax(scores / settings.temperature, dim=-1).cpu()
            tokens = [torch.multinomial(row, 1, generator=g) for row, g in zip(shares, draws, strict=True)]
            written = torch.cat(tokens).to(scores.device)
        else:
            written = scores.argmax(-1)
        return torch.where(token == CHOOSE, written, token)

    return choose


def written(texts: Sequence[Text], tokens: Tensor, settings: Settings, tokenizer: Any) -> dict[str, list[str]]:
    """What the model wrote of each text, by part.

    `before` the change, `after` it without the given bridge, and the `end`: the last `horizon` tokens of that.

    Args:
        texts: as they were decoded.
        tokens: int64 [steps, texts], the token that each step predicts.
        settings: of the study.
        tokenizer: turns tokens into text.
    """
    change = settings.before - 1
    parts: dict[str, list[str]] = {"before": [], "after": [], "end": []}
    for number, text in enumerate(texts):
        row = tokens[:, number].tolist()
        bridge = sum(token != CHOOSE for token in text.script)
        after = row[change + bridge :]
        for part, ids in (("before", row[:change]), ("after", after), ("end", after[-settings.horizon :])):
            parts[part].append(tokenizer.decode(ids, skip_special_tokens=True))
    return parts
