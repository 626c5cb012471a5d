"""Tokens a second of a served model, pruned and dense in turn, with some numbers of clients that stream at once.

    python benchmarks/serving.py --model smollm2 --clients 1,2,16 --out benchmarks/results/serving-smollm2.json

Each turn lets all clients stream `--rounds` answers each, greedily, from both servers' engines one after the other
(the same process, so that they share the machine and nothing else runs). Nothing is sent over HTTP: what is compared
is the decoding.
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

from dartprune.bench.models import build
from dartprune.bench.result import machine
from dartprune.evaluation.arms import arm
from dartprune.serving.engine import Engine, Limits
from dartprune.serving.pace import dense_above
from dartprune.serving.request import Ask, Done, Failed


class Client:
    """Streams one answer after another; counts tokens."""

    def __init__(self, engine: Engine, prompts: list[tuple[int, ...]], new: int) -> None:
        self.tokens = 0
        self.sparsity: list[float] = []
        self._engine, self._prompts, self._new = engine, prompts, new

    def run(self) -> None:
        """All answers."""
        for prompt in self._prompts:
            done = threading.Event()

            def tell(news: Any, done: threading.Event = done) -> None:
                if isinstance(news, Failed):
                    raise RuntimeError(news.message)
                if isinstance(news, Done):
                    self.tokens += news.tokens
                    self.sparsity.append(news.report.realised_sparsity)
                    done.set()

            self._engine.submit(Ask(prompt, self._new), tell)
            done.wait()


def rate(engine: Engine, clients: int, rounds: int, new: int, vocabulary: int) -> tuple[float, float]:
    """Tokens a second of all clients together, and the mean realised sparsity."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(5, vocabulary, (48 + n % 16,), generator=generator).tolist())
        for n in range(clients * rounds)
    ]
    every = [Client(engine, prompts[n::clients], new) for n in range(clients)]
    threads = [threading.Thread(target=client.run) for client in every]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    realised = [share for client in every for share in client.sparsity]
    return sum(client.tokens for client in every) / seconds, statistics.mean(realised)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default="sketch-dart")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--clients", default="1,2,16")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--above", default="auto", help="auto or never")
    parser.add_argument("--batch-invariant", action="store_true", help="of the pruned server; implies --above never")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from dartprune.loading import load

    _, tokenizer = load(None)  # of any model: random tokens need none
    model = build(args.shape, dtype=args.dtype).model if args.shape else load(args.model, dtype=args.dtype)[0]
    model.generation_config.eos_token_id = -1  # every answer has its full length
    vocabulary = 4000
    counts = [int(part) for part in args.clients.split(",")]
    rates: dict[tuple[str, int], list[float]] = {}
    shares: dict[tuple[str, int], float] = {}
    above: int | None = None
    for turn in range(args.turns + 1):
        for name in ("dense", args.method):
            # dense is unattached in all but counting: the plain model's own forward
            method = arm(name).build(args.sparsity)
            with method(model) as run:
                invariant = args.batch_invariant and name != "dense"
                engine = Engine(model, tokenizer, run, Limits(batch=max(counts), invariant=invariant))
                if name != "dense" and args.above == "auto" and not invariant:
                    above = dense_above(model, run, engine.together) if turn == 0 else above
                    engine.dense_above = above
                if name == "dense":
                    run._step.remove()  # the plain server has transformers' own step
                engine.start()
                for clients in counts:
                    found, share = rate(engine, clients, 2, args.new if turn else 4, vocabulary)
                    if turn:
                        rates.setdefault((name, clients), []).append(found)
                    shares[name, clients] = share
                engine.close()
    rows = []
    for clients in counts:
        dense = rates["dense", clients]
        for name in ("dense", args.method):
            mine = rates[name, clients]
            rows.append(
                {
                    "clients": clients,
                    "arm": name,
                    "tokens_per_second": statistics.median(mine),
                    "of_dense": statistics.median(a / b for a, b in zip(mine, dense, strict=True)),
                    "realised_sparsity": shares[name, clients],
                    "each": mine,
                }
            )
            print(f"{clients:3d} clients, {name}: {rows[-1]['tokens_per_second']:.1f} tokens/s, "
                  f"{rows[-1]['of_dense']:.2f} of dense, realised {rows[-1]['realised_sparsity']:.2f}")  # fmt: skip
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
        data = {"benchmark": "serving", "date": time.strftime("%Y-%m-%d"), "machine": machine(torch.device("cpu"))}
        data |= {"settings": settings, "dense_above": above, "rows": rows}
        args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
