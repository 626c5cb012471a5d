"""Carries out a plan on a model: every arm on everything that the plan names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dartprune.evaluation.models import context_length
from dartprune.evaluation.outcome import Outcome, Table, arms, collect, tables
from dartprune.evaluation.perplexity import cut, perplexity
from dartprune.evaluation.plan import Plan
from dartprune.evaluation.progress import bar
from dartprune.evaluation.sources import SUMMARIES, corpus, require, summaries
from dartprune.evaluation.summaries import summarise
from dartprune.evaluation.tasks import load_tasks, run_task
from dartprune.journal import Journal
from dartprune.page import Page
from dartprune.pruner import Pruner

PROTOCOL = (
    "All of a context but its last token is prefilled dense and traced; the last context token and all that follow it "
    "are decoded with the masks in force, in every arm alike. Contexts too short for a mask run dense and are counted. "
    "Realised sparsity: one minus the share of the FFN's weights that the decoded tokens used."
)
WINDOW = 2048  # tokens, where neither the plan nor the model says less
Work = Callable[[Pruner, str], dict[str, Any]]


@dataclass
class Measured:
    """Results of a plan."""

    plan: Plan
    model: str
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """For people."""
        decimals = 2 if self.plan.measure == "perplexity" else 3
        return tables(self.outcomes, decimals=decimals, mean=self.plan.measure == "tasks")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "measure": self.plan.measure,
            "title": self.plan.title,
            "model": self.model,
            "settings": self.plan.settings(),
            "arms": [outcome.to_dict() for outcome in self.outcomes],
            "notes": self.notes,
        }

    def write(self, folder: Path) -> list[Path]:
        """Write `results.json` and `report.html` into a folder."""
        data = folder / "results.json"
        data.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        page = Page(self.plan.title or f"{self.plan.measure}: {', '.join(self.plan.what)}")
        page.text(f"Model: {self.model}. {PROTOCOL}")
        for table in self.tables():
            page.heading(table.title)
            page.table(table.columns, table.rows)
        for note in self.notes:
            page.text(note)
        page.settings(self.plan.settings())
        report = folder / "report.html"
        page.write(report)
        return [data, report]


def check(plan: Plan) -> None:
    """ValueError for what a plan needs and this machine lacks, before any model is loaded."""
    if plan.measure == "tasks":
        require("lm_eval", "running tasks")
    if plan.measure == "summaries":
        require("rouge_score", "judging summaries")


def measure(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    backend: str = "auto",
    out: Path | None = None,
    silent: bool = False,
) -> Measured:
    """Do what a plan of tasks, perplexity or summaries says.

    Args:
        plan: what to measure.
        model: a decoder in evaluation mode, not attached.
        tokenizer: of the model.
        name: of the model, for people and for the journal.
        backend: how the pruned FFN is computed.
        out: folder of the journal; work that was killed goes on from there. None: nothing is kept.
        silent: show no progress.

    Raises:
        ValueError: data that cannot be loaded, or a journal of other settings.
    """
    make = {"tasks": _tasks, "perplexity": _perplexity, "summaries": _summaries}[plan.measure]
    notes: list[str] = []
    units, work = make(plan, model, tokenizer, backend, silent, notes)
    settings = {**plan.settings(), "model": name, "backend": backend, "dtype": str(model.dtype)}
    journal = Journal(None if out is None else out / "journal.jsonl", settings)
    outcomes = collect(arms(plan.methods, plan.sparsities), units, work, journal)
    said = dict.fromkeys(note for outcome in outcomes for note in outcome.tally.notes)
    return Measured(plan, name, outcomes, notes + list(said))


def _tasks(
    plan: Plan, model: Any, tokenizer: Any, backend: str, silent: bool, notes: list[str]
) -> tuple[list[str], Work]:
    loaded = load_tasks(plan.what, plan.include_path)

    def work(pruner: Pruner, unit: str) -> dict[str, Any]:
        return run_task(
            model,
            tokenizer,
            pruner,
            loaded[unit],
            limit=plan.limit,
            batch=plan.batch,
            backend=backend,
            silent=silent,
        )

    if plan.limit is not None:
        notes.append(f"Only the first {plan.limit} documents of each task.")
    return list(loaded), work


def _perplexity(
    plan: Plan, model: Any, tokenizer: Any, backend: str, silent: bool, notes: list[str]
) -> tuple[list[str], Work]:
    size = min(plan.window or WINDOW, context_length(model))
    parts: dict[str, list[Any]] = {}
    for source in plan.what:
        for domain, documents in corpus(source).items():
            parts[domain] = parts.get(domain, []) + cut(documents, tokenizer, size, plan.limit)
    notes.append(f"Windows of {size} tokens that move on by half; the second half of each is scored.")

    def work(pruner: Pruner, unit: str) -> dict[str, Any]:
        with bar(f"{pruner.name}: {unit}", len(parts[unit]), silent=silent) as advance:
            done = perplexity(
                model, tokenizer, pruner, parts[unit], batch=plan.batch, backend=backend, progress=advance
            )
        return done | {key: {unit: done[key]["perplexity"]} for key in ("scores", "errors")}

    return list(parts), work


def _summaries(
    plan: Plan, model: Any, tokenizer: Any, backend: str, silent: bool, notes: list[str]
) -> tuple[list[str], Work]:
    pairs = {name: summaries(name)[: plan.limit] for name in plan.what}
    if plan.limit is not None:
        notes.append(f"Only the first {plan.limit} documents.")

    def work(pruner: Pruner, unit: str) -> dict[str, Any]:
        written = plan.output_tokens or (SUMMARIES[unit].written if unit in SUMMARIES else 128)
        with bar(f"{pruner.name}: {unit}", len(pairs[unit]), silent=silent) as advance:
            done = summarise(
                model,
                tokenizer,
                pruner,
                pairs[unit],
                most=plan.input_tokens,
                written=written,
                chat=plan.chat,
                batch=plan.batch,
                backend=backend,
                progress=advance,
            )
        of = Path(unit).stem
        return done | {key: {f"{of} {n}": v for n, v in done[key].items()} for key in ("scores", "errors")}

    return list(pairs), work
