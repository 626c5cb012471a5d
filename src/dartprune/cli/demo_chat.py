"""`dartprune demo --model MODEL`: two topics asked of a chat model, dense and pruned side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dartprune.cli import options as o
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.demo.chat import Answer

ARMS = ("dense", "dart", "sketch-dart")


def chat_demo(name: str, sparsity: float, out: Path, backend: str, most: int, *, as_json: bool) -> None:
    """Load the model, let each arm answer, and show what came of it."""
    from dartprune.demo.chat import INSTRUCTION, work_of, write_in_turn
    from dartprune.evaluation.texts import chat_prompt
    from dartprune.loading import load
    from dartprune.model.sizes import count, dtype_name
    from dartprune.reporting.progress import bar

    arms = [o.make_pruner(arm, sparsity) for arm in ARMS]
    model, tokenizer = load(name)
    prompt = chat_prompt(tokenizer, INSTRUCTION)
    with bar("decoding", work_of(len(arms), most), silent=as_json) as work:
        found = write_in_turn(model, tokenizer, arms, prompt, most=most, backend=backend, progress=work)
    if found[0].tokens < 2:
        raise UserError(f"{name} answers nothing to the demo's instruction: it is no chat model that can be shown")
    picture = out / "demo-chat.png"
    _picture(found, picture)
    data = {
        "model": name,
        "parameters": count(model)[0],
        "dtype": dtype_name(model),
        "instruction": INSTRUCTION,
        "prompt_tokens": prompt["input_ids"].shape[1],
        "arms": [_row(written) for written in found],
        "picture": str(picture),
    }
    if as_json:
        o.print_json(data)
    else:
        _show(data)


def _row(written: Answer) -> dict[str, Any]:
    half = len(written.losses) // 2
    return {
        "arm": written.name,
        "text": written.text,
        "tokens": written.tokens,
        "tokens_per_second": written.tokens_per_second,
        "realised_sparsity": written.report.realised_sparsity,
        "bytes_saved": written.report.bytes_saved,
        "loss_over_dense": [float(written.losses[:half].mean()), float(written.losses[half:].mean())],
        "events": len(written.report.events),
        "backend": written.report.backend,
        "saves_time": written.report.saves_time,
    }


def _picture(found: list[Answer], path: Path) -> None:
    """The similarity that DART watches, and what each token of the dense model's text costs more."""
    import numpy as np
    from matplotlib.figure import Figure

    from dartprune.evaluation.compare.pictures import smoothed
    from dartprune.reporting.plot import draw_similarity, legend_beside, look, save

    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    draw_similarity(upper, found[1].report.sequences[0])
    upper.set_title(f"{found[1].name}, while it writes", loc="left")
    for number, written in enumerate(found[1:]):
        losses = written.losses.cpu().numpy()
        style = look(number) | {"marker": None}
        lower.plot(np.arange(len(losses)), smoothed(losses.tolist()), label=written.name, **style)
    lower.axhline(0, color="black", linewidth=0.8)
    lower.set_title("what the dense model wrote: loss over dense (running mean)", loc="left")
    lower.set_xlabel("token of the dense model's text")
    lower.set_ylabel("nats")
    legend_beside(lower)
    save(figure, path)


def _show(data: dict[str, Any]) -> None:
    from dartprune.reporting.tables import grid, say, show

    say(f"{data['model']}, {data['parameters'] / 1e6:.0f} M parameters, {data['dtype']}, is asked:")
    say(f"{data['instruction']}\n", style="bold")
    for row in data["arms"]:
        say(f"{row['arm']}, {row['tokens']} tokens:", style="bold")
        say(row["text"].strip() + "\n")
    dense = data["arms"][0]
    columns = ("tokens/s", "times dense", "realised sparsity", "FFN bytes saved", "loss over dense, 1st / 2nd half")
    rows = [
        (
            row["arm"],
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}",
            f"{max(0.0, row['realised_sparsity']):.3f}",
            o.saved(row["bytes_saved"]),
            "{:.2f} / {:.2f}".format(*row["loss_over_dense"]),
        )
        for row in data["arms"]
    ]
    show(grid(("", *columns), rows))
    say(
        "tokens/s: median decode step, three turns. Loss over dense: nats a token, of the text that the dense model "
        "wrote as each method decodes it."
    )
    for row in data["arms"][1:]:
        if not row["saves_time"]:
            say(f"{row['arm']}: the {row['backend']} backend computes all neurons, zeroes the rest and saves no time.")
    say(f"\npicture: {data['picture']}")
