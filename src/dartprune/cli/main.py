"""Entry point: collects the subcommands and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

import dartprune
from dartprune.cli import bench, compare, demo, generate, inspect, layers, lm_eval, study
from dartprune.cli import eval as evaluation

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Skip most of a language model's FFN while it decodes, and renew the masks when the topic moves (DART).",
)
app.command(name="generate", epilog=generate.EXAMPLE)(generate.generate)
app.command(name="inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
app.command(name="demo", epilog=demo.EXAMPLE)(demo.demo)
app.command(name="study", epilog=study.EXAMPLE)(study.study)
app.command(name="compare", epilog=compare.EXAMPLE)(compare.compare)
app.command(name="eval", epilog=evaluation.EXAMPLE)(evaluation.evaluate)
app.command(name="layers", epilog=layers.EXAMPLE)(layers.layers)
app.command(name="lm-eval", epilog=lm_eval.EXAMPLE, context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dartprune {dartprune.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    return None


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake in what was given, 130 interrupted."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            Console(stderr=True).print("interrupted: the model was detached", style="yellow")
        raise
    except (ValueError, TypeError, OSError) as error:
        if not _is_users(error):
            raise
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _is_users(error: BaseException) -> bool:
    """Whether this package raised the error about what it was given; anything else is a bug and keeps its traceback."""
    if isinstance(error, OSError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "dartprune" in trace.tb_frame.f_globals.get("__name__", "")


if __name__ == "__main__":
    main()
