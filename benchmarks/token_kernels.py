"""Time of one FFN with each token selector on the CPU, everything counted, against torch's dense FFN and row lists.

    python benchmarks/token_kernels.py --batch 1 --saved 0.7

All ways run in turn, layer after layer, on the same random weights; medians over the rounds. Each reads the same share
of the FFN's bytes: its own (candidates' gate rows, bit planes) are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from dartprune.bench.device import BandwidthProbe
from dartprune.bench.result import Result, Row
from dartprune.bench.timing import Spread, Turns, alternate, seconds_per_call
from dartprune.ffn.cpu import selectors as cpu_selectors
from dartprune.ffn.cpu.backend import CpuBackend
from dartprune.ffn.planes import build_planes
from dartprune.ffn.sketch import FFNSketch, SketchPlanes
from dartprune.ffn.weights import FFNWeights


def copy(planes: SketchPlanes) -> SketchPlanes:
    """The same planes in memory of their own."""
    return SketchPlanes(planes.planes.clone(), planes.scale.clone(), planes.hidden)


def ways(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed, by name; each call computes all layers."""
    torch.manual_seed(0)
    hidden, neurons, rows, kept = args.hidden, args.neurons, args.batch, 1 - args.saved
    base = [(torch.randn(neurons, hidden) / hidden**0.5).bfloat16() for _ in range(3)]
    layers = [FFNWeights(*(w.clone() for w in base), None, None, None, "silu", F.silu) for _ in range(args.layers)]
    columns = [w.down.t().contiguous() for w in layers]  # as a model keeps it
    planes = build_planes(base[0], args.bits)
    sketches = [FFNSketch(copy(planes), copy(planes)) for _ in layers]
    errors = [torch.rand(rows, 4, neurons).bfloat16() for _ in layers]
    means = [(torch.rand(rows, neurons).bfloat16(), torch.rand(rows, hidden)) for _ in layers]
    x, slots, backend = torch.randn(rows, hidden).bfloat16(), torch.arange(rows), CpuBackend()

    def lists(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        k = round(share * neurons)
        index = torch.stack([torch.randperm(neurons)[:k].sort().values for _ in range(rows)])
        return index.int(), torch.full((rows,), k, dtype=torch.int32)

    mask, masked = lists(kept)
    candidates, counted = lists(min(1.0, 3 * kept / (1 + 2 * args.rate)))
    some, importance = (counted * args.rate).int(), torch.ones(1, neurons)
    chosen = torch.full_like(some, round((kept - 2 * args.bits / 16 / 3) * neurons))

    def dense() -> None:
        for w, down in zip(layers, columns, strict=True):
            F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), down)

    def row_lists() -> None:
        for w in layers:
            backend.ffn(x, w, mask, masked, slots)

    def gate() -> None:
        for w in layers:
            cpu_selectors.gated_rows(x, w, candidates, counted, slots, some, None, importance)

    def sketch() -> None:
        for w, s in zip(layers, sketches, strict=True):
            cpu_selectors.sketched_rows(x, w, s, slots, chosen, importance, neurons)

    def calibrated() -> None:
        for w, s, e in zip(layers, sketches, errors, strict=True):
            cpu_selectors.sketched_rows(x, w, s, slots, chosen, importance, neurons, None, e)

    def compensated() -> None:
        for w, s, e, m in zip(layers, sketches, errors, means, strict=True):
            cpu_selectors.sketched_rows(x, w, s, slots, chosen, importance, neurons, None, e, *m)

    def sketch_choice() -> None:
        for w, s in zip(layers, sketches, strict=True):
            cpu_selectors.sketched_rows(x, w, s, slots, torch.zeros_like(chosen), importance, neurons)

    def calibrated_choice() -> None:
        for w, s, e in zip(layers, sketches, errors, strict=True):
            cpu_selectors.sketched_rows(x, w, s, slots, torch.zeros_like(chosen), importance, neurons, None, e)

    return {
        "torch dense": dense,
        "row lists": row_lists,
        "token gate": gate,
        "sketch": sketch,
        "calibrated sketch": calibrated,
        "calibrated, with means": compensated,
        "the sketch's choice alone": sketch_choice,
        "the calibrated choice alone": calibrated_choice,
    }


def rows(args: argparse.Namespace, turns: Turns, case: str, bandwidth: float) -> list[Row]:
    """One row for each way: all but dense read the same share of the bytes, the sketch's choice alone its planes."""
    whole = 3 * args.hidden * args.neurons * 2
    read = dict.fromkeys(turns.seconds, round((1 - args.saved) * whole)) | {
        "torch dense": whole,
        "the sketch's choice alone": 2 * args.neurons * (args.hidden * args.bits // 8 + 4),
        "the calibrated choice alone": 2 * args.neurons * (args.hidden * args.bits // 8 + 8),
    }
    found = []
    for name in turns.seconds:
        each = turns.spread(name)
        seconds = Spread(*(value / args.layers for value in (each.lower, each.median, each.upper)))
        share = read[name] / seconds.median / bandwidth if args.batch == 1 else None
        found.append(Row(case, name, seconds, turns.times_as_fast(name, "torch dense"), read[name], share))
    return found


def main() -> None:
    """Parse, warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--saved", type=float, default=0.7, help="share of the FFN's bytes that is not read")
    parser.add_argument("--rate", type=float, default=0.15, help="share of the candidates that the gate chooses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    timed = ways(args)
    for way in timed.values():
        way()
        torch.set_num_threads(args.threads)  # Numba's start may have set it anew
    device = torch.device("cpu")
    turns = alternate({name: partial(seconds_per_call, way, device, 1) for name, way in timed.items()}, args.rounds)
    bandwidth = BandwidthProbe(device).bandwidth()
    case = f"H={args.hidden} I={args.neurons} bf16, {args.saved:.0%} of the bytes saved, batch {args.batch}"
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    found = rows(args, turns, case, bandwidth.median)
    result = Result("token kernels", device, settings, found, bandwidth)
    if args.out is not None:
        result.write(args.out, " ".join(["python", *sys.argv]))
    print(f"{case}, {args.threads} threads, {bandwidth.median / 1e9:.0f} GB/s")
    for row in found:
        fast, share = row.times_as_fast, "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}"
        print(
            f"{row.arm:26} {1e3 * row.seconds.median:7.2f} ms a layer {fast.median:6.2f} times as fast as dense "
            f"({fast.lower:.2f} to {fast.upper:.2f}) {share}"
        )


if __name__ == "__main__":
    main()
