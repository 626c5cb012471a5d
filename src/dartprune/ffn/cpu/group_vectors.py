"""What the vector code for Numba over rows of 4 and 8 bits is built of: instructions, as the compiler takes them.

A lane is a group of 32 weights: one instruction multiplies four weights of each of 16 groups with four inputs and adds
them up (`vpdpbusd`); where the processor has none, the same in plain vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from llvmlite import binding, ir
from numba.core import cgutils

from dartprune.ffn.row_format import QUAD, SEGMENTS

LINE = 64  # bytes that memory gives at a time
LEVEL = 2
BYTE, INT, SIZE, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_NATIVE = {16: "512", 8: "256", 4: "128"}
Fields: TypeAlias = list[tuple[Any, int]]  # vectors of codes, each with how many bits too far up they are


@cache
def native(lanes: int) -> bool:
    """Whether this processor multiplies and adds bytes in vectors of so many lanes."""
    has = binding.get_host_cpu_features()
    if not str(binding.get_process_triple()).startswith(("x86_64", "i686")):
        return False
    return bool(has.get("avx512vnni")) and (lanes == SEGMENTS[0] or bool(has.get("avx512vl")))


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """What a function of the compiler's, of this name, returns."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def vector(kind: Any, lanes: int) -> Any:
    """The kind of a vector."""
    return ir.VectorType(kind, lanes)


def filled(kind: Any, lanes: int, value: Any) -> Any:
    """A vector with one number in all lanes."""
    return ir.Constant(vector(kind, lanes), [value] * lanes)


def load_at(builder: Any, base: Any, at: Any, kind: Any) -> Any:
    """The value of a kind that begins `at` bytes behind a byte pointer."""
    return builder.load(builder.bitcast(builder.gep(base, [at]), kind.as_pointer()), align=1)


def fetch(builder: Any, base: Any, at: Any) -> None:
    """Ask for the line of memory `at` bytes behind a byte pointer, without waiting for it."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.gep(base, [at]), INT(0), INT(LEVEL), INT(1))


def fetch_all(builder: Any, base: Any, at: Any, count: Any) -> None:
    """Ask for `count` bytes."""
    with cgutils.for_range_slice(builder, SIZE(0), count, SIZE(LINE)) as (line, _):
        fetch(builder, base, builder.add(at, line))


def data_of(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The memory of an array as a byte pointer."""
    return builder.bitcast(context.make_array(kind)(context, builder, value).data, BYTE.as_pointer())


def rows_of(context: Any, builder: Any, kinds: tuple[Any, Any], values: tuple[Any, Any], many: int) -> list[Any]:
    """Byte pointers of the rows of a matrix that the first `many` numbers of an index name."""
    kind = ir.IntType(kinds[1].dtype.bitwidth)
    matrix = context.make_array(kinds[0])(context, builder, values[0])
    index = builder.bitcast(data_of(context, builder, kinds[1], values[1]), kind.as_pointer())
    home, stride = builder.bitcast(matrix.data, BYTE.as_pointer()), builder.extract_value(matrix.strides, 0)
    numbers = [builder.load(builder.gep(index, [SIZE(r)])) for r in range(many)]
    wide = [builder.sext(n, SIZE) if kind.width < SIZE.width else n for n in numbers]
    return [builder.gep(home, [builder.mul(n, stride)]) for n in wide]


def byte_products(builder: Any, total: Any, codes: Any, x: Any, lanes: int) -> Any:
    """Total int32 [lanes] plus, in each lane, the products of four unsigned codes with four signed inputs."""
    if native(lanes):
        words = vector(INT, lanes)
        name = f"llvm.x86.avx512.vpdpbusd.{_NATIVE[lanes]}"
        return call(builder, name, words, total, builder.bitcast(codes, words), builder.bitcast(x, words))
    short = vector(ir.IntType(16), 4 * lanes)
    values = builder.mul(builder.zext(codes, short), builder.sext(x, short))  # 255 * 127 fits into 16 bits
    for width in (4 * lanes, 2 * lanes):
        even, odd = (
            builder.shuffle_vector(values, values, ir.Constant(vector(INT, width // 2), list(range(k, width, 2))))
            for k in range(2)
        )
        if width == 4 * lanes:
            wide = vector(INT, width // 2)
            even, odd = builder.sext(even, wide), builder.sext(odd, wide)
        values = builder.add(even, odd)
    return builder.add(total, values)


def word_products(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """Total int32 [16] plus, in each lane, the products of the lower and of the upper halves, signed words."""
    lanes = SEGMENTS[0]
    if native(lanes):
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", total.type, total, one, other)
    sixteen = filled(INT, lanes, 16)
    upper = builder.mul(builder.ashr(one, sixteen), builder.ashr(other, sixteen))
    lower = builder.mul(*(builder.ashr(builder.shl(part, sixteen), sixteen) for part in (one, other)))
    return builder.add(total, builder.add(upper, lower))


def _moved(builder: Any, packed: Any, by: int, lanes: int) -> Any:
    """The bytes of a vector moved down by so many bits (up, where negative), their neighbours' bits behind them."""
    if not by:
        return packed
    # there is no shift of bytes: of pairs of bytes
    words = vector(ir.IntType(16), 2 * lanes)
    move = builder.lshr if by > 0 else builder.shl
    return builder.bitcast(
        move(builder.bitcast(packed, words), filled(ir.IntType(16), 2 * lanes, abs(by))), packed.type
    )


def _masked(builder: Any, packed: Any, mask: int, lanes: int) -> Any:
    return builder.and_(packed, filled(BYTE, QUAD * lanes, mask))


def fields_of(builder: Any, packed: Any, width: int, lanes: int) -> Fields:
    """The codes of `width` bits in the bytes of a vector, lowest first; every second is left where it is."""
    if width == 8:
        return [(packed, 0)]
    mask, out = (1 << width) - 1, []
    for by in range(0, 8, 2 * width):
        moved = _moved(builder, packed, by, lanes)
        out += [(_masked(builder, moved, mask << up, lanes), up) for up in (0, width)]
    return out


def whole_codes(builder: Any, parts: list[Any], widths: tuple[int, int], v: int, lanes: int) -> Fields:
    """The codes whose high bits are in the bytes of a row's v-th vector, and whose low ones in those of another.

    parts: the first vector alone, where there are no low bits.  widths: bits in each.
    """
    width, below = widths
    if not below:
        return fields_of(builder, parts[0], width, lanes)
    high, low = parts
    if below != width:
        return _six_bits(builder, high, low, v, lanes)
    mask = 0xCC if width == 2 else 0xF0
    # the high bits of every second code stay where they are, its low ones come below them
    pairs = (_moved(builder, high, -width, lanes), low), (high, _moved(builder, low, width, lanes))
    both = [
        builder.or_(_masked(builder, one, mask, lanes), _masked(builder, other, 255 - mask, lanes))
        for one, other in pairs
    ]
    even, odd = (fields_of(builder, codes, 2 * width, lanes) for codes in both)
    return [field for pair in zip(even, odd, strict=True) for field in pair]


def _six_bits(builder: Any, high: Any, low: Any, v: int, lanes: int) -> Fields:
    """Codes of four high and two low bits; all are left two bits up."""
    out = []
    for j in range(2):
        upper = _masked(builder, _moved(builder, high, 4 * j - 4, lanes), 0xF0, lanes)
        lower = _moved(builder, low, 2 * (v // 2 + 2 * j) - 2, lanes)
        out.append((builder.or_(upper, _masked(builder, lower, 0x0C, lanes)), 2))
    return out


def code_products(builder: Any, fields: Fields, values: list[Any], lanes: int) -> Any:
    """The sums of codes times inputs, int32 [lanes]: two chains, one for each place where codes were left."""
    places = sorted({up for _, up in fields})
    chains = [filled(INT, lanes, 0)] * 2
    for k, ((codes, up), inputs) in enumerate(zip(fields, values, strict=True)):
        chain = places.index(up) if len(places) == 2 else k % 2
        chains[chain] = byte_products(builder, chains[chain], codes, inputs, lanes)
    ups = (places[0], places[-1])
    return builder.add(
        *(builder.ashr(c, filled(INT, lanes, up)) if up else c for c, up in zip(chains, ups, strict=True))
    )


def each_segment(builder: Any, groups: Any, work: Callable[[Any, int], None]) -> None:
    """Emit `work(first group, number of groups)` for each segment of a row, a loop over those of the first size."""
    largest = SEGMENTS[0]
    rest = builder.and_(groups, SIZE(largest - 1))
    whole = builder.sub(groups, rest)
    with cgutils.for_range_slice(builder, SIZE(0), whole, SIZE(largest)) as (first, _):
        work(first, largest)
    for size in SEGMENTS[1:]:
        # the sizes are powers of two: of what remains, each bit is one segment
        present = builder.icmp_unsigned("!=", builder.and_(rest, SIZE(size)), SIZE(0))
        before = builder.and_(groups, SIZE(~(2 * size - 1) & (2**63 - 1)))
        with builder.if_then(present):
            work(before, size)


def folded(builder: Any, total: Any) -> Any:
    """The sum of the largest vector's lanes, in one fixed order."""
    lanes = SEGMENTS[0]
    kind = ir.FunctionType(FLOAT, [FLOAT, vector(FLOAT, lanes)])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{lanes}f32")
    return builder.call(function, [ir.Constant(FLOAT, -0.0), total], fastmath=("reassoc",))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Vectors: a * b + c, rounded once."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def spread(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of a kind with one value in all lanes."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = ir.Constant(vector(INT, kind.count), [0] * kind.count)
    return builder.shuffle_vector(builder.insert_element(nothing, value, INT(0)), nothing, first)
