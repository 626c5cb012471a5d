"""`dartprune demo`: the whole idea on the model inside the package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.cli.demo_chat import chat_demo
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.report import Report

EXAMPLE = "Example: dartprune demo --sparsity 0.7 --out out"
ARMS = ("dense", "static", "dart", "gated-dart", "sketch-dart")
DART = ARMS.index("dart")
ANSWER = 240  # tokens of a chat model's
CONTEXT = 64
HALF = 184  # tokens of each domain


def demo(
    model: o.Model = None,
    sparsity: o.Sparsity = 0.7,
    tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=2, help="Of a chat model's answer.", show_default="240"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the picture.")] = Path("out"),
    backend: o.Backend = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Decode texts that change their domain midway: dense, the prompt's mask for ever, DART, and each token its own.

    With --model, a chat model (smollm2 is fetched) is asked for two topics, and each method answers.
    """
    if model is not None:
        o.check_backend(backend)
        o.results_folder(out)
        o.quiet()
        chat_demo(model, sparsity, out, backend, tokens or ANSWER, as_json=as_json)
        return
    if tokens is not None:
        raise UserError(f"--max-new-tokens {tokens} is for a chat model's answer: name one with --model, as smollm2")
    arms = [o.make_pruner(name, sparsity) for name in ARMS]
    o.check_backend(backend)
    o.results_folder(out)
    o.quiet()
    data, report, names = _run(arms, backend, as_json)
    picture = out / "demo.png"
    _picture(report, names, picture)
    data["picture"] = str(picture)
    if as_json:
        o.print_json(data)
    else:
        _show(data)


def _run(arms: list[Any], backend: str, silent: bool) -> tuple[dict[str, Any], Report, list[str]]:
    import torch

    from dartprune.demo import pairs
    from dartprune.evaluation.forced import forced_losses
    from dartprune.loading import load
    from dartprune.reporting.progress import bar

    model, tokenizer = load()
    texts = pairs()
    rows, names = [], []
    for first, text, second, other in texts:
        halves = [tokenizer(part, add_special_tokens=False)["input_ids"][: HALF - 1] for part in (text, other)]
        # the model was trained with its separator between texts
        rows.append([tokenizer.eos_token_id, *halves[0], tokenizer.eos_token_id, *halves[1]])
        names.append(f"{first} to {second}")
    tokens = torch.tensor(rows)
    result: list[dict[str, Any]] = []
    reports: list[Report] = []
    with bar("decoding", len(arms) * (2 * HALF - CONTEXT), silent=silent) as work:
        for arm in arms:
            losses, report = forced_losses(model, arm, tokens, CONTEXT, backend=backend, progress=work)
            result.append(_row(report, losses))
            reports.append(report)
    report = reports[DART]
    prompt = tokenizer(texts[-1][1], return_tensors="pt", return_token_type_ids=False)["input_ids"][:, :CONTEXT]
    with arms[DART](model, backend=backend):
        sample = model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    data = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "texts": names,
        "prompt_tokens": CONTEXT,
        "decoded_tokens_of_each_half": [HALF - CONTEXT, HALF],
        "arms": result,
        "sample": {
            "domain": texts[-1][0],
            "prompt_ends": tokenizer.decode(prompt[0, -20:]),
            "text": tokenizer.decode(sample[0, prompt.shape[1] :], skip_special_tokens=True),
        },
        "backend": report.backend,
        "saves_time": report.saves_time,
    }
    return data, report, names


def _row(report: Report, losses: Any) -> dict[str, Any]:
    change = HALF - CONTEXT
    first_after = [
        min((e.decoded - change for e in s.events if e.decoded > change and e.kind != "settle"), default=None)
        for s in report.sequences
    ]
    delays = sorted(d for d in first_after if d is not None)
    return {
        "arm": report.method,
        "perplexity_before": math.exp(losses[:, :change].mean()),
        "perplexity_after": math.exp(losses[:, change:].mean()),
        "realised_sparsity": report.realised_sparsity,
        "bytes_saved": report.bytes_saved,
        "dense_tokens": report.dense_tokens,
        "pruned_tokens": report.pruned_tokens,
        # a settle follows every replay by itself and notices nothing
        "events_before": sum(e.decoded <= change and e.kind != "settle" for e in report.events),
        "events_after": sum(e.decoded > change and e.kind != "settle" for e in report.events),
        "texts_noticed": len(delays),
        "tokens_until_noticed": delays[len(delays) // 2] if delays else None,
    }


def _picture(report: Report, names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    from dartprune.reporting.plot import draw_budget, draw_similarity, save

    shown = min(3, len(names))
    figure = Figure(figsize=(10, 3 * shown + 2.5), layout="constrained")
    axes = figure.subplots(shown + 1, 1)
    for i in range(shown):
        draw_similarity(axes[i], report.sequences[i], change=HALF - CONTEXT)
        axes[i].set_title(names[i], loc="left")
        if i < shown - 1:
            axes[i].set_xlabel("")
    draw_budget(axes[-1], [n.index for n in report.layers], [(n.kept or n.neurons) / n.neurons for n in report.layers])
    figure.suptitle(f"{report.method} at {report.target_sparsity:.0%} of the FFN's neurons left out")
    save(figure, path)


def _show(data: dict[str, Any]) -> None:
    from dartprune.reporting.tables import grid, say, show

    texts, prompt, halves = data["texts"], data["prompt_tokens"], data["decoded_tokens_of_each_half"]
    say(
        f"{len(texts)} texts move from one domain to another ({', '.join(texts)}).\n"
        f"The first {prompt} tokens of each are the prompt; then {halves[0]} more of the first domain and {halves[1]} "
        "of the second go through decoding one by one.\n"
        f"The model inside has {data['parameters'] / 1e6:.0f} M parameters and writes plausible fragments, no more."
    )
    columns = ("perplexity before", "after the change", "realised sparsity", "FFN bytes saved", "events before + after")
    rows = [
        (
            row["arm"],
            f"{row['perplexity_before']:.1f}",
            f"{row['perplexity_after']:.1f}",
            f"{max(0.0, row['realised_sparsity']):.3f}",
            o.saved(row["bytes_saved"]),
            f"{row['events_before']} + {row['events_after']}",
        )
        for row in data["arms"]
    ]
    show(grid(("", *columns), rows))
    dart = data["arms"][DART]
    if dart["tokens_until_noticed"] is not None:
        say(
            f"DART noticed the change in {dart['texts_noticed']} of {len(texts)} texts, "
            f"{dart['tokens_until_noticed']} tokens after it (median), and decoded {dart['dense_tokens']} dense. "
            f"Before it, it fired {dart['events_before']} times in {len(texts) * halves[0]} tokens of one domain."
        )
    else:
        say("DART noticed no change of domain at this sparsity.")
    if not data["saves_time"]:
        say(f"The {data['backend']} backend saves no time: it computes all neurons and zeroes the rest.")
    say(
        "GatedDart lets each token choose among DART's neurons by their gate rows; SketchDart keeps a few bits of "
        "every weight to choose among all. Their savings count what they read to choose."
    )
    if data["saves_time"] and any(row["bytes_saved"] < row["realised_sparsity"] - 0.005 for row in data["arms"]):
        say(
            f"The {len(texts)} texts are decoded as one batch, each with its own neurons: a step reads the union, "
            "every neuron that any of them keeps, so fewer bytes are saved than neurons are left out."
        )
    sample = data["sample"]
    say(f"\nDART, {sample['domain']}: ...{sample['prompt_ends']}", style="dim")
    say(sample["text"])
    say(f"\npicture: {data['picture']}")
