"""The sketch for many rows at once: bit planes spread into bytes, and products of bytes in place of bits in common.

Spreading costs about what a few rows do, so one row alone goes by its bits. The integers are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.cpu.group_vectors import byte_products, data_of, load_at, native
from dartprune.ffn.cpu.lean import lean

WORD = 64  # bits of a word of a plane, which become as many bytes
TILE = 4  # neurons, and rows, whose products are made side by side
FEWEST = 4 if native(16) else 1 << 30  # rows from which on bytes are the faster way
LANES = 16  # numbers of 32 bits in a vector
_BYTE, _INT, _SIZE = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES, _SUMS = ir.VectorType(_BYTE, WORD), ir.VectorType(_INT, LANES)


def _every(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of one value."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, kind.count), [0] * kind.count))


@intrinsic
def add_bits(context: Any, plane: Any, weight: Any, out: Any) -> Any:
    """Add `weight` to each byte of out [words * 64] whose bit is set in plane int64 [words]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, words = data_of(context, builder, signature.args[0], args[0]), context.make_array(signature.args[0])
        to = data_of(context, builder, signature.args[2], args[2])
        count = builder.extract_value(words(context, builder, args[0]).shape, 0)
        every = _every(builder, builder.trunc(args[1], _BYTE), _BYTES)
        with cgutils.for_range(builder, count) as loop:
            word = load_at(builder, bits, builder.mul(loop.index, _SIZE(WORD // 8)), _SIZE)
            is_set = builder.bitcast(word, ir.VectorType(ir.IntType(1), WORD))
            place = builder.bitcast(builder.gep(to, [builder.mul(loop.index, _SIZE(WORD))]), _BYTES.as_pointer())
            more = builder.select(is_set, every, ir.Constant(_BYTES, [0] * WORD))
            builder.store(builder.add(builder.load(place, align=1), more), place, align=1)
        return context.get_dummy_value()

    return types.void(plane, weight, out), generate


@intrinsic
def bits_of(context: Any, row: Any, word: Any, bit: Any) -> Any:
    """The bits of one place in the 64 bytes that belong to a word of a plane, int64; row [words * 64]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.mul(args[1], _SIZE(WORD))
        values = load_at(builder, data_of(context, builder, signature.args[0], args[0]), at, _BYTES)
        mask = _every(builder, builder.shl(_BYTE(1), builder.trunc(args[2], _BYTE)), _BYTES)
        is_set = builder.icmp_unsigned("!=", builder.and_(values, mask), ir.Constant(_BYTES, [0] * WORD))
        return builder.bitcast(is_set, _SIZE)

    return types.int64(row, types.int64, types.int64), generate


@intrinsic
def byte_dots(context: Any, codes: Any, inputs: Any) -> Any:
    """Products of each of the codes with each of the inputs: a tuple of int32, the inputs of the first codes first.

    Tuples of contiguous arrays of bytes [words * 64]: codes unsigned, inputs signed.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right = (
            [data_of(context, builder, kind, builder.extract_value(arg, n)) for n, kind in enumerate(kinds)]
            for kinds, arg in zip(signature.args, args, strict=True)
        )
        shape = context.make_array(signature.args[0][0])(context, builder, builder.extract_value(args[0], 0)).shape
        length = builder.extract_value(shape, 0)
        zero = ir.Constant(_SUMS, [0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in right] for _ in left]
        with cgutils.for_range_slice(builder, _SIZE(0), length, _SIZE(WORD)) as (at, _):
            values = [load_at(builder, pointer, at, _BYTES) for pointer in right]
            for row, pointer in zip(sums, left, strict=True):
                code = load_at(builder, pointer, at, _BYTES)
                for total, value in zip(row, values, strict=True):
                    builder.store(byte_products(builder, builder.load(total), code, value, LANES), total)
        kind = ir.FunctionType(_INT, [_SUMS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32")
        results = [builder.call(reduce, [builder.load(total)]) for row in sums for total in row]
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(types.int32, len(codes) * len(inputs))(codes, inputs), generate


@intrinsic
def add_looked_up(
    context: Any, columns: Any, starts: Any, bits: Any, base: Any, tables: Any, table: Any, out: Any, at: Any
) -> Any:
    """Add sums of table entries to the 16 numbers of out float32 that begin `at`.

    Flat arrays, and where in them what is meant begins: four columns of uint8, whose k-th bits side by side tell an
    entry of a table of 16 float32; `base` plus 2^(k + 1) times that for each k, in turn.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, entries, to = (data_of(context, builder, signature.args[k], args[k]) for k in (0, 4, 6))
        narrow, floats = ir.VectorType(_BYTE, LANES), ir.VectorType(ir.FloatType(), LANES)
        every = partial(_every, builder)

        def looked_up(entry: Any) -> Any:
            first = builder.mul(args[5], _SIZE(4))
            if native(LANES):
                kind = ir.FunctionType(floats, [floats, _SUMS])
                permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
                return builder.call(permute, [load_at(builder, entries, first, floats), entry])
            values = ir.Constant(floats, ir.Undefined)
            for lane in range(LANES):
                offset = builder.mul(builder.zext(builder.extract_element(entry, _INT(lane)), _SIZE), _SIZE(4))
                value = load_at(builder, entries, builder.add(first, offset), ir.FloatType())
                values = builder.insert_element(values, value, _INT(lane))
            return values

        found = [
            builder.zext(load_at(builder, codes, builder.extract_value(args[1], o), narrow), _SUMS) for o in range(4)
        ]
        total = cgutils.alloca_once_value(builder, every(args[3], floats))
        with cgutils.for_range(builder, args[2]) as loop:
            shift = every(builder.trunc(loop.index, _INT), _SUMS)
            entry = ir.Constant(_SUMS, [0] * LANES)
            for o, code in enumerate(found):
                bit = builder.and_(builder.lshr(code, shift), ir.Constant(_SUMS, [1] * LANES))
                entry = builder.or_(entry, builder.shl(bit, ir.Constant(_SUMS, [o] * LANES)))
            factor = builder.uitofp(builder.shl(ir.Constant(_SUMS, [2] * LANES), shift), floats)
            builder.store(builder.fadd(builder.load(total), builder.fmul(factor, looked_up(entry))), total)
        place = builder.bitcast(builder.gep(to, [builder.mul(args[7], _SIZE(4))]), floats.as_pointer())
        builder.store(builder.fadd(builder.load(place, align=4), builder.load(total)), place, align=4)
        return context.get_dummy_value()

    counts = types.UniTuple(types.int64, 4), types.int64, types.float32
    return types.void(columns, *counts, tables, types.int64, out, types.int64), generate


@njit(nogil=True)
def outlier_columns(place, width):
    """The columns that any row keeps exact, int64 [U], and which of them each does, int64 [N, K]; place [N, K].

    width: columns that there are; 0 where the weights go by their bits, and none is needed.
    """
    if not width:
        return np.empty(0, np.int64), np.empty(place.shape, np.int64)
    number = np.full(width, -1, np.int64)
    columns, which = np.empty(place.size, np.int64), np.empty(place.shape, np.int64)
    found = 0
    for n in range(place.shape[0]):
        for o in range(place.shape[1]):
            j = place[n, o]
            if number[j] < 0:
                number[j], columns[found] = found, j
                found += 1
            which[n, o] = number[j]
    return columns[:found].copy(), which


@njit(nogil=True)
def input_bytes(planes):
    """Rows of planes int64 [N, A, words] as int8 [N, words * 64]; none where so few rows go by their bits."""
    rows, bits, words = planes.shape
    if rows < FEWEST:
        return np.empty((0, 0), np.int8)
    out = np.zeros((rows, words * WORD), np.int8)
    for n in range(rows):
        for p in range(bits):
            add_bits(planes[n, p], -(1 << p) if p == bits - 1 else 1 << p, out[n])
    return out


@lean()
def integers_by_bytes(first, last, planes, x, total, codes, out):
    """`sketch.sketch_integers` of the neurons first:last and all rows, to out int32 [N, last - first or more].

    planes int64 [I, b, words]; x int8 [N, words * 64]; total int32 [N]; codes uint8 [last - first or more, words * 64]:
    room, in which the neurons' codes are left.
    """
    bits, size, rows = planes.shape[1], last - first, x.shape[0]
    top = 2**bits - 1
    for i in range(size):
        codes[i] = 0
        for k in range(bits):
            add_bits(planes[first + i, k], 1 << k, codes[i])
    for i in range(0, size, TILE):
        i1, i2, i3 = min(i + 1, size - 1), min(i + 2, size - 1), min(i + 3, size - 1)
        four = codes[i], codes[i1], codes[i2], codes[i3]
        for n in range(0, rows, TILE):
            n1, n2, n3 = min(n + 1, rows - 1), min(n + 2, rows - 1), min(n + 3, rows - 1)
            d = byte_dots(four, (x[n], x[n1], x[n2], x[n3]))
            # what is beyond the end is the last one once more
            out[n, i], out[n1, i], out[n2, i], out[n3, i] = d[0], d[1], d[2], d[3]
            out[n, i1], out[n1, i1], out[n2, i1], out[n3, i1] = d[4], d[5], d[6], d[7]
            out[n, i2], out[n1, i2], out[n2, i2], out[n3, i2] = d[8], d[9], d[10], d[11]
            out[n, i3], out[n1, i3], out[n2, i3], out[n3, i3] = d[12], d[13], d[14], d[15]
    for n in range(rows):
        for i in range(size):
            out[n, i] = 2 * out[n, i] - top * total[n]
