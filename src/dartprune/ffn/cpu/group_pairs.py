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
    byte_products,
    data_of,
    each_segment,
    fields_of,
    filled,
    load_at,
    multiply_add,
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
        exact, rough = ([row.sum() for _ in range(inputs)] for _ in range(2))

        def segment(at: Any, lanes: int) -> None:
            start = builder.mul(at, SIZE(QUAD * bits))
            whole, floats = vector(BYTE, QUAD * lanes), vector(FLOAT, lanes)
            high, low = ([filled(INT, lanes, 0)] * inputs for _ in range(2))
            # both halves in turn: so an input's vector is used twice while it is at hand
            for v in range(bits):
                where = builder.add(start, SIZE(v * QUAD * lanes))
                halves = (load_at(builder, codes, where, whole) for codes in (high_codes, low_codes))
                fields = (fields_of(builder, packed, bits, lanes) for packed in halves)
                for j, (of_high, of_low) in enumerate(zip(*fields, strict=True)):
                    place = builder.add(builder.mul(at, SIZE(GROUP)), SIZE((v + bits * j) * QUAD * lanes))
                    for n, part in enumerate(given):
                        values = load_at(builder, part, place, whole)
                        high[n] = byte_products(builder, high[n], of_high, values, lanes)
                        low[n] = byte_products(builder, low[n], of_low, values, lanes)
            high = [builder.shl(total, filled(INT, lanes, bits)) for total in high]
            full = [builder.add(one, other) for one, other in zip(high, low, strict=True)]
            scale, begin_at = row.scale(at, lanes), row.low(at, lanes)
            middle_at = multiply_add(builder, scale, filled(FLOAT, lanes, middle), begin_at)
            place = builder.mul(at, SIZE(4))
            for n in range(inputs):
                own = builder.fmul(scale, load_at(builder, factors[n], place, floats))
                theirs = load_at(builder, totals[n], place, floats)
                for total, codes, base in ((exact[n], full[n], begin_at), (rough[n], high[n], middle_at)):
                    row.add(total, builder.sitofp(codes, floats), own, lanes)
                    row.add(total, base, theirs, lanes)

        each_segment(builder, count, segment)
        results = [row.total(total) for total in exact + rough]
        return context.make_tuple(builder, signature.return_type, results)

    numbers = types.UniTuple(types.float32, 2 * inputs)
    places = types.int64
    return numbers(x, scale, sums, places, many, home, places, places, tail, places, places, width), generate
