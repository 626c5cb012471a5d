"""`dartprune eval`: benchmarks, perplexity and summaries, every arm by one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o

if TYPE_CHECKING:
    from dartprune.evaluation.execute import Measured
    from dartprune.evaluation.recipe import Recipe

EXAMPLE = "Example: dartprune eval --perplexity notes.txt --method dense,static,dart --sparsity 0.5,0.7 --window 256"


def evaluate(
    more: Annotated[
        list[str] | None, typer.Argument(help="Further tasks, texts or summaries.", show_default=False)
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
    method: Annotated[
        str | None,
        typer.Option("--method", help="Presets, with commas.", show_default="dense,static,griffin,dart"),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", "-s", help="In [0, 1), with commas.", show_default="0.7")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="Examples in the prompt of each task.")] = None,
    include_path: Annotated[
        str | None, typer.Option("--include-path", help="Folder of further YAML tasks; they win over lm_eval's.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents or windows of each, at most.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Contexts at a time.", show_default="8")
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
    asked = _asked(suite, tasks, perplexity, summaries, recipe, more or [], shots).but(
        methods=_methods(method),
        sparsities=_numbers(sparsity),
        limit=limit,
        batch=batch_size,
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
    from dartprune.evaluation.execute import execute, gather
    from dartprune.loading import DEMO, load

    gathered = gather(asked)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    measured = execute(asked, gathered, loaded, tokenizer, name=model or DEMO, backend=backend, out=out, silent=as_json)
    written = measured.write(out) if out is not None else []
    if as_json:
        o.print_json(measured.to_dict())
        return
    _show(measured)
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
    from dartprune.evaluation.recipe import Recipe
    from dartprune.evaluation.recipe import recipe as read_recipe
    from dartprune.evaluation.tasks import suite as read_suite

    given = {"tasks": tasks, "perplexity": perplexity, "summaries": summaries}
    named = [measure for measure, value in given.items() if value is not None]
    if len(named) + (suite is not None) > 1 or not (named or suite or recipe) or (suite and recipe):
        raise ValueError("give one of --suite, --tasks, --perplexity, --summaries and --recipe")
    base = read_recipe(recipe) if recipe is not None else None
    if suite is not None:
        what = read_suite(suite)
        return Recipe("tasks", what if shots is None else dict.fromkeys(what, shots))
    if not named:
        assert base is not None
        return base if shots is None else base.but(what=dict.fromkeys(base.what, shots))
    measure = named[0]
    names = [*_split(given[measure]), *more]
    if base is None:
        return Recipe(measure, dict.fromkeys(names, shots))
    if base.measure != measure:
        raise ValueError(f"the recipe {recipe!r} measures {base.measure}: --{measure} does not fit it")
    # a recipe on other data: its numbers of examples stay
    return base.but(what={name: base.what.get(name) if shots is None else shots for name in names})


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _methods(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(_split(text))


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in _split(text))
    except ValueError:
        raise ValueError(f"--sparsity must be numbers with commas between them, got {text!r}") from None


def _list_recipes(as_json: bool) -> None:
    from dartprune.evaluation.recipe import recipe, recipe_names

    found: dict[str, Any] = {name: recipe(name) for name in recipe_names()}
    if as_json:
        o.print_json({name: {"title": r.title, "about": r.about, "ran": r.ran} for name, r in found.items()})
        return
    for name, listed in found.items():
        typer.echo(f"{name}: {listed.title}")


def _show(measured: Measured) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if measured.recipe.title:
        console.print(measured.recipe.title, markup=False, highlight=False)
    for shown in measured.tables():
        table = Table(title=shown.title, title_justify="left")
        for column in shown.columns:
            table.add_column(column, justify="right" if column else "left")
        for row in shown.rows:
            table.add_row(*row)
        console.print(table)
    for note in measured.notes:
        console.print(note, markup=False, highlight=False)
