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
    Fields,
    call,
    data_of,
    each_segment,
    fetch,
    fetch_all,
    filled,
    load_at,
    multiply_add,
    rows_of,
    spread,
    vector,
    word_products,
)
from dartprune.ffn.row_format import GROUP, SEGMENTS


def _literals(*kinds: Any) -> bool:
    return all(isinstance(kind, types.IntegerLiteral) for kind in kinds)


@intrinsic(prefer_literal=True)
def add_codes(
    context: Any, out: Any, factor: Any, shares: Any, tail: Any, rows: Any, many: Any, codes: Any, groups: Any,
    width: Any, later: Any,
):  # fmt: skip
    """Out float32 [groups * 32] += factor * (for each row: the share of each group times the codes in it).

    shares: int32 [many / 2, groups] as `prepare_rows` gives them.  tail: uint8 [I, bytes], of which the first `many`
    (a literal, even) of rows int [n] name rows, codes of `width` bits (4 or 8, a literal) lying at
    `codes`.  later: int [n], rows whose codes are asked for meanwhile.
    """
    if not _literals(width, many):
        return None
    bits, count_of_rows, lanes = width.literal_value, many.literal_value, SEGMENTS[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        y, parts = (data_of(context, builder, kinds[i], args[i]) for i in (0, 2))
        given, then = (
            rows_of(context, builder, (kinds[3], kinds[i]), (args[3], args[i]), count_of_rows) for i in (4, 9)
        )
        at, count = args[6], args[7]
        words, floats = vector(INT, lanes), vector(FLOAT, lanes)
        together = LINE * 8 // bits // GROUP  # groups of one vector of codes
        times = spread(builder, args[1], floats)
        left = spread(builder, builder.fmul(args[1], ir.Constant(FLOAT, 2.0**-4)), floats)
        with cgutils.for_range_slice(builder, SIZE(0), count, SIZE(together)) as (first, _):
            start = builder.add(at, builder.mul(first, SIZE(GROUP * bits // 8)))
            totals = [(filled(INT, lanes, 0), times)] * (32 // bits)
            for pointer in then:
                fetch(builder, pointer, start)
            for p in range(0, len(given), 2):
                pair = [load_at(builder, pointer, start, words) for pointer in given[p : p + 2]]
                for k, (field, up) in enumerate(_pairs_of_fields(builder, pair, bits)):
                    group = builder.add(first, SIZE(k * lanes // GROUP))
                    place = builder.mul(builder.add(builder.mul(SIZE(p // 2), count), group), SIZE(4))
                    share = spread(builder, load_at(builder, parts, place, INT), words)
                    totals[k] = word_products(builder, totals[k][0], field, share), left if up else times
            for k, (total, unit) in enumerate(totals):
                place = builder.add(builder.mul(first, SIZE(4 * GROUP)), SIZE(4 * lanes * k))
                value = multiply_add(builder, builder.sitofp(total, floats), unit, load_at(builder, y, place, floats))
                builder.store(value, builder.bitcast(builder.gep(y, [place]), floats.as_pointer()), align=4)
        return context.get_dummy_value()

    places = types.int64
    return types.void(out, types.float32, shares, tail, rows, many, places, places, width, later), generate


@intrinsic(prefer_literal=True)
def prepare_rows(
    context: Any, shares: Any, lows: Any, tail: Any, rows: Any, many: Any, scales: Any, groups: Any, steps: Any,
    factors: Any,
):  # fmt: skip
    """What `add_codes` needs: the rows' shares; and their lows, each row's by its factor, added to lows.

    shares: int32 [many / 2, groups], filled: 16 bits of each row of a pair, those of the second above.  lows: float32
    [groups].  tail, rows, many: as there, scale bytes and low bytes lying at `scales`.  steps: what makes a row's scale
    byte its share, and factors: its low byte its low; float32 [many] each.
    """
    if not _literals(many):
        return None
    count_of_rows = many.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        into, total, first_step, first_factor = (data_of(context, builder, kinds[i], args[i]) for i in (0, 1, 7, 8))
        homes = rows_of(context, builder, (kinds[2], kinds[3]), (args[2], args[3]), count_of_rows)
        count, given = args[6], [builder.gep(home, [args[5]]) for home in homes]
        each, factor = (
            [load_at(builder, begin, SIZE(4 * r), FLOAT) for r in range(count_of_rows)]
            for begin in (first_step, first_factor)
        )

        def segment(first: Any, lanes: int) -> None:
            bytes_, words, floats = vector(BYTE, lanes), vector(INT, lanes), vector(FLOAT, lanes)
            rounded = []
            for row, step in zip(given, each, strict=True):
                value = builder.uitofp(load_at(builder, row, first, bytes_), floats)
                value = builder.fmul(value, spread(builder, step, floats))
                rounded.append(builder.fptosi(call(builder, f"llvm.rint.v{lanes}f32", floats, value), words))
            place = builder.mul(first, SIZE(4))
            for p in range(0, len(rounded), 2):
                one, other = rounded[p : p + 2]
                pair = builder.or_(
                    builder.and_(one, filled(INT, lanes, 0xFFFF)), builder.shl(other, filled(INT, lanes, 16))
                )
                where = builder.add(builder.mul(SIZE(p // 2), builder.mul(count, SIZE(4))), place)
                builder.store(pair, builder.bitcast(builder.gep(into, [where]), words.as_pointer()), align=4)
            found = load_at(builder, total, place, floats)
            for row, low in zip(given, factor, strict=True):
                value = builder.sitofp(load_at(builder, row, builder.add(count, first), bytes_), floats)
                found = multiply_add(builder, value, spread(builder, low, floats), found)
            builder.store(found, builder.bitcast(builder.gep(total, [place]), floats.as_pointer()), align=4)

        each_segment(builder, count, segment)
        return context.get_dummy_value()

    places = types.int64
    return types.void(shares, lows, tail, rows, many, places, places, steps, factors), generate


def _pairs_of_fields(builder: Any, pair: list[Any], bits: int) -> Fields:
    """Words of two rows: in each lane the k-th code of one in the lower half, that of the other in the upper half.

    Of 4 bits, every second is left where it is.
    """

    def constant(value: int) -> Any:
        return filled(INT, SEGMENTS[0], value)

    one, other = pair
    lower, upper, sixteen = constant(0x0000FFFF), constant(0xFFFF0000), constant(16)
    halves = [
        builder.or_(builder.and_(one, lower), builder.shl(other, sixteen)),
        builder.or_(builder.lshr(one, sixteen), builder.and_(other, upper)),
    ]
    mask, places = (1 << bits) - 1, (0,) if bits == 8 else (0, 4)
    return [
        (builder.and_(builder.lshr(half, constant(by)) if by else half, constant((mask << 16 | mask) << up)), up)
        for half in halves
        for by in (0, 8)
        for up in places
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
