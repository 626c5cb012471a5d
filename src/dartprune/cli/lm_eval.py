"""`dartprune lm-eval`: lm-evaluation-harness's own command line with the model `dart`."""

from __future__ import annotations

import sys

import typer

EXAMPLE = "Example: dartprune lm-eval --model_args pretrained=demo,sparsity=0.7,method=dart --tasks boolq --limit 20"
# everything but --help of this command goes to lm_eval as it stands; behind its subcommands --help is lm_eval's
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def lm_eval(context: typer.Context) -> None:
    """Run lm_eval with the model `dart`; all arguments are lm_eval's own (`dartprune lm-eval run --help` shows them).

    Arguments of the model: pretrained (folder, name on the hub, or demo), method, sparsity, dtype, device, batch_size,
    backend, max_length, and any setting of the pruner, such as refresh=relearn or min_traced=8.
    """
    from dartprune.evaluation.sources import require

    require("lm_eval", "this command")
    import torch
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import dartprune.evaluation.harness  # noqa: F401  registers the model

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
    finally:
        sys.argv = before
