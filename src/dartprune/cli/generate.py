"""`dartprune generate`: decode a prompt, then say what was pruned."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError, user_file
from dartprune.reporting.tables import say

if TYPE_CHECKING:
    from dartprune.pruner import Pruner
    from dartprune.report import Report

EXAMPLE = 'Example: dartprune generate "Once upon a time" --sparsity 0.7 --plot out.png'


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    model: o.Model = None,
    sparsity: o.Sparsity = 0.7,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help=f"{o.METHODS}; with --compare several, with commas or repeated.",
            show_default="dart",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    stream: Annotated[bool, typer.Option(help="Print the text while it is decoded.")] = True,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode dense and the methods (static,dart) side by side.")
    ] = False,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    plot: o.Plot = None,
    as_json: o.AsJson = False,
) -> None:
    """Decode a prompt with most of the FFN left out, then report what was pruned."""
    text = _prompt(prompt)
    o.check_plot(plot)
    o.check_backend(backend)
    names = o.listed(method)
    if compare:
        names = ["dense", *(name for name in dict.fromkeys(names or ["static", "dart"]) if name != "dense")]
    elif len(names) > 1:
        raise UserError(f"--method {','.join(names)}: several methods need --compare")
    arms = [o.make_pruner(name, sparsity) for name in names or ["dart"]]
    from dartprune.loading import load

    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    from dartprune.evaluation.texts import chat_prompt

    plain = {"return_tensors": "pt", "return_token_type_ids": False}
    inputs = (chat_prompt(tokenizer, text) if chat else tokenizer(text, **plain)).to(loaded.device)
    _check_context(loaded, inputs["input_ids"].shape[1], max_new_tokens)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    live = stream and not as_json and not compare
    results = _decode(loaded, tokenizer, inputs, arms, sampling, seed, backend, live)
    interrupted = any(result.interrupted for result in results)
    if plot is not None and not interrupted:
        _picture(results, plot)
    if as_json:
        o.print_json(_as_data(arms, results, compare))
    else:
        _show(results, compare, live)
    if interrupted:
        raise typer.Exit(o.INTERRUPTED)
    if plot is not None and not as_json:
        typer.echo(f"picture: {plot}")


@dataclass
class Decoded:
    """One arm: what it wrote, what it did, and the seconds of each timed repetition.

    interrupted: by the user, so that text and report are those of the part that was decoded.
    """

    text: str
    report: Report
    tokens: int
    seconds: list[float]
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Median over the repetitions, prompt included."""
        return self.tokens / statistics.median(self.seconds)


def _prompt(given: str) -> str:
    with user_file("standard input" if given == "-" else "the prompt"):
        raw = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")
        text = raw.decode("utf-8")
    if not text.strip():
        raise UserError("the prompt is empty: give some text to continue")
    return text


def _check_context(model: Any, prompt: int, new: int) -> None:
    """UserError, or a note where positions go on, for a text that would leave the model's context."""
    from torch import nn

    from dartprune.model.context import context_length

    most = context_length(model)
    if most is None or prompt > most or prompt + new <= most:
        return
    said = f"a prompt of {prompt} tokens and {new} new ones leave the model's context of {most}"
    # a table of positions ends there; rotary and relative positions can be computed for any place
    tables = [
        m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and ("pos" in name or "wpe" in name)
    ]
    if tables:
        raise UserError(f"{said}: ask for at most {most - prompt} with -n")
    say(f"note: {said}: what comes after it was never trained", style="yellow", error=True)


def _decode(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    arms: list[Pruner],
    sampling: dict[str, Any],
    seed: int,
    backend: str,
    live: bool,
) -> list[Decoded]:
    import torch

    from dartprune.cli.streaming import TextSoFar

    results: list[Decoded | None] = [None] * len(arms)
    # several arms are timed in turn, so that a slow moment of the machine meets all of them
    for _ in range(3 if len(arms) > 1 else 1):
        for i, arm in enumerate(arms):
            torch.manual_seed(seed)
            written, stopped = TextSoFar(tokenizer, live=live), False
            with o.attaching(not live) as progress:
                run = arm.attach(model, backend=backend, progress=progress)
            try:
                began = time.perf_counter()
                try:
                    model.generate(**inputs, **sampling, streamer=written, pad_token_id=tokenizer.pad_token_id)
                except KeyboardInterrupt:
                    stopped = True
                took = time.perf_counter() - began
                report = run.report()
            finally:
                run.detach()
            known = results[i]
            if known is None:
                results[i] = Decoded(written.text, report, len(written.tokens), [took], interrupted=stopped)
            elif stopped:  # its whole text is known from an earlier turn
                known.interrupted = True
            else:
                known.seconds.append(took)
            if stopped:
                return [result for result in results if result is not None]
    return [result for result in results if result is not None]


def _as_data(arms: list[Pruner], results: list[Decoded], compare: bool) -> dict[str, Any]:
    parts = [
        {
            "text": result.text,
            "new_tokens": result.tokens,
            "tokens_per_second": result.tokens_per_second,
            "seconds": result.seconds,
            "pruner": arm.to_dict(),
            "report": result.report.to_dict(),
        }
        for arm, result in zip(arms, results, strict=True)
    ]
    return {"arms": parts} if compare else parts[0]


def _picture(results: list[Decoded], path: Path) -> None:
    """What a run did; of several, one row each: similarity over its windows, neurons its layers keep."""
    from matplotlib.figure import Figure

    from dartprune.reporting.plot import draw_budget, draw_similarity, save, save_run

    if len(results) == 1:
        save_run(results[0].report, path)
        return
    figure = Figure(figsize=(14, 3 * len(results)), layout="constrained")
    for (left, right), result in zip(figure.subplots(len(results), 2, width_ratios=(3, 2)), results, strict=True):
        report = result.report
        draw_similarity(left, report.sequences[0])
        layers = report.layers
        kept = [1.0 if layer.kept is None else layer.kept / layer.neurons for layer in layers]
        draw_budget(right, [layer.index for layer in layers], kept)
        speed = f"{result.tokens_per_second:.1f} tokens/s"
        left.set_title(f"{report.method}: realised sparsity {report.realised_sparsity:.3f}, {speed}", loc="left")
    save(figure, path)


def _show(results: list[Decoded], compare: bool, live: bool) -> None:
    from dartprune.reporting.tables import grid, show

    if not compare:
        if not live:
            say(results[0].text)
        show(o.report_table(results[0].report))
        return
    for result in results:
        say(f"--- {result.report.method}", style="green")
        say(result.text)
    columns = ("arm", "realised sparsity", "FFN bytes saved", "events", "tokens/s (median of 3)", "of dense")
    dense = results[0].tokens_per_second
    rows = [
        (
            result.report.method,
            f"{result.report.realised_sparsity:.3f}",
            o.saved(result.report.bytes_saved),
            str(len(result.report.events)),
            f"{result.tokens_per_second:.1f}",
            f"{result.tokens_per_second / dense:.2f}",
        )
        for result in results
    ]
    show(grid(columns, rows, title="side by side"))
    for result in results[1:]:
        report = result.report
        if not report.saves_time:
            say(f"{report.method}: the {report.backend} backend saves no time, it computes all neurons")
        for figure, reasons in report.reasons.items():
            say(*(f"{report.method}, {figure}: {reason}" for reason in reasons), style="dim")
        say(*(f"note: {report.method}: {note}" for note in report.notes), style="yellow")
