"""Vector code for Numba: several weight rows against several inputs at once, while the rows that come next are fetched.

Written as LLVM vectors of 16 floats, which every target splits into the registers it has. Numba's own vectoriser finds
the same instructions but not the order: rows lie far apart, the hardware's prefetcher starts anew at each of them,
and a core that waits for memory row by row reaches a third of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # floats of one vector
STEP = 2 * LANES  # weights of each row that one turn of the loop takes
LINE = 64  # bytes that memory gives at a time
LEVEL = 2  # fetch into the second cache: a block of eight rows would flood the first
AGAIN = 512  # bytes ahead in a row itself that are asked for once more: a busy processor drops what it is asked for

_BYTES = {types.int8: 1, types.uint16: 2, types.int16: 2, types.float32: 4}
_FLOAT, _SIZE = ir.FloatType(), ir.IntType(64)
_STORED = {types.int8: ir.IntType(8), types.uint16: ir.IntType(16), types.int16: ir.HalfType(), types.float32: _FLOAT}
_VECTOR = ir.VectorType(_FLOAT, LANES)
_WORD, _WORDS = ir.IntType(64), ir.VectorType(ir.IntType(64), 8)  # of bit planes
# whether the processor counts the bits of eight words at once: then a row's last words are a vector that is not full
_COUNTS_VECTORS = bool(get_host_cpu_features().get("avx512vpopcntdq"))
_AHEAD = 4096  # bytes between the planes that are counted and those that are fetched


def _call(builder: Any, name: str, result: Any, *args: Any, flags: tuple[str, ...] = ()) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args, fastmath=flags)


def _like(kind: Any, scalar: Any) -> Any:
    return ir.VectorType(scalar, kind.count) if isinstance(kind, ir.VectorType) else scalar


def _weights(builder: Any, words: Any, row: Any, at: Any, kind: Any) -> Any:
    """row[at], or the vector that begins there, as float32: uint16 holds bf16, int16 fp16, int8 whole numbers."""
    stored = _STORED[words]
    place = builder.bitcast(builder.gep(row, [at]), _like(kind, stored).as_pointer())
    value = builder.load(place, align=_BYTES[words])
    if words == types.int16:
        return builder.fpext(value, kind)
    if words == types.int8:
        return builder.sitofp(value, kind)
    if words == types.uint16:
        wide = _like(kind, ir.IntType(32))
        sixteen = ir.Constant(wide, [16] * LANES if kind is _VECTOR else 16)
        return builder.bitcast(builder.shl(builder.zext(value, wide), sixteen), kind)
    return value


def _multiply_add(builder: Any, a: Any, b: Any, c: Any, kind: Any) -> Any:
    name = f"llvm.fmuladd.v{LANES}f32" if kind is _VECTOR else "llvm.fmuladd.f32"
    return _call(builder, name, kind, a, b, c)


def _fetch(builder: Any, words: Any, later: Sequence[Any], rows: Sequence[Any], at: Any) -> None:
    """Ask for what lies at row[at : at + STEP] of each later row, and again for what comes in those that are read."""
    size = _BYTES[words]
    for group, ahead in ((later, 0), (rows, AGAIN // size)):
        for row in group:
            for first in range(ahead, ahead + STEP, LINE // size):
                _prefetch(builder, row, builder.add(at, _SIZE(first)))


def _prefetch(builder: Any, row: Any, at: Any) -> None:
    hint = ir.IntType(32)
    place = builder.bitcast(builder.gep(row, [at]), ir.IntType(8).as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, hint(0), hint(LEVEL), hint(1))


def _pointers(context: Any, builder: Any, kind: Any, rows: Any) -> list[Any]:
    arrays = [builder.extract_value(rows, i) for i in range(len(kind))]
    return [context.make_array(part)(context, builder, array).data for part, array in zip(kind, arrays, strict=True)]


def _length(context: Any, builder: Any, kind: Any, rows: Any, step: int) -> tuple[Any, Any]:
    """Length of the first row, and how much of it whole steps cover."""
    array = context.make_array(kind[0])(context, builder, builder.extract_value(rows, 0))
    length = builder.extract_value(array.shape, 0)
    return length, builder.sub(length, builder.urem(length, _SIZE(step)))


def _fits(floats: Any, rows: Any, ahead: Any) -> bool:
    stored = {row.dtype for row in (*rows, *ahead)}
    return all(row.dtype == types.float32 for row in floats) and len(stored) == 1 and stored <= set(_BYTES)


def _folded(builder: Any, vector: Any) -> Any:
    """The sum of a vector's floats: its halves are added until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = [
            ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes))) for first in (0, lanes)
        ]
        low, high = (builder.shuffle_vector(vector, vector, half) for half in halves)
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.IntType(32)(0))


@intrinsic
def dots(context: Any, inputs: Any, rows: Any, ahead: Any) -> Any:
    """Dot products of weight rows with inputs, in float32; `ahead`, rows that are needed next, are fetched meanwhile.

    Each is a tuple of contiguous arrays [H]: inputs float32, rows and ahead in a weight's words. A weight is widened
    once for all inputs. Returns a tuple: row 0 with each input, row 1 with each input, and so on. Each sum is made in
    one order, whatever the numbers of rows and inputs.
    """
    if not _fits(inputs, rows, ahead):
        return None
    words, many = rows[0].dtype, len(inputs)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, w, later = (_pointers(context, builder, kind, arg) for kind, arg in zip(signature.args, args, strict=True))
        length, whole = _length(context, builder, signature.args[0], args[0], STEP)
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(len(w) * many)]
        with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(STEP)) as (at, _):
            _fetch(builder, words, later, w, at)
            for half in range(2):
                place = builder.add(at, _SIZE(half * LANES))
                values = [_weights(builder, types.float32, pointer, place, _VECTOR) for pointer in x]
                for r, row in enumerate(w):
                    weight = _weights(builder, words, row, place, _VECTOR)
                    for n, value in enumerate(values):
                        total = sums[r * many + n][half]
                        builder.store(_multiply_add(builder, weight, value, builder.load(total), _VECTOR), total)
        results = []
        for one, other in sums:
            folded = _folded(builder, builder.fadd(builder.load(one), builder.load(other)))
            results.append(cgutils.alloca_once_value(builder, folded))
        with cgutils.for_range_slice(builder, whole, length, _SIZE(1)) as (at, _):
            values = [_weights(builder, types.float32, pointer, at, _FLOAT) for pointer in x]
            for r, row in enumerate(w):
                weight = _weights(builder, words, row, at, _FLOAT)
                for n, value in enumerate(values):
                    total = results[r * many + n]
                    builder.store(_multiply_add(builder, weight, value, builder.load(total), _FLOAT), total)
        return context.make_tuple(builder, signature.return_type, [builder.load(total) for total in results])

    return types.UniTuple(types.float32, len(rows) * many)(inputs, rows, ahead), generate


@intrinsic
def add_rows(context: Any, outputs: Any, scales: Any, rows: Any, ahead: Any) -> Any:
    """Add scaled weight rows to outputs in place; `ahead`, rows that are needed next, are fetched meanwhile.

    outputs: tuple of float32 arrays [H]; scales: float32, in the order in which `dots` returns; rows, ahead: as there.
    """
    if not _fits(outputs, rows, ahead) or len(scales) != len(rows) * len(outputs):
        return None
    words, many = rows[0].dtype, len(outputs)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, _, w, later = signature.args
        y = _pointers(context, builder, into, args[0])
        w, later = _pointers(context, builder, w, args[2]), _pointers(context, builder, later, args[3])
        length, whole = _length(context, builder, into, args[0], STEP)
        single = [builder.extract_value(args[1], i) for i in range(len(scales))]
        nothing, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_like(_VECTOR, ir.IntType(32)), [0] * LANES)
        spread = [
            builder.shuffle_vector(builder.insert_element(nothing, value, ir.IntType(32)(0)), nothing, first)
            for value in single
        ]

        def add(at: Any, kind: Any, factors: list[Any]) -> None:
            weights = [_weights(builder, words, row, at, kind) for row in w]
            for n, pointer in enumerate(y):
                place = builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer())
                total = builder.load(place, align=4)
                for r, weight in enumerate(weights):
                    total = _multiply_add(builder, weight, factors[r * many + n], total, kind)
                builder.store(total, place, align=4)

        with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(STEP)) as (at, _):
            _fetch(builder, words, later, w, at)
            for half in range(2):
                add(builder.add(at, _SIZE(half * LANES)), _VECTOR, spread)
        with cgutils.for_range_slice(builder, whole, length, _SIZE(1)) as (at, _):
            add(at, _FLOAT, single)
        return context.get_dummy_value()

    return types.void(outputs, scales, rows, ahead), generate


def _first(builder: Any, many: Any) -> Any:
    """Of the lanes of a vector of words the first `many`, as bits."""
    nothing, first = ir.Constant(_WORDS, ir.Undefined), ir.Constant(_like(_WORDS, ir.IntType(32)), [0] * _WORDS.count)
    spread = builder.shuffle_vector(builder.insert_element(nothing, many, ir.IntType(32)(0)), nothing, first)
    return builder.icmp_unsigned("<", ir.Constant(_WORDS, list(range(_WORDS.count))), spread)


@intrinsic
def common_ones(context: Any, rows: Any, planes: Any) -> Any:
    """Bits that each row has in common with the planes: the sum of w_p * popcount(row AND plane p).

    Tuples of contiguous int64 arrays [words]. One plane has the weight 1; of several, plane p has 2^p and the last one
    -2^p (two's complement). Returns a tuple of int64, one for each row. What lies 4 KB behind each row is fetched
    meanwhile: rows are read in the order in which they lie.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        length, whole = _length(context, builder, signature.args[0], args[0], _WORDS.count)
        left, right = (_pointers(context, builder, kind, arg) for kind, arg in zip(signature.args, args, strict=True))

        def load(pointer: Any, at: Any, kind: Any, lanes: Any) -> Any:
            place = builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer())
            if lanes is None:
                return builder.load(place, align=8)
            zeros = ir.Constant(kind, [0] * kind.count)
            return _call(builder, "llvm.masked.load.v8i64.p0", kind, place, ir.IntType(32)(8), lanes, zeros)

        def count(sums: list[list[Any]], at: Any, kind: Any, lanes: Any = None) -> None:
            words = [load(pointer, at, kind, lanes) for pointer in left]
            for p, pointer in enumerate(right):
                plane = load(pointer, at, kind, lanes)
                for r, word in enumerate(words):
                    ones = _call(
                        builder, "llvm.ctpop." + ("v8i64" if kind is _WORDS else "i64"), kind, builder.and_(word, plane)
                    )
                    builder.store(builder.add(builder.load(sums[r][p]), ones), sums[r][p])

        def weighed(totals: list[Any]) -> Any:
            result = builder.load(totals[0])
            for p, total in enumerate(totals[1:], start=1):
                value = builder.load(total)
                places = ir.Constant(value.type, [p] * value.type.count if value.type is _WORDS else p)
                change = builder.sub if p == len(totals) - 1 else builder.add
                result = change(result, builder.shl(value, places))
            return result

        vectors, scalars = (
            [[cgutils.alloca_once_value(builder, zero) for _ in right] for _ in left]
            for zero in (ir.Constant(_WORDS, [0] * _WORDS.count), ir.Constant(_WORD, 0))
        )
        with cgutils.for_range_slice(builder, _WORD(0), whole, _WORD(_WORDS.count)) as (at, _):
            for pointer in left:
                _prefetch(builder, pointer, builder.add(at, _WORD(_AHEAD // 8)))
            count(vectors, at, _WORDS)
        if _COUNTS_VECTORS:  # one word alone is quicker by itself
            rest = builder.sub(length, whole)
            several = builder.icmp_unsigned("<", _WORD(1), rest)
            with builder.if_then(several):
                count(vectors, whole, _WORDS, _first(builder, rest))
            whole = builder.select(several, length, whole)
        with cgutils.for_range_slice(builder, whole, length, _WORD(1)) as (at, _):
            count(scalars, at, _WORD)
        results = [
            builder.add(_call(builder, "llvm.vector.reduce.add.v8i64", _WORD, weighed(vector)), weighed(scalar))
            for vector, scalar in zip(vectors, scalars, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(types.int64, len(rows))(rows, planes), generate


@intrinsic
def float_of(context: Any, word: Any) -> Any:
    """The float32 that a word stands for: uint16 holds bf16, int16 fp16; a float32 is one already."""
    if word not in (types.uint16, types.int16, types.float32):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if word == types.float32:
            return args[0]
        if word == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _FLOAT)
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.IntType(32)(16)), _FLOAT)

    return types.float32(word), generate


@intrinsic
def word_of(context: Any, value: Any, like: Any) -> Any:
    """The word nearest to a float32, ties to even, of the kind of `like`; itself if that is a float32."""
    if value != types.float32 or like not in (types.uint16, types.int16, types.float32):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.float32:
            return args[0]
        number, short = ir.IntType(32), ir.IntType(16)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), short)
        bits = builder.bitcast(args[0], number)
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, number(0x7FFF))), number(16))
        # a NaN must not be rounded up to an infinity
        quiet = builder.or_(builder.lshr(bits, number(16)), number(0x40))
        exact = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(exact, quiet, rounded), short)

    return like(value, like), generate
