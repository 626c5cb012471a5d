"""Whole decode steps beside llama.cpp, in turn in one run: the same model, its GGUF file there, 4 or 8 bits here.

    python benchmarks/peers/decode.py --model FOLDER --gguf FILE.gguf --llama-python PYTHON

Greedy decoding of `--tokens` tokens after a prompt of `--prompt`, the prompt's time not counted; median over rounds.
`--llama-python` names a Python with llama-cpp-python, which is no dependency.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import dartprune
from dartprune.bench.result import Result, Row
from dartprune.bench.timing import alternate
from dartprune.loading import load

TEXT = "The history of electric cars is longer than most people think. " * 40


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, path: str, threads: int) -> None:
        worker = str(Path(__file__).with_name("llama_worker.py"))
        self._process = subprocess.Popen(
            [python, worker, path, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the llama.cpp process ended: see what it wrote above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def seconds(self, prompt: list[int], tokens: int) -> float:
        """Of one decoded token."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"] / tokens


def decoded(model: torch.nn.Module, pruner: dartprune.Pruner | None, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds of one token decoded by `generate()`, the prompt's and the first token's taken off."""
    run = None if pruner is None else pruner.attach(model)
    try:
        mask, times = torch.ones_like(prompt), []
        for n in (1, tokens + 1):
            began = time.perf_counter()
            # no end, instead of a least length, for which all logits are looked through at each step
            model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=n, eos_token_id=None, do_sample=False)
            times.append(time.perf_counter() - began)
        return (times[1] - times[0]) / tokens
    finally:
        if run is not None:
            run.detach()


def main() -> None:
    """Parse, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--gguf", help="the same model as a GGUF file, for llama.cpp")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--dtype", default="int4", help="of our model: int4, int8 or bfloat16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="also the model without anything attached")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model, dtype=args.dtype)
    prompt = tokenizer(TEXT, return_tensors="pt").input_ids[:, : args.prompt]
    pruners: dict[str, dartprune.Pruner | None] = {"dense": dartprune.Dense()}
    for preset, sparsity in ((dartprune.SketchDart, 0.3), (dartprune.SketchDart, 0.45), (dartprune.Dart, 0.5)):
        pruners[f"{preset.__name__}({sparsity})"] = preset(sparsity)
    if args.plain:
        pruners["nothing attached"] = None
    arms = {
        name: lambda pruner=pruner: decoded(model, pruner, prompt, args.tokens)  # type: ignore[misc]
        for name, pruner in pruners.items()
    }
    for arm in arms.values():
        arm()
    base = "dense"
    if args.gguf:
        peer = Peer(args.llama_python, args.gguf, args.threads)
        arms["llama.cpp"] = lambda: peer.seconds(prompt[0].tolist(), args.tokens)
        arms["llama.cpp"]()
        base = "llama.cpp"
    turns = alternate(arms, args.rounds)
    case = f"{Path(args.model).name}, {args.dtype}, {args.prompt} + {args.tokens} tokens"
    found = [
        Row(case, name, turns.spread(name), turns.times_as_fast(name, base), extra={"base": base}) for name in arms
    ]
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "llama_python")}
    result = Result("decoding beside llama.cpp", torch.device("cpu"), settings, found)
    if args.out is not None:
        result.write(args.out, " ".join(["python", *sys.argv]))
    print(f"{case}, {args.threads} threads")
    for row in found:
        fast, each = row.times_as_fast, row.seconds
        print(
            f"{row.arm:18} {1e3 * each.median:6.1f} ms a token ({1e3 * each.lower:.1f} to {1e3 * each.upper:.1f})  "
            f"{1 / each.median:5.1f} tokens/s  {fast.median:.2f} x {base} ({fast.lower:.2f} to {fast.upper:.2f})"
        )


if __name__ == "__main__":
    main()
