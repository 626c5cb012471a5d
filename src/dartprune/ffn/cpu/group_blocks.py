"""Vector code for Numba over rows of 4 and 8 bits: dot products of bytes, and rows of codes added to an output.

What is needed next is fetched meanwhile.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.cpu.group_vectors import (
    BYTE,
    FLOAT,
    INT,
    LINE,
    SIZE,
    call,
    data_of,
    each_segment,
    fetch,
    fetch_all,
    filled,
    load_at,
    multiply_add,
    spread,
    vector,
    word_products,
)
from dartprune.ffn.row_format import GROUP, SEGMENTS


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


@intrinsic(prefer_literal=True)
def prepare_rows(context: Any, shares: Any, lows: Any, rows: Any, scales: Any, groups: Any, steps: Any, factors: Any):
    """What `add_codes` needs of one or four rows: their shares; and the rows' lows, each by its factor, added to lows.

    shares: int32 [pairs, groups], filled.  lows: float32 [groups].  rows: tuple of uint8 [bytes], whose scale bytes and
    low bytes lie at `scales`.  steps: of each row, what makes a scale byte its share; factors: what makes a low byte
    its low; float32 each.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, total = (data_of(context, builder, signature.args[i], args[i]) for i in (0, 1))
        count = args[4]
        given = [
            builder.gep(data_of(context, builder, kind, builder.extract_value(args[2], r)), [args[3]])
            for r, kind in enumerate(signature.args[2])
        ]
        each, factor = ([builder.extract_value(args[i], r) for r in range(len(given))] for i in (5, 6))

        def segment(first: Any, lanes: int) -> None:
            bytes_, words, floats = vector(BYTE, lanes), vector(INT, lanes), vector(FLOAT, lanes)
            rounded = []
            for row, step in zip(given, each, strict=True):
                value = builder.uitofp(load_at(builder, row, first, bytes_), floats)
                value = builder.fmul(value, spread(builder, step, floats))
                rounded.append(builder.fptosi(call(builder, f"llvm.rint.v{lanes}f32", floats, value), words))
            place = builder.mul(first, SIZE(4))
            for p in range(0, len(rounded), 2):
                pair = builder.and_(rounded[p], filled(INT, lanes, 0xFFFF))
                if p + 1 < len(rounded):
                    pair = builder.or_(pair, builder.shl(rounded[p + 1], filled(INT, lanes, 16)))
                where = builder.add(builder.mul(SIZE(p // 2), builder.mul(count, SIZE(4))), place)
                builder.store(pair, builder.bitcast(builder.gep(into, [where]), words.as_pointer()), align=4)
            found = load_at(builder, total, place, floats)
            for row, low in zip(given, factor, strict=True):
                value = builder.sitofp(load_at(builder, row, builder.add(count, first), bytes_), floats)
                found = multiply_add(builder, value, spread(builder, low, floats), found)
            builder.store(found, builder.bitcast(builder.gep(total, [place]), floats.as_pointer()), align=4)

        each_segment(builder, count, segment)
        return context.get_dummy_value()

    return types.void(shares, lows, rows, types.int64, types.int64, steps, factors), generate


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
