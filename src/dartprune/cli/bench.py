"""`dartprune bench`: speed and memory, against dense and the memory-bandwidth limit."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.cli.command import Command, shares_options
from dartprune.errors import UserError, check_output_file
from dartprune.names import comma_list

if TYPE_CHECKING:
    from dartprune.bench.models import Subject
    from dartprune.bench.result import Result
    from dartprune.pruner import Pruner

EXAMPLES = {
    "kernel": "Example: dartprune bench kernel --hidden 2048 --neurons 8192 --sparsity 0.5,0.7,0.8 --batch 1,4",
    "decode": "Example: dartprune bench decode --shape llama-3.2-1b --method static,dart --refresh-every 32",
    "refresh": "Example: dartprune bench refresh --shape llama-3.2-1b",
    "trace": "Example: dartprune bench trace --shape llama-3.2-1b --prompt 128,512",
    "memory": "Example: dartprune bench memory --shape llama-3.1-8b --layers 2",
}

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory against dense decoding, in turn in one run, and against the memory bandwidth.",
)

Shape = Annotated[
    str | None,
    typer.Option("--shape", help="A real shape with random weights: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, "
                 "qwen3-0.6b or gpt2."),
]  # fmt: skip
Layers = Annotated[int | None, typer.Option("--layers", help="Fewer layers of the shape, where memory is short.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Methods, with commas or repeated.", show_default="static,dart"),
]
Batch = Annotated[int, typer.Option("--batch", help="Sequences decoded together, each with its own masks.")]
Prompt = Annotated[int, typer.Option("--prompt", help="Tokens of each prompt.")]
TurnsOption = Annotated[int, typer.Option("--turns", help="How often all arms are measured in turn.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the results, with machine and command, to this file.")]


def _methods(names: list[str] | None, sparsity: float) -> dict[str, Pruner]:
    made = {name: o.make_pruner(name, sparsity) for name in o.listed(names) or ("static", "dart")}
    return {name if pruner.prunes else f"{name}, attached": pruner for name, pruner in made.items()}


@dataclass(frozen=True)
class Setup:
    """Options of all benchmarks: how is computed, and where results go."""

    backend: o.Backend = "auto"
    device: o.Device = None
    plot: o.Plot = None
    out: Out = None
    as_json: o.AsJson = False

    def check(self, turns: int) -> None:
        """UserError, before the long work, for what cannot be."""
        o.check_plot(self.plot)
        o.check_backend(self.backend)
        if turns < 1:
            raise UserError(f"--turns must be at least 1, got {turns}")
        if self.out is not None:
            check_output_file(self.out)

    def run(self, measure: Callable[..., Result], *what: Any, **how: Any) -> None:
        """Measure with a line of progress, then print, draw and write."""
        from dartprune.bench.table import remarks, tables
        from dartprune.reporting.progress import bar
        from dartprune.reporting.tables import say, show

        with bar("starting", silent=self.as_json) as progress:
            result = measure(*what, **how, backend=self.backend, progress=progress.tell)
        command = shlex.join(["dartprune", *sys.argv[1:]])
        if self.plot is not None:
            from dartprune.bench.picture import save_result

            save_result(result, self.plot)
        if self.out is not None:
            result.write(self.out, command)
        if self.as_json:
            o.print_json(result.to_dict(command))
            return
        show(*tables(result))
        say(*remarks(result))
        for name, path in (("picture", self.plot), ("results", self.out)):
            if path is not None:
                typer.echo(f"{name}: {path}")


@dataclass(frozen=True)
class ModelSetup(Setup):
    """Options of the benchmarks of a whole model."""

    model: o.Model = None
    shape: Shape = None
    layers: Layers = None
    dtype: o.DType = "auto"

    def subject(self) -> Subject:
        """The model to measure."""
        from dartprune.bench.models import subject

        o.quiet()
        return subject(model=self.model, shape=self.shape, dtype=self.dtype, layers=self.layers, device=self.device)


@app.command(cls=Command, epilog=EXAMPLES["kernel"])
@shares_options
def kernel(
    hidden: Annotated[str, typer.Option("--hidden", help="Widths of the model, separated by commas.")] = "2048",
    neurons: Annotated[str, typer.Option("--neurons", help="Neurons of the FFN, separated by commas.")] = "8192",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights, separated by commas.")] = "bfloat16,float32",
    sparsity: Annotated[
        list[str] | None,
        typer.Option("--sparsity", "-s", help="Shares left out, with commas or repeated.", show_default="0.5,0.7,0.8"),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences, each with its own mask.")] = "1,4",
    activation: Annotated[str, typer.Option("--activation", help="silu, gelu, gelu_tanh, relu, ...")] = "silu",
    plain: Annotated[bool, typer.Option("--plain", help="An FFN without a gate.")] = False,
    layers: Annotated[
        int | None, typer.Option("--layers", help="Layers to rotate over.", show_default="out of the caches")
    ] = None,
    turns: TurnsOption = 11,
    setup: Setup = Setup(),
) -> None:
    """Time one FFN: torch dense, masked, a packed copy of the kept rows, and the rows read in place."""
    setup.check(turns)
    if layers is not None and layers < 1:
        raise UserError(f"--layers must be at least 1, got {layers}")
    from dartprune.bench.kernel import FFNCase, measure

    cases = [
        FFNCase(h, n, kind, s, b, not plain, activation)
        for h in o.numbers("--hidden", hidden, int)
        for n in o.numbers("--neurons", neurons, int)
        for kind in comma_list(dtype)
        for b in o.numbers("--batch", batch, int)
        for s in o.numbers("--sparsity", sparsity or "0.5,0.7,0.8", float)
    ]
    setup.run(measure, cases, device=setup.device, turns=turns, layers=layers)


@app.command(cls=Command, epilog=EXAMPLES["decode"])
@shares_options
def decode(
    methods: Methods = None,
    sparsity: o.Sparsity = 0.7,
    refresh_every: Annotated[
        int | None,
        typer.Option(
            "--refresh-every",
            help="Methods that replay do so after this many tokens exactly.",
            show_default="when their detector fires",
        ),
    ] = None,
    batch: Batch = 1,
    prompt: Prompt = 64,
    new: Annotated[int, typer.Option("--new", "-n", help="New tokens that are timed in each turn.")] = 32,
    graphs: Annotated[bool, typer.Option("--graphs", help="Decode under CUDA graphs, dense too.")] = False,
    turns: TurnsOption = 5,
    setup: ModelSetup = ModelSetup(),
) -> None:
    """Time whole decode steps, dense and pruned, beside what Amdahl's law allows."""
    setup.check(turns)
    from dartprune.bench.decode import Load, check, measure, paced
    from dartprune.bench.device import device_of

    pruners, load = paced(_methods(methods, sparsity), refresh_every), Load(batch, prompt, new, graphs)
    check(pruners, load, device_of(setup.device))
    setup.run(measure, setup.subject(), pruners, load, turns=turns)


@app.command(cls=Command, epilog=EXAMPLES["refresh"])
@shares_options
def refresh(
    method: o.MethodName = "dart",
    sparsity: o.Sparsity = 0.7,
    batch: Batch = 1,
    prompt: Prompt = 64,
    turns: TurnsOption = 5,
    setup: ModelSetup = ModelSetup(),
) -> None:
    """Time one replay, split by what it does, and attaching, in dense decode steps."""
    setup.check(turns)
    from dartprune.bench.refresh import check, measure

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would tell of its start and end
    pruner = o.make_pruner(method, sparsity)
    check(pruner, batch, prompt)
    setup.run(measure, setup.subject(), pruner, batch=batch, prompt=prompt, turns=turns)


@app.command(cls=Command, epilog=EXAMPLES["trace"])
@shares_options
def trace(
    method: o.MethodName = "dart",
    sparsity: o.Sparsity = 0.7,
    prompts: Annotated[str, typer.Option("--prompt", help="Tokens of the prompts, separated by commas.")] = "128,512",
    batch: Batch = 1,
    turns: TurnsOption = 5,
    setup: ModelSetup = ModelSetup(),
) -> None:
    """Time the reading of prompts, attached and unattached: what tracing adds."""
    setup.check(turns)
    from dartprune.bench.trace import check, measure

    lengths, pruner = o.numbers("--prompt", prompts, int), o.make_pruner(method, sparsity)
    check(pruner, lengths, batch)
    setup.run(measure, setup.subject(), pruner, lengths, batch=batch, turns=turns)


@app.command(cls=Command, epilog=EXAMPLES["memory"])
@shares_options
def memory(
    methods: Methods = None,
    sparsity: o.Sparsity = 0.7,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of the smaller of the two batches.")] = 1,
    prompt: Prompt = 288,
    new: Annotated[int, typer.Option("--new", "-n", help="New tokens.")] = 4,
    turns: TurnsOption = 3,
    setup: ModelSetup = ModelSetup(),
) -> None:
    """Measure the bytes that a sequence holds while it is decoded, attached and unattached."""
    setup.check(turns)
    from dartprune.bench.memory import check, measure

    pruners = _methods(methods, sparsity)
    check(pruners, batch, prompt, new)
    setup.run(measure, setup.subject(), pruners, batch=batch, prompt=prompt, new=new, turns=turns)
