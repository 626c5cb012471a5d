"""One pruned FFN against the dense one: torch, masked, a packed copy of the kept rows, and the rows read in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dartprune.bench.device import BandwidthProbe, device_of, free_bytes, last_level_cache
from dartprune.bench.graphs import capture
from dartprune.bench.models import dtype_of, fill
from dartprune.bench.result import Result, Row
from dartprune.bench.timing import Turns, Work, alternate, seconds_per_call
from dartprune.errors import UserError
from dartprune.ffn import Backend, FFNWeights, choose
from dartprune.ffn.backend import activation
from dartprune.ffn.masked import apply_mask
from dartprune.names import unknown

ARMS = ("dense", "masked", "packed copy", "zero-copy")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")


@dataclass(frozen=True)
class FFNCase:
    """One FFN: width H, neurons I, dtype, share of neurons left out, sequences with a mask each, form, activation."""

    hidden: int = 2048
    neurons: int = 8192
    dtype: str = "bfloat16"
    sparsity: float = 0.7
    batch: int = 1
    gated: bool = True
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name in ("hidden", "neurons", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity must lie in [0, 1), got {self.sparsity}")
        dtype_of(self.dtype)
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)

    @property
    def kept(self) -> int:
        """Neurons that each sequence keeps."""
        return max(1, round((1 - self.sparsity) * self.neurons))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights of the FFN."""
        return (3 if self.gated else 2) * self.neurons * self.hidden * dtype_of(self.dtype).itemsize

    def __str__(self) -> str:
        form = "gated" if self.gated else "plain"
        return (
            f"H={self.hidden} I={self.neurons} {self.dtype}, {self.sparsity:.0%} left out, batch {self.batch}"
            f"{'' if form == 'gated' and self.activation == 'silu' else f', {form} {self.activation}'}"
        )


def measure(
    cases: Sequence[FFNCase],
    *,
    backend: str = "auto",
    device: str | None = None,
    turns: int = 11,
    layers: int | None = None,
    stream: BandwidthProbe | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Seconds of one FFN call for each arm and case.

    Weights must come from memory: every call goes through so many layers of random weights that even the kept rows are
    four times as large as the last cache.

    Args:
        cases: what to measure.
        backend: how the rows are read in place: `auto` or a name from `dartprune.ffn.backend_names()`.
        device: cpu or cuda.
        turns: how often all arms are measured in turn.
        layers: layers to rotate over, None for as many as the above asks for.
        stream: gives the bandwidth limit.
        progress: told of each case.

    Raises:
        ValueError: the backend cannot read rows on this device, or the weights do not fit in memory.
    """
    place = device_of(device)
    for case in cases:
        _backend(case, backend, place)
        _check_room(case, layers or layers_for(case, place), place)
    stream = stream or BandwidthProbe(place)
    bandwidth = stream.bandwidth()
    rows: list[Row] = []
    notes: list[str] = []
    for number, case in enumerate(cases):
        progress(f"{number + 1} of {len(cases)}: {case}")
        count = layers or layers_for(case, place)
        ffn = RandomFFNs(case, count, _backend(case, backend, place), place)
        arms: dict[str, Callable[[], float]] = {
            name: _timed(work, place, count) for name, work in ffn.works().items()
        } | {"stream": stream.seconds}
        taken = alternate(arms, turns)
        rows += [_row(case, name, ffn.bytes_moved(name), taken, stream.bytes) for name in ARMS]
        if place.type == "cuda":
            notes.append("each call is replayed as a CUDA graph: launches by Python are not counted")
        note = f"weights from memory: each call goes through {count} layers, {count * case.weight_bytes / 1e6:,.0f} MB"
        notes.append(note)
    settings = {"backend": backend, "turns": turns, "layers": layers}
    return Result("kernel", place, settings, rows, bandwidth, list(dict.fromkeys(notes)))


def _timed(work: Work, device: torch.device, layers: int) -> Callable[[], float]:
    if device.type == "cuda":
        # as one graph: else what is timed is how quickly Python launches
        replay, _ = capture(work)
        return lambda: seconds_per_call(replay, device) / layers
    return lambda: seconds_per_call(work, device) / layers


def _row(case: FFNCase, arm: str, moved: int, taken: Turns, stream_bytes: int) -> Row:
    seconds, ratio = taken.spread(arm), taken.times_as_fast(arm, "dense")
    fastest = moved / (stream_bytes / taken.spread("stream").median)
    return Row(
        str(case),
        arm,
        seconds,
        ratio,
        moved,
        fastest / seconds.median,
        taken.spread("dense").median / fastest,
        {"hidden": case.hidden, "neurons": case.neurons, "dtype": case.dtype, "sparsity": case.sparsity}
        | {"batch": case.batch, "gated": case.gated, "activation": case.activation},
    )


def layers_for(case: FFNCase, device: torch.device) -> int:
    """Layers to rotate over so that the kept rows are four times as large as the last cache."""
    kept = case.weight_bytes * case.kept / case.neurons
    return max(2, math.ceil(4 * last_level_cache(device) / kept))


def _check_room(case: FFNCase, layers: int, device: torch.device) -> None:
    # the weights, down the other way round for torch, and one packed copy for each sequence
    needed = layers * case.weight_bytes * (1 + (1 / 3 if case.gated else 1 / 2) + case.batch * case.kept / case.neurons)
    free = free_bytes(device)
    if free is not None and needed > 0.9 * free:
        raise UserError(
            f"{case}: {layers} layers need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "take fewer --layers or a smaller FFN"
        )


def _backend(case: FFNCase, name: str, device: torch.device) -> Backend:
    """The backend that reads the rows in place; ValueError if there is none for this case."""
    matrix = torch.empty(case.neurons, case.hidden, dtype=dtype_of(case.dtype), device=device)
    chosen, reason = choose(name, RandomFFNs.weights(case, [matrix] * 3), device)
    if not chosen.gathers:
        raise UserError(f"no backend reads single rows here: {reason or f'{chosen.name} computes all neurons'}")
    return chosen


class RandomFFNs:
    """Several FFNs with random weights, in the forms that the arms read."""

    def __init__(self, case: FFNCase, count: int, backend: Backend, device: torch.device) -> None:
        self.case = case
        self.backend = backend
        kind = dtype_of(case.dtype)
        size = (3 if case.gated else 2, case.neurons, case.hidden)
        matrices = [[torch.empty(size[1:], dtype=kind, device=device) for _ in range(size[0])] for _ in range(count)]
        fill((matrix for layer in matrices for matrix in layer), case.hidden**-0.5)
        self.rows = [self.weights(case, layer) for layer in matrices]
        self.down = [weights.down.t().contiguous() for weights in self.rows]  # as a model holds it
        draw = torch.Generator("cpu").manual_seed(0)
        self.x = torch.randn(case.batch, case.hidden, generator=draw).to(device, kind)

        def kept() -> Tensor:
            return torch.randperm(case.neurons, generator=draw)[: case.kept].sort().values.to(torch.int32)

        self.index = [torch.stack([kept() for _ in range(case.batch)]).to(device) for _ in range(count)]
        self.count = torch.full((case.batch,), case.kept, dtype=torch.int32, device=device)
        self.slots = torch.arange(case.batch, device=device)
        self.masks = [
            torch.zeros(case.batch, case.neurons, dtype=torch.bool, device=device).scatter_(1, index.long(), True)
            for index in self.index
        ]
        self.copies = [
            [self._packed(number, sequence) for sequence in range(case.batch)] for number in range(len(self.rows))
        ]
        backend.prepare(self.rows[0])

    @staticmethod
    def weights(case: FFNCase, matrices: Sequence[Tensor]) -> FFNWeights:
        """The matrices (gate if there is one, up, down by rows) as a backend takes them."""
        *gate, up, down = matrices if case.gated else matrices[-2:]

        def act(a: Tensor) -> Tensor:
            return activation(case.activation, a)

        return FFNWeights(gate[0] if gate else None, up, down, None, None, None, case.activation, act)

    def _packed(self, layer: int, sequence: int) -> tuple[Tensor | None, Tensor, Tensor]:
        kept, w = self.index[layer][sequence].long(), self.rows[layer]
        return None if w.gate is None else w.gate[kept], w.up[kept], self.down[layer][:, kept].contiguous()

    def _hidden(self, x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        act, a = self.rows[0].act, F.linear(x, up)
        return act(a) if gate is None else act(F.linear(x, gate)) * a

    def dense(self, layer: int) -> Tensor:
        """As the model computes it."""
        w = self.rows[layer]
        return F.linear(self._hidden(self.x, w.gate, w.up), self.down[layer])

    def masked(self, layer: int) -> Tensor:
        """All neurons computed, those that are not kept zeroed before the down projection."""
        w = self.rows[layer]
        a = apply_mask(self._hidden(self.x, w.gate, w.up)[:, None], self.masks[layer])[:, 0]
        return F.linear(a, self.down[layer])

    def packed(self, layer: int) -> Tensor:
        """A second matrix of the kept rows for each sequence, gathered beforehand, and dense products with it."""
        parts = []
        for sequence, (gate, up, down) in enumerate(self.copies[layer]):
            x = self.x[sequence : sequence + 1]
            parts.append(F.linear(self._hidden(x, gate, up), down))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def in_place(self, layer: int) -> Tensor:
        """The kept rows read from the original weights."""
        return self.backend.ffn(self.x, self.rows[layer], self.index[layer], self.count, self.slots)

    def works(self) -> dict[str, Work]:
        """One call of each arm goes through all layers."""
        ways = dict(zip(ARMS, (self.dense, self.masked, self.packed, self.in_place), strict=True))

        def through(way: Callable[[int], Tensor]) -> Work:
            def work() -> Any:
                for layer in range(len(self.rows)):
                    way(layer)

            return work

        return {name: through(way) for name, way in ways.items()}

    def bytes_moved(self, arm: str) -> int:
        """Weight bytes that one FFN call of an arm must read (the first layer's lists stand for all)."""
        whole = self.case.neurons * self.rows[0].row_bytes
        if arm in ("dense", "masked"):
            return whole
        if arm == "packed copy":
            return self.case.batch * self.case.kept * self.rows[0].row_bytes
        return self.backend.bytes_read(self.rows[0], list(self.index[0]))
