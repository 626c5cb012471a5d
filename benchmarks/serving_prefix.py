"""Seconds to the first token of prompts that begin alike, with and without what was read before, in turn.

    python benchmarks/serving_prefix.py --model smollm2 --out benchmarks/results/serving-prefix-smollm2.json

Nothing is sent over HTTP. Both engines serve one model in one process, one request at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dartprune.bench.result import machine
from dartprune.evaluation.arms import arm
from dartprune.loading import load
from dartprune.serving.engine import Engine, Limits
from dartprune.serving.request import Ask, Done, Failed


def first_token(engine: Engine, prompt: tuple[int, ...]) -> tuple[float, int]:
    """Seconds until a request's only token is there, and how many tokens of its prompt were known."""
    done, told = threading.Event(), []

    def tell(news: Any) -> None:
        if isinstance(news, (Done, Failed)):
            told.append(news)
            done.set()

    began = time.perf_counter()
    engine.submit(Ask(prompt, 1), tell)
    done.wait()
    seconds = time.perf_counter() - began
    if isinstance(told[0], Failed):
        raise RuntimeError(told[0].message)
    return seconds, told[0].cached


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", default="dense,dart,sketch-dart")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--shared", type=int, default=1024, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=64, help="tokens of each prompt's own")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 4000, (count,), generator=generator).tolist())

    rows, shared = [], tokens(args.shared)
    for name in args.methods.split(","):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with arm(name).build(args.sparsity)(model) as run:
            engines = {kept: Engine(model, tokenizer, run, Limits(prefix_bytes=(1 << 30) * kept)) for kept in seconds}
            for engine in engines.values():
                engine.start()
            known = 0
            for turn in range(args.turns + 1):
                prompt = shared + tokens(args.own)
                for kept, engine in engines.items():
                    found, cached = first_token(engine, prompt)
                    if turn:
                        seconds[kept].append(found)
                        known = max(known, cached)
            for engine in engines.values():
                engine.close()
        without, beside = (statistics.median(seconds[kept]) for kept in (False, True))
        rows.append({"arm": name, "known": known, "seconds": without, "seconds_known": beside, "each": seconds})
        print(
            f"{name}: {without:.3f} s without, {beside:.3f} s with {known} tokens known, {without / beside:.1f} times"
        )
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
        data = {"benchmark": "serving-prefix", "date": time.strftime("%Y-%m-%d")}
        data |= {"machine": machine(torch.device("cpu")), "settings": settings, "rows": rows}
        args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
