"""An FFN whose weights are rows of 4 or 8 bits, one neuron a row; the sketch that lies inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dartprune.ffn.row_format import (
    GROUP,
    RowFormat,
    pack_down,
    pack_fields,
    rounded,
    row_values,
    unpack,
    unpack_fields,
)
from dartprune.ffn.weights import FFNWeights

BITS = (4, 8)
BLOCK = 1 << 24  # weights that are unpacked at a time
RoundMatrix: TypeAlias = Callable[[Tensor, RowFormat, int], tuple[Tensor, Tensor]]


class QuantisedRows(FFNWeights):
    """An FFN in rows of 4 or 8 bits; its matrices are unpacked whenever they are asked for.

    head: uint8 [I, layout.head].  tail: uint8 [I, layout.tail].  layout: what lies where in them.
    original: dtype of the weights that were rounded, and of the matrices.
    """

    head: Tensor
    tail: Tensor
    layout: RowFormat
    original: torch.dtype

    def __init__(
        self,
        head: Tensor,
        tail: Tensor,
        layout: RowFormat,
        biases: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
        act: Callable[[Tensor], Tensor],
        original: torch.dtype,
    ) -> None:
        """Set up; biases of gate [I], up [I] and down [H], or None each."""
        names = ("gate_bias", "up_bias", "down_bias")
        parts = {
            "head": head,
            "tail": tail,
            "layout": layout,
            "activation": activation,
            "act": act,
            "original": original,
        }
        for name, value in {**parts, **dict(zip(names, biases, strict=True))}.items():
            object.__setattr__(self, name, value)

    @property
    def neurons(self) -> int:
        """Number of neurons, I."""
        return int(self.head.shape[0])

    @property
    def hidden(self) -> int:
        """Width of the residual stream, H."""
        return self.layout.hidden

    @property
    def matrices(self) -> int:
        """Rows that one neuron owns: 3 with a gate, else 2."""
        return 3 if self.layout.gated else 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.original

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.head.device

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """None: no gradient reaches packed weights."""
        return ()

    @property
    def row_bytes(self) -> int:
        """Bytes of all that belongs to one neuron."""
        return self.layout.head + self.layout.tail

    @property
    def kind(self) -> str:
        """What a weight is kept in."""
        return f"{self.layout.bits}-bit"

    @property
    def gate(self) -> Tensor | None:
        """The gate unpacked, [I, H]: made anew at every access."""
        return self.unpacked("gate") if self.layout.gated else None

    @property
    def up(self) -> Tensor:
        """Up unpacked, [I, H]: made anew at every access."""
        return self.unpacked("up")

    @property
    def down(self) -> Tensor:
        """Down unpacked and transposed, [I, H]: made anew at every access."""
        return self.unpacked("down")

    def unpacked(self, role: str, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Rows `first` to `last` of a matrix ("gate", "up" or "down"), [rows, H], in `dtype` (that of the original)."""
        return unpack(self.head[first:last], self.tail[first:last], self.layout, role).to(dtype or self.original)


def quantised_rows(
    weights: FFNWeights, bits: int, *, nested: bool = True, round_matrix: RoundMatrix = rounded
) -> QuantisedRows:
    """Round an FFN to rows of 4 or 8 bits; the weights are read once, a block of neurons at a time.

    Args:
        weights: what to round, matrices [I, H].
        bits: 4 or 8.
        nested: the high half of each code of gate and up lies apart, for token selectors.
        round_matrix: gives codes and scales of matrices, as `row_format.rounded` does.
    """
    high = bits // 2 if nested else bits
    layout = RowFormat(weights.hidden, weights.gate is not None, high, bits - high)
    head = torch.zeros(weights.neurons, layout.head, dtype=torch.uint8, device="cpu")
    tail = torch.zeros(weights.neurons, layout.tail, dtype=torch.uint8, device="cpu")
    gate, up, down, *biases = weights.tensors()
    step = max(1, BLOCK // layout.width)
    for first in range(0, weights.neurons, step):
        block = slice(first, first + step)
        parts = [matrix[block] for matrix in (gate, up) if matrix is not None]
        codes = [round_matrix(part, layout, bits) for part in parts]
        rows = round_matrix(down[block], layout, bits)
        heads = [pack_fields(code >> layout.low, high, layout) for code, _ in codes]
        lows = [pack_fields(code & ((1 << layout.low) - 1), layout.low, layout) for code, _ in codes if layout.low]
        put_parts(head[block], [*heads, *(scales for _, scales in codes)])
        put_parts(tail[block], [*lows, pack_down(rows[0], bits, layout), rows[1]])
    return QuantisedRows(
        head, tail, layout, (biases[0], biases[1], biases[2]), weights.activation, weights.act, weights.up.dtype
    )


def put_parts(rows: Tensor, parts: list[Tensor]) -> None:
    """Fill the beginning of rows, uint8 [I, bytes], with parts [I, ...] side by side."""
    whole = torch.cat(parts, dim=1)
    rows[:, : whole.shape[1]] = whole


@dataclass(frozen=True)
class NestedSketch:
    """The sketch of nested rows: the high halves of their own codes, which every token reads."""

    rows: QuantisedRows

    @property
    def bytes(self) -> int:
        """Read for each token; nothing is held beside the rows."""
        return self.rows.neurons * self.rows.layout.head


def rounded_inputs(x: Tensor) -> Tensor:
    """Rows x [N, H] as the kernels round them, float32: 8 bits in groups of 32, the largest of a group being 127."""
    filled = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).view(x.shape[0], -1, GROUP)
    largest = filled.abs().amax(-1, keepdim=True)
    whole = (filled * torch.where(largest > 0, 127 / largest, 0.0)).round() * (largest / 127)
    return whole.flatten(1)[:, : x.shape[1]]


def nested_estimates(x: Tensor, rows: QuantisedRows) -> tuple[Tensor | None, Tensor]:
    """Products of x [N, H] with gate (None for a plain FFN) and up from their high codes, float32 [N, I], no biases.

    What the low codes may add is taken at its middle.
    """
    wide = rounded_inputs(x)
    gate = wide @ rough(rows, "gate").t() if rows.layout.gated else None
    return gate, wide @ rough(rows, "up").t()


def nested_pairs(x: Tensor, rows: QuantisedRows) -> tuple[tuple[Tensor | None, Tensor], tuple[Tensor | None, Tensor]]:
    """Products of x [N, H] with gate (None for a plain FFN) and up, and `nested_estimates` of them, no biases."""
    wide = rounded_inputs(x)
    gate = wide @ rows.unpacked("gate", dtype=torch.float32).t() if rows.layout.gated else None
    return (gate, wide @ rows.unpacked("up", dtype=torch.float32).t()), nested_estimates(x, rows)


def rough(rows: QuantisedRows, role: str) -> Tensor:
    """Gate or up with all low codes in the middle, float32 [I, H]."""
    layout = rows.layout
    flat = RowFormat(layout.hidden, layout.gated, layout.high, 0)
    _, _, _, _, *places, _, _, _, _ = layout.offsets
    begin, home = places[::2] if role == "gate" else places[1::2]
    codes = unpack_fields(rows.head[:, begin : begin + layout.codes(layout.high)], layout.high, layout)
    middle = ((1 << layout.low) - 1) / 2
    return row_values(codes.float() * (1 << layout.low) + middle, rows.head[:, home:], flat)
