"""Vector code for Numba over rows of 4 and 8 bits: dot products of bytes, and rows of codes added to an output.

What is needed next is fetched meanwhile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.cpu.group_vectors import (
    BYTE,
    FLOAT,
    INT,
    LINE,
    SIZE,
    byte_products,
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
    word_products,
)
from dartprune.ffn.row_format import GROUP, QUAD, SEGMENTS


@intrinsic(prefer_literal=True)
def row_parts(
    context: Any,
    x: Any,
    scale: Any,
    sums: Any,
    home: Any,
    scales: Any,
    row: Any,
    codes: Any,
    groups: Any,
    width: Any,
    full: Any,
    later_home: Any,
    later: Any,
):
    """Dot products of one row's codes of `width` bits (a literal) with an input, four numbers of float32.

    x int8 [groups * 32], scale and sums float32 [groups]: the input as `group_inputs` rounds it. The row's codes lie at
    row[codes:], its scale bytes, low bytes and two floats at home[scales:]. The same of another row, at later and
    later_home, is asked for meanwhile, unless these are None.

    Returns, with s the row's scales (bytes times the first float) and l its lows: the sum of s * scale * (codes . x)
    over the groups; with `full` (a literal) also the sum of l * sums, and of s * sums; else 0 for these two.
    """
    if not isinstance(width, types.IntegerLiteral) or not isinstance(full, types.IntegerLiteral):
        return None
    bits, lows_too = width.literal_value, bool(full.literal_value)
    largest = SEGMENTS[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, factors, totals_of, scales_of, bytes_ = (
            data_of(context, builder, signature.args[i], args[i]) for i in (0, 1, 2, 3, 5)
        )
        then = None if signature.args[11] == types.none else data_of(context, builder, signature.args[11], args[11])
        scales_at, at, count = args[4], args[6], args[7]
        lows_at = builder.add(scales_at, count)
        floats_at = builder.add(lows_at, count)
        nothing = filled(FLOAT, largest, 0.0)
        sums = [cgutils.alloca_once_value(builder, nothing) for _ in range(3 if lows_too else 1)]
        if then is not None:
            home_then = data_of(context, builder, signature.args[10], args[10])
            fetch_all(builder, home_then, scales_at, builder.add(builder.add(count, count), SIZE(8)))

        def add(total: Any, one: Any, other: Any, lanes: int) -> None:
            """The products of two vectors, added to the first lanes of a sum."""
            old = builder.load(total)
            if lanes == largest:
                builder.store(multiply_add(builder, one, other, old), total)
                return
            value = builder.fmul(one, other)
            places = ir.Constant(vector(INT, largest), [min(i, lanes) for i in range(largest)])
            zeros = filled(FLOAT, lanes, 0.0)
            builder.store(builder.fadd(old, builder.shuffle_vector(value, zeros, places)), total)

        def segment(first: Any, lanes: int) -> None:
            begin = builder.add(at, builder.mul(first, SIZE(QUAD * bits)))
            start = builder.mul(first, SIZE(GROUP))
            whole = vector(BYTE, QUAD * lanes)
            products = [filled(INT, lanes, 0)] * 2
            for v in range(bits):
                where = builder.add(begin, SIZE(v * QUAD * lanes))
                if then is not None:
                    fetch(builder, then, where)
                packed = load_at(builder, bytes_, where, whole)
                for j, field in enumerate(fields_of(builder, packed, bits, lanes)):
                    step = v + bits * j
                    values = load_at(builder, inputs, builder.add(start, SIZE(step * QUAD * lanes)), whole)
                    products[step % 2] = byte_products(builder, products[step % 2], field, values, lanes)
            floats, words = vector(FLOAT, lanes), vector(INT, lanes)
            place = builder.mul(first, SIZE(4))
            own = load_at(builder, scales_of, builder.add(scales_at, first), vector(BYTE, lanes))
            own = builder.sitofp(builder.zext(own, words), floats)
            dots = builder.sitofp(builder.add(*products), floats)
            add(sums[0], dots, builder.fmul(own, load_at(builder, factors, place, floats)), lanes)
            if lows_too:
                theirs = load_at(builder, totals_of, place, floats)
                low = load_at(builder, scales_of, builder.add(lows_at, first), vector(BYTE, lanes))
                add(sums[1], builder.sitofp(builder.sext(low, words), floats), theirs, lanes)
                add(sums[2], own, theirs, lanes)

        each_segment(builder, count, segment)
        unit, low_unit = (load_at(builder, scales_of, builder.add(floats_at, SIZE(k)), FLOAT) for k in (0, 4))
        results = [builder.fmul(folded(builder, builder.load(sums[0])), unit)]
        if lows_too:
            results += [
                builder.fmul(folded(builder, builder.load(sums[1])), low_unit),
                builder.fmul(folded(builder, builder.load(sums[2])), unit),
            ]
        else:
            results += [ir.Constant(FLOAT, 0.0)] * 2
        return context.make_tuple(builder, signature.return_type, results)

    numbers = types.UniTuple(types.float32, 3)
    places = types.int64
    return numbers(x, scale, sums, home, places, row, places, places, width, full, later_home, later), generate


@intrinsic(prefer_literal=True)
def add_codes(
    context: Any, out: Any, factor: Any, shares: Any, rows: Any, codes: Any, groups: Any, width: Any, later: Any
):
    """Out float32 [groups * 32] += factor * (for each row: the share of each group times the codes in it).

    shares: int32 [pairs, groups], 16 bits of each row of a pair, those of the second in the upper half.
    rows: tuple of uint8 [bytes], one or an even number, codes of `width` bits (4 or 8, a literal) lying at `codes`.
    later: tuple of rows whose codes are asked for meanwhile.
    """
    if not isinstance(width, types.IntegerLiteral):
        return None
    bits = width.literal_value
    lanes = SEGMENTS[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, many = (
            data_of(context, builder, signature.args[0], args[0]),
            data_of(context, builder, signature.args[2], args[2]),
        )
        given = [
            data_of(context, builder, kind, builder.extract_value(args[3], r))
            for r, kind in enumerate(signature.args[3])
        ]
        pairs = [given[r : r + 2] for r in range(0, len(given), 2)]
        then = [
            data_of(context, builder, kind, builder.extract_value(args[7], r))
            for r, kind in enumerate(signature.args[7])
        ]
        at, count = args[4], args[5]
        words, floats = vector(INT, lanes), vector(FLOAT, lanes)
        together = LINE * 8 // bits // GROUP  # groups of one vector of codes
        times = spread(builder, args[1], floats)
        with cgutils.for_range_slice(builder, SIZE(0), count, SIZE(together)) as (first, _):
            start = builder.add(at, builder.mul(first, SIZE(GROUP * bits // 8)))
            totals = [filled(INT, lanes, 0)] * (32 // bits)
            for pointer in then:
                fetch(builder, pointer, start)
            for p, pair in enumerate(pairs):
                both = [load_at(builder, pointer, start, words) for pointer in pair]
                for k, fields in enumerate(_pairs_of_fields(builder, both, bits)):
                    group = builder.add(first, SIZE(k * lanes // GROUP))
                    place = builder.mul(builder.add(builder.mul(SIZE(p), count), group), SIZE(4))
                    share = spread(builder, load_at(builder, many, place, INT), words)
                    totals[k] = word_products(builder, totals[k], fields, share)
            for k, total in enumerate(totals):
                place = builder.add(builder.mul(first, SIZE(4 * GROUP)), SIZE(4 * lanes * k))
                value = multiply_add(builder, builder.sitofp(total, floats), times, load_at(builder, y, place, floats))
                builder.store(value, builder.bitcast(builder.gep(y, [place]), floats.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(out, types.float32, shares, rows, types.int64, types.int64, width, later), generate


def _pairs_of_fields(builder: Any, pair: list[Any], bits: int) -> list[Any]:
    """Words of two rows: in each lane the k-th code of one in the lower half, that of the other in the upper half."""

    def constant(value: int) -> Any:
        return filled(INT, SEGMENTS[0], value)

    lower, upper = constant(0x0000FFFF), constant(0xFFFF0000)
    sixteen = constant(16)
    if len(pair) == 1:
        halves = [builder.and_(pair[0], lower), builder.lshr(pair[0], sixteen)]
    else:
        one, other = pair
        halves = [
            builder.or_(builder.and_(one, lower), builder.shl(other, sixteen)),
            builder.or_(builder.lshr(one, sixteen), builder.and_(other, upper)),
        ]
    mask = (1 << bits) - 1
    both = constant(mask << 16 | mask)
    return [
        builder.and_(builder.lshr(half, constant(shift)) if shift else half, both)
        for half in halves
        for shift in range(0, 16, bits)
    ]


@intrinsic
def float_at(context: Any, row: Any, at: Any):
    """The float32 whose four bytes begin at row[at]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_at(builder, data_of(context, builder, signature.args[0], args[0]), args[1], FLOAT)

    return types.float32(row, types.int64), generate


@intrinsic
def fetch_bytes(context: Any, row: Any, at: Any, count: Any):
    """Ask for the bytes row[at : at + count], without waiting for them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = data_of(context, builder, signature.args[0], args[0])
        fetch_all(builder, pointer, args[1], args[2])
        return context.get_dummy_value()

    return types.void(row, types.int64, types.int64), generate
