"""How DART's defaults were chosen: one setting changed at a time, on training texts.

    python benchmarks/choices.py --texts DIR --out benchmarks/results/choices-demo.json
    python benchmarks/choices.py --texts DIR --model smollm2 --dtype auto --sparsity 0.5 --streams 12 --out choices.json

DIR holds NAME.train.txt files as in `dartprune.evaluation.texts`. Two kinds of streams, teacher-forced after 64 tokens
of prompt with the masks in force: 192 tokens of one domain and 256 of another, and 448 of one domain. Loss over dense
in nats a token. A run that was stopped goes on; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dartprune import Dart, Dense, DepthAware, Global, Griffin, Pruner, Static, Uniform
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.texts import batch, pieces, read_texts, streams
from dartprune.loading import load
from dartprune.refresh import Periodic
from dartprune.report import Report

PROMPT, FIRST, SECOND = 64, 192, 256
EARLY = 64  # tokens after the change that count as right after it


@dataclass(frozen=True)
class Case:
    """One setting: `name` says what differs from the default."""

    name: str
    pruner: Pruner


def cases(sparsity: float) -> Iterator[Case]:
    """Everything that is tried, the default of each part first."""
    frozen, dart = Static(sparsity=sparsity), Dart(sparsity=sparsity)
    yield Case("Griffin", Griffin(sparsity=sparsity))
    yield Case("Static", frozen)
    yield Case("Static, compensate=mean", replace(frozen, compensate="mean"))
    yield from _budgets("Static", frozen)
    yield Case("Dart", dart)
    yield from _budgets("Dart", dart)
    for scorer in ("weight-aware", "average"):
        yield Case(f"Dart, scorer={scorer}", replace(dart, scorer=scorer))
    yield Case("Dart, compensate=None", replace(dart, compensate=None))
    for settings in (
        *({"memory": share} for share in (0.0, 0.25, 0.5)),
        *({"tokens": count} for count in (8, 24, 32)),
        *({"settle": count} for count in (0, 24, 32, 64)),
    ):
        if any(getattr(dart.refresh, name) != value for name, value in settings.items()):
            yield Case(f"Dart, replay {_words(settings)}", replace(dart, refresh=replace(dart.refresh, **settings)))
    deltas = [delta for delta in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0) if delta != dart.detector.delta]
    for found in (*({"delta": delta} for delta in deltas), {"patience": 1}, {"min_drop": 0.1}):
        yield Case(f"Dart, detector {_words(found)}", replace(dart, detector=replace(dart.detector, **found)))
    for every in (16, 24, 40):
        clock = Periodic(every=every, dense=None, replay=dart.refresh.replay_tokens, memory=dart.refresh.replay_memory)
        yield Case(f"Dart, a replay every {every} tokens", replace(dart, refresh=clock))


def _budgets(name: str, pruner: Pruner) -> Iterator[Case]:
    yield Case(f"{name}, max_sparsity=0.9", replace(pruner, budget=Global(max_sparsity=0.9)))
    yield Case(f"{name}, max_sparsity=1.0", replace(pruner, budget=Global(max_sparsity=1.0)))
    yield Case(f"{name}, budget DepthAware()", replace(pruner, budget=DepthAware()))
    yield Case(f"{name}, budget DepthAware(min_sparsity=0.1)", replace(pruner, budget=DepthAware(min_sparsity=0.1)))
    yield Case(f"{name}, budget Uniform()", replace(pruner, budget=Uniform()))


def _words(settings: dict[str, float]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def measure(
    model: torch.nn.Module, pruner: Pruner, tokens: Tensor, dense: Tensor, change: int | None
) -> dict[str, float]:
    """Loss over dense and events of one setting on streams [B, T]; change: position of the second domain."""
    losses, report = forced_losses(model, pruner, tokens, PROMPT, block=None, backend="masked")
    over = losses - dense
    often = 200 * len(report.events) / over.numel()
    row = {"realised_sparsity": report.realised_sparsity, "refreshes_in_200": often}
    if change is None:
        return row | {"loss": float(over.mean())}
    at = change - PROMPT
    parts = {
        "before": over[:, :at],
        "after": over[:, at:],
        "early": over[:, at : at + EARLY],
        "late": over[:, at + EARLY :],
    }
    delays = _delays(report, at)
    row |= {name: float(part.mean()) for name, part in parts.items()}
    row |= {"noticed": len(delays) / len(tokens)}
    return row | ({"delay": float(median(delays))} if delays else {})


def _delays(report: Report, change: int) -> list[int]:
    """Of each sequence that noticed: tokens from the change to the first event after it."""
    firsts = (
        min((e.decoded - change for e in sequence.events if e.decoded > change and e.kind != "settle"), default=None)
        for sequence in report.sequences
    )
    return [first for first in firsts if first is not None]


def table(rows: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """The results as Markdown."""
    yield f"| | before | after the change | its first {EARLY} tokens | later | one topic | refreshes / 200 tokens |"
    yield "|" + "---|" * 7
    for name, row in rows.items():
        two, one = row["changing"], row["steady"]
        figures = [two["before"], two["after"], two["early"], two["late"], one["loss"]]
        yield f"| {name} | " + " | ".join(f"{x:.2f}" for x in figures) + f" | {one['refreshes_in_200']:.1f} |"


def main() -> None:
    """Measure what is missing, write after each setting, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", default=None, help="folder or name; the model of the package unless given")
    parser.add_argument("--dtype", default="float32", help="auto is that of the checkpoint")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--streams", type=int, default=36)
    parser.add_argument("--split", default="train", help="texts: train, to choose on; valid, to report on")
    parser.add_argument("--only", default="", help="settings whose name has this in it, and Dart's own")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype=args.dtype)
    texts = {name: parts[:200] for name, parts in read_texts([args.texts], split=args.split).items()}
    tokens = pieces(texts, tokenizer, FIRST + SECOND)
    separator = tokenizer.bos_token_id
    two = batch(streams(tokens, (FIRST, SECOND), args.streams, seed=2, separator=separator))
    one = batch(streams(tokens, (FIRST + SECOND,), args.streams, seed=3, separator=separator))
    settings = {name: getattr(args, name) for name in ("sparsity", "streams", "dtype", "split")}
    settings |= {
        "model": Path(args.model).name if args.model else "demo",
        "delta": Dart(sparsity=args.sparsity).detector.delta,  # of every row that does not name another
    }
    data = {"date": str(date.today()), "machine": platform.processor(), "settings": settings, "rows": {}}
    if args.out.is_file():
        data = json.loads(args.out.read_text())
        if data["settings"] != settings:
            parser.error(f"{args.out} holds results of other settings {data['settings']}; give another --out")
    dense = [forced_losses(model, Dense(), streams_, PROMPT, block=None)[0] for streams_ in (two, one)]
    for case in cases(args.sparsity):
        if case.name in data["rows"] or not (args.only in case.name or case.name == "Dart"):
            continue
        data["rows"][case.name] = {
            "changing": measure(model, case.pruner, two, dense[0], FIRST),
            "steady": measure(model, case.pruner, one, dense[1], None),
        }
        args.out.write_text(json.dumps(data, indent=1) + "\n")
        print(*list(table({case.name: data["rows"][case.name]}))[2:], flush=True)
    print(*table(data["rows"]), sep="\n")


if __name__ == "__main__":
    main()
