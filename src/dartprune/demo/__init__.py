"""The model and the texts that come with the package, so that everything can be tried without a network."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path


def model_folder() -> Path:
    """The folder of the embedded model; see MODEL_CARD.md in it for what it is and is not."""
    return Path(str(files("dartprune.demo") / "model"))


def passages() -> dict[str, list[str]]:
    """Short passages by domain, written for this package in the manner of the model's training texts."""
    text = (files("dartprune.demo") / "passages.json").read_text(encoding="utf-8")
    loaded: dict[str, list[str]] = json.loads(text)
    return loaded


def pairs() -> list[tuple[str, str, str, str]]:
    """Texts that move from one domain to another: (first domain, its text, second domain, its text).

    Every domain is the first one once and the second one once.
    """
    by_domain = passages()
    names = sorted(by_domain)
    following = names[1:] + names[:1]
    return [(a, by_domain[a][0], b, by_domain[b][1]) for a, b in zip(names, following, strict=True)]
