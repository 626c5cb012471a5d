"""Entry point: collects the subcommands and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

import dartprune
from dartprune.cli import (
    advise,
    batch,
    bench,
    compare,
    demo,
    frontier,
    generate,
    inspect,
    layers,
    lm_eval,
    serve,
    study,
)
from dartprune.cli import eval as evaluation
from dartprune.cli.command import Command
from dartprune.cli.options import INTERRUPTED
from dartprune.cli.plugins import run_plugins
from dartprune.errors import UserError
from dartprune.reporting.tables import say

# typer brings a click of its own in some versions and the common one in others
_Usage: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Skip most of a language model's FFN while it decodes, and renew the masks when the topic moves (DART).",
)
for _name, _command, _example in (
    ("generate", generate.generate, generate.EXAMPLE),
    ("advise", advise.advise, advise.EXAMPLE),
    ("serve", serve.serve, serve.EXAMPLE),
    ("batch", batch.batch, batch.EXAMPLE),
    ("inspect", inspect.inspect, inspect.EXAMPLE),
    ("demo", demo.demo, demo.EXAMPLE),
    ("study", study.study, study.EXAMPLE),
    ("compare", compare.compare, compare.EXAMPLE),
    ("frontier", frontier.frontier, frontier.EXAMPLE),
    ("eval", evaluation.evaluate, evaluation.EXAMPLE),
    ("layers", layers.layers, layers.EXAMPLE),
):
    app.command(name=_name, epilog=_example, cls=Command)(_command)
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
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin", help="A Python file that is run first, as to register a scorer or an arm; may be repeated."
        ),
    ] = None,
) -> None:
    run_plugins(plugin or [])


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a bug (with its traceback), 2 a mistake in what was given, 130."""
    try:
        code = app(prog_name="dartprune", standalone_mode=False)
    except _Usage as error:
        if not error.format_message() or type(error).__name__ == "NoArgsIsHelpError":
            error.ctx.get_help()
            sys.exit(2)
        _end(_plain(error))
    except UserError as error:
        _end(str(error))
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output went away
    if code == INTERRUPTED:
        say("interrupted: the model was detached", style="yellow", error=True)
    sys.exit(code if isinstance(code, int) else 0)


def _plain(error: Any) -> str:
    """The message of a usage error as all others are written, with the value that was given to the option."""
    message = str(error.format_message())
    message = message[:1].lower() + message[1:].removesuffix(".")
    options = getattr(getattr(error, "param", None), "opts", ())
    arguments = [part for argument in sys.argv for part in argument.split("=", 1)]
    given = [value for name, value in pairwise(arguments) if name in options]
    return f"{message}, got {given[-1]!r}" if given else message


def _end(message: str) -> None:
    say(f"error: {' '.join(message.split())}", style="red", error=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
