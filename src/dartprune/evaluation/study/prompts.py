"""Two-topic prompts: a seeded generator, the same for the same seed for ever, and prompts from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dartprune.errors import UserError, read_user_text
from dartprune.evaluation.texts import json_lines
from dartprune.names import unknown

# noun phrases that can follow "about"
TOPICS: dict[str, tuple[str, ...]] = {
    "technology": ("electric cars", "graphics processors", "solar panels", "satellite navigation", "3D printing"),
    "food": ("Italian cooking", "sourdough bread", "Japanese noodle soups", "the history of chocolate", "street food"),
    "film": ("war films", "silent comedies", "animated films", "film music", "documentary film-making"),
    "history": (
        "the Roman Republic",
        "the Silk Road",
        "the Industrial Revolution",
        "Viking voyages",
        "the printing press",
    ),
    "nature": ("coral reefs", "the migration of birds", "rainforests", "the life of honey bees", "deep-sea animals"),
    "medicine": ("asthma", "the treatment of diabetes", "vaccination", "healthy sleep", "broken bones"),
    "sport": (
        "long-distance running",
        "the rules of cricket",
        "rock climbing",
        "Olympic swimming",
        "chess tournaments",
    ),
    "space": ("the planet Mars", "black holes", "the first landing on the Moon", "comets", "space telescopes"),
    "music": ("jazz improvisation", "the violin", "opera", "folk songs", "electronic dance music"),
    "law and money": ("personal savings", "the stock market", "copyright law", "family budgets", "rental contracts"),
    "places": ("the city of Venice", "life in Antarctica", "the Sahara desert", "mountain railways", "small islands"),
    "programming": (
        "sorting algorithms",
        "relational databases",
        "the Python language",
        "version control",
        "web servers",
    ),
}

_REQUESTS = (
    "Write two long paragraphs. The first is about {a}, the second is about {b}.",
    "First tell me everything you know about {a}. Then, without a transition, tell me about {b}.",
    "Write the opening of a lecture about {a}, and after it the opening of a lecture about {b}.",
    "Explain what a beginner should know about {a}. After that, explain the same about {b}.",
    "Write a magazine article in two parts: part one about {a}, part two about {b}.",
)
_OPENINGS = (
    "This is an introduction for beginners. Today we will talk about {a}. The most important thing to understand is",
    "Chapter One. Everyone has heard something about {a}, but few people know the whole story. It begins with",
    "Dear reader, you asked me for a few pages about {a}, and I am glad to write them. Let me start with",
    "Many books have been written about {a}. In the following pages we look at the main ideas, and first of all at",
)
_BRIDGES = (
    "\n\nThat is all for this part. Now for something entirely different: we will talk about {b}. The main point is",
    "\n\nChapter Two. We leave this subject and turn to another one. This chapter is about {b}. It begins with",
    "\n\nSo much for that. The rest of this text is about {b}, which is another matter. To begin with,",
    "\n\nHere the first part ends. The second part is about {b}, and has nothing to do with the first. We start with",
)


@dataclass(frozen=True)
class TopicPrompt:
    """One prompt.

    first, second: the topics.  prompt: asks for both at once.  opening: begins a text about the first, for models that
    continue text.  bridge: turns such a text to the second; empty: there is none.
    """

    first: str
    second: str
    prompt: str
    opening: str
    bridge: str


def generate_prompts(count: int = 100, seed: int = 7) -> list[TopicPrompt]:
    """Draw prompts, no pair of topics twice, the topics of a pair from two domains; the same for the same seed.

    Raises:
        ValueError: more prompts than there are pairs.
    """
    pairs = [
        (a, b) for one, firsts in TOPICS.items() for other, seconds in TOPICS.items() if one != other
        for a in firsts for b in seconds
    ]  # fmt: skip
    if not 1 <= count <= len(pairs):
        raise UserError(f"prompts must be 1 to {len(pairs)}, got {count}")
    rng = random.Random(seed)

    def draw(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options))]  # the one draw that Python promises never to change

    out: list[TopicPrompt] = []
    for _ in range(count):
        a, b = pairs.pop(int(rng.random() * len(pairs)))
        texts = (draw(_REQUESTS), draw(_OPENINGS), draw(_BRIDGES))
        out.append(TopicPrompt(a, b, *(text.format(a=a, b=b) for text in texts)))
    return out


def read_prompts(path: Path) -> list[TopicPrompt]:
    """Prompts from a JSON list, or one JSON object a line, with the fields of `TopicPrompt`.

    `first` and `second` are needed, and either `prompt`, or `opening` and `bridge`.

    Raises:
        ValueError: not JSON, an unknown field, one that is missing, or two equal topics.
    """
    text = read_user_text(path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else list(json_lines(text, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not rows:
        raise UserError(f"{path}: holds no prompts")
    return [_read(row, f"{path}, prompt {number}") for number, row in enumerate(rows, 1)]


def _read(row: object, where: str) -> TopicPrompt:
    names = list(TopicPrompt.__dataclass_fields__)
    if not isinstance(row, dict):
        raise UserError(f"{where}: needs the fields {', '.join(names)}")
    for key, value in row.items():
        if key not in names:
            raise unknown(f"field in {where}:", key, names)
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} must be text, got {value!r}")
    made = TopicPrompt(**{name: row.get(name, "") for name in names})
    if not made.first.strip() or not made.second.strip():
        raise UserError(f"{where}: name both topics as 'first' and 'second'")
    if made.first.strip().lower() == made.second.strip().lower():
        raise UserError(f"{where}: both topics are {made.first!r}; a change of topic needs two different ones")
    if not made.prompt.strip() and not (made.opening.strip() and made.bridge.strip()):
        raise UserError(f"{where}: needs a 'prompt' that asks for both topics, or an 'opening' and a 'bridge'")
    return made
