"""`dartprune compare`: arms against each other at equal realised sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.evaluation.compare.outcomes import Comparison

EXAMPLE = "Example: dartprune compare --texts my-texts --method static,griffin,dart --sparsity 0.5,0.7 --out results"


def compare(
    texts: o.Texts = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="Data set by name, as NAME or NAME:CONFIG, one domain each; may be repeated."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Of folders: files named DOMAIN.SPLIT.*. Of data sets: the split (test)."),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Of a data set's rows, that holds the text.")] = "text",
    out: Annotated[Path, typer.Option("--out", help="Folder for results; the same folder continues them.")] = Path(
        "comparison"
    ),
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Arms by name, with commas or repeated; `list` shows them.",
            show_default="all that need nothing",
        ),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            "--sparsity", "-s", help="Realised ones to compare at, with commas or repeated.", show_default="0.5,0.7"
        ),
    ] = None,
    streams: Annotated[int, typer.Option("--streams", help="Streams of each kind.")] = 30,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of each stream that are given.")] = 64,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of the first topic, prompt included, and of the second.")
    ] = "128,128",
    kinds: Annotated[str, typer.Option("--kinds", help="one-topic, changing or both.")] = "one-topic,changing",
    calibration: Annotated[
        list[str] | None,
        typer.Option("--calibration", help="Texts for the calibrated arms, with commas or repeated."),
    ] = None,
    versus: Annotated[
        str | None, typer.Option("--versus", help="Arm that the others are paired with.", show_default="dart")
    ] = None,
    model: o.Model = None,
    batch: Annotated[int, typer.Option("--batch", help="Streams decoded together: bounds the memory.")] = 15,
    block: Annotated[
        int,
        typer.Option(
            "--block", help="Longest block of tokens that one forward decodes: a detector's window, 8, for all."
        ),
    ] = 64,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", min=1, help="Decode with several arms at once, each process on its share of the cores."
        ),
    ] = 1,
    tolerance: Annotated[float, typer.Option("--tolerance", help="How far apart realised sparsities may lie.")] = 0.005,
    seed: Annotated[int, typer.Option("--seed", help="Of the streams and the intervals.")] = 0,
    backend: Annotated[
        str, typer.Option("--backend", help="Whose saved bytes are counted; quality is measured with masks.")
    ] = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    as_json: o.AsJson = False,
) -> None:
    """Decode streams that keep and that change their topic with every arm, and compare the losses."""
    asked = o.listed(method)
    if asked == ["list"]:
        _list(as_json)
        return
    from dartprune.evaluation.arms import check_arms, default_arms
    from dartprune.evaluation.compare.plan import Plan
    from dartprune.names import comma_list, unknown

    plan = Plan(
        prompt=prompt,
        lengths=o.numbers("--lengths", lengths, int),
        count=streams,
        batch=batch,
        kinds=tuple(comma_list(kinds)),
        sparsities=o.numbers("--sparsity", sparsity or "0.5,0.7", float),
        tolerance=tolerance,
        seed=seed,
        versus=versus or "dart",
        block=block,
    )
    names = asked or default_arms()
    if versus is not None and versus not in names:
        raise unknown("arm for --versus", versus, names)
    check_arms(names, calibrated=bool(calibration))
    o.check_backend(backend)
    o.results_folder(out)
    documents = _documents(o.paths(texts), dataset or [], split, field)
    from dartprune.evaluation.texts import read_texts

    calibrating = read_texts(o.paths(calibration)) if calibration else {}
    from dartprune.cli.plugins import ran
    from dartprune.cli.shares import Job, compared

    o.quiet()
    job = Job(model, dtype, device, documents, calibrating, plan, names, backend, tuple(ran))
    with o.resumable(out):
        comparison = compared(job, out, processes, silent=as_json)
    comparison.settings |= {"model": Path(model).name if model else "demo", "arms": names, "backend": backend}
    from dartprune.evaluation.compare.report import write

    files = write(comparison, out, f"Arms compared on {Path(model).name if model else 'the demo model'}")
    if as_json:
        o.print_json(comparison.to_dict() | {"files": files})
    else:
        _show(comparison, files)


def _documents(texts: list[Path], dataset: list[str], split: str | None, field: str) -> dict[str, list[str]]:
    if not texts and not dataset:
        raise UserError("nothing to read: give --texts FILE_OR_FOLDER or --dataset NAME")
    from dartprune.evaluation.benchmarks.sources import named_texts
    from dartprune.evaluation.texts import read_texts

    documents = read_texts(texts, split=split) if texts else {}
    for name in dataset:
        documents.setdefault(name, []).extend(named_texts(name, split=split or "test", field=field))
    return documents


def _list(as_json: bool) -> None:
    from dartprune.evaluation.arms import arm_names
    from dartprune.reporting.tables import facts, show

    if as_json:
        o.print_json(arm_names())
    else:
        show(facts(arm_names().items()))


def _show(comparison: Comparison, files: dict[str, str]) -> None:
    from dartprune.evaluation.compare import report
    from dartprune.reporting.tables import grid, say, show

    for target in comparison.settings["sparsities"]:
        show(grid(*report.brief(comparison, target), title=f"{target:.0%} realised sparsity", frame=False))
    say(report.brief_legend(comparison), *report.notes(comparison))
    for path in files.values():
        typer.echo(path)
