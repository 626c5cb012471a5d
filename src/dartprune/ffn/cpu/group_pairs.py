"""Vector code for Numba over nested rows: what a row gives with inputs, and what its high codes alone estimate.

A row's codes are unpacked once for up to four inputs, and the products with its high codes are made once for both.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from dartprune.ffn.cpu.group_rows import RowSums
from dartprune.ffn.cpu.group_vectors import (
    BYTE,
    FLOAT,
    INT,
    SIZE,
    Fields,
    code_products,
    data_of,
    each_segment,
    fields_of,
    filled,
    load_at,
    vector,
)
from dartprune.ffn.row_format import GROUP, QUAD


@intrinsic(prefer_literal=True)
def row_pairs(
    context: Any,
    x: Any,
    scale: Any,
    sums: Any,
    first: Any,
    many: Any,
    home: Any,
    scales: Any,
    codes: Any,
    tail: Any,
    rest: Any,
    groups: Any,
    width: Any,
):
    """Exact and estimated dot products of one nested row with the inputs first : first + many (a literal).

    x int8 [N, groups * 32], scale and sums float32 [N, groups]: inputs as `group_inputs` rounds them. The row's high
    codes lie at home[codes:], its scale bytes, low bytes and two floats at home[scales:], its low codes at tail[rest:];
    each code has `width` (a literal) high and as many low bits.

    Returns 2 * many numbers of float32: the products; then those with all low codes in the middle of what they may be.
    An input's numbers are made in one order, whatever there are beside it.
    """
    if not isinstance(width, types.IntegerLiteral) or not isinstance(many, types.IntegerLiteral):
        return None
    bits, inputs = width.literal_value, many.literal_value
    middle = ((1 << bits) - 1) / 2

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(i: int) -> Any:
            return data_of(context, builder, signature.args[i], args[i])

        begin, count = args[3], args[10]
        places_of = [builder.add(begin, SIZE(n)) for n in range(inputs)]
        size = builder.mul(count, SIZE(GROUP))
        given = [builder.gep(pointer(0), [builder.mul(n, size)]) for n in places_of]
        factors, totals = (
            [builder.gep(pointer(i), [builder.mul(n, builder.mul(count, SIZE(4)))]) for n in places_of] for i in (1, 2)
        )
        row = RowSums(builder, pointer(5), args[6], count)
        high_codes, low_codes = builder.gep(pointer(5), [args[7]]), builder.gep(pointer(8), [args[9]])
        exact, rough, lows, middles = ([row.sum() for _ in range(inputs)] for _ in range(4))

        def segment(at: Any, lanes: int) -> None:
            start = builder.mul(at, SIZE(QUAD * bits))
            whole, floats = vector(BYTE, QUAD * lanes), vector(FLOAT, lanes)
            high: Fields = []
            low: Fields = []
            where: list[Any] = []
            for v in range(bits):
                from_here = builder.add(start, SIZE(v * QUAD * lanes))
                for found, home in ((high, high_codes), (low, low_codes)):
                    found += fields_of(builder, load_at(builder, home, from_here, whole), bits, lanes)
                where += [
                    builder.add(builder.mul(at, SIZE(GROUP)), SIZE((v + bits * j) * QUAD * lanes))
                    for j in range(8 // bits)
                ]
            up, scale, low_scale = filled(INT, lanes, bits), row.scale(at, lanes), row.low(at, lanes)
            place = builder.mul(at, SIZE(4))
            for n in range(inputs):
                values = [load_at(builder, given[n], k, whole) for k in where]
                of_high, of_low = (code_products(builder, found, values, lanes) for found in (high, low))
                of_high = builder.shl(of_high, up)
                own = builder.fmul(scale, load_at(builder, factors[n], place, floats))
                theirs = load_at(builder, totals[n], place, floats)
                row.add(exact[n], builder.sitofp(builder.add(of_high, of_low), floats), own, lanes)
                row.add(rough[n], builder.sitofp(of_high, floats), own, lanes)
                row.add(lows[n], low_scale, theirs, lanes)
                row.add(middles[n], scale, theirs, lanes)

        each_segment(builder, count, segment)
        of_lows = [(low, row.low_unit) for low in lows]
        results = [row.total((total, row.unit), low) for total, low in zip(exact, of_lows, strict=True)]
        results += [
            row.total((total, row.unit), (add, row.times(middle)), low)
            for total, add, low in zip(rough, middles, of_lows, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, results)

    numbers = types.UniTuple(types.float32, 2 * inputs)
    places = types.int64
    return numbers(x, scale, sums, places, many, home, places, places, tail, places, places, width), generate
