"""`dartprune batch`: prompts from a file, answers into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dartprune.cli import options as o
from dartprune.cli import serving as s
from dartprune.errors import UserError, check_output_file, require, user_file

EXAMPLE = "Example: dartprune batch prompts.jsonl answers.jsonl --model smollm2 --sparsity 0.5"


def batch(
    source: Annotated[Path, typer.Argument(help="JSON lines: a request each, as the server takes it, with an id.")],
    target: Annotated[Path, typer.Argument(help="Answers, a line each; what is there already is not done again.")],
    model: o.Model = None,
    method: s.Method = "sketch-dart",
    sparsity: o.Sparsity = 0.5,
    allow_sparsity: s.Allow = None,
    batch: s.Batch = 16,
    chunk: s.Chunk = 256,
    tokens: s.Tokens = None,
    dense_above: s.Above = "auto",
    batch_invariant: s.Invariant = False,
    prefix_cache: s.PrefixCache = 256,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
) -> None:
    """Answer the requests of a file, in its order; a bad line gets an error as its answer, and the rest goes on."""
    require("pydantic", "dartprune batch", "serve")
    offer = s.Offer.of(method, sparsity, allow_sparsity)
    above = s.above_of(dense_above, invariant=batch_invariant)
    o.check_backend(backend)
    with user_file(source), source.open("rb"):
        pass
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{target}: the answers would be written over the prompts")
    check_output_file(target)
    from dartprune.reporting.progress import bar
    from dartprune.serving.batch import BatchJob, whole_lines
    from dartprune.serving.door import Door, Terms
    from dartprune.serving.engine import Engine
    from dartprune.serving.pace import measured

    whole_lines(target)
    with s.attached(model, offer, backend=backend, dtype=dtype, device=device) as (loaded, tokenizer, run):
        limits = s.limits_of(batch, 1 << 30, chunk, tokens, prefix_cache, invariant=batch_invariant)
        engine = Engine(loaded, tokenizer, run, limits)
        engine.dense_above = measured(above, loaded, run, engine.together)
        engine.start()
        terms = Terms(s.name_of(model), **offer.terms, seconds=None)
        try:
            with o.resumable(target), bar("answers", silent=False) as progress:
                job = BatchJob(Door(engine, terms), source, target)
                counts = job.run(lambda now: progress.tell(f"{now.before + now.done} answers"))
        finally:
            engine.abandon()
            engine.close(10)
    before = f", {counts.before} were there" if counts.before else ""
    bad = f", {counts.bad} of them errors" if counts.bad else ""
    typer.echo(f"{target}: {counts.done} answers{bad}{before}")
