"""Rows of few bits, one neuron a row: how weights are rounded, packed and read back.

A weight is `low + scale * code`, with a scale and a low for each group of 32 along H. Scales and lows are bytes under a
pair of floats for each row and matrix. Codes of gate and up may lie in two halves: the high bits of all neurons
together, which a token selector reads for every token, and the low bits of each neuron beside its down row, which
are read for the neurons that are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GROUP = 32  # weights along H that share a scale and a low
STEPS, QUAD = 8, 4  # of a group: eight times four weights, as the dot product of bytes takes them
SEGMENTS = (16, 8, 4)  # groups that the kernels take at a time; H is filled up to a multiple of the last
LINE = 64  # bytes that memory gives at a time
LANES = 16  # words of a vector, in down rows
SHRINKS, SHRINK = 8, 0.04  # ranges that rounding to few bits tries for each group, each narrower by this share
SHRUNK = 4  # and what few bits are, at most
TINY = 1e-30


@dataclass(frozen=True)
class RowFormat:
    """Where the parts of a neuron lie, in bytes from the beginning of its head and of its tail.

    Head: the high bits of gate's codes (where there is a gate) and of up's, then the scales, lows and two floats of
    gate, and of up. Tail: the low bits of gate's codes and of up's, down's codes, its scales, lows and two floats. Both
    are filled up to whole lines of memory.
    high, low: bits of a code of gate and up in each; their sum is the bits of a code of down.
    """

    hidden: int
    gated: bool
    high: int
    low: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.high + self.low

    @property
    def groups(self) -> int:
        """Groups of a row, those included that only fill up."""
        return -(-self.hidden // (GROUP * SEGMENTS[-1])) * SEGMENTS[-1]

    @property
    def width(self) -> int:
        """Weights of a row, filled up with zeros."""
        return self.groups * GROUP

    @property
    def scales(self) -> int:
        """Bytes of a matrix's scales, lows and floats in one row."""
        return 2 * self.groups + 8

    def codes(self, bits: int) -> int:
        """Bytes of a row's codes of so many bits."""
        return self.width * bits // 8

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """What the kernels take: groups, high, low, gated; then where the parts lie.

        In the head: codes of gate, of up, scales of gate, of up. In the tail: codes of gate, of up, of down, scales.
        """
        matrices = 2 if self.gated else 1
        high, low = self.codes(self.high), self.codes(self.low)
        first, rest = (high, low) if self.gated else (0, 0)
        scales = matrices * high
        down = matrices * low
        in_head = 0, first, scales, scales + (matrices - 1) * self.scales
        return self.groups, self.high, self.low, int(self.gated), *in_head, 0, rest, down, down + self.codes(self.bits)

    @property
    def head(self) -> int:
        """Bytes of a neuron's head."""
        return lines(self.offsets[7] + self.scales)

    @property
    def tail(self) -> int:
        """Bytes of a neuron's tail."""
        return lines(self.offsets[11] + self.scales)


def lines(size: int) -> int:
    """A size in bytes, filled up to whole lines of memory."""
    return -(-size // LINE) * LINE


def rounded(matrix: Tensor, layout: RowFormat, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [I, width] of a matrix [I, H], and its scales, lows and floats, uint8 [I, layout.scales].

    Each group spans from its smallest to its largest weight; with few bits also narrower ranges are tried, and the one
    with the smallest sum of squared errors is taken.
    """
    most = (1 << bits) - 1
    filled = torch.nn.functional.pad(matrix.detach().to("cpu", torch.float32), (0, layout.width - layout.hidden))
    w = filled.view(-1, layout.groups, GROUP)
    smallest, largest = w.amin(-1), w.amax(-1)
    middle, reach = (smallest + largest) / 2, (largest - smallest) / 2
    # the floats of a row are such that its widest group and its farthest low fit
    unit = (2 * reach / most).amax(1, keepdim=True).clamp_min(TINY) / 255
    low_unit = (middle - reach).abs().amax(1, keepdim=True).clamp_min(TINY) / 127
    best: list[Tensor] = []
    for narrower in range(SHRINKS if bits <= SHRUNK else 1):
        span = reach * (1 - SHRINK * narrower)
        scale = 2 * span / most / unit
        scale = (scale.round() if narrower else scale.ceil()).clamp(0, 255)
        low = ((middle - span) / low_unit).round().clamp(-127, 127)
        step, start = (scale * unit)[..., None], (low * low_unit)[..., None]
        code = ((w - start) / step.clamp_min(TINY)).round_().clamp_(0, most)
        error = (code * step + start - w).square_().sum(-1, keepdim=True)
        found = [error, code, scale[..., None], low[..., None]]
        better = error < best[0] if best else None
        best = (
            found if better is None else [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        )
    _, codes, scale, low = best
    floats = torch.cat((unit, low_unit), dim=1).view(torch.uint8)
    scales = torch.cat((scale[..., 0].to(torch.uint8), low[..., 0].to(torch.int8).view(torch.uint8), floats), dim=1)
    return codes.to(torch.uint8).flatten(1), scales


def pack_fields(codes: Tensor, width: int, layout: RowFormat) -> Tensor:
    """Codes of `width` bits, uint8 [I, layout.width], as the kernels read gate and up: uint8 [I, width * groups * 4].

    A segment of L groups is eight steps of 4 L codes (four of each group); a byte holds the steps v, v + width, ...
    """
    out = []
    for first, groups in segments(layout.groups):
        part = codes[:, first * GROUP : (first + groups) * GROUP].view(-1, groups, STEPS, QUAD)
        fields = part.transpose(1, 2).reshape(-1, STEPS // width, width, groups * QUAD)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device="cpu").view(1, -1, 1, 1)
        out.append((fields << shifts).sum(1, dtype=torch.uint8).flatten(1))
    return torch.cat(out, dim=1)


def unpack_fields(packed: Tensor, width: int, layout: RowFormat) -> Tensor:
    """What `pack_fields` packed, uint8 [I, layout.width]."""
    out = []
    for first, groups in segments(layout.groups):
        part = packed[:, first * QUAD * width :][:, : groups * QUAD * width].reshape(-1, 1, width, groups * QUAD)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device="cpu").view(1, -1, 1, 1)
        fields = (part >> shifts) & ((1 << width) - 1)
        out.append(fields.reshape(-1, STEPS, groups, QUAD).transpose(1, 2).flatten(1))
    return torch.cat(out, dim=1)


def pack_down(codes: Tensor, bits: int, layout: RowFormat) -> Tensor:
    """Codes of down rows, uint8 [I, layout.width], packed: the k-th code of word i of 16 is weight 16 k + i."""
    each = 32 // bits  # codes of a word
    parts = codes.view(-1, layout.width // (each * LANES), each // (8 // bits), 8 // bits, LANES)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device="cpu").view(1, 1, 1, -1, 1)
    return (parts << shifts).sum(3, dtype=torch.uint8).transpose(2, 3).flatten(1)


def unpack_down(packed: Tensor, bits: int, layout: RowFormat) -> Tensor:
    """What `pack_down` packed, uint8 [I, layout.width]."""
    parts = packed.reshape(packed.shape[0], -1, LANES, 4).transpose(2, 3)[:, :, :, None]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device="cpu").view(1, 1, 1, -1, 1)
    return ((parts >> shifts) & ((1 << bits) - 1)).flatten(1)


def unpack(head: Tensor, tail: Tensor, layout: RowFormat, role: str) -> Tensor:
    """The reference: one matrix in float32 [I, H] from heads and tails."""
    _, high, low, _, *in_head, gate_low, up_low, down, down_scales = layout.offsets
    if role == "down":
        codes = unpack_down(tail[:, down:down_scales], layout.bits, layout)
        scales = tail[:, down_scales:]
    else:
        begin, home = in_head[::2] if role == "gate" else in_head[1::2]
        codes, scales = unpack_fields(head[:, begin : begin + layout.codes(high)], high, layout), head[:, home:]
        if low:
            rest = gate_low if role == "gate" else up_low
            codes = codes << low | unpack_fields(tail[:, rest : rest + layout.codes(low)], low, layout)
    return row_values(codes, scales, layout)


def row_values(codes: Tensor, scales: Tensor, layout: RowFormat) -> Tensor:
    """Weights float32 [I, H] from codes [I, width] and scales, lows and floats, uint8 [I, layout.scales]."""
    groups = layout.groups
    scale8, low8 = scales[:, :groups].float(), scales[:, groups : 2 * groups].contiguous().view(torch.int8).float()
    floats = scales[:, 2 * groups : 2 * groups + 8].contiguous().view(torch.float32)
    step, start = scale8 * floats[:, :1], low8 * floats[:, 1:]
    values = codes.view(-1, groups, GROUP).float() * step[..., None] + start[..., None]
    return values.flatten(1)[:, : layout.hidden].contiguous()


def segments(groups: int) -> list[tuple[int, int]]:
    """The first group and the number of groups of each part that the kernels take at a time."""
    out, first = [], 0
    for size in SEGMENTS:
        while groups - first >= size:
            out.append((first, size))
            first += size
    return out
