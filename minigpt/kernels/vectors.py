"""Pieces of LLVM IR that other modules put together: what LLVM's own vectorizer does not find.

Functions take an IR builder `b` and IR values. The code is generic: the backend turns it into what the target has
(`vpdpwssd`, `pmaddwd`, `smlal`, ...).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from llvmlite.binding import add_symbol
from numba.core import cgutils

from minigpt.kernels.target import BYTES, HALF_IN_HARDWARE, OTHER, STAND_IN, X86

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def vector_of(element: Any, n: int) -> Any:
    """Return the type of n lanes."""
    return ir.VectorType(element, n)


def word(value: int) -> Any:
    """Return an int64 constant."""
    return ir.Constant(I64, value)


def advance(b: Any, address: Any, index: Any, size: int = 1) -> Any:
    """Return address + index * size; index is a Python int or an IR value."""
    return b.add(address, word(index * size) if isinstance(index, int) else b.mul(index, word(size)))


def load(b: Any, address: Any, kind: Any, align: int = 1) -> Any:
    """Read a scalar or a vector."""
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(b: Any, value: Any, address: Any) -> None:
    """Write a vector of 4-byte lanes."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


def prefetch(b: Any, address: Any) -> None:
    """Ask for a cache line, in the L2 cache: more of them can be on their way than to the L1. Any address will do."""
    pointer = I8.as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    hint = cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0")
    b.call(hint, [b.inttoptr(address, pointer), *(ir.Constant(I32, v) for v in (0, 2, 1))])  # to read, L2, data


PAGE, PAGES = 4096, 4  # bytes; how many are asked for in turns


def prefetch_pages(b: Any, address: Any) -> None:
    """Ask for one cache line of the next four pages for each that is read in order: a line of each page in turn.

    The processor, which looks ahead within pages, then does so in four at once; it got 1.05 to 1.1 times the bytes
    of the same lines asked for in order, 1.2 to 1.3 times those that come unasked (one thread, Zen 3).
    """
    block = b.add(b.and_(address, word(-PAGE * PAGES)), word(PAGE * PAGES))
    page = b.mul(b.and_(b.lshr(address, word(6)), word(PAGES - 1)), word(PAGE))
    line = b.and_(b.udiv(address, word(PAGES)), word(PAGE - 64))
    prefetch(b, b.or_(block, b.or_(page, line)))


def shuffle(b: Any, a: Any, c: Any, lanes: list[int]) -> Any:
    """Return the named lanes of a followed by c."""
    return b.shuffle_vector(a, c, ir.Constant(vector_of(I32, len(lanes)), lanes))


def broadcast(b: Any, value: Any, kind: Any) -> Any:
    """Fill a vector with one value."""
    vector = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(b, vector, vector, [0] * kind.count)


def widen_half(b: Any, bits: Any) -> Any:
    """Convert float16 bits, a scalar or a vector of i16, to float32."""
    n = bits.type.count if isinstance(bits.type, ir.VectorType) else 0
    kind = (lambda scalar: vector_of(scalar, n)) if n else (lambda scalar: scalar)
    constant = lambda scalar, v: ir.Constant(kind(scalar), [v] * n if n else v)  # noqa: E731
    if HALF_IN_HARDWARE:
        return b.fpext(b.bitcast(bits, kind(ir.HalfType())), kind(F32))
    # Shift exponent and mantissa into a float32's place; 2^112 makes up for the smaller exponent bias (no infinities)
    wide = b.zext(bits, kind(I32))
    magnitude = b.shl(b.and_(wide, constant(I32, 0x7FFF)), constant(I32, 13))
    scaled = b.fmul(b.bitcast(magnitude, kind(F32)), constant(F32, 2.0**112))
    sign = b.shl(b.and_(wide, constant(I32, 0x8000)), constant(I32, 16))
    return b.bitcast(b.or_(b.bitcast(scaled, kind(I32)), sign), kind(F32))


def call_own(b: Any, name: str, result: Any, *values: Any) -> Any:
    """Call an instruction that only some processors have, by LLVM's name without `llvm.`.

    For another machine, numba generates code for this one on the way: a name that it can link stands in there.
    """
    name = f"{STAND_IN if OTHER else 'llvm.'}{name}"
    if OTHER:
        add_symbol(name, 1)
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def add_pairs(b: Any, w: Any, x: Any, total: Any) -> Any:
    """Add products of int16 to int32 lanes, two to each, as cheaply as the processor can.

    w[2i] * x[2i] + w[2i + 1] * x[2i + 1] is the one pattern that LLVM turns into `pmaddwd`, or `vpdpwssd` where the
    CPU has it. Other processors multiply and add half a vector at a time (`smlal`): pairs are half a vector apart.
    """
    n = w.type.count
    wide = vector_of(I32, n)
    if X86:
        products = b.mul(b.sext(w, wide), b.sext(x, wide))
        return b.add(total, b.add(*(shuffle(b, products, products, list(range(i, n, 2))) for i in (0, 1))))
    for lanes in (list(range(n // 2)), list(range(n // 2, n))):
        products = b.mul(*(b.sext(shuffle(b, v, v, lanes), total.type) for v in (w, x)))
        total = b.add(total, products)
    return total


def in_pairs(b: Any, vector: Any) -> Any:
    """Put the neighbours of a vector where `add_pairs` takes them as a pair."""
    n = vector.type.count
    return vector if X86 else shuffle(b, vector, vector, [*range(0, n, 2), *range(1, n, 2)])


def multiply_bytes(b: Any, w: Any, x: Any, total: Any) -> Any:
    """Add four products of bytes w (below 128, or int8 + OFFSET) and int8 x to each int32 lane; only with BYTE_PAIRS.

    Without BYTES the sums of two products must fit an int16: w below 128, or |x| + |its neighbour| at most 128.
    """
    lanes = total.type.count
    if BYTES:
        name = f"x86.avx512.vpdpbusd.{32 * lanes}" if X86 else f"aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8"
        return call_own(b, name, total.type, total, w, x)
    return _widen_pairs(b, [(w, x)], total)


def _widen_pairs(b: Any, factors: list[tuple[Any, Any]], total: Any) -> Any:
    """Add products of bytes and int8 to int32 lanes; all that fall on one int16 must fit it together."""
    words = vector_of(I16, 2 * total.type.count)
    pairs = reduce(b.add, [call_own(b, "x86.avx2.pmadd.ub.sw", words, w, x) for w, x in factors])
    return b.add(total, call_own(b, "x86.avx2.pmadd.wd", total.type, pairs, ir.Constant(words, [1] * words.count)))


def add_nibbles(b: Any, w: list[Any], x: list[Any], totals: list[Any]) -> list[Any]:
    """Add products of vectors of bytes below 16 and of int8, four to each int32 lane, to totals; only with BYTE_PAIRS.

    Without BYTES the pairs of eight vectors fit an int16 together: fewer are widened.
    """
    first, *others = totals
    if BYTES:
        if not w:
            return totals
        return add_nibbles(b, w[1:], x[1:], [*others, multiply_bytes(b, w[0], x[0], first)])
    factors = list(zip(w, x, strict=True))
    for i in range(0, len(factors), 8):
        first = _widen_pairs(b, factors[i : i + 8], first)
    return [first, *others]


def multiply_add(b: Any, a: Any, c: Any, total: Any) -> Any:
    """Return a * c + total in float32, fused where the CPU can (`llvm.fma` would call a library elsewhere)."""
    return b.fadd(b.fmul(a, c, flags=("contract",)), total, flags=("contract",))


def exponential(b: Any, x: Any) -> Any:
    """Return e^x, x <= 88, of a float32 or a vector, with a relative error below 2e-7; 0 where x < -87.

    2^n times the Taylor polynomial of the rest, |rest| <= ln(2) / 2. A float32 of size 1.5 * 2^23 has no room for a
    fraction: adding that rounds, ties to even, and leaves n in the lowest bits.
    """
    n_lanes = x.type.count if isinstance(x.type, ir.VectorType) else 0
    bits = vector_of(I32, n_lanes) if n_lanes else I32
    constant = lambda v: ir.Constant(x.type, [v] * n_lanes if n_lanes else v)  # noqa: E731
    whole = lambda v: ir.Constant(bits, [v] * n_lanes if n_lanes else v)  # noqa: E731
    shifted = multiply_add(b, x, constant(1.44269504), constant(12582912.0))
    n = b.fsub(shifted, constant(12582912.0))
    rest = multiply_add(b, n, constant(-0.693359375), x)  # ln 2 in two parts
    rest = multiply_add(b, n, constant(2.12194440e-4), rest)
    p = constant(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = multiply_add(b, p, rest, constant(coefficient))
    power = b.add(b.shl(b.bitcast(shifted, bits), whole(23)), whole(127 << 23))
    tiny = b.fcmp_ordered("<", x, constant(-87.0))
    return b.select(tiny, constant(0.0), b.fmul(p, b.bitcast(power, x.type)))


def fold(b: Any, vector: Any, n: int) -> Any:
    """Add halves of a vector to each other until n lanes are left."""
    add = b.add if vector.type.element == I32 else b.fadd
    while (lanes := vector.type.count) > n:
        low = shuffle(b, vector, vector, list(range(lanes // 2)))
        vector = add(low, shuffle(b, vector, vector, list(range(lanes // 2, lanes))))
    return vector


def sum_lanes(b: Any, vector: Any) -> Any:
    """Add up the lanes."""
    return b.extract_element(fold(b, vector, 1), ir.Constant(I32, 0))


ROWS = 4  # of a matrix whose sums across lanes are made together; the rows stream by one after the other


def sum_rows(b: Any, rows: list[Any]) -> Any:
    """Add up the lanes of ROWS vectors: a vector of ROWS sums."""
    while len(rows) > 1:
        n = rows[0].type.count
        even, odd = ([v * n + k + i for k in range(0, n, 4) for v in (0, 1) for i in (j, j + 2)] for j in (0, 1))
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [b.fadd(shuffle(b, v, w, even), shuffle(b, v, w, odd)) for v, w in pairs]
    return fold(b, rows[0], ROWS)


def accumulators(b: Any, kind: Any, n: int) -> list[Any]:
    """Return n variables that begin with zeros."""
    return [cgutils.alloca_once_value(b, ir.Constant(kind, None)) for _ in range(n)]
