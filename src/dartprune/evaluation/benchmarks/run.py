"""Carries out a recipe on a model: every arm on everything that the recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dartprune.errors import require
from dartprune.evaluation.arms import arms_at
from dartprune.evaluation.benchmarks.perplexity import cut, perplexity
from dartprune.evaluation.benchmarks.recipe import Recipe
from dartprune.evaluation.benchmarks.report import RecipeResults
from dartprune.evaluation.benchmarks.results import collect
from dartprune.evaluation.benchmarks.sources import SUMMARIES, corpus, summaries
from dartprune.evaluation.benchmarks.summaries import summarise
from dartprune.evaluation.benchmarks.tasks import load_tasks, run_task
from dartprune.evaluation.protocol import Protocol
from dartprune.evaluation.texts import opening
from dartprune.model.context import context_length
from dartprune.model.sizes import dtype_name, fingerprint
from dartprune.pruner import Pruner
from dartprune.reporting.journal import Journal
from dartprune.reporting.progress import bar

WINDOW = 2048  # tokens, where neither the recipe nor the model says less
WRITTEN = 128  # tokens of a summary, where neither the recipe nor the data set says so
Work = Callable[[Pruner, str], dict[str, Any]]


def gather(recipe: Recipe) -> dict[str, Any]:
    """Everything that a recipe of tasks, perplexity or summaries names, read before any model is loaded.

    Raises:
        ValueError: a package is missing, a name is unknown, or data cannot be loaded.
    """
    if recipe.measure == "tasks":
        return load_tasks(recipe.what, recipe.include_path)
    if recipe.measure == "summaries":
        require("rouge_score", "judging summaries")
        return {name: summaries(name)[: recipe.limit] for name in recipe.what}
    return texts_of(recipe.what)


def texts_of(sources: Iterable[str]) -> dict[str, list[str]]:
    """Documents of each domain of some files, folders or named data sets."""
    documents: dict[str, list[str]] = {}
    for source in sources:
        for domain, texts in corpus(source).items():
            documents.setdefault(domain, []).extend(texts)
    return documents


def execute(
    recipe: Recipe,
    gathered: dict[str, Any],
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    backend: str = "auto",
    out: Path | None = None,
    silent: bool = False,
) -> RecipeResults:
    """Do what a recipe of tasks, perplexity or summaries says.

    Args:
        recipe: what to measure.
        gathered: its data, from `gather`.
        model: a decoder in evaluation mode, not attached.
        tokenizer: of the model.
        name: of the model, for people and for the journal.
        backend: how the pruned FFN is computed.
        out: folder of the journal; work that was killed goes on from there. None: nothing is kept.
        silent: show no progress.

    Raises:
        ValueError: a text too short, or a journal of other settings.
    """
    units, work, notes = _Work(recipe, gathered, model, tokenizer, backend, silent).of(recipe.measure)
    settings = {**recipe.settings(), "model": name, "backend": backend, "weights": fingerprint(model)}
    journal = Journal(None if out is None else out / "journal.jsonl", settings)
    arms = collect(arms_at(recipe.methods, recipe.sparsities), units, work, journal)
    notes += [f"{arm.name}: {note}" for arm in arms for note in arm.tally.notes]
    return RecipeResults(recipe, name, dtype_name(model), arms, notes)


class _Work:
    """The units of each kind of recipe, how one is done, and what must be known to read the results."""

    def __init__(
        self, recipe: Recipe, data: dict[str, Any], model: Any, tokenizer: Any, backend: str, silent: bool
    ) -> None:
        self.recipe, self.data, self.model, self.tokenizer = recipe, data, model, tokenizer
        self.backend, self.silent = backend, silent

    def of(self, measure: str) -> tuple[list[str], Work, list[str]]:
        """Units, work and notes."""
        limit = self.recipe.limit
        if measure == "perplexity":
            size = min(self.recipe.window or WINDOW, context_length(self.model) or WINDOW)
            self.data = {domain: cut(texts, self.tokenizer, size, limit) for domain, texts in self.data.items()}
            notes = [f"Windows of {size} tokens that move on by half; the second half of each is scored."]
            if head := opening(self.tokenizer):
                shown = self.tokenizer.decode(head)
                notes.append(f"Each window begins with {shown}, which the tokenizer puts before a text.")
            return list(self.data), self._perplexity, notes
        each = " of each task" if measure == "tasks" else ""
        notes = [] if limit is None else [f"Only the first {limit} documents{each}."]
        return list(self.data), self._task if measure == "tasks" else self._summaries, notes

    def _protocol(self, pruner: Pruner) -> Protocol:
        padding = self.tokenizer.pad_token_id
        return Protocol(self.model, pruner, padding=padding, batch=self.recipe.batch, backend=self.backend)

    def _task(self, pruner: Pruner, unit: str) -> dict[str, Any]:
        return run_task(
            self.model, self.tokenizer, pruner, self.data[unit],
            limit=self.recipe.limit, batch=self.recipe.batch, backend=self.backend, silent=self.silent,
        )  # fmt: skip

    def _perplexity(self, pruner: Pruner, unit: str) -> dict[str, Any]:
        with bar(f"{pruner.name}: {unit}", len(self.data[unit]), silent=self.silent) as advance:
            done = perplexity(self._protocol(pruner), self.data[unit], advance, opening(self.tokenizer))
        return done | {key: {unit: done[key]["perplexity"]} for key in ("scores", "errors")}

    def _summaries(self, pruner: Pruner, unit: str) -> dict[str, Any]:
        recipe, pairs = self.recipe, self.data[unit]
        written = recipe.output_tokens or (SUMMARIES[unit].written if unit in SUMMARIES else WRITTEN)
        with bar(f"{pruner.name}: {unit}", len(pairs), silent=self.silent) as advance:
            done = summarise(
                self._protocol(pruner), self.tokenizer, pairs,
                most=recipe.input_tokens, written=written, chat=recipe.chat, progress=advance,
            )  # fmt: skip
        return done | {
            key: {f"{Path(unit).stem} {n}": v for n, v in done[key].items()} for key in ("scores", "errors", "each")
        }
