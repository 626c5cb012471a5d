"""Vector code for Numba over rows of 4 and 8 bits: one row's dot product with an input, whole, or its halves apart.

What is needed next is fetched meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.cpu.group_vectors import (
    BYTE,
    FLOAT,
    INT,
    SIZE,
    Fields,
    code_products,
    data_of,
    each_segment,
    fetch,
    fetch_all,
    fields_of,
    filled,
    folded,
    load_at,
    multiply_add,
    spread,
    vector,
    whole_codes,
)
from dartprune.ffn.row_format import GROUP, QUAD, SEGMENTS

LARGEST = SEGMENTS[0]


class RowSums:
    """Emits code over one row: its scales and lows as whole numbers, and sums over its groups."""

    def __init__(self, builder: Any, home: Any, scales: Any, groups: Any) -> None:
        self.builder, self.groups = builder, groups
        self.scales = builder.gep(home, [scales])
        behind = builder.add(groups, groups)
        self.unit, self.low_unit = (load_at(builder, self.scales, builder.add(behind, SIZE(k)), FLOAT) for k in (0, 4))

    def sum(self) -> Any:
        """Room for a sum in vectors."""
        return cgutils.alloca_once_value(self.builder, filled(FLOAT, LARGEST, 0.0))

    def add(self, total: Any, one: Any, other: Any, lanes: int) -> None:
        """The products of two vectors, added to the first lanes of a sum."""
        builder = self.builder
        if lanes < LARGEST:
            places = ir.Constant(vector(INT, LARGEST), [min(i, lanes) for i in range(LARGEST)])
            zeros = filled(FLOAT, lanes, 0.0)
            one, other = (builder.shuffle_vector(part, zeros, places) for part in (one, other))
        builder.store(multiply_add(builder, one, other, builder.load(total)), total)

    def scale(self, first: Any, lanes: int) -> Any:
        """Scales of groups, float32, in units of the row's first float."""
        found = load_at(self.builder, self.scales, first, vector(BYTE, lanes))
        return self.builder.uitofp(found, vector(FLOAT, lanes))

    def low(self, first: Any, lanes: int) -> Any:
        """Lows of groups, float32, in units of the row's second float."""
        found = load_at(self.builder, self.scales, self.builder.add(first, self.groups), vector(BYTE, lanes))
        return self.builder.sitofp(found, vector(FLOAT, lanes))

    def times(self, times: float) -> Any:
        """The unit of scales, times a number."""
        return self.builder.fmul(self.unit, ir.Constant(FLOAT, times))

    def total(self, *parts: tuple[Any, Any]) -> Any:
        """The value of sums, each times its float32."""
        builder, floats = self.builder, vector(FLOAT, LARGEST)
        found = filled(FLOAT, LARGEST, 0.0)
        for room, factor in parts:
            found = multiply_add(builder, builder.load(room), spread(builder, factor, floats), found)
        return folded(builder, found)


def _dots(builder: Any, x: Any, at: Any, lanes: int, bits: int, fields: Callable[[int], Fields]) -> Any:
    """Whole products of the groups at `at`, float32 [lanes]; fields: the codes of each vector, `bits` vectors."""
    start, found, values = builder.mul(at, SIZE(GROUP)), [], []
    for v in range(bits):
        for j, field in enumerate(fields(v)):
            place = builder.add(start, SIZE((v + bits * j) * QUAD * lanes))
            found.append(field)
            values.append(load_at(builder, x, place, vector(BYTE, QUAD * lanes)))
    total = code_products(builder, found, values, lanes)
    return builder.sitofp(total, vector(FLOAT, lanes))


def _literals(*kinds: Any) -> bool:
    return all(isinstance(kind, types.IntegerLiteral) for kind in kinds)


@intrinsic(prefer_literal=True)
def whole_row(
    context: Any, x: Any, scale: Any, sums: Any, home: Any, scales: Any, codes: Any, tail: Any, rest: Any, groups: Any,
    high: Any, low: Any, later_home: Any, later_tail: Any,
):  # fmt: skip
    """One row's dot product with an input, float32.

    x int8 [groups * 32], scale and sums float32 [groups]: the input as `group_inputs` rounds it. The row's codes of
    `high` (a literal) bits lie at home[codes:], its scale bytes, low bytes and two floats at home[scales:], the `low`
    (a literal: as many, 2 below 4, or 0 for none) bits below them at tail[rest:]. The same of another row, in
    later_home and later_tail, is asked for meanwhile.
    """
    if not _literals(high, low):
        return None
    bits, below = high.literal_value, low.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, factors, totals, own, other, then, then_tail = (
            data_of(context, builder, signature.args[i], args[i]) for i in (0, 1, 2, 3, 6, 11, 12)
        )
        count = args[8]
        row = RowSums(builder, own, args[4], count)
        product, lows = row.sum(), row.sum()
        sources = [(bits, builder.gep(own, [args[5]]), builder.gep(then, [args[5]]))]
        if below:
            sources.append((below, builder.gep(other, [args[7]]), builder.gep(then_tail, [args[7]])))
        fetch_all(builder, then, args[4], builder.add(builder.add(count, count), SIZE(8)))

        def segment(first: Any, lanes: int) -> None:
            kind = vector(BYTE, QUAD * lanes)

            def fields(v: int) -> Fields:
                parts = []
                for width, mine, others in sources:
                    where = builder.mul(first, SIZE(QUAD * width))
                    where = builder.add(where, SIZE(v % width * QUAD * lanes))
                    if v < width:
                        fetch(builder, others, where)
                    parts.append(load_at(builder, mine, where, kind))
                return whole_codes(builder, parts, (bits, below), v, lanes)

            dots = _dots(builder, inputs, first, lanes, bits, fields)
            floats, place = vector(FLOAT, lanes), builder.mul(first, SIZE(4))
            mine = builder.fmul(row.scale(first, lanes), load_at(builder, factors, place, floats))
            row.add(product, dots, mine, lanes)
            row.add(lows, row.low(first, lanes), load_at(builder, totals, place, floats), lanes)

        each_segment(builder, count, segment)
        return row.total((product, row.unit), (lows, row.low_unit))

    places = types.int64
    kinds = x, scale, sums, home, places, places, tail, places, places, high, low, later_home, later_tail
    return types.float32(*kinds), generate


@intrinsic(prefer_literal=True)
def low_row(
    context: Any, x: Any, scale: Any, home: Any, scales: Any, tail: Any, rest: Any, groups: Any, low: Any,
    later_home: Any, later_tail: Any,
):  # fmt: skip
    """What a nested row's low codes add to its product, float32; arguments as for `whole_row`."""
    if not _literals(low):
        return None
    bits = low.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, factors, own, other, then, then_tail = (
            data_of(context, builder, signature.args[i], args[i]) for i in (0, 1, 2, 4, 8, 9)
        )
        count = args[6]
        row = RowSums(builder, own, args[3], count)
        total = row.sum()
        mine, others = builder.gep(other, [args[5]]), builder.gep(then_tail, [args[5]])
        fetch_all(builder, then, args[3], builder.add(builder.add(count, count), SIZE(8)))

        def segment(first: Any, lanes: int) -> None:
            begin, kind = builder.mul(first, SIZE(QUAD * bits)), vector(BYTE, QUAD * lanes)

            def fields(v: int) -> Fields:
                where = builder.add(begin, SIZE(v * QUAD * lanes))
                fetch(builder, others, where)
                return fields_of(builder, load_at(builder, mine, where, kind), bits, lanes)

            dots = _dots(builder, inputs, first, lanes, bits, fields)
            floats = vector(FLOAT, lanes)
            factor = load_at(builder, factors, builder.mul(first, SIZE(4)), floats)
            row.add(total, dots, builder.fmul(row.scale(first, lanes), factor), lanes)

        each_segment(builder, count, segment)
        return row.total((total, row.unit))

    places = types.int64
    kinds = x, scale, home, places, tail, places, places, low, later_home, later_tail
    return types.float32(*kinds), generate


@intrinsic(prefer_literal=True)
def high_row(context: Any, x: Any, scale: Any, sums: Any, home: Any, scales: Any, codes: Any, groups: Any, high: Any):
    """A nested row's product without its low codes, as many bits as the high ones have; what these add in the middle.

    Arguments as for `whole_row`. Two numbers of float32. Nothing is asked for.
    """
    if not _literals(high):
        return None
    bits = high.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, factors, totals, own = (data_of(context, builder, signature.args[i], args[i]) for i in range(4))
        count = args[6]
        row = RowSums(builder, own, args[4], count)
        product, lows, middle = row.sum(), row.sum(), row.sum()
        mine = builder.gep(own, [args[5]])

        def segment(first: Any, lanes: int) -> None:
            begin, kind = builder.mul(first, SIZE(QUAD * bits)), vector(BYTE, QUAD * lanes)

            def fields(v: int) -> Fields:
                where = builder.add(begin, SIZE(v * QUAD * lanes))
                return fields_of(builder, load_at(builder, mine, where, kind), bits, lanes)

            dots = _dots(builder, inputs, first, lanes, bits, fields)
            floats, place = vector(FLOAT, lanes), builder.mul(first, SIZE(4))
            scale, theirs = row.scale(first, lanes), load_at(builder, totals, place, floats)
            factor = builder.fmul(scale, load_at(builder, factors, place, floats))
            row.add(product, dots, factor, lanes)
            row.add(lows, row.low(first, lanes), theirs, lanes)
            row.add(middle, scale, theirs, lanes)

        each_segment(builder, count, segment)
        results = [
            row.total((product, row.times(1 << bits)), (lows, row.low_unit)),
            row.total((middle, row.times(((1 << bits) - 1) / 2))),
        ]
        return context.make_tuple(builder, signature.return_type, results)

    places = types.int64
    pair = types.UniTuple(types.float32, 2)
    return pair(x, scale, sums, home, places, places, places, high), generate
