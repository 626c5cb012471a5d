"""Seconds on a CPU: the row kernel alone, and whole decode steps of a real shape with random weights.

    python benchmarks/cpu.py kernel --out benchmarks/results/NAME.json
    python benchmarks/cpu.py decode --out benchmarks/results/NAME.json

Dense and pruned alternate in one run; medians and their ratios are what counts. The streaming bandwidth is measured in
the same run, as torch's sum over 512 MB.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dartprune import Dart, Static
from dartprune.costs import Shape
from dartprune.ffn.cpu import CpuBackend
from dartprune.ffn.weights import FFNWeights

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(works: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each work, in turn, so that a slow moment of the machine meets all of them."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return taken


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile, in milliseconds."""
    return [round(1e3 * v, 3) for v in statistics.quantiles(values, n=4)]


def kernel(runs: int) -> list[dict[str, Any]]:
    """The pruned FFN against torch's dense one, H=2048, I=8192; enough layers that weights come from memory."""
    hidden, neurons, rows = 2048, 8192, []
    ocean = torch.randn(128 * 1024 * 1024)
    backend = CpuBackend()
    for dtype, layers in ((torch.bfloat16, 8), (torch.float32, 4)):
        gates, ups, downs = (
            [(torch.randn(neurons, hidden) / hidden**0.5).to(dtype) for _ in range(layers)] for _ in range(3)
        )
        plain = [down.t().contiguous() for down in downs]
        weights = [
            FFNWeights(g, u, d, None, None, None, "silu", F.silu) for g, u, d in zip(gates, ups, downs, strict=True)
        ]
        for batch in (1, 4):
            x = torch.randn(batch, hidden).to(dtype)

            def dense(x: torch.Tensor = x, gates: Any = gates, ups: Any = ups, plain: Any = plain) -> None:
                for g, u, d in zip(gates, ups, plain, strict=True):
                    F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)

            for sparsity in (0.5, 0.7, 0.8):
                k = round((1 - sparsity) * neurons)
                index = torch.stack([torch.randperm(neurons)[:k].sort().values for _ in range(batch)]).int()
                count, slots = torch.full((batch,), k, dtype=torch.int32), torch.arange(batch)

                def pruned(x: Any = x, w: Any = weights, i: Any = index, c: Any = count, s: Any = slots) -> None:
                    for layer in w:
                        backend.ffn(x, layer, i, c, s)

                taken = alternate({"dense": dense, "pruned": pruned, "stream": ocean.sum}, runs)
                middle = {name: statistics.median(values) for name, values in taken.items()}
                moved = layers * backend.bytes_read(weights[0], list(index))
                stream = ocean.nbytes / middle["stream"]
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "batch": batch,
                        "sparsity": sparsity,
                        "dense_ms": quartiles([v / layers for v in taken["dense"]]),
                        "pruned_ms": quartiles([v / layers for v in taken["pruned"]]),
                        "times_faster": round(middle["dense"] / middle["pruned"], 2),
                        "bytes_read": moved // layers,
                        "stream_gb_per_s": round(stream / 1e9, 1),
                        "share_of_bandwidth": round(moved / middle["pruned"] / stream, 2),
                    }
                )
                print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def decode(runs: int) -> list[dict[str, Any]]:
    """Tokens per second of the Llama-3.2-1B shape with random bf16 weights, 70 %: dense, static, DART."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).eval()
    torch.set_default_dtype(torch.float32)
    prompt = torch.randint(5, 128000, (1, 256))
    new = 16
    shape = Shape.of(model)
    ffn = [layer.mlp for layer in model.model.layers]
    rows, prefill, attach, refresh = [], {}, [], []
    taken: dict[str, list[float]] = {"dense": [], "static": [], "dart": [], "dense FFN": []}
    warm: dict[str, list[float]] = {"plain": [], "attached": []}
    x = torch.randn(1, 1, 2048).bfloat16()

    def read() -> None:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def step_seconds() -> float:
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
        return _steps(model, cache, new)

    for turn in range(runs + 1):
        began = step_seconds()
        taken["dense"].append(began)
        taken["dense FFN"].append(seconds(lambda: [mlp(x) for mlp in ffn]))
        warm["plain"] += [seconds(read) for _ in range(3)][1:]
        for name, pruner in (("static", Static(sparsity=0.7)), ("dart", Dart(sparsity=0.7))):
            with pruner(model, backend="cpu") as run:
                with run.phase("prefill"):
                    warm["attached"].append(seconds(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1)))
                    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
                with run.phase("decode"):
                    taken[name].append(_steps(model, cache, new))
                if name == "dart":
                    slot = run._pool.live[run.slots_of(cache)[0]]
                    refresh.append(seconds(lambda run=run, slot=slot: run._renewal.replay([slot])))
                attach.append(run.report().seconds["attaching"])
                realised = run.report().realised_sparsity
        if turn == 0:  # the first turn compiles and warms
            taken = {name: [] for name in taken}
            warm = {name: [] for name in warm}
            attach, refresh = [], []
    middle = {name: statistics.median(values) for name, values in taken.items()}
    share = middle["dense FFN"] / middle["dense"]
    for name in ("static", "dart"):
        rows.append(
            {
                "arm": name,
                "sparsity": 0.7,
                "realised_sparsity": round(realised, 3),
                "dense_ms_per_token": quartiles(taken["dense"]),
                "pruned_ms_per_token": quartiles(taken[name]),
                "times_faster": round(middle["dense"] / middle[name], 2),
                "ffn_share_of_dense_step": round(share, 3),
                "ffn_share_of_step_bytes": round(shape.ffn_bytes / shape.step_bytes, 3),
                "amdahl_limit_at_bytes": round(1 / (1 - share * 0.7), 2),
            }
        )
        print(rows[-1], flush=True)
    prefill = {name: quartiles(values) for name, values in warm.items()}
    rows.append(
        {
            "prefill_ms_256_tokens": prefill,
            "prefill_attached_over_plain": round(
                statistics.median(warm["attached"]) / statistics.median(warm["plain"]), 3
            ),
            "attach_seconds": round(statistics.median(attach), 2),
            "replay_seconds": round(statistics.median(refresh), 4),
            "replay_in_dense_steps": round(statistics.median(refresh) / middle["dense"], 2),
        }
    )
    print(rows[-1], flush=True)
    return rows


def _steps(model: Any, cache: Any, new: int) -> float:
    token = torch.tensor([[7]])
    taken = []
    for _ in range(new):
        taken.append(seconds(lambda: model(input_ids=token, past_key_values=cache, use_cache=True)))
    return statistics.median(taken)


def main() -> None:
    """Measure and write the figures with machine, date and command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernel", "decode"))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = kernel(args.runs) if args.what == "kernel" else decode(args.runs)
    data = {
        "date": str(date.today()),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "command": f"python benchmarks/cpu.py {args.what} --runs {args.runs}",
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
