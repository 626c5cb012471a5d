"""What a batch costs here: row kernel by its union, dense FFN by its rows; measured once and kept on disk."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dartprune.ffn.cpu.backend import CpuBackend
from dartprune.ffn.weights import FFNWeights

VERSION = 1
BATCHES = (2, 4, 8, 16, 32)
RUNS = 5

Dense = Callable[[Tensor], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one layer. dense: of the model's own FFN for each of `BATCHES` rows, masks included.

    union: of the row kernel for each neuron that any row keeps.  pair: for each neuron of each row.
    """

    dense: tuple[float, ...]
    union: float
    pair: float

    def dense_seconds(self, rows: int) -> float:
        """Of the dense FFN with masks, between the measured sizes by a straight line."""
        last = len(BATCHES) - 1
        i = next((i for i in range(last) if rows <= BATCHES[i + 1]), last - 1)
        slope = (self.dense[i + 1] - self.dense[i]) / (BATCHES[i + 1] - BATCHES[i])
        return max(0.0, self.dense[i] + slope * (rows - BATCHES[i]))

    def kernel_seconds(self, union: int, pairs: int) -> float:
        """Of the row kernel for rows that keep `union` neurons together and `pairs` when each row counts its own."""
        return self.union * union + self.pair * pairs


@torch.no_grad()
def measure(weights: Sequence[FFNWeights], dense: Sequence[Dense]) -> Timing:
    """Time both ways on these layers, in turn, medians; more layers than the caches hold give what decoding sees.

    Args:
        weights: of each layer.
        dense: the model's own FFN of each layer, x [N, H] -> anything.
    """
    first, layers = weights[0], len(weights)
    neurons, backend = first.neurons, CpuBackend()
    draw = torch.Generator("cpu").manual_seed(0)  # the caller's own draws must not depend on ours

    def inputs(rows: int) -> Tensor:
        return torch.randn(rows, first.hidden, generator=draw, dtype=torch.float32, device="cpu").to(first.up.dtype)

    def whole(rows: int) -> Callable[[], None]:
        x = inputs(rows)

        def work() -> None:
            for layer in dense:
                layer(x)

        return work

    def rows(index: Tensor) -> Callable[[], None]:
        lines, k = index.shape
        x, slots = inputs(lines), torch.arange(lines, dtype=torch.int64, device="cpu")
        count = torch.full((lines,), k, dtype=torch.int32, device="cpu")

        def work() -> None:
            for layer in weights:
                backend.ffn(x, layer, index, count, slots)

        return work

    # both read every neuron, as batches do where the choice is close: once each, or in half of eight lines
    def shuffled() -> Tensor:
        return torch.randperm(neurons, generator=draw, device="cpu").int()

    once = shuffled()[: neurons // 4 * 4].reshape(4, -1)
    often = torch.stack([shuffled()[: max(1, neurons // 2)] for _ in range(8)])
    works = [*map(whole, BATCHES), rows(once), rows(often)]
    taken: list[list[float]] = [[] for _ in works]
    for run in range(RUNS + 1):
        for work, seconds in zip(works, taken, strict=True):
            began = time.perf_counter()
            work()
            if run:  # the first one warms
                seconds.append((time.perf_counter() - began) / layers)
    *full, single, eightfold = (statistics.median(seconds) for seconds in taken)
    pair = max(0.0, (eightfold - single) / max(1, often.numel() - once.numel()))
    union = max(0.0, single / max(1, once.numel()) - pair)
    return Timing(tuple(full), union, pair)


def kept_timing(
    folder: Path, weights: Sequence[FFNWeights], dense: Sequence[Dense], work: Callable[..., Timing] = measure
) -> Timing:
    """The timing of layers of this shape, from the file in `folder` or measured now and kept there.

    A file that is broken or of another version is written anew; one that cannot be written is warned of.
    """
    path = folder / "cpu-timing.json"
    known = _read(path)
    key = _key(weights[0])
    if key not in known:
        known[key] = work(weights, dense)
        _write(path, known)
    return known[key]


def _key(weights: FFNWeights) -> str:
    shape = f"{weights.matrices}x{weights.neurons}x{weights.hidden} {weights.kind}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}: {shape}"


def processor() -> str:
    """The name of this machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Timing]:
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            return {}
        return {key: _checked(entry) for key, entry in data["layers"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} cannot be read ({error!r}): it is measured again", stacklevel=4)
        return {}


def _checked(entry: dict[str, object]) -> Timing:
    dense = entry["dense"]
    if not isinstance(dense, list):
        raise ValueError("dense is no list")
    timing = Timing(tuple(map(float, dense)), float(str(entry["union"])), float(str(entry["pair"])))
    if len(dense) != len(BATCHES) or not all(map(math.isfinite, (*timing.dense, timing.union, timing.pair))):
        raise ValueError("seconds are missing or not finite")
    return timing


def _write(path: Path, known: dict[str, Timing]) -> None:
    data = {"version": VERSION, "layers": {key: asdict(timing) for key, timing in known.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all: another process may read the file now, or this one may be stopped
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        part.write_text(json.dumps(data, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        warnings.warn(f"what was measured cannot be kept in {path.parent}: {error}", stacklevel=4)
