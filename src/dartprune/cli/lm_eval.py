"""`dartprune lm-eval`: lm-evaluation-harness's own command line with the model `dart`."""

from __future__ import annotations

import sys
import textwrap

import typer

from dartprune.errors import UserError, require

EXAMPLE = "Example: dartprune lm-eval --model_args pretrained=demo,sparsity=0.7,method=dart --tasks boolq --limit 20"
# everything but --help of this command goes to lm_eval as it stands; behind its subcommands --help is lm_eval's
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def lm_eval(context: typer.Context) -> None:
    """Run lm_eval with the model `dart`; all arguments are lm_eval's own (`dartprune lm-eval run --help` shows them).

    Arguments of the model: pretrained (folder, name on the hub, or demo), method, sparsity, dtype, device, batch_size,
    backend, max_length, and any setting of the pruner, such as refresh=relearn or min_traced=8.
    """
    require("lm_eval", "this command")
    import torch
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import dartprune.evaluation.benchmarks.harness  # noqa: F401  registers the model

    arguments = list(context.args)
    runs = not arguments or arguments[0] not in ("ls", "validate")
    if runs and arguments and not {"-h", "--help"} & set(arguments):
        if not any(a.split("=")[0] in ("--model", "-M", "--config", "-C") for a in arguments):
            arguments += ["--model", "dart"]
        if not any(a.split("=")[0] in ("--device", "--config", "-C") for a in arguments):
            # lm_eval would take a GPU for granted
            arguments += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    setup_logging()
    before, sys.argv = sys.argv, ["dartprune lm-eval", *arguments]
    try:
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    except (KeyError, ValueError) as error:
        if not _about_arguments(error):
            raise
        raise UserError(textwrap.shorten(str(error.args[0]), 300, placeholder=" ...")) from error
    finally:
        sys.argv = before


def _about_arguments(error: BaseException) -> bool:
    """Whether lm_eval raised the error while it read its arguments, and not in the work itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return where.startswith(("lm_eval.config", "lm_eval._cli", "lm_eval.api.registry"))
