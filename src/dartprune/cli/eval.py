"""`dartprune eval`: benchmarks, perplexity and summaries, every arm by one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError
from dartprune.names import comma_list
from dartprune.reporting.tables import say, show_cells

if TYPE_CHECKING:
    from dartprune.evaluation.benchmarks.recipe import Recipe

EXAMPLE = "Example: dartprune eval --perplexity notes.txt --method dense,static,dart --sparsity 0.5,0.7 --window 256"


def evaluate(
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Further names; of a recipe: instead of its data.", show_default=False),
    ] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A set of tasks: paper (the ten benchmarks).")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-evaluation-harness, with commas.")] = None,
    perplexity: Annotated[
        str | None, typer.Option("--perplexity", help="wikitext-2, c4, files or folders of text.")
    ] = None,
    summaries: Annotated[
        str | None,
        typer.Option("--summaries", help="cnn_dailymail, multi_news, gov_report, xsum, or a file of JSON lines."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A table or figure of the paper; 'list' shows them.")
    ] = None,
    model: o.Model = None,
    method: o.Methods = None,
    sparsity: o.Sparsities = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="Examples in the prompt of each task.")] = None,
    include_path: Annotated[
        str | None, typer.Option("--include-path", help="Folder of further YAML tasks; they win over lm_eval's.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents or windows of each, at most.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, help="Contexts at a time.", show_default="8")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=4, help="Tokens of a window of perplexity.", show_default="2048")
    ] = None,
    input_tokens: Annotated[
        int | None, typer.Option("--input-tokens", help="Tokens of a document to summarise.", show_default="1024")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output-tokens", help="Tokens of a summary.", show_default="the data set's")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put documents to summarise into the tokenizer's chat template.")
    ] = False,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for results.json, report.html and what is done so far.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Measure quality: tasks of lm-evaluation-harness, perplexity, summaries, or a recipe of the paper's tables."""
    if recipe == "list":
        _list_recipes(as_json)
        return
    o.check_backend(backend)
    asked = _asked(suite, tasks, perplexity, summaries, recipe, more or [], shots).but(
        methods=tuple(o.listed(method)) if method is not None else None,
        sparsities=o.numbers("--sparsity", sparsity, float) if sparsity is not None else None,
        limit=limit,
        batch=batch,
        window=window,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        chat=chat or None,
        include_path=include_path,
    )
    if asked.measure == "layers":
        from dartprune.cli.layers import carry_out

        carry_out(asked, model, backend=backend, dtype=dtype, device=device, out=out, as_json=as_json)
        return
    from dartprune.evaluation.benchmarks.run import execute, gather
    from dartprune.loading import DEMO, load

    if out is not None:
        o.results_folder(out)
    gathered = gather(asked)
    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    with o.resumable(out):
        measured = execute(
            asked, gathered, loaded, tokenizer, name=model or DEMO, backend=backend, out=out, silent=as_json
        )
    written = measured.write(out) if out is not None else []
    if as_json:
        o.print_json(measured.to_dict())
        return
    if asked.title:
        say(asked.title)
    show_cells(measured.tables())
    say(*measured.notes)
    for path in written:
        typer.echo(f"written: {path}")


def _asked(
    suite: str | None,
    tasks: str | None,
    perplexity: str | None,
    summaries: str | None,
    recipe: str | None,
    more: list[str],
    shots: int | None,
) -> Recipe:
    from dartprune.evaluation.benchmarks.recipe import Recipe
    from dartprune.evaluation.benchmarks.recipe import recipe as read_recipe
    from dartprune.evaluation.benchmarks.tasks import suite as read_suite

    given = {"suite": suite, "tasks": tasks, "perplexity": perplexity, "summaries": summaries, "recipe": recipe}
    named = [kind for kind, value in given.items() if value is not None]
    if len(named) != 1:
        raise UserError("give one of --suite, --tasks, --perplexity, --summaries and --recipe")
    if recipe is not None:
        asked = read_recipe(recipe)
        # a recipe on other data: its numbers of examples stay
        asked = asked.but(what={name: asked.what.get(name) for name in more} or None)
        return asked if shots is None else asked.but(what=dict.fromkeys(asked.what, shots))
    if suite is not None:
        what = {**read_suite(suite), **dict.fromkeys(more)}
        return Recipe("tasks", what if shots is None else dict.fromkeys(what, shots))
    return Recipe(named[0], dict.fromkeys([*comma_list(given[named[0]] or ""), *more], shots))


def _list_recipes(as_json: bool) -> None:
    from dartprune.evaluation.benchmarks.recipe import recipe, recipe_names

    found: dict[str, Any] = {name: recipe(name) for name in recipe_names()}
    if as_json:
        o.print_json({name: {"title": r.title, "about": r.about, "ran": r.ran} for name, r in found.items()})
        return
    for name, listed in found.items():
        typer.echo(f"{name}: {listed.title}")
