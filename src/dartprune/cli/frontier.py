"""`dartprune frontier`: loss against the bits that are read, for formats of weights and methods on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.evaluation.frontier.run import Frontier

EXAMPLE = "Example: dartprune frontier --model smollm2 --texts my-texts --method sketch-dart,dart --out frontier"
JOURNAL = "journal.jsonl"


def frontier(
    texts: o.Texts = None,
    split: Annotated[str | None, typer.Option("--split", help="Of folders: files named DOMAIN.SPLIT.*.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for results; the same folder continues them.")] = Path(
        "frontier"
    ),
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            help="int8 and int4 (rows, on which methods save), int2 to int7 (rounded only), GGUF files of the model; "
            "with commas, or repeated. bfloat16 is always measured.",
            show_default="int8,int4,int3",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"{o.METHODS}; with commas, or repeated.", show_default="sketch-dart,dart"),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option("--sparsity", "-s", help="Shares of the FFN's bytes to leave unread.", show_default="0.3,0.5,0.7"),
    ] = None,
    streams: Annotated[int, typer.Option("--streams", help="Streams, each of two topics.")] = 12,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of each stream that are given.")] = 128,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of the first topic, prompt included, and of the second.")
    ] = "192,192",
    model: o.Model = None,
    batch: Annotated[int, typer.Option("--batch", help="Streams decoded together: bounds the memory.")] = 12,
    seed: Annotated[int, typer.Option("--seed", help="Of the streams and the intervals.")] = 0,
    backend: o.Backend = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Measure loss over bfloat16 against bits read for each FFN weight: formats of weights, and methods on them."""
    from dartprune.evaluation.arms import check_arms
    from dartprune.evaluation.compare.plan import CHANGING, Plan
    from dartprune.evaluation.frontier.formats import check_formats
    from dartprune.evaluation.texts import read_texts

    plan = Plan(
        prompt=prompt,
        lengths=o.numbers("--lengths", lengths, int),
        count=streams,
        batch=batch,
        kinds=(CHANGING,),
        sparsities=o.numbers("--sparsity", sparsity or "0.3,0.5,0.7", float),
        seed=seed,
    )
    formats = [str(path) for path in o.paths(weights)] if weights else ["int8", "int4", "int3"]
    check_formats(formats)
    methods = o.listed(method) or ["sketch-dart", "dart"]
    check_arms(methods, calibrated=False)
    o.check_backend(backend)
    if not texts:
        raise UserError("nothing to read: give --texts FILE_OR_FOLDER")
    o.results_folder(out)
    documents = read_texts(o.paths(texts), split=split)
    from dartprune.evaluation.frontier.report import write
    from dartprune.evaluation.frontier.run import frontier as measured
    from dartprune.reporting.journal import Journal
    from dartprune.reporting.progress import bar

    o.quiet()
    with o.resumable(out), bar("measuring", 0, silent=as_json) as work:
        found = measured(
            model,
            documents,
            plan,
            formats=formats,
            methods=methods,
            journal=lambda settings: Journal(out / JOURNAL, settings),
            backend=backend,
            watcher=work,
        )
    name = Path(model).name if model else "the demo model"
    found.settings["name"] = name
    files = write(found, out, f"Loss against bits read on {name}")
    if as_json:
        o.print_json(found.to_dict() | {"files": files})
    else:
        _show(found, files)


def _show(found: Frontier, files: dict[str, str]) -> None:
    from dartprune.evaluation.frontier import report
    from dartprune.reporting.tables import grid, say, show

    show(
        grid(
            *report.brief(found.points),
            title="bits read for each FFN weight, and loss over bfloat16 in nats a token",
            frame=False,
        )
    )
    say(report.EXPLAINED, *report.notes(found))
    for path in files.values():
        typer.echo(path)
