"""Options that several subcommands share, and what they stand for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dartprune.names import comma_list

if TYPE_CHECKING:
    from rich.table import Table

    from dartprune.pruner import Pruner
    from dartprune.report import Report

N = TypeVar("N", int, float)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder or name on the Hugging Face hub.", show_default="the small model inside"
    ),
]
Sparsity = Annotated[
    float, typer.Option("--sparsity", "-s", help="Share of the FFN's neurons to leave out, in [0, 1).")
]
MethodName = Annotated[
    str,
    typer.Option("--method", help="dart, gated-dart, sketch-dart, static, griffin, clock, random, per-token or dense."),
]
Backend = Annotated[str, typer.Option("--backend", help="How the pruned FFN is computed: auto or a backend's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture to this file (png, svg or pdf).")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda.", show_default="cpu")]


def make_pruner(method: str, sparsity: float) -> Pruner:
    """The preset of that name at that sparsity; ValueError naming the nearest for an unknown one."""
    from dartprune.pruner import presets

    cls = presets.get(method)
    return cls(sparsity=sparsity if cls.prunes else 0.0)


def numbers(option: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """The numbers of a list with commas between them; ValueError naming the option otherwise."""
    try:
        return tuple(kind(part) for part in comma_list(text))
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers with commas between them") from None


def check_plot(path: Path | None) -> None:
    """ValueError before any work if a picture could not be written there."""
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: the file must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")


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
