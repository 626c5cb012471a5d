"""Time of one FFN in rows of 4 and 8 bits on the CPU, against torch's packed products and its own dense form.

    python benchmarks/quantised_kernels.py --hidden 1536 --neurons 8960

All ways run in turn, layer after layer, on the same random weights; medians over the rounds. k is the share of neurons
that are computed; a context mask reads nothing else, a nested choice the high codes of all neurons too.
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
from dartprune.bench.timing import Spread, alternate, seconds_per_call
from dartprune.ffn.cpu import quantised as cpu
from dartprune.ffn.quantised import QuantisedRows, quantised_rows
from dartprune.ffn.row_format import GROUP
from dartprune.ffn.weights import FFNWeights
from dartprune.model.packed_bytes import ByteLinear, bytes_of

Way = tuple[Callable[[], None], int]  # what is timed, and the weight bytes that a layer of it reads


class TorchPacked(torch.nn.Module):
    """A linear layer of 4 bits as torch's own CPU kernel takes it; its weights are any: only time is measured."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        self.weight4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.rand(inputs // GROUP, outputs, 2).to(weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output of x [N, K]."""
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight4, GROUP, self.scales)
        return out


def copies(rows: QuantisedRows, layers: int) -> list[QuantisedRows]:
    """The same rows in memory of their own."""
    biases = None, None, None
    return [
        QuantisedRows(rows.head.clone(), rows.tail.clone(), rows.layout, biases, "silu", F.silu, rows.dtype)
        for _ in range(layers)
    ]


def ways(args: argparse.Namespace) -> dict[str, Way]:
    """What is timed, by name; each call computes all layers."""
    torch.manual_seed(0)
    hidden, neurons = args.hidden, args.neurons
    gate, up, down = ((torch.randn(neurons, hidden) / hidden**0.5).bfloat16() for _ in range(3))
    weights = FFNWeights(gate, up, down, None, None, None, "silu", F.silu)
    x, slots = torch.randn(1, hidden).bfloat16(), torch.zeros(1, dtype=torch.int64)
    importance, errors = torch.ones(1, neurons), torch.rand(1, 4, neurons).bfloat16()
    found: dict[str, Way] = {}

    def torch_way(name: str, linears: list[list[torch.nn.Module]], size: int) -> None:
        def work() -> None:
            for first, second, third in linears:
                third(F.silu(first(x)) * second(x))

        found[name] = work, size

    plain = []
    for _ in range(args.layers):
        linears = [torch.nn.Linear(n, m, bias=False, dtype=torch.bfloat16) for m, n in ((neurons, hidden),) * 2]
        plain.append([*linears, torch.nn.Linear(neurons, hidden, bias=False, dtype=torch.bfloat16)])
    torch_way("torch bf16", plain, 6 * hidden * neurons)
    matrices = gate, up, down.t().contiguous()
    torch_way(
        "torch int4pack",
        [[TorchPacked(m) for m in matrices] for _ in range(args.layers)],
        3 * hidden * neurons * 5 // 8,
    )
    torch_way(
        "torch int8pack",
        [[ByteLinear(*bytes_of(m), None) for m in matrices] for _ in range(args.layers)],
        3 * hidden * neurons,
    )
    for bits in (4, 8):
        layers = copies(quantised_rows(weights, bits), args.layers)
        each = layers[0].row_bytes
        for share in (1.0, 0.5, 0.3):
            k = round(share * neurons)
            lists = [torch.randperm(neurons)[:k].sort().values.int()[None] for _ in layers]
            count = torch.tensor([k], dtype=torch.int32)

            def masked(layers=layers, lists=lists, count=count) -> None:  # type: ignore[no-untyped-def]
                for rows, index in zip(layers, lists, strict=True):
                    cpu.pruned_ffn(x, rows, index, count, slots)

            found[f"{bits} bits, all rows" if share == 1 else f"{bits} bits, mask, k={share}"] = masked, k * each
            if share < 1:

                def nested(layers=layers, count=count) -> None:  # type: ignore[no-untyped-def]
                    for rows in layers:
                        cpu.nested_rows(x, rows, slots, count, importance, neurons, None, errors)

                size = neurons * layers[0].layout.head + k * layers[0].layout.tail
                found[f"{bits} bits, nested choice, k={share}"] = nested, size
    return found


def main() -> None:
    """Parse, warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--neurons", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    with torch.no_grad():
        timed = ways(args)
        for way, _ in timed.values():
            way()
            torch.set_num_threads(args.threads)  # Numba's start may have set it anew
        device = torch.device("cpu")
        works = {name: partial(seconds_per_call, way, device, 1) for name, (way, _) in timed.items()}
        turns = alternate(works, args.rounds)
    bandwidth = BandwidthProbe(device).bandwidth()
    case = f"H={args.hidden} I={args.neurons}, one token"
    found = []
    for name, (_, size) in timed.items():
        spread = turns.spread(name)
        seconds = Spread(*(value / args.layers for value in (spread.lower, spread.median, spread.upper)))
        own = f"{name.split(' ', 1)[0]} bits, all rows"
        base = own if own in timed else "torch int4pack"
        extra = {"base": base}
        share = size / seconds.median / bandwidth.median
        found.append(Row(case, name, seconds, turns.times_as_fast(name, base), size, share, extra=extra))
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result = Result("quantised kernels", device, settings, found, bandwidth)
    if args.out is not None:
        result.write(args.out, " ".join(["python", *sys.argv]))
    print(f"{case}, {args.threads} threads, {bandwidth.median / 1e9:.0f} GB/s")
    for row in found:
        fast = row.times_as_fast
        print(
            f"{row.arm:28} {1e3 * row.seconds.median:6.3f} ms a layer  {row.bytes_moved / 1e6:5.1f} MB  "
            f"{row.bandwidth_share:4.0%} of the bandwidth  {fast.median:5.2f} x {row.extra['base']} "
            f"({fast.lower:.2f} to {fast.upper:.2f})"
        )


if __name__ == "__main__":
    main()
