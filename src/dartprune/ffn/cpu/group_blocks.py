"""Vector code for Numba over rows of 4 and 8 bits: dot products of bytes, and rows of codes added to an output.

A lane is a group of 32 weights: one instruction multiplies four weights of each of 16 groups with four inputs and adds
them up (`vpdpbusd`); where the processor has none, the same in plain vectors. What is needed next is fetched meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.row_format import GROUP, QUAD, SEGMENTS

LINE = 64  # bytes that memory gives at a time
LEVEL = 2
_BYTE, _INT, _SIZE, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_NATIVE = {16: "512", 8: "256", 4: "128"}


@cache
def native(lanes: int) -> bool:
    """Whether this processor multiplies and adds bytes in vectors of so many lanes."""
    has = binding.get_host_cpu_features()
    if not str(binding.get_process_triple()).startswith(("x86_64", "i686")):
        return False
    return bool(has.get("avx512vnni")) and (lanes == SEGMENTS[0] or bool(has.get("avx512vl")))


def _function(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _vector(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes)


def _all(kind: Any, lanes: int, value: Any) -> Any:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def load_at(builder: Any, base: Any, at: Any, kind: Any) -> Any:
    """The value of a kind that begins `at` bytes behind a byte pointer."""
    return builder.load(builder.bitcast(builder.gep(base, [at]), kind.as_pointer()), align=1)


def _fetch(builder: Any, base: Any, at: Any) -> None:
    _function(builder, "llvm.prefetch.p0", ir.VoidType(), builder.gep(base, [at]), _INT(0), _INT(LEVEL), _INT(1))


def _fetch_all(builder: Any, base: Any, at: Any, count: Any) -> None:
    with cgutils.for_range_slice(builder, _SIZE(0), count, _SIZE(LINE)) as (line, _):
        _fetch(builder, base, builder.add(at, line))


def data_of(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The memory of an array as a byte pointer."""
    return builder.bitcast(context.make_array(kind)(context, builder, value).data, _BYTE.as_pointer())


def byte_products(builder: Any, total: Any, codes: Any, x: Any, lanes: int) -> Any:
    """Total int32 [lanes] plus, in each lane, the products of four unsigned codes with four signed inputs."""
    if native(lanes):
        words = _vector(_INT, lanes)
        name = f"llvm.x86.avx512.vpdpbusd.{_NATIVE[lanes]}"
        return _function(builder, name, words, total, builder.bitcast(codes, words), builder.bitcast(x, words))
    short = _vector(ir.IntType(16), 4 * lanes)
    values = builder.mul(builder.zext(codes, short), builder.sext(x, short))  # 255 * 127 fits into 16 bits
    for width in (4 * lanes, 2 * lanes):
        even, odd = (
            builder.shuffle_vector(values, values, ir.Constant(_vector(_INT, width // 2), list(range(k, width, 2))))
            for k in range(2)
        )
        if width == 4 * lanes:
            wide = _vector(_INT, width // 2)
            even, odd = builder.sext(even, wide), builder.sext(odd, wide)
        values = builder.add(even, odd)
    return builder.add(total, values)


def _word_products(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """Total int32 [16] plus, in each lane, the products of the lower and of the upper halves, signed words."""
    lanes = SEGMENTS[0]
    if native(lanes):
        return _function(builder, "llvm.x86.avx512.vpdpwssd.512", total.type, total, one, other)
    sixteen = _all(_INT, lanes, 16)
    upper = builder.mul(builder.ashr(one, sixteen), builder.ashr(other, sixteen))
    lower = builder.mul(*(builder.ashr(builder.shl(part, sixteen), sixteen) for part in (one, other)))
    return builder.add(total, builder.add(upper, lower))


def _fields(builder: Any, packed: Any, width: int, lanes: int) -> list[Any]:
    """The codes of `width` bits in the bytes of a vector, lowest first."""
    if width == 8:
        return [packed]
    count, words, whole = 4 * lanes, _vector(ir.IntType(16), 2 * lanes), _vector(_BYTE, 4 * lanes)
    mask, out = _all(_BYTE, count, (1 << width) - 1), []
    for shift in range(0, 8, width):
        # there is no shift of bytes: of pairs of bytes, and what comes from the neighbour is masked out
        moved = packed
        if shift:
            pairs = builder.lshr(builder.bitcast(packed, words), _all(ir.IntType(16), 2 * lanes, shift))
            moved = builder.bitcast(pairs, whole)
        out.append(builder.and_(moved, mask))
    return out


def _each_segment(builder: Any, groups: Any, work: Callable[[Any, int], None]) -> None:
    """Emit `work(first group, number of groups)` for each segment of a row, a loop over those of the first size."""
    largest = SEGMENTS[0]
    rest = builder.and_(groups, _SIZE(largest - 1))
    whole = builder.sub(groups, rest)
    with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(largest)) as (first, _):
        work(first, largest)
    for size in SEGMENTS[1:]:
        # the sizes are powers of two: of what remains, each bit is one segment
        present = builder.icmp_unsigned("!=", builder.and_(rest, _SIZE(size)), _SIZE(0))
        before = builder.and_(groups, _SIZE(~(2 * size - 1) & (2**63 - 1)))
        with builder.if_then(present):
            work(before, size)


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
        nothing = _all(_FLOAT, largest, 0.0)
        sums = [cgutils.alloca_once_value(builder, nothing) for _ in range(3 if lows_too else 1)]
        if then is not None:
            home_then = data_of(context, builder, signature.args[10], args[10])
            _fetch_all(builder, home_then, scales_at, builder.add(builder.add(count, count), _SIZE(8)))

        def add(total: Any, one: Any, other: Any, lanes: int) -> None:
            """The products of two vectors, added to the first lanes of a sum."""
            old = builder.load(total)
            if lanes == largest:
                builder.store(_multiply_add(builder, one, other, old), total)
                return
            value = builder.fmul(one, other)
            places = ir.Constant(_vector(_INT, largest), [min(i, lanes) for i in range(largest)])
            zeros = _all(_FLOAT, lanes, 0.0)
            builder.store(builder.fadd(old, builder.shuffle_vector(value, zeros, places)), total)

        def segment(first: Any, lanes: int) -> None:
            begin = builder.add(at, builder.mul(first, _SIZE(QUAD * bits)))
            start = builder.mul(first, _SIZE(GROUP))
            whole = _vector(_BYTE, QUAD * lanes)
            products = [_all(_INT, lanes, 0)] * 2
            for v in range(bits):
                where = builder.add(begin, _SIZE(v * QUAD * lanes))
                if then is not None:
                    _fetch(builder, then, where)
                packed = load_at(builder, bytes_, where, whole)
                for j, field in enumerate(_fields(builder, packed, bits, lanes)):
                    step = v + bits * j
                    values = load_at(builder, inputs, builder.add(start, _SIZE(step * QUAD * lanes)), whole)
                    products[step % 2] = byte_products(builder, products[step % 2], field, values, lanes)
            floats, words = _vector(_FLOAT, lanes), _vector(_INT, lanes)
            place = builder.mul(first, _SIZE(4))
            own = load_at(builder, scales_of, builder.add(scales_at, first), _vector(_BYTE, lanes))
            own = builder.sitofp(builder.zext(own, words), floats)
            dots = builder.sitofp(builder.add(*products), floats)
            add(sums[0], dots, builder.fmul(own, load_at(builder, factors, place, floats)), lanes)
            if lows_too:
                theirs = load_at(builder, totals_of, place, floats)
                low = load_at(builder, scales_of, builder.add(lows_at, first), _vector(_BYTE, lanes))
                add(sums[1], builder.sitofp(builder.sext(low, words), floats), theirs, lanes)
                add(sums[2], own, theirs, lanes)

        _each_segment(builder, count, segment)
        unit, low_unit = (load_at(builder, scales_of, builder.add(floats_at, _SIZE(k)), _FLOAT) for k in (0, 4))
        results = [builder.fmul(_folded(builder, sums[0]), unit)]
        if lows_too:
            results += [
                builder.fmul(_folded(builder, sums[1]), low_unit),
                builder.fmul(_folded(builder, sums[2]), unit),
            ]
        else:
            results += [ir.Constant(_FLOAT, 0.0)] * 2
        return context.make_tuple(builder, signature.return_type, results)

    numbers = types.UniTuple(types.float32, 3)
    places = types.int64
    return numbers(x, scale, sums, home, places, row, places, places, width, full, later_home, later), generate


def _folded(builder: Any, total: Any) -> Any:
    """The sum of a vector's lanes, in one fixed order."""
    lanes = SEGMENTS[0]
    kind = ir.FunctionType(_FLOAT, [_FLOAT, _vector(_FLOAT, lanes)])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{lanes}f32")
    return builder.call(function, [ir.Constant(_FLOAT, -0.0), builder.load(total)], fastmath=("reassoc",))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _function(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


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
        words, floats = _vector(_INT, lanes), _vector(_FLOAT, lanes)
        together = LINE * 8 // bits // GROUP  # groups of one vector of codes
        times = _spread(builder, args[1], floats)
        with cgutils.for_range_slice(builder, _SIZE(0), count, _SIZE(together)) as (first, _):
            start = builder.add(at, builder.mul(first, _SIZE(GROUP * bits // 8)))
            totals = [_all(_INT, lanes, 0)] * (32 // bits)
            for pointer in then:
                _fetch(builder, pointer, start)
            for p, pair in enumerate(pairs):
                both = [load_at(builder, pointer, start, words) for pointer in pair]
                for k, fields in enumerate(_pairs_of_fields(builder, both, bits)):
                    group = builder.add(first, _SIZE(k * lanes // GROUP))
                    place = builder.mul(builder.add(builder.mul(_SIZE(p), count), group), _SIZE(4))
                    share = _spread(builder, load_at(builder, many, place, _INT), words)
                    totals[k] = _word_products(builder, totals[k], fields, share)
            for k, total in enumerate(totals):
                place = builder.add(builder.mul(first, _SIZE(4 * GROUP)), _SIZE(4 * lanes * k))
                value = _multiply_add(builder, builder.sitofp(total, floats), times, load_at(builder, y, place, floats))
                builder.store(value, builder.bitcast(builder.gep(y, [place]), floats.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(out, types.float32, shares, rows, types.int64, types.int64, width, later), generate


def _pairs_of_fields(builder: Any, pair: list[Any], bits: int) -> list[Any]:
    """Words of two rows: in each lane the k-th code of one in the lower half, that of the other in the upper half."""

    def constant(value: int) -> Any:
        return _all(_INT, SEGMENTS[0], value)

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


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = ir.Constant(_vector(_INT, kind.count), [0] * kind.count)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _INT(0)), nothing, first)


@intrinsic
def float_at(context: Any, row: Any, at: Any):
    """The float32 whose four bytes begin at row[at]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_at(builder, data_of(context, builder, signature.args[0], args[0]), args[1], _FLOAT)

    return types.float32(row, types.int64), generate


@intrinsic
def fetch_bytes(context: Any, row: Any, at: Any, count: Any):
    """Ask for the bytes row[at : at + count], without waiting for them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = data_of(context, builder, signature.args[0], args[0])
        _fetch_all(builder, pointer, args[1], args[2])
        return context.get_dummy_value()

    return types.void(row, types.int64, types.int64), generate
