"""`dartprune inspect`: what a model is made of, and what pruning could save at best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError, read_user_text
from dartprune.model.caches import handed

BAR = 12  # widest bar of the table, which fits into 80 columns
EXAMPLE = "Example: dartprune inspect --model ./my-model --text notes.txt --sparsity 0.7"


def inspect(
    model: o.Model = None,
    sparsity: o.Sparsity = 0.7,
    text: Annotated[Path | None, typer.Option("--text", help="File whose text shows the sensitivities.")] = None,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    plot: o.Plot = None,
    as_json: o.AsJson = False,
) -> None:
    """Show a model's family, its FFN's share, the best possible saving, and each layer's sensitivity and budget."""
    o.check_plot(plot)
    o.check_backend(backend)
    pruner = o.make_pruner("dart", sparsity)
    from dartprune.demo import passages
    from dartprune.loading import load

    content = read_user_text(text) if text is not None else " ".join(passages()["novels"])
    if not content.strip():
        raise UserError(f"--text {text}: the file is empty")
    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    data = _look(loaded, tokenizer, content, pruner, backend)
    if plot is not None:
        from dartprune.reporting.plot import save_budget

        save_budget(data["layers"], plot)
    if as_json:
        o.print_json(data)
        return
    _show(data)
    if plot is not None:
        typer.echo(f"picture: {plot}")


def _look(model: Any, tokenizer: Any, content: str, pruner: Any, backend: str) -> dict[str, Any]:
    import torch

    from dartprune.bench.costs import Shape
    from dartprune.model.context import context_length
    from dartprune.model.families import describe

    decoder = describe(model)
    shape = Shape.of(model)
    most = min((context_length(model) or 1025) - 1, 1024)
    tokens = tokenizer(content, return_tensors="pt", truncation=True, max_length=most)["input_ids"]
    if tokens.shape[1] < pruner.least_traced + 2:
        raise UserError(f"the text has {tokens.shape[1]} tokens: {pruner.least_traced + 2} are needed to see anything")
    with torch.no_grad(), pruner(model, backend=backend) as run:
        cache = run.prefill(tokens[:, :-1].to(model.device))
        with run.phase("decode"):
            model(input_ids=tokens[:, -1:].to(model.device), **handed(cache))
        impact = run.impact(run.slots_of(cache)[0])
        report = run.report()
    share = shape.ffn_bytes / shape.step_bytes
    return {
        "family": decoder.family,
        "recognised": decoder.recognised,
        "layers": [
            {
                "layer": layer.index,
                "neurons": layer.neurons,
                "angle": angle,
                "change": change,
                "sensitivity": angle * change,
                "keep": layer.kept,
            }
            for layer, (angle, change) in zip(report.layers, impact, strict=True)
        ],
        "hidden": decoder.hidden,
        "parameters": shape.parameters,
        "ffn_share_of_parameters": shape.ffn_parameters / shape.parameters,
        "ffn_share_of_step_bytes": share,
        "sparsity": pruner.sparsity,
        "best_speedup": 1 / (1 - share * pruner.sparsity),
        "backend": report.backend,
        "saves_time": report.saves_time,
        "overhead_bytes_per_sequence": report.overhead_bytes_per_sequence,
        "notes": report.notes,
    }


def _show(data: dict[str, Any]) -> None:
    from dartprune.reporting.tables import facts, grid, say, show

    how = "row of the table" if data["recognised"] == "table" else "recognised by its structure"
    neurons = sorted({layer["neurons"] for layer in data["layers"]})
    rows = [
        ("family", f"{data['family']} ({how})"),
        ("layers", f"{len(data['layers'])}, H={data['hidden']}, I={', '.join(map(str, neurons))}"),
        ("FFN share of the parameters", f"{data['ffn_share_of_parameters']:.1%} of {data['parameters'] / 1e6:,.1f} M"),
        ("FFN share of a decode step's weight bytes", f"{data['ffn_share_of_step_bytes']:.1%}"),
        (
            f"at sparsity {data['sparsity']:g}, at best",
            f"{data['best_speedup']:.2f} times as fast, if weights are all that is read",
        ),
        ("backend", data["backend"] + ("" if data["saves_time"] else " (saves no time)")),
        ("extra memory", f"{data['overhead_bytes_per_sequence'] / 1e6:.2f} MB per sequence"),
    ]
    show(facts(rows))
    say(*(f"note: {note}" for note in data["notes"]), style="yellow")
    layers = [
        (
            str(layer["layer"]),
            f"{layer['angle']:.3f}",
            f"{layer['change']:.3f}",
            f"{layer['sensitivity']:.3f}",
            f"{layer['keep'] / layer['neurons']:.1%}",
            "█" * round(BAR * layer["keep"] / layer["neurons"]),
        )
        for layer in data["layers"]
    ]
    columns = ("layer", "1 - cos(y, z)", "|z - y| / |y|", "sensitivity", "keeps", "")
    show(grid(columns, layers, title="sensitivity and budget on the text", words=("",)))
