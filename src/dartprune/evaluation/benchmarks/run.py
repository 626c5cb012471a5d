"""Carries out a recipe on a model: every arm on everything that the recipe names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dartprune.evaluation.arms import arms_at
from dartprune.evaluation.benchmarks.perplexity import cut, perplexity
from dartprune.evaluation.benchmarks.pictures import curves
from dartprune.evaluation.benchmarks.recipe import Recipe
from dartprune.evaluation.benchmarks.results import Outcome, Table, collect, tables
from dartprune.evaluation.benchmarks.sources import SUMMARIES, corpus, require, summaries
from dartprune.evaluation.benchmarks.summaries import summarise
from dartprune.evaluation.benchmarks.tasks import load_tasks, run_task
from dartprune.model.context import context_length
from dartprune.pruner import Pruner
from dartprune.reporting.journal import Journal
from dartprune.reporting.page import Page
from dartprune.reporting.plot import save
from dartprune.reporting.progress import bar

PROTOCOL = (
    "All of a context but its last token is prefilled dense and traced; the last context token and all that follow it "
    "are decoded with the masks in force, in every arm alike. Contexts too short for a mask run dense and are counted. "
    "Realised sparsity: one minus the share of the FFN's weights that the decoded tokens used."
)
WINDOW = 2048  # tokens, where neither the recipe nor the model says less
Work = Callable[[Pruner, str], dict[str, Any]]


@dataclass
class Measured:
    """Results of a recipe."""

    recipe: Recipe
    model: str
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """For people."""
        decimals = 2 if self.recipe.measure == "perplexity" else 3
        return tables(self.outcomes, decimals=decimals, mean=self.recipe.measure == "tasks")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "measure": self.recipe.measure,
            "title": self.recipe.title,
            "model": self.model,
            "settings": self.recipe.settings(),
            "arms": [outcome.to_dict() for outcome in self.outcomes],
            "notes": self.notes,
        }

    def write(self, folder: Path) -> list[Path]:
        """Write `results.json`, `report.html` and, for several sparsities, `curves.png` into a folder."""
        data = folder / "results.json"
        data.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        page = Page(self.recipe.title or f"{self.recipe.measure}: {', '.join(self.recipe.what)}")
        page.text(f"Model: {self.model}. {PROTOCOL}")
        for table in self.tables():
            page.heading(table.title)
            page.table(table.columns, table.rows)
        written = [data]
        if len({outcome.pruner.sparsity for outcome in self.outcomes if outcome.pruner.prunes}) > 1:
            figure = curves(self.outcomes, averaged=self.recipe.measure == "tasks")
            page.picture(figure, "Scores against realised sparsity.")
            written.append(folder / "curves.png")
            save(figure, written[-1])
        for note in self.notes:
            page.text(note)
        page.settings(self.recipe.settings())
        written.append(folder / "report.html")
        page.write(written[-1])
        return written


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
        for domain, found in corpus(source).items():
            documents.setdefault(domain, []).extend(found)
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
) -> Measured:
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
    make = {"tasks": _tasks, "perplexity": _perplexity, "summaries": _summaries}[recipe.measure]
    notes: list[str] = []
    units, work = make(recipe, gathered, model, tokenizer, backend, silent, notes)
    settings = {**recipe.settings(), "model": name, "backend": backend, "dtype": str(model.dtype)}
    journal = Journal(None if out is None else out / "journal.jsonl", settings)
    outcomes = collect(arms_at(recipe.methods, recipe.sparsities), units, work, journal)
    said = dict.fromkeys(note for outcome in outcomes for note in outcome.tally.notes)
    return Measured(recipe, name, outcomes, notes + list(said))


def _tasks(
    recipe: Recipe, data: dict[str, Any], model: Any, tokenizer: Any, backend: str, silent: bool, notes: list[str]
) -> tuple[list[str], Work]:
    def work(pruner: Pruner, unit: str) -> dict[str, Any]:
        return run_task(
            model,
            tokenizer,
            pruner,
            data[unit],
            limit=recipe.limit,
            batch=recipe.batch,
            backend=backend,
            silent=silent,
        )

    if recipe.limit is not None:
        notes.append(f"Only the first {recipe.limit} documents of each task.")
    return list(data), work


def _perplexity(
    recipe: Recipe, data: dict[str, Any], model: Any, tokenizer: Any, backend: str, silent: bool, notes: list[str]
) -> tuple[list[str], Work]:
    size = min(recipe.window or WINDOW, context_length(model) or WINDOW)
    parts = {domain: cut(documents, tokenizer, size, recipe.limit) for domain, documents in data.items()}
    notes.append(f"Windows of {size} tokens that move on by half; the second half of each is scored.")

    def work(pruner: Pruner, unit: str) -> dict[str, Any]:
        with bar(f"{pruner.name}: {unit}", len(parts[unit]), silent=silent) as advance:
            done = perplexity(
                model, tokenizer, pruner, parts[unit], batch=recipe.batch, backend=backend, progress=advance
            )
        return done | {key: {unit: done[key]["perplexity"]} for key in ("scores", "errors")}

    return list(parts), work


def _summaries(
    recipe: Recipe, data: dict[str, Any], model: Any, tokenizer: Any, backend: str, silent: bool, notes: list[str]
) -> tuple[list[str], Work]:
    if recipe.limit is not None:
        notes.append(f"Only the first {recipe.limit} documents.")

    def work(pruner: Pruner, unit: str) -> dict[str, Any]:
        written = recipe.output_tokens or (SUMMARIES[unit].written if unit in SUMMARIES else 128)
        with bar(f"{pruner.name}: {unit}", len(data[unit]), silent=silent) as advance:
            done = summarise(
                model,
                tokenizer,
                pruner,
                data[unit],
                most=recipe.input_tokens,
                written=written,
                chat=recipe.chat,
                batch=recipe.batch,
                backend=backend,
                progress=advance,
            )
        of = Path(unit).stem
        return done | {key: {f"{of} {n}": v for n, v in done[key].items()} for key in ("scores", "errors")}

    return list(data), work
