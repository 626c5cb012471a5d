"""What to measure, checked before the long work; those of the paper's tables and figures are files of the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

from dartprune.errors import UserError
from dartprune.evaluation.arms import arms_at
from dartprune.evaluation.benchmarks.tasks import suite
from dartprune.names import unknown

MEASURES = ("tasks", "perplexity", "summaries", "layers")
METHODS = ("dense", "static", "griffin", "dart")


@dataclass(frozen=True)
class Recipe:
    """One table or figure.

    measure: one of MEASURES.  what: tasks with their number of examples in the prompt (None: the task's own), or names
    of texts or summaries, each with None.  methods, sparsities: the arms; of `layers`, sparsities are the shares left
    out of a layer.  limit: documents, windows or summaries of each, at most; of `layers`, texts in all.  window: tokens
    of perplexity's windows, half of them context; of the texts of `layers`, half of them prompt.  input_tokens,
    output_tokens: of summaries (None: the data set's own).  chat: use the chat template.  include_path: folder of
    further YAML tasks.  title, about, ran: for people; `ran` says what was really run with it, and where.
    """

    measure: str
    what: Mapping[str, int | None]
    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = (0.7,)
    limit: int | None = None
    batch: int = 8
    window: int | None = None
    input_tokens: int = 1024
    output_tokens: int | None = None
    chat: bool = False
    include_path: str | None = None
    title: str = ""
    about: str = ""
    ran: str = ""

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise unknown("measure", self.measure, MEASURES)
        if not self.what:
            raise UserError(f"{self.measure}: say what to measure")
        for name, least in (("limit", 1), ("batch", 1), ("window", 4), ("input_tokens", 16), ("output_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(f"{name.replace('_', ' ')} must be a whole number of at least {least}, got {value!r}")
        if self.measure != "layers":
            arms_at(self.methods, self.sparsities)

    def but(self, **changes: Any) -> Recipe:
        """The same recipe with what was given changed; None changes nothing."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def settings(self) -> dict[str, Any]:
        """What results depend on, as plain data."""
        skipped = ("title", "about", "ran", "batch")
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in skipped}


def recipe_names() -> list[str]:
    """The recipes inside the package."""
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir() if path.name.endswith(".json"))


def recipe(name: str) -> Recipe:
    """A recipe by name; ValueError naming the nearest for an unknown one."""
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return recipe_from(json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8")))


def recipe_from(data: Mapping[str, Any]) -> Recipe:
    """The recipe that plain data describes; `what` is a list, or the name of a suite of tasks.

    Raises:
        ValueError: an unknown key, with the nearest.
    """
    known = [item.name for item in fields(Recipe)]
    for key in data:
        if key not in known:
            raise unknown("recipe setting", key, known)
    what = suite(data["what"]) if isinstance(data["what"], str) else dict.fromkeys(data["what"])
    lists: dict[str, Sequence[Any]] = {key: tuple(data[key]) for key in ("methods", "sparsities") if key in data}
    return Recipe(**{**data, "what": what, **lists})


def _folder() -> Any:
    return resources.files("dartprune.evaluation.benchmarks") / "recipes"
