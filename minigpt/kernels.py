"""Everything that is compiled: matrices times activations, attention, the whole network, the threads' meetings.

Every entry point takes addresses and integers (records are described in `layout.py`), holds no Python object, allocates
nothing and cannot raise, so that it runs without the GIL and can be compiled ahead of time for other machines. Vector
code is generic LLVM IR that the backend turns into what the target has (`vpdpwssd`, `pmaddwd`, `smlal`, ...).
`reference.py` has the same arithmetic in NumPy. Nothing here validates: whoever fills the records does.

The file reads upwards in size: addresses, vectors, scalar functions, matrices, threads, attention, the network.
"""

# ruff: noqa: F403, F405
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_name
from numba import cfunc, config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from minigpt.layout import *  # indices of fields: W_ of a matrix, X_ activations, L_ a layer, P_ a program, T_ a team

# Reductions may be reordered and multiply-adds fused; NaN and infinity keep their meaning. Division by zero gives
# infinity: numba's default would raise, and its check keeps loops from being vectorized.
FAST: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
HELP: dict[str, Any] = {**FAST, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
EXACT: dict[str, Any] = {**HELP, "fastmath": {"contract", "nsz"}}

int64, float32, int32 = types.int64, types.float32, types.int32  # of numba
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()  # of LLVM

# ---------------------------------------------------------------------------------------------------------------------
# Entry points: compiled one by one when asked for, because a process pays for each
# ---------------------------------------------------------------------------------------------------------------------

ENTRIES: dict[str, tuple[Any, Callable[..., Any]]] = {}


def entry(n_arguments: int, result: Any = types.void) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of int64 arguments as an entry point under its own name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ENTRIES[function.__name__] = (result(*[int64] * n_arguments), function)
        return function

    return register


def compile_entry(name: str) -> tuple[int, str, str, str, str]:
    """Compile an entry point: its number of arguments, LLVM module and symbol, and the processor it is meant for."""
    signature, function = ENTRIES[name]
    compiled = cfunc(signature, **FAST)(function)
    return len(signature.args), compiled.inspect_llvm(), compiled.native_name, CPU, FEATURES


# ---------------------------------------------------------------------------------------------------------------------
# The target
# ---------------------------------------------------------------------------------------------------------------------

WANTED = getattr(config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES, or none of them for NUMBA_CPU_NAME=generic
FEATURES = get_host_cpu_features() if WANTED is None else WANTED
CPU = getattr(config, "CPU_NAME", None) or get_host_cpu_name()
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
VECTOR = 64 if "+avx512bw" in FEATURES else 32 if "+avx2" in FEATURES else 16  # bytes of a vector register
HALF_IN_HARDWARE = not X86 or "+f16c" in FEATURES  # else the conversion would call a library
LANES = VECTOR // 4  # of 4 bytes
PANEL = 2 * LANES  # rows of a matrix that a tile takes at once: two vectors
# The CPU multiplies bytes four at a time, twice as many as int16: tiles of integer matrices take int8 activations
BYTES = (VECTOR == 64 and "+avx512vnni" in FEATURES) or (VECTOR == 32 and "+avxvnni" in FEATURES)
EXPANDS = VECTOR == 64 and "+avx512vbmi2" in FEATURES and "+avx512vl" in FEATURES  # spreads bytes over a mask's bits
# The same for 8 bytes in a word; before Zen 3, AMD took hundreds of cycles for it
DEPOSITS = X86 and "+bmi2" in FEATURES and CPU not in ("znver1", "znver2")
GROUP = 64  # int8 activations that share a scale: an outlier spoils no more than these
TILE = 6 if X86 and VECTOR < 64 else 12  # tokens of a tile: 2 * TILE accumulators must fit the 16 or 32 registers

# ---------------------------------------------------------------------------------------------------------------------
# Addresses: `i64(address)[i]` reads and `f32(address)[i] = v` writes, as in C; no bounds, no negative index
# ---------------------------------------------------------------------------------------------------------------------


def _pointer(dtype: Any) -> Any:
    """Return an intrinsic that views an int64 address as a pointer to dtype."""

    @intrinsic
    def view(typing_context: Any, address: Any) -> Any:
        pointer = types.CPointer(dtype)

        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            return b.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(int64), build

    return view


i8, u8, u16, u32 = (_pointer(kind) for kind in (types.int8, types.uint8, types.uint16, types.uint32))
i16, i32, i64, f32 = _pointer(types.int16), _pointer(int32), _pointer(int64), _pointer(float32)


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Reinterpret an int32 as the float32 with the same bits."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.bitcast(arguments[0], ir.FloatType())

    return float32(int32), build


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """Reinterpret a float32 as the int32 with the same bits."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.bitcast(arguments[0], ir.IntType(32))

    return int32(float32), build


@intrinsic
def square_root(typing_context: Any, value: Any) -> Any:
    """Return the square root of a float32 by the processor's instruction, where `np.sqrt` calls a library."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(F32, [F32])
        return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.sqrt.f32"), arguments)

    return float32(float32), build


@intrinsic
def half(typing_context: Any, bits: Any) -> Any:
    """Convert the bits of a float16 (uint16) to float32."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return _half(b, arguments[0])

    return float32(types.uint16), build


def _call(n_arguments: int, result: Any) -> Any:
    """Return an intrinsic that calls the C function of int64 arguments at an address: `call(address, (a, b))`."""

    @intrinsic
    def call(typing_context: Any, address: Any, arguments: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, values: Any) -> Any:
            word = ir.IntType(64)
            returned = ir.VoidType() if result is types.void else ir.IntType(32)
            function = ir.FunctionType(returned, [word] * n_arguments)
            b.call(b.inttoptr(values[0], function.as_pointer()), cgutils.unpack_tuple(b, values[1]))
            return context.get_dummy_value()

        return types.void(int64, types.UniTuple(int64, n_arguments)), build

    return call


@intrinsic
def never_inline(typing_context: Any) -> Any:
    """Keep the function that calls this a function: one copy to optimize instead of one per caller (compile time)."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), build


call_matmul, call_rows, call_entry = _call(7, types.void), _call(3, types.void), _call(2, types.void)


@intrinsic
def call_yield(typing_context: Any, address: Any) -> Any:
    """Call the C function `int f(void)` at an address."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.call(b.inttoptr(arguments[0], ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(int64), build


# ---------------------------------------------------------------------------------------------------------------------
# Vectors: what LLVM's own vectorizer does not find
# ---------------------------------------------------------------------------------------------------------------------


def _vector(element: Any, n: int) -> Any:
    return ir.VectorType(element, n)


def _offset(b: Any, address: Any, index: Any, size: int = 1) -> Any:
    """Return address + index * size; index is a Python int or an IR value."""
    if isinstance(index, int):
        return b.add(address, ir.Constant(address.type, index * size))
    return b.add(address, b.mul(index, ir.Constant(address.type, size)))


def _load(b: Any, address: Any, kind: Any, align: int = 1) -> Any:
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


AHEAD = 4096  # bytes: an int4 row is too short, and its three parts too many, for the processor to foresee


def _prefetch(b: Any, address: Any) -> Any:
    """Ask for a cache line; the address may be anywhere."""
    pointer = I8.as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0")
    b.call(prefetch, [b.inttoptr(address, pointer), *(ir.Constant(I32, v) for v in (0, 3, 1))])  # to read, keep, data


def _shuffle(b: Any, a: Any, c: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(a, c, ir.Constant(_vector(I32, len(lanes)), lanes))


def _concatenate(b: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [_shuffle(b, low, high, list(range(2 * low.type.count))) for low, high in pairs]
    return parts[0]


def _half(b: Any, bits: Any) -> Any:
    """Convert float16 bits, a scalar or a vector of i16, to float32."""
    n = bits.type.count if isinstance(bits.type, ir.VectorType) else 0
    kind = (lambda scalar: _vector(scalar, n)) if n else (lambda scalar: scalar)
    constant = lambda scalar, v: ir.Constant(kind(scalar), [v] * n if n else v)  # noqa: E731
    if HALF_IN_HARDWARE:
        return b.fpext(b.bitcast(bits, kind(ir.HalfType())), kind(F32))
    # Shift exponent and mantissa into a float32's place; 2^112 makes up for the smaller exponent bias (no infinities)
    wide = b.zext(bits, kind(I32))
    magnitude = b.shl(b.and_(wide, constant(I32, 0x7FFF)), constant(I32, 13))
    scaled = b.fmul(b.bitcast(magnitude, kind(F32)), constant(F32, 2.0**112))
    sign = b.shl(b.and_(wide, constant(I32, 0x8000)), constant(I32, 16))
    return b.bitcast(b.or_(b.bitcast(scaled, kind(I32)), sign), kind(F32))


def _multiply_pairs(b: Any, w: Any, x: Any) -> Any:
    """Return w[2i] * x[2i] + w[2i + 1] * x[2i + 1], i16 to i32: the one pattern that LLVM turns into `pmaddwd`.

    Added to an accumulator it becomes `vpdpwssd` where the CPU has it.
    """
    n = w.type.count
    wide = _vector(I32, n)
    products = b.mul(b.sext(w, wide), b.sext(x, wide))
    even = _shuffle(b, products, products, list(range(0, n, 2)))
    odd = _shuffle(b, products, products, list(range(1, n, 2)))
    return b.add(even, odd)


def _multiply_add(b: Any, a: Any, c: Any, total: Any) -> Any:
    """Return a * c + total in float32, fused where the CPU can (`llvm.fma` would call a library elsewhere)."""
    return b.fadd(b.fmul(a, c, flags=("contract",)), total, flags=("contract",))


def _broadcast(b: Any, value: Any, kind: Any) -> Any:
    """Fill a vector with one value."""
    vector = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return _shuffle(b, vector, vector, [0] * kind.count)


def _fold(b: Any, vector: Any, n: int) -> Any:
    """Add halves of a vector to each other until n lanes are left."""
    add = b.add if vector.type.element == I32 else b.fadd
    while (lanes := vector.type.count) > n:
        low = _shuffle(b, vector, vector, list(range(lanes // 2)))
        vector = add(low, _shuffle(b, vector, vector, list(range(lanes // 2, lanes))))
    return vector


def _sum(b: Any, vector: Any) -> Any:
    """Add up the lanes."""
    return b.extract_element(_fold(b, vector, 1), ir.Constant(I32, 0))


ROWS = 4  # of a matrix whose sums across lanes are made together; the rows stream by one after the other


def _sum_rows(b: Any, rows: list[Any]) -> Any:
    """Add up the lanes of ROWS vectors: a vector of ROWS sums."""
    while len(rows) > 1:
        n = rows[0].type.count
        even, odd = ([v * n + k + i for k in range(0, n, 4) for v in (0, 1) for i in (j, j + 2)] for j in (0, 1))
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [b.fadd(_shuffle(b, v, w, even), _shuffle(b, v, w, odd)) for v, w in pairs]
    return _fold(b, rows[0], ROWS)


def _accumulators(b: Any, kind: Any, n: int) -> list[Any]:
    return [cgutils.alloca_once_value(b, ir.Constant(kind, None)) for _ in range(n)]


def _dot_i8(b: Any, w: Any, x: Any, n: Any, place: Callable[[Any], Any], unrolled: int) -> Any:
    """Return the int32 sum of w[i] * x[place(i)], int8 times int16, over the whole vectors (of VECTOR / 2) in n.

    Several accumulators hide the latency of the multiply-add; the weights stream by at the speed of memory.
    """
    width = VECTOR // 2
    constant = lambda v: ir.Constant(n.type, v)  # noqa: E731
    totals = _accumulators(b, _vector(I32, width // 2), unrolled)

    def step(start: Any, total: Any) -> None:
        codes = b.sext(_load(b, b.add(w, start), _vector(I8, width)), _vector(I16, width))
        pairs = _multiply_pairs(b, codes, _load(b, _offset(b, x, place(start), 2), _vector(I16, width)))
        b.store(b.add(b.load(total), pairs), total)

    blocks = b.udiv(n, constant(width * unrolled))
    with cgutils.for_range(b, blocks) as loop:
        start = b.mul(loop.index, constant(width * unrolled))
        for i, total in enumerate(totals):
            step(b.add(start, constant(i * width)), total)
    rest = b.mul(blocks, constant(unrolled))
    with cgutils.for_range(b, b.sub(b.udiv(n, constant(width)), rest)) as loop:
        step(b.mul(b.add(loop.index, rest), constant(width)), totals[0])
    first, *others = (b.load(total) for total in totals)
    return _sum(b, reduce(b.add, others, first))


@intrinsic
def dot_i8(typing_context: Any, w: Any, x: Any, n: Any) -> Any:
    """Return the int32 sum of w[i] * x[i] over the whole vectors in n."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        w, x, n = arguments
        return _dot_i8(b, w, x, n, lambda i: i, unrolled=4)

    return int32(int64, int64, int64), build


@intrinsic
def dot_blocks(typing_context: Any, w: Any, columns: Any, x: Any, n: Any) -> Any:
    """Return the int32 sum over blocks of 32 codes, block k times x[32 columns[k]...]; n codes, columns uint16."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        w, columns, x, n = arguments
        constant = lambda v: ir.Constant(n.type, v)  # noqa: E731

        def place(i: Any) -> Any:
            column = _load(b, _offset(b, columns, b.lshr(i, constant(5)), 2), I16)
            return b.add(b.shl(b.zext(column, n.type), constant(5)), b.and_(i, constant(31)))

        return _dot_i8(b, w, x, n, place, unrolled=1)  # rows are short: two loops would be mispredicted twice

    return int32(int64, int64, int64, int64), build


def _dot_i8_groups(group: int) -> Any:
    """Return `dot(w, scales, x, n_groups)`: the float32 sum of scale * sum(w * x) over groups of int8 times int16."""
    width = VECTOR // 2

    @intrinsic
    def dot(typing_context: Any, w: Any, scales: Any, x: Any, n_groups: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            w, scales, x, n_groups = arguments
            (total,) = _accumulators(b, _vector(F32, width // 2), 1)
            with cgutils.for_range(b, n_groups) as loop:
                products = ir.Constant(_vector(I32, width // 2), None)
                for i in range(0, group, width):
                    start = b.add(b.mul(loop.index, ir.Constant(n_groups.type, group)), ir.Constant(n_groups.type, i))
                    codes = b.sext(_load(b, b.add(w, start), _vector(I8, width)), _vector(I16, width))
                    values = _load(b, _offset(b, x, start, 2), codes.type)
                    products = b.add(products, _multiply_pairs(b, codes, values))
                products = b.sitofp(products, _vector(F32, width // 2))
                scale = _half(b, _load(b, _offset(b, scales, loop.index, 2), I16))
                b.store(_multiply_add(b, products, _broadcast(b, scale, products.type), b.load(total)), total)
            return _sum(b, b.load(total))

        return float32(*[int64] * 4), build

    return dot


dot_i8_g32, dot_i8_g64, dot_i8_g128 = _dot_i8_groups(32), _dot_i8_groups(64), _dot_i8_groups(128)


def _moves(mask: int) -> list[int]:
    """Return the bytes of a word that move up by 4, by 2 and by 1 to spread over the bits of a mask, and those kept."""
    selected = [0, 0, 0, 0]
    for source, target in enumerate(i for i in range(8) if mask >> i & 1):
        place = source
        for step, distance in enumerate((4, 2, 1)):
            if (target - source) & distance:
                place += distance
                selected[step] |= 255 << 8 * place
        selected[3] |= 255 << 8 * target
    return selected


def _spread_word(b: Any, mask: Any, packed: Any) -> Any:
    """Do what `_spread` does for 8 bits, both as words."""
    word = packed.type
    constant = lambda v: ir.Constant(word, v)  # noqa: E731
    if DEPOSITS:
        function = ir.FunctionType(word, [word, word])
        deposit = cgutils.get_or_insert_function(b.module, function, "llvm.x86.bmi.pdep.64")
        kept = b.mul(b.call(deposit, [mask, constant(0x0101010101010101)]), constant(255))
        return b.call(deposit, [packed, kept])
    # in three moves whose masks are looked up (Warren, Hacker's Delight 7-5)
    table = [value for mask in range(256) for value in _moves(mask)]
    moves = cgutils.global_constant(b, "moves", ir.Constant(ir.ArrayType(word, len(table)), table))
    at = b.add(b.ptrtoint(moves, word), b.shl(mask, constant(5)))
    for step, distance in enumerate((4, 2, 1)):
        selected = _load(b, _offset(b, at, 8 * step), word, 8)
        moved = b.shl(packed, constant(8 * distance))
        packed = b.or_(b.and_(packed, b.not_(selected)), b.and_(moved, selected))
    return b.and_(packed, _load(b, _offset(b, at, 24), word, 8))


def _spread(b: Any, mask: Any, packed: Any) -> Any:
    """Put the next of the packed bytes wherever mask has a bit, and 0 elsewhere: a vector of a byte for each bit."""
    n, word = mask.type.width, ir.IntType(64)
    kind, bits = _vector(I8, n), _vector(ir.IntType(1), n)
    if not EXPANDS:
        packed = b.zext(b.bitcast(packed, ir.IntType(8 * packed.type.count)), word)
        return b.bitcast(_spread_word(b, b.zext(mask, word), packed), kind)
    # from a register: the form that reads memory is microcode on Zen
    packed = _shuffle(b, packed, ir.Constant(packed.type, ir.Undefined), [min(i, packed.type.count) for i in range(n)])
    function = ir.FunctionType(kind, [kind, kind, bits])
    expand = cgutils.get_or_insert_function(b.module, function, f"llvm.x86.avx512.mask.expand.v{n}i8")
    return b.call(expand, [packed, ir.Constant(kind, None), b.bitcast(mask, bits)])


def _expand(most: float) -> Any:
    """Return `expand(bits, values, n, codes)`: undo a bitmap of n columns, a multiple of 32, into int8 codes.

    At most this share of the columns are kept: more values are not read.
    """

    @intrinsic
    def expand(typing_context: Any, bits: Any, values: Any, n: Any, codes: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            bits, values, n, codes = arguments
            constant = lambda v: ir.Constant(n.type, v)  # noqa: E731
            values = cgutils.alloca_once_value(b, values)
            done = constant(0)
            for columns in (64, 32) if EXPANDS else (8,):
                steps = b.udiv(b.sub(n, done), constant(columns))
                with cgutils.for_range(b, steps) as loop:
                    column = b.add(done, b.mul(loop.index, constant(columns)))
                    mask = _load(b, b.add(bits, b.lshr(column, constant(3))), ir.IntType(columns))
                    at = b.load(values)
                    packed = _load(b, at, _vector(I8, int(columns * most)))
                    _store(b, _spread(b, mask, packed), b.add(codes, column))
                    b.store(b.add(at, b.ctpop(b.zext(mask, n.type) if columns < 64 else mask)), values)
                done = b.add(done, b.mul(steps, constant(columns)))
            return context.get_dummy_value()

        return types.void(*[int64] * 4), build

    return expand


expand_any, expand_half = _expand(1), _expand(0.5)


def _multiply_bytes(b: Any, w: Any, x: Any, total: Any) -> Any:
    """Add four products of uint8 w and int8 x to each int32 lane; only where BYTES says that the CPU can."""
    kinds = [total.type, w.type, x.type]
    name = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}"
    dot = cgutils.get_or_insert_function(b.module, ir.FunctionType(total.type, kinds), name)
    return b.call(dot, [total, w, x])


UNIT = VECTOR // 16  # groups of int4, 16 bytes each, that fill a vector


def _multiply_nibbles(b: Any, packed: Any, x: list[Any]) -> Any:
    """Return the products of packed int4 codes, bytes, with the four vectors of `order_for_i4`: 4 int32 for a group."""
    n = packed.type.count
    lanes, words = _vector(I32, n // 4), _vector(I16, n // 2)
    constant = lambda kind, v: ir.Constant(kind, [v] * kind.count)  # noqa: E731
    shifted = lambda bits: b.lshr(b.bitcast(packed, words), constant(words, bits))  # noqa: E731
    total = ir.Constant(lanes, None)
    if BYTES:  # upper and lower bytes of the activations apart
        low, high = (b.and_(b.bitcast(shifted(i), packed.type), constant(packed.type, 15)) for i in (0, 4))
        total = _multiply_bytes(b, high, x[1], _multiply_bytes(b, low, x[0], total))
        total = b.shl(total, constant(lanes, 8))
        return _multiply_bytes(b, high, x[3], _multiply_bytes(b, low, x[2], total))
    for i, values in enumerate(x):  # a nibble of each word
        nibbles = b.and_(shifted(4 * i), constant(words, 15))
        total = b.add(total, _multiply_pairs(b, nibbles, b.bitcast(values, words)))
    return total


def _dot_i4(group: int) -> Any:
    """Return `dot(codes, scales, minimums, distance, x, sums, n, factor, y)` of ROWS rows in groups of columns.

    y[row] = factor * the sum over groups of scale * sum(code * x) + minimum * sum(x), where x is the int16 activations
    as `order_for_i4` leaves them, sums those of each 32, and n how many 32 there are. The codes of a row are
    `distance` times 16 bytes before those of the next: n, or 0 for the same row again.
    """
    share = group // 32

    @intrinsic
    def dot(
        typing_context: Any,
        codes: Any,
        scales: Any,
        minimums: Any,
        distance: Any,
        x: Any,
        sums: Any,
        n: Any,
        factor: Any,
        y: Any,
    ) -> Any:
        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, minimums, distance, x, sums, n, factor, y = arguments
            constant = lambda v: ir.Constant(n.type, v)  # noqa: E731

            def step(row: Any, first: Any, count: int, total: Any, offset: Any) -> None:
                """Do `count` times 32 columns."""
                begin = b.add(first, b.mul(distance, row))
                group = b.udiv(begin, constant(share))
                kind = _vector(I16, count // share)
                factors, lowest = (_half(b, _load(b, _offset(b, part, group, 2), kind)) for part in (scales, minimums))
                lowest = _shuffle(b, lowest, lowest, [i // share for i in range(count)])
                lowest = _multiply_add(b, lowest, _load(b, _offset(b, sums, first, 4), lowest.type), b.load(offset))
                b.store(lowest, offset)
                unit = UNIT if count >= UNIT else 1
                kind = _vector(I8, 16 * unit)
                for i in range(0, count, unit):
                    at = _offset(b, _offset(b, x, first, 64), 64 * i)
                    values = [_load(b, _offset(b, at, 16 * unit * part), kind) for part in range(4)]
                    address = _offset(b, _offset(b, codes, begin, 16), 16 * i)
                    _prefetch(b, _offset(b, address, AHEAD))
                    packed = _load(b, address, kind)
                    products = b.sitofp(_multiply_nibbles(b, packed, values), _vector(F32, 4 * unit))
                    scale = _shuffle(b, factors, factors, [(i + j // 4) // share for j in range(4 * unit)])
                    b.store(_multiply_add(b, products, scale, b.load(total)), total)

            # a vector at a time, then group by group
            counts = sorted({max(UNIT, share), share}, reverse=True)
            rows = {count: _vector(F32, 4 * (UNIT if count >= UNIT else 1)) for count in counts}
            memory = {count: cgutils.alloca_once(b, ir.ArrayType(kind, ROWS)) for count, kind in rows.items()}
            with cgutils.for_range(b, constant(ROWS)) as row:
                done = constant(0)
                for count, kind in rows.items():
                    (total,), (offset,) = (_accumulators(b, k, 1) for k in (kind, _vector(F32, count)))
                    b.store(ir.Constant(kind, None), total)
                    b.store(ir.Constant(offset.type.pointee, None), offset)
                    steps = b.udiv(b.sub(n, done), constant(count))
                    with cgutils.for_range(b, steps) as loop:
                        step(row.index, b.add(done, b.mul(loop.index, constant(count))), count, total, offset)
                    done = b.add(done, b.mul(steps, constant(count)))
                    lowest = b.load(offset)
                    lanes = [min(i, count) for i in range(kind.count)]
                    lowest = _shuffle(b, lowest, ir.Constant(lowest.type, None), lanes)
                    b.store(b.fadd(b.load(total), lowest), cgutils.gep_inbounds(b, memory[count], 0, row.index))
            result = ir.Constant(_vector(F32, ROWS), None)
            for array in memory.values():
                vectors = [b.load(cgutils.gep_inbounds(b, array, 0, i)) for i in range(ROWS)]
                result = b.fadd(result, _sum_rows(b, vectors))
            _store(b, b.fmul(result, _broadcast(b, factor, result.type)), y)
            return context.get_dummy_value()

        return types.void(*[int64] * 7, float32, int64), build

    return dot


dot_i4_g32, dot_i4_g64, dot_i4_g128 = _dot_i4(32), _dot_i4(64), _dot_i4(128)


@intrinsic
def order_for_i4(typing_context: Any, x: Any, y: Any, n: Any) -> Any:
    """Copy n times 32 int16 activations in the order in which `dot_i4` takes them: four vectors for UNIT times 32.

    With BYTES they are the upper bytes, rounded, of columns 0..15 and 16..31 of each 32, then the lower bytes.
    Without, the columns of the four nibbles of a word: 0, 2, .. 14, then 16, .. 30, then the odd ones.
    """

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        x, y, n = arguments
        constant = lambda v: ir.Constant(n.type, v)  # noqa: E731
        done = constant(0)
        for unit in sorted({UNIT, 1}, reverse=True):
            steps = b.udiv(b.sub(n, done), constant(unit))
            with cgutils.for_range(b, steps) as loop:
                start = b.mul(b.add(done, b.mul(loop.index, constant(unit))), constant(64))
                values = _load(b, b.add(x, start), _vector(I16, 32 * unit))
                if BYTES:
                    split = _vector(I8, 64 * unit)
                    upper = b.bitcast(b.add(values, ir.Constant(values.type, [128] * 32 * unit)), split)
                    lower = b.bitcast(values, split)
                    take = [
                        (source, 2 * first + byte, 2, 16)
                        for source, byte in ((upper, 1), (lower, 0))
                        for first in (0, 16)
                    ]
                    size = 64
                else:
                    take = [(values, first, 2, 8) for first in (0, 16, 1, 17)]
                    size = 32
                for i, (source, first, stride, n_lanes) in enumerate(take):
                    lanes = [size * g + first + stride * j for g in range(unit) for j in range(n_lanes)]
                    _store(b, _shuffle(b, source, source, lanes), _offset(b, b.add(y, start), 16 * unit * i))
            done = b.add(done, b.mul(steps, constant(unit)))
        return context.get_dummy_value()

    return types.void(int64, int64, int64), build


def _multiply_tile(b: Any, arguments: Any, totals: Any, line: Any, multiply_add: Callable[..., Any]) -> None:
    """Add PANEL rows of an unpacked matrix times TILE tokens to totals[token][half of the panel].

    Each of n steps takes one line of the panel (lane = row) and one word of each token, which is broadcast:
    2 * TILE multiply-adds for 2 + TILE loads, and no sum across lanes at the end. A word is 4 bytes: a float32, two
    int16 or four int8. Strides are in bytes.
    """
    panel, panel_stride, x, x_stride, n = arguments
    word = b.load(totals[0][0]).type.element
    lanes = _vector(word, LANES)
    tokens = [b.add(x, b.mul(x_stride, ir.Constant(n.type, t))) for t in range(TILE)]
    with cgutils.for_range(b, n) as loop:
        at = b.add(panel, b.mul(loop.index, panel_stride))
        rows = [_load(b, _offset(b, at, VECTOR * i), line, 4) for i in range(2)]
        for token, sums in zip(tokens, totals, strict=True):
            spread = b.bitcast(_broadcast(b, _load(b, _offset(b, token, loop.index, 4), word, 4), lanes), line)
            for row, total in zip(rows, sums, strict=True):
                b.store(multiply_add(b, row, spread, b.load(total)), total)


def _tile(word: Any, line: Any, multiply_add: Callable[..., Any]) -> Any:
    """Return `tile(panel, panel_stride, x, x_stride, n, y, y_stride)`: y[token, row] = the products."""

    @intrinsic
    def tile(
        typing_context: Any, panel: Any, panel_stride: Any, x: Any, x_stride: Any, n: Any, y: Any, y_stride: Any
    ) -> Any:
        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            *factors, y, y_stride = arguments
            totals = [_accumulators(b, _vector(word, LANES), 2) for _ in range(TILE)]
            _multiply_tile(b, factors, totals, line, multiply_add)
            for t, halves in enumerate(totals):
                for i, total in enumerate(halves):
                    _store(b, b.load(total), _offset(b, b.add(y, b.mul(y_stride, ir.Constant(y.type, t))), VECTOR * i))
            return context.get_dummy_value()

        return types.void(*[int64] * 7), build

    return tile


tile_f32 = _tile(F32, _vector(F32, LANES), _multiply_add)
tile_i16 = _tile(I32, _vector(I16, 2 * LANES), lambda b, w, x, total: b.add(total, _multiply_pairs(b, w, x)))


@intrinsic
def tile_i8(
    typing_context: Any, panel: Any, x: Any, x_stride: Any, n: Any, scales: Any, excesses: Any, stride: Any, y: Any
) -> Any:
    """Add a group of int8 activations to y, float32 [TILE, PANEL]: (uint8 w * x - excess) * scale, both per token."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        panel, x, x_stride, n, scales, excesses, stride, y = arguments
        at = [b.mul(stride, ir.Constant(stride.type, t)) for t in range(TILE)]
        lanes = _vector(I32, LANES)
        totals = []
        for t in range(TILE):
            excess = b.sub(ir.Constant(I32, 0), _load(b, b.add(excesses, at[t]), I32, 4))
            totals.append([cgutils.alloca_once_value(b, _broadcast(b, excess, lanes)) for _ in range(2)])
        step = ir.Constant(n.type, 2 * VECTOR)
        _multiply_tile(b, (panel, step, x, x_stride, n), totals, _vector(I8, 4 * LANES), _multiply_bytes)
        for t, halves in enumerate(totals):
            scale = _broadcast(b, _load(b, b.add(scales, at[t]), F32, 4), _vector(F32, LANES))
            for i, total in enumerate(halves):
                to = _offset(b, y, (2 * t + i) * VECTOR)
                before = _load(b, to, scale.type, 4)
                _store(b, _multiply_add(b, b.sitofp(b.load(total), scale.type), scale, before), to)
        return context.get_dummy_value()

    return types.void(*[int64] * 8), build


def _pack(unit: Any, widen: Callable[[Any, Any], Any]) -> Any:
    """Return the intrinsic that unpacks PANEL rows for a tile: `pack(rows, row_bytes, n_units, panel)`.

    A unit is what one lane of the panel holds of one row. Squares of LANES x LANES units are transposed in registers
    by perfect shuffles, as many times as 2 goes into LANES, and each line widened to 4 bytes a lane: ten
    times as fast as unit by unit. What does not fill a square, n_units % LANES, is left to the caller.
    """
    size = unit.width // 8

    @intrinsic
    def pack(typing_context: Any, rows: Any, row_bytes: Any, n_units: Any, panel: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            rows, row_bytes, n_units, panel = arguments
            constant = lambda v: ir.Constant(n_units.type, v)  # noqa: E731
            low = [lane // 2 + lane % 2 * LANES for lane in range(LANES)]
            high = [lane + LANES // 2 for lane in low]
            with cgutils.for_range(b, b.udiv(n_units, constant(LANES))) as loop:
                first = b.mul(loop.index, constant(LANES))
                for half_panel in range(2):
                    square = []
                    for row in range(LANES):
                        at = b.add(rows, b.mul(row_bytes, constant(half_panel * LANES + row)))
                        square.append(_load(b, _offset(b, at, first, size), _vector(unit, LANES)))
                    for _ in range(LANES.bit_length() - 1):
                        pairs = list(zip(square[: LANES // 2], square[LANES // 2 :], strict=True))
                        square = [_shuffle(b, v, w, lanes) for v, w in pairs for lanes in (low, high)]
                    for i, line in enumerate(square):
                        at = _offset(b, _offset(b, panel, first, 2 * VECTOR), i * 2 * VECTOR + half_panel * VECTOR)
                        _store(b, widen(b, line), at)
            return context.get_dummy_value()

        return types.void(int64, int64, int64, int64), build

    return pack


def _widen_codes(b: Any, pairs: Any) -> Any:
    return b.sext(b.bitcast(pairs, _vector(I8, 2 * LANES)), _vector(I16, 2 * LANES))


pack_squares_i8 = _pack(I16, _widen_codes)  # a unit is two int8, which become two int16
pack_squares_u8 = _pack(I32, lambda b, codes: b.xor(codes, ir.Constant(codes.type, [0x80808080] * LANES)))  # + 128
pack_squares_f16 = _pack(I16, _half)
pack_squares_f32 = _pack(I32, lambda b, line: line)

# ---------------------------------------------------------------------------------------------------------------------
# Scalar functions: polynomials, so that LLVM vectorizes the loops around them and no mathematical library is needed
# ---------------------------------------------------------------------------------------------------------------------


@njit(**EXACT)
def nearest(x):
    """Round to the nearest integer, ties to even: a float32 of size 2^23 has no room for a fraction. |x| < 2^22."""
    return int32((x + float32(12582912.0)) - float32(12582912.0))


@njit(**EXACT)
def exp(x):
    """e^x with a relative error below 2e-7: 2^n times the Taylor polynomial of the rest, |rest| <= ln(2) / 2."""
    x = min(max(x, float32(-87.0)), float32(88.0))
    n = nearest(x * float32(1.44269504))
    rest = x - float32(n) * float32(0.693359375) - float32(n) * float32(-2.12194440e-4)  # ln 2 in two parts
    p = float32(1 / 720)
    p = p * rest + float32(1 / 120)
    p = p * rest + float32(1 / 24)
    p = p * rest + float32(1 / 6)
    p = p * rest + float32(0.5)
    p = p * rest * rest + rest + float32(1)
    return p * float_of_bits(int32(int32(n + int32(127)) << int32(23)))


@njit(**EXACT)
def gelu_new(x):
    """GELU by its tanh approximation; 0.5 x (1 + tanh u) is x * sigmoid(2u)."""
    u = float32(1.5957691216) * x * (float32(1) + float32(0.044715) * x * x)
    return x / (float32(1) + exp(-u))


@njit(**EXACT)
def gelu(x):
    """Exact GELU, x * Phi(x), by Numerical Recipes' Chebyshev fit of erfc."""
    z = abs(x) * float32(0.70710678)
    t = float32(1) / (float32(1) + float32(0.5) * z)
    p = float32(0.17087277)
    p = p * t + float32(-0.82215223)
    p = p * t + float32(1.48851587)
    p = p * t + float32(-1.13520398)
    p = p * t + float32(0.27886807)
    p = p * t + float32(-0.18628806)
    p = p * t + float32(0.09678418)
    p = p * t + float32(0.37409196)
    p = p * t + float32(1.00002368)
    p = p * t + float32(-1.26551223)
    tail = float32(0.5) * t * exp(p - z * z)
    return x * (float32(1) - tail if x >= float32(0) else tail)


@njit(**EXACT)
def silu(x):
    """Return x * sigmoid(x)."""
    return x / (float32(1) + exp(-x))


@njit(**HELP)
def activate(function, x, bias, y, n):
    """y[i] = f(x[i] + bias[i]); the choice of f stands outside the loops, which are then vectorized."""
    never_inline()
    x, bias, y = f32(x), f32(bias), f32(y)
    if function == 0:
        for i in range(n):
            y[i] = gelu_new(x[i] + bias[i])
    elif function == 1:
        for i in range(n):
            y[i] = gelu(x[i] + bias[i])
    elif function == 2:
        for i in range(n):
            y[i] = max(x[i] + bias[i], float32(0))
    else:
        for i in range(n):
            y[i] = silu(x[i] + bias[i])


# ---------------------------------------------------------------------------------------------------------------------
# Activations: what a matrix takes
# ---------------------------------------------------------------------------------------------------------------------


@njit(**HELP)
def layer_norm(x, gain, bias, epsilon, y, n):
    """Normalize n floats to mean 0 and variance 1, then scale and shift (Ba et al. 2016)."""
    never_inline()
    x, gain, bias, y = f32(x), f32(gain), f32(bias), f32(y)
    total = float32(0)
    for i in range(n):
        total += x[i]
    mean = total / float32(n)
    total = float32(0)
    for i in range(n):
        total += (x[i] - mean) * (x[i] - mean)
    factor = float32(1) / square_root(total / float32(n) + epsilon)
    for i in range(n):
        y[i] = (x[i] - mean) * factor * gain[i] + bias[i]


@njit(**HELP)
def largest(x, n, magnitude):
    """Return the largest of n floats, or of their magnitudes.

    Compared as integers, in which a loop of maxima is vectorized although NaN is allowed.
    """
    never_inline()
    x = i32(x)
    top = int32(-(2**31))
    if magnitude:
        for i in range(n):
            top = max(top, int32(x[i] & int32(0x7FFFFFFF)))
        return float_of_bits(top)
    for i in range(n):  # negative floats have descending bits: turn them round
        top = max(top, int32(x[i] ^ int32(int32(x[i] >> int32(31)) & int32(0x7FFFFFFF))))
    return float_of_bits(int32(top ^ int32(int32(top >> int32(31)) & int32(0x7FFFFFFF))))


@njit(**HELP)
def quantize(x, token, n_in, levels):
    """Round a token's float activations to integers -levels..levels with one scale, and sum up each 32 of them."""
    never_inline()
    x = i64(x)
    stride, padded = x[X_STRIDE], (n_in + 127) // 128 * 128  # the widest group
    source = x[X_FLOAT] + token * x[X_FLOAT_STRIDE] * 4
    scale = max(largest(source, n_in, True), float32(1e-9)) / float32(levels)
    f32(x[X_SCALES])[token] = scale
    inverse = float32(1) / scale
    source, codes = f32(source), i16(x[X_CODES] + token * stride * 2)
    for i in range(n_in):
        codes[i] = nearest(source[i] * inverse)
    for i in range(n_in, padded):
        codes[i] = 0
    sums = f32(x[X_SUMS] + token * stride // 32 * 4)
    for group in range(padded // 32):
        total = int32(0)
        for i in range(32 * group, 32 * group + 32):
            total = int32(total + int32(codes[i]))
        sums[group] = float32(total)


@njit(**HELP)
def quantize_to_bytes(x, token, n_in):
    """Round a token's float activations to int8, each GROUP of them with a scale and a sum of its own."""
    never_inline()
    x = i64(x)
    stride = x[X_STRIDE]
    source, codes = x[X_FLOAT] + token * x[X_FLOAT_STRIDE] * 4, i8(x[X_CODES] + token * stride)
    first = token * stride // 32
    for begin in range(0, n_in, GROUP):
        n, group = min(GROUP, n_in - begin), first + begin // GROUP
        scale = max(largest(source + begin * 4, n, True), float32(1e-9)) / float32(127)
        inverse, total, values = float32(1) / scale, int32(0), f32(source)
        for i in range(begin, begin + n):
            code = nearest(values[i] * inverse)
            codes[i] = code
            total = int32(total + code)
        f32(x[X_GROUP_SCALES])[group] = scale
        i32(x[X_SUMS])[group] = int32(total * int32(128))
    for i in range(n_in, (n_in + 63) // 64 * 64):
        codes[i] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Matrices: matmul_<encoding>(w, x, y, y_stride, n_tokens, row_begin, row_end) and rows_<encoding>(w, row, y)
#
# y[token * y_stride + row] = sum over i of W[row, i] * x[token, i], float32. Few tokens: the weights stream by once,
# row by row, each row times every token while it is in the L1 cache. Many tokens: PANEL rows are unpacked once
# and multiplied by TILE tokens at a time.
# ---------------------------------------------------------------------------------------------------------------------


@njit(**HELP)
def matmul_tiles_i16(x, y, y_stride, n_tokens, row, n_rows, scales, n_in):
    """Multiply the int16 panel in x's scratch (pairs along n_in) by all tokens."""
    never_inline()
    x = i64(x)
    scales, x_scales, products = f32(scales), f32(x[X_SCALES]), i32(x[X_TILE])
    for begin in range(0, n_tokens, TILE):
        first = min(begin, n_tokens - TILE)  # the last tile overlaps the one before and gives the same again
        codes = x[X_CODES] + first * x[X_STRIDE] * 2
        tile_i16(x[X_PANEL], 2 * VECTOR, codes, x[X_STRIDE] * 2, (n_in + 1) // 2, x[X_TILE], PANEL * 4)
        for t in range(TILE):
            to = f32(y + ((first + t) * y_stride + row) * 4)
            scale = x_scales[first + t]
            for r in range(n_rows):
                to[r] = float32(products[t * PANEL + r]) * scales[r] * scale


@njit(**HELP)
def matmul_tiles_i8(x, y, y_stride, n_tokens, row, n_rows, scales, n_in):
    """Multiply the uint8 panel in x's scratch (fours along n_in, 128 too large) by all tokens in int8."""
    never_inline()
    x = i64(x)
    scales, totals, stride = f32(scales), f32(x[X_TILE]), x[X_STRIDE]
    for begin in range(0, n_tokens, TILE):
        first = min(begin, n_tokens - TILE)
        for i in range(TILE * PANEL):
            totals[i] = 0
        for start in range(0, n_in, GROUP):
            n = (min(GROUP, n_in - start) + 3) // 4
            panel, codes = x[X_PANEL] + start // 4 * 2 * VECTOR, x[X_CODES] + first * stride + start
            group = (first * stride // 32 + start // GROUP) * 4
            tile_i8(panel, codes, stride, n, x[X_GROUP_SCALES] + group, x[X_SUMS] + group, stride // 8, x[X_TILE])
        for t in range(TILE):
            to = f32(y + ((first + t) * y_stride + row) * 4)
            for r in range(n_rows):
                to[r] = totals[t * PANEL + r] * scales[r]


@njit(**HELP)
def matmul_tiles_f32(x, y, y_stride, n_tokens, row, n_rows, n_in):
    """Multiply the float32 panel in x's scratch by all tokens."""
    never_inline()
    x = i64(x)
    products = f32(x[X_TILE])
    for begin in range(0, n_tokens, TILE):
        first = min(begin, n_tokens - TILE)
        source = x[X_FLOAT] + first * x[X_FLOAT_STRIDE] * 4
        tile_f32(x[X_PANEL], 2 * VECTOR, source, x[X_FLOAT_STRIDE] * 4, n_in, x[X_TILE], PANEL * 4)
        for t in range(TILE):
            to = f32(y + ((first + t) * y_stride + row) * 4)
            for r in range(n_rows):
                to[r] = products[t * PANEL + r]


def _matmul_codes(unpack: Any) -> Any:
    """Return `matmul(..., scales)`: codes int8 times int16 activations, one scale per row and one per token.

    `unpack(w, row, n_rows, scratch)` returns where the codes of rows begin, in the file or in the scratch, and how far
    a row is from the next.
    """
    matmul_by_tiles = _matmul_codes_by_tiles(unpack)

    @njit(**HELP)
    def matmul_codes(w, x, y, y_stride, n_tokens, row_begin, row_end, scales):
        if n_tokens >= TILE:
            matmul_by_tiles(w, x, y, y_stride, n_tokens, row_begin, row_end, scales)
            return
        n_in, xs = i64(w)[W_N_IN], i64(x)
        scales, x_codes, x_bytes, x_scales = f32(scales), xs[X_CODES], xs[X_STRIDE] * 2, f32(xs[X_SCALES])
        whole = n_in // (VECTOR // 2) * (VECTOR // 2)
        for row in range(row_begin, row_end):
            codes, _ = unpack(w, row, 1, xs[X_PANEL])
            for token in range(n_tokens):
                source = x_codes + token * x_bytes
                total = dot_i8(codes, source, n_in)
                for i in range(whole, n_in):
                    total = int32(total + int32(int32(i8(codes)[i]) * int32(i16(source)[i])))
                f32(y)[token * y_stride + row] = float32(total) * scales[row] * x_scales[token]

    return matmul_codes


def _matmul_codes_by_tiles(unpack: Any) -> Any:
    """Return the same for TILE tokens or more; the unpacked codes follow the panel in the scratch."""

    @njit(**HELP)
    def matmul_codes_by_tiles(w, x, y, y_stride, n_tokens, row_begin, row_end, scales):
        n_in, xs = i64(w)[W_N_IN], i64(x)
        panel = xs[X_PANEL]
        for row in range(row_begin, row_end, PANEL):
            n_rows = min(PANEL, row_end - row)
            codes, row_bytes = unpack(w, row, n_rows, panel + 2 * PANEL * xs[X_STRIDE])
            if BYTES:
                pack_bytes(codes, row_bytes, n_in, n_rows, panel)
                matmul_tiles_i8(x, y, y_stride, n_tokens, row, n_rows, scales + row * 4, n_in)
            else:
                pack_pairs(codes, row_bytes, n_in, n_rows, panel)
                matmul_tiles_i16(x, y, y_stride, n_tokens, row, n_rows, scales + row * 4, n_in)

    return matmul_codes_by_tiles


@njit(**HELP)
def unpack_int8(w, row, n_rows, scratch):
    """Nothing to unpack."""
    n_in = i64(w)[W_N_IN]
    return i64(w)[W_PART_0] + row * n_in, n_in


matmul_codes_of_int8 = _matmul_codes(unpack_int8)


@entry(7)
def matmul_int8(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes [n_out, n_in], scales [n_out]."""
    matmul_codes_of_int8(w, x, y, y_stride, n_tokens, row_begin, row_end, i64(w)[W_PART_1])


@njit(**HELP)
def pack_bytes(codes, row_bytes, n_in, n_rows, panel):
    """Spread rows over lanes: panel[four, row] = codes[row, 4 four .. 4 four + 3] + 128 as uint8."""
    never_inline()
    done = 0
    if n_rows == PANEL:
        pack_squares_u8(codes, row_bytes, n_in // 4, panel)
        done = n_in // 4 // LANES * LANES * 4
    panel = u8(panel)
    for r in range(n_rows):
        source = i8(codes + r * row_bytes)
        for i in range(done, n_in):
            panel[(i // 4 * PANEL + r) * 4 + i % 4] = source[i] + 128


@njit(**HELP)
def pack_pairs(codes, row_bytes, n_in, n_rows, panel):
    """Spread rows over lanes: panel[pair, row] = (codes[row, 2 pair], codes[row, 2 pair + 1]) as int16."""
    never_inline()
    n_pairs, done = n_in // 2, 0
    if n_rows == PANEL:
        pack_squares_i8(codes, row_bytes, n_pairs, panel)
        done = n_pairs // LANES * LANES
    panel = i16(panel)
    for r in range(n_rows):
        source = i8(codes + r * row_bytes)
        for i in range(2 * done, n_in):
            panel[(i // 2 * PANEL + r) * 2 + i % 2] = source[i]
        if n_in % 2:
            panel[(n_pairs * PANEL + r) * 2 + 1] = 0


@entry(3)
def rows_int8(w, row, y):
    """Decode one row into float32."""
    w, y = i64(w), f32(y)
    codes, scale = i8(w[W_PART_0] + row * w[W_N_IN]), f32(w[W_PART_1])[row]
    for i in range(w[W_N_IN]):
        y[i] = float32(codes[i]) * scale


@njit(**HELP)
def unpack_bitmap_int8(w, row, n_rows, scratch):
    """Put the zeros of rows back."""
    w = i64(w)
    n_columns = (w[W_N_IN] + 31) // 32 * 32
    row_bytes = (n_columns + 63) // 64 * 64
    for r in range(n_rows):
        bits, values = w[W_PART_0] + (row + r) * n_columns // 8, w[W_PART_2] + u32(w[W_PART_1])[row + r]
        expand_any(bits, values, n_columns, scratch + r * row_bytes)
    return scratch, row_bytes


matmul_codes_of_bitmap_int8 = _matmul_codes(unpack_bitmap_int8)


@entry(7)
def matmul_bitmap_int8(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Bitmap [n_out, n_in / 8], offsets [n_out + 1], values, scales [n_out]."""
    matmul_codes_of_bitmap_int8(w, x, y, y_stride, n_tokens, row_begin, row_end, i64(w)[W_PART_3])


@entry(3)
def rows_bitmap_int8(w, row, y):
    """Decode one row into float32."""
    w = i64(w)
    bits, values = w[W_PART_0] + row * ((w[W_N_IN] + 31) // 32 * 4), w[W_PART_2] + u32(w[W_PART_1])[row]
    decode_bitmap(bits, values, f32(w[W_PART_3])[row], y, w[W_N_IN])


@njit(**HELP)
def decode_bitmap(bits, values, scale, y, n_in):
    """Write the n_in floats that a bitmap and int8 values stand for."""
    bits, values, y, place = u8(bits), i8(values), f32(y), 0
    for i in range(n_in):
        kept = int64(bits[i // 8]) >> (i % 8) & 1
        y[i] = float32(values[place]) * scale if kept else float32(0)
        place += kept


@njit(**HELP)
def unpack_nm_int8(w, row, n_rows, scratch):
    """Put the zeros of rows back."""
    w = i64(w)
    n_columns = (w[W_N_IN] + 31) // 32 * 32
    row_bytes = (n_columns + 63) // 64 * 64
    for r in range(n_rows):
        masks, codes = w[W_PART_0] + (row + r) * n_columns // 8, w[W_PART_1] + (row + r) * n_columns // 2
        expand_half(masks, codes, n_columns, scratch + r * row_bytes)
    return scratch, row_bytes


matmul_codes_of_nm_int8 = _matmul_codes(unpack_nm_int8)


@entry(7)
def matmul_nm_int8(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Masks [n_out, n_in / 8] with 4 bits each, codes [n_out, n_in / 2], scales [n_out]."""
    matmul_codes_of_nm_int8(w, x, y, y_stride, n_tokens, row_begin, row_end, i64(w)[W_PART_2])


@entry(3)
def rows_nm_int8(w, row, y):
    """Decode one row into float32."""
    w = i64(w)
    n_columns = (w[W_N_IN] + 31) // 32 * 32
    masks, codes = w[W_PART_0] + row * n_columns // 8, w[W_PART_1] + row * n_columns // 2
    decode_bitmap(masks, codes, f32(w[W_PART_2])[row], y, w[W_N_IN])


@njit(**HELP)
def unpack_block_int8(w, row, n_rows, scratch):
    """Put the empty blocks of rows back."""
    w = i64(w)
    pointers, columns = u32(w[W_PART_0]), u16(w[W_PART_1])
    row_bytes = (w[W_N_IN] + 31) // 32 * 32
    to = i64(scratch)
    for i in range(n_rows * row_bytes // 8):
        to[i] = 0
    for r in range(n_rows):
        for block in range(int64(pointers[row + r]), int64(pointers[row + r + 1])):
            source, to = i64(w[W_PART_2] + block * 32), i64(scratch + r * row_bytes + columns[block] * 32)
            for i in range(4):
                to[i] = source[i]
    return scratch, row_bytes


matmul_blocks_by_tiles = _matmul_codes_by_tiles(unpack_block_int8)


@entry(7)
def matmul_block_int8(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Pointers [n_out + 1], columns [n_blocks], codes [n_blocks, 32], scales [n_out]: what is not stored is skipped."""
    if n_tokens >= TILE:
        matmul_blocks_by_tiles(w, x, y, y_stride, n_tokens, row_begin, row_end, i64(w)[W_PART_3])
        return
    w, xs = i64(w), i64(x)
    pointers, scales = u32(w[W_PART_0]), f32(w[W_PART_3])
    x_codes, x_bytes, x_scales = xs[X_CODES], xs[X_STRIDE] * 2, f32(xs[X_SCALES])
    for row in range(row_begin, row_end):
        first = int64(pointers[row])
        n = (int64(pointers[row + 1]) - first) * 32
        for token in range(n_tokens):
            total = dot_blocks(w[W_PART_2] + first * 32, w[W_PART_1] + first * 2, x_codes + token * x_bytes, n)
            f32(y)[token * y_stride + row] = float32(total) * scales[row] * x_scales[token]


@entry(3)
def rows_block_int8(w, row, y):
    """Decode one row into float32; the last block of a row may reach beyond it."""
    w, y = i64(w), f32(y)
    n_in, pointers, scale = w[W_N_IN], u32(w[W_PART_0]), f32(w[W_PART_3])[row]
    for i in range(n_in):
        y[i] = 0
    for block in range(int64(pointers[row]), int64(pointers[row + 1])):
        codes, begin = i8(w[W_PART_2] + block * 32), int64(u16(w[W_PART_1])[block]) * 32
        for i in range(min(32, n_in - begin)):
            y[begin + i] = float32(codes[i]) * scale


def _matmul_int8_groups(dot: Any, group: int) -> Any:
    """Return `matmul`: codes int8, padded to whole groups with a scale in f16 each, times int16 activations.

    Tiles are of floats: rounding to one scale a row would lose what the groups are for.
    """

    @njit(**HELP)
    def matmul_int8_groups(w, x, y, y_stride, n_tokens, row_begin, row_end):
        n_in, xs = i64(w)[W_N_IN], i64(x)
        if n_tokens >= TILE:
            for row in range(row_begin, row_end, PANEL):
                n_rows = min(PANEL, row_end - row)
                for r in range(n_rows):
                    unpack_int8_groups(w, row + r, xs[X_PANEL] + r * 4, PANEL, n_in, group)
                matmul_tiles_f32(x, y, y_stride, n_tokens, row, n_rows, n_in)
            return
        n_groups = (n_in + group - 1) // group
        x_codes, x_bytes, x_scales = xs[X_CODES], xs[X_STRIDE] * 2, f32(xs[X_SCALES])
        for row in range(row_begin, row_end):
            codes, scales = i64(w)[W_PART_0] + row * n_groups * group, i64(w)[W_PART_1] + row * n_groups * 2
            for token in range(n_tokens):
                total = dot(codes, scales, x_codes + token * x_bytes, n_groups)
                f32(y)[token * y_stride + row] = total * x_scales[token]

    return matmul_int8_groups


@njit(**HELP)
def unpack_int8_groups(w, row, y, step, n_in, group):
    """Decode a row into the floats y[0], y[step], y[2 step], ..."""
    w, y = i64(w), f32(y)
    n_groups = (n_in + group - 1) // group
    codes, scales = i8(w[W_PART_0] + row * n_groups * group), u16(w[W_PART_1] + row * n_groups * 2)
    for begin in range(0, n_in, group):
        scale = half(scales[begin // group])
        for i in range(begin, min(begin + group, n_in)):
            y[i * step] = float32(codes[i]) * scale


matmul_int8_by_32 = _matmul_int8_groups(dot_i8_g32, 32)


@entry(7)
def matmul_int8_g32(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes [n_out, n_in], scales f16 [n_out, n_in / 32]."""
    matmul_int8_by_32(w, x, y, y_stride, n_tokens, row_begin, row_end)


@entry(3)
def rows_int8_g32(w, row, y):
    """Decode one row into float32."""
    unpack_int8_groups(w, row, y, 1, i64(w)[W_N_IN], 32)


matmul_int8_by_64 = _matmul_int8_groups(dot_i8_g64, 64)


@entry(7)
def matmul_int8_g64(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes [n_out, n_in], scales f16 [n_out, n_in / 64]."""
    matmul_int8_by_64(w, x, y, y_stride, n_tokens, row_begin, row_end)


@entry(3)
def rows_int8_g64(w, row, y):
    """Decode one row into float32."""
    unpack_int8_groups(w, row, y, 1, i64(w)[W_N_IN], 64)


matmul_int8_by_128 = _matmul_int8_groups(dot_i8_g128, 128)


@entry(7)
def matmul_int8_g128(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes [n_out, n_in], scales f16 [n_out, n_in / 128]."""
    matmul_int8_by_128(w, x, y, y_stride, n_tokens, row_begin, row_end)


@entry(3)
def rows_int8_g128(w, row, y):
    """Decode one row into float32."""
    unpack_int8_groups(w, row, y, 1, i64(w)[W_N_IN], 128)


@entry(7)
def matmul_f32(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Plain float32 [n_out, n_in]."""
    w, xs = i64(w), i64(x)
    n_in, matrix = w[W_N_IN], w[W_PART_0]
    if n_tokens >= TILE:
        for row in range(row_begin, row_end, PANEL):
            n_rows = min(PANEL, row_end - row)
            pack_f32(matrix + row * n_in * 4, n_in, n_rows, xs[X_PANEL])
            matmul_tiles_f32(x, y, y_stride, n_tokens, row, n_rows, n_in)
        return
    x_floats, x_bytes = xs[X_FLOAT], xs[X_FLOAT_STRIDE] * 4
    for row in range(row_begin, row_end):
        values = f32(matrix + row * n_in * 4)
        for token in range(n_tokens):
            source, total = f32(x_floats + token * x_bytes), float32(0)
            for i in range(n_in):
                total += values[i] * source[i]
            f32(y)[token * y_stride + row] = total


@njit(**HELP)
def pack_f32(values, n_in, n_rows, panel):
    """Spread rows over lanes: panel[i, row] = values[row, i]."""
    never_inline()
    done = 0
    if n_rows == PANEL:
        pack_squares_f32(values, n_in * 4, n_in, panel)
        done = n_in // LANES * LANES
    values, panel = f32(values), f32(panel)
    for r in range(n_rows):
        for i in range(done, n_in):
            panel[i * PANEL + r] = values[r * n_in + i]


@entry(3)
def rows_f32(w, row, y):
    """Copy one row."""
    w, y = i64(w), f32(y)
    values = f32(w[W_PART_0] + row * w[W_N_IN] * 4)
    for i in range(w[W_N_IN]):
        y[i] = values[i]


@entry(7)
def matmul_f16(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """float16 [n_out, n_in], widened as it streams by."""
    w, xs = i64(w), i64(x)
    n_in, matrix = w[W_N_IN], w[W_PART_0]
    if n_tokens >= TILE:
        for row in range(row_begin, row_end, PANEL):
            n_rows = min(PANEL, row_end - row)
            pack_f16(matrix + row * n_in * 2, n_in, n_rows, xs[X_PANEL])
            matmul_tiles_f32(x, y, y_stride, n_tokens, row, n_rows, n_in)
        return
    x_floats, x_bytes = xs[X_FLOAT], xs[X_FLOAT_STRIDE] * 4
    for row in range(row_begin, row_end):
        values = u16(matrix + row * n_in * 2)
        for token in range(n_tokens):
            source, total = f32(x_floats + token * x_bytes), float32(0)
            for i in range(n_in):
                total += half(values[i]) * source[i]
            f32(y)[token * y_stride + row] = total


@njit(**HELP)
def pack_f16(values, n_in, n_rows, panel):
    """Widen and spread rows over lanes: panel[i, row] = values[row, i]."""
    never_inline()
    done = 0
    if n_rows == PANEL:
        pack_squares_f16(values, n_in * 2, n_in, panel)
        done = n_in // LANES * LANES
    values, panel = u16(values), f32(panel)
    for r in range(n_rows):
        for i in range(done, n_in):
            panel[i * PANEL + r] = half(values[r * n_in + i])


@entry(3)
def rows_f16(w, row, y):
    """Decode one row into float32."""
    w, y = i64(w), f32(y)
    values = u16(w[W_PART_0] + row * w[W_N_IN] * 2)
    for i in range(w[W_N_IN]):
        y[i] = half(values[i])


def _matmul_int4(dot: Any, group: int) -> Any:
    """Return `matmul`: codes 0..15 times int16 activations; a row is padded to whole groups."""

    @njit(**HELP)
    def matmul_int4_groups(w, x, y, y_stride, n_tokens, row_begin, row_end):
        if n_tokens >= TILE:
            matmul_int4_by_tiles(w, x, y, y_stride, n_tokens, row_begin, row_end, group)
            return
        w, xs = i64(w), i64(x)
        n_groups = (w[W_N_IN] + group - 1) // group
        n = n_groups * (group // 32)
        ordered, x_sums, x_bytes, x_scales = xs[X_PANEL], xs[X_SUMS], xs[X_STRIDE] * 2, f32(xs[X_SCALES])
        for token in range(n_tokens):
            order_for_i4(xs[X_CODES] + token * x_bytes, ordered + token * x_bytes, n)
        several = row_end - row_begin >= ROWS
        for begin in range(row_begin, row_end, ROWS if several else 1):
            # the last rows overlap those before; fewer than ROWS are done one by one, each ROWS times at once
            row, distance = (min(begin, row_end - ROWS), n) if several else (begin, 0)
            codes, first = w[W_PART_0] + row * n * 16, row * n_groups * 2
            scales, minimums = w[W_PART_1] + first, w[W_PART_2] + first
            for token in range(n_tokens):
                source, sums = ordered + token * x_bytes, x_sums + token * x_bytes // 16
                to = y + (token * y_stride + row) * 4
                products = to if several else xs[X_TILE]
                dot(codes, scales, minimums, distance, source, sums, n, x_scales[token], products)
                f32(to)[0] = f32(products)[0]

    return matmul_int4_groups


@njit(**HELP)
def matmul_int4_by_tiles(w, x, y, y_stride, n_tokens, row_begin, row_end, group):
    """Do TILE tokens or more."""
    never_inline()
    n_in, xs = i64(w)[W_N_IN], i64(x)
    for row in range(row_begin, row_end, PANEL):
        n_rows, panel = min(PANEL, row_end - row), xs[X_PANEL]
        if BYTES:
            codes = panel + PANEL * xs[X_STRIDE]
            scales = round_int4(w, row, n_rows, n_in, group, codes)
            pack_bytes(codes, n_in, n_in, n_rows, panel)
            matmul_tiles_i8(x, y, y_stride, n_tokens, row, n_rows, scales, n_in)
        else:
            for r in range(n_rows):
                unpack_int4(w, row + r, panel + r * 4, PANEL, n_in, group)
            matmul_tiles_f32(x, y, y_stride, n_tokens, row, n_rows, n_in)


@njit(**HELP)
def round_int4(w, row, n_rows, n_in, group, codes):
    """Round decoded rows to int8 with one scale a row, far below int4's own error; return their address.

    The scales and one decoded row follow the codes, int8 [n_rows, n_in], in the scratch.
    """
    never_inline()
    scales = (codes + PANEL * n_in + 63) // 64 * 64
    values = scales + PANEL * 4
    for r in range(n_rows):
        unpack_int4(w, row + r, values, 1, n_in, group)
        scale = max(largest(values, n_in, True), float32(1e-9)) / float32(127)
        f32(scales)[r] = scale
        source, to, inverse = f32(values), i8(codes + r * n_in), float32(1) / scale
        for i in range(n_in):
            to[i] = nearest(source[i] * inverse)
    return scales


@njit(**HELP)
def unpack_int4(w, row, y, step, n_in, group):
    """Decode a row into the floats y[0], y[step], y[2 step], ..."""
    w, y = i64(w), f32(y)
    n_groups, share = (n_in + group - 1) // group, group // 32
    scales, minimums = u16(w[W_PART_1] + row * n_groups * 2), u16(w[W_PART_2] + row * n_groups * 2)
    for i in range((n_in + 31) // 32):
        codes, begin = u8(w[W_PART_0] + (row * n_groups * share + i) * 16), i * 32
        scale, minimum = half(scales[i // share]), half(minimums[i // share])
        if begin + 32 <= n_in:
            for j in range(16):
                y[(begin + j) * step] = float32(int32(codes[j]) & int32(15)) * scale + minimum
                y[(begin + 16 + j) * step] = float32(int32(codes[j]) >> int32(4)) * scale + minimum
        else:
            for j in range(n_in - begin):
                code = codes[j % 16] >> (j // 16 * 4) & 15
                y[(begin + j) * step] = float32(code) * scale + minimum


matmul_int4_by_32 = _matmul_int4(dot_i4_g32, 32)


@entry(7)
def matmul_int4(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes [n_out, n_in / 2], scales and minimums f16 [n_out, n_in / 32]."""
    matmul_int4_by_32(w, x, y, y_stride, n_tokens, row_begin, row_end)


@entry(3)
def rows_int4(w, row, y):
    """Decode one row into float32."""
    unpack_int4(w, row, y, 1, i64(w)[W_N_IN], 32)


matmul_int4_by_64 = _matmul_int4(dot_i4_g64, 64)


@entry(7)
def matmul_int4_g64(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes as of int4, scales and minimums for 64 columns."""
    matmul_int4_by_64(w, x, y, y_stride, n_tokens, row_begin, row_end)


@entry(3)
def rows_int4_g64(w, row, y):
    """Decode one row into float32."""
    unpack_int4(w, row, y, 1, i64(w)[W_N_IN], 64)


matmul_int4_by_128 = _matmul_int4(dot_i4_g128, 128)


@entry(7)
def matmul_int4_g128(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Codes as of int4, scales and minimums for 128 columns."""
    matmul_int4_by_128(w, x, y, y_stride, n_tokens, row_begin, row_end)


@entry(3)
def rows_int4_g128(w, row, y):
    """Decode one row into float32."""
    unpack_int4(w, row, y, 1, i64(w)[W_N_IN], 128)


# ---------------------------------------------------------------------------------------------------------------------
# Threads: work is cut into phases, a phase into chunks, and whoever is free takes the next chunk
#
# A phase ends when its chunks are done, not when every thread has come by: a thread that the operating system
# has put aside, or that is slower than the others, holds nobody up unless it is inside a chunk. What a thread computes
# for itself before it takes a chunk may be garbage if the phase is over by then, but then it gets no chunk.
# ---------------------------------------------------------------------------------------------------------------------


def _atomic(operation: str) -> Any:
    """Return an intrinsic (address, operand) -> old value."""

    @intrinsic
    def update(typing_context: Any, address: Any, operand: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            return b.atomic_rmw(
                operation, b.inttoptr(arguments[0], ir.IntType(64).as_pointer()), arguments[1], "seq_cst"
            )

        return int64(int64, int64), build

    return update


atomic_add, atomic_exchange = _atomic("add"), _atomic("xchg")


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """Read an int64 that other threads write; what they wrote before it is visible after."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.load_atomic(b.inttoptr(arguments[0], ir.IntType(64).as_pointer()), "seq_cst", 8)

    return int64(int64), build


@intrinsic
def atomic_replace(typing_context: Any, address: Any, old: Any, new: Any) -> Any:
    """Write new if the int64 still is old; return whether it was."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        address, old, new = arguments
        pointer = b.inttoptr(address, ir.IntType(64).as_pointer())
        return b.extract_value(b.cmpxchg(pointer, old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(int64, int64, int64), build


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        if X86:
            name = "llvm.x86.sse2.pause"
            b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.void(), build


SPINS = 256  # about 5 us: longer than a phase's threads differ, shorter than anybody else misses the processor


@njit(**HELP)
def wait_turn(team, turns):
    """Wait a little: spin at first, then let other processes run."""
    if turns < SPINS:
        pause()
    else:
        call_yield(i64(team)[T_YIELD])


@njit(**HELP)
def is_over(team, phase):
    """Tell whether all chunks of a phase are done."""
    return (atomic_load(team + T_TICKET * 8) >> 32) > phase


@njit(**HELP)
def take_chunk(team, phase, n_chunks):
    """Return the next chunk of a phase, or -1 when none is left."""
    while True:
        ticket = atomic_load(team + T_TICKET * 8)
        chunk = ticket & 0xFFFFFFFF
        if ticket >> 32 != phase or chunk >= n_chunks:
            return -1
        if atomic_replace(team + T_TICKET * 8, ticket, ticket + 1):
            return chunk


@njit(**HELP)
def next_chunk(team, phase, n_chunks):
    """Count a chunk as done, opening the next phase after the last, and return another one or -1."""
    if atomic_add(team + T_DONE * 8, 1) == n_chunks - 1:
        atomic_exchange(team + T_DONE * 8, 0)
        atomic_exchange(team + T_TICKET * 8, (phase + 1) << 32)
        return -1
    return take_chunk(team, phase, n_chunks)


@njit(**HELP)
def finish_phase(team, phase):
    """Wait until all chunks of a phase are done and return the next phase."""
    never_inline()
    turns = 0
    while not is_over(team, phase):
        wait_turn(team, turns)
        turns += 1
    return phase + 1


@entry(3)
def run_team(team, kernel, argument):
    """Open a job for the workers, take part in it as thread 0, close it, and wait until all have left."""
    record = i64(team)
    record[T_ENTRY], record[T_ARGUMENT] = kernel, argument
    record[T_TICKET], record[T_DONE] = 0, 0
    job = (record[T_JOB] >> 32) + 1  # odd
    atomic_exchange(team + T_JOB * 8, job << 32)
    call_entry(kernel, (argument, 0))
    atomic_add(team + T_JOB * 8, 1 << 32)  # even: nobody can enter any more
    turns = 0
    while atomic_load(team + T_JOB * 8) & 0xFFFFFFFF:
        wait_turn(team, turns)
        turns += 1


@entry(2, int64)
def work_for_team(team, thread):
    """Take part in jobs; return 1 to be parked after a time without any, 0 when the team is closing."""
    record, job_word, state = i64(team), team + T_JOB * 8, team + (T_STATES + thread * T_STRIDE) * 8
    last, turns = 0, 0
    while True:
        word = atomic_load(job_word)
        job = word >> 32
        if record[T_CLOSING]:
            return 0
        if job & 1 and job != last:
            if atomic_replace(job_word, word, word + 1):
                last = job
                call_entry(record[T_ENTRY], (record[T_ARGUMENT], thread))
                atomic_add(job_word, -1)
                turns = 0
            continue
        wait_turn(team, turns)
        turns += 1
        if turns > SPINS + record[T_PATIENCE]:
            atomic_exchange(state, 1)
            return 1


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@njit(**HELP)
def softmax(x, n):
    """Turn n scores into weights, but for the division: return the inverse of their sum."""
    never_inline()
    top = largest(x, n, False)
    x, total = f32(x), float32(0)
    for i in range(n):
        x[i] = exp(x[i] - top)
        total += x[i]
    return float32(1) / total


@njit(**HELP)
def attend(q, keys, values, n_positions, head_dim, scores, y):
    """One token and head over n_positions keys and values [n_positions, head_dim]; q is scaled already."""
    never_inline()
    query, weights, y = f32(q), f32(scores), f32(y)
    for position in range(n_positions):
        key = f32(keys + position * head_dim * 4)
        total = float32(0)
        for i in range(head_dim):
            total += query[i] * key[i]
        weights[position] = total
    factor = softmax(scores, n_positions)
    for i in range(head_dim):
        y[i] = 0
    for position in range(n_positions):
        value = f32(values + position * head_dim * 4)
        weight = weights[position] * factor
        for i in range(head_dim):
            y[i] += weight * value[i]


@njit(**HELP)
def attend_tiles(q, q_stride, keys, values, first_position, n_tokens, head_dim, scratch, y, y_stride):
    """Do n_tokens >= TILE neighbours of one head: both products are matrices, multiplied by tiles of tokens.

    Only TILE rows of the scores exist at a time. The keys are spread over lanes once; the values, [position, dim],
    lie as a panel must already. Strides in bytes; head_dim is a multiple of PANEL.
    """
    never_inline()
    n_positions = first_position + n_tokens
    n_panels = (n_positions + PANEL - 1) // PANEL
    for panel in range(n_panels):
        begin = panel * PANEL
        n_rows = min(PANEL, n_positions - begin)
        pack_f32(keys + begin * head_dim * 4, head_dim, n_rows, scratch + begin * head_dim * 4)
    scores = scratch + n_panels * PANEL * head_dim * 4
    stride = n_panels * PANEL * 4
    for begin in range(0, n_tokens, TILE):
        first = min(begin, n_tokens - TILE)
        seen = first_position + first + TILE  # positions that the tile's last token sees
        for panel in range((seen + PANEL - 1) // PANEL):
            lines = scratch + panel * PANEL * head_dim * 4
            tile_f32(lines, PANEL * 4, q + first * q_stride, q_stride, head_dim, scores + panel * PANEL * 4, stride)
        for t in range(TILE):
            row = scores + t * stride
            visible = seen - TILE + t + 1
            factor = softmax(row, visible)
            weights = f32(row)
            for i in range(visible):
                weights[i] *= factor
            for i in range(visible, seen):
                weights[i] = 0
        for i in range(0, head_dim, PANEL):
            tile_f32(values + i * 4, head_dim * 4, scores, stride, seen, y + first * y_stride + i * 4, y_stride)


# ---------------------------------------------------------------------------------------------------------------------
# The network: each thread calls `forward` with the same program
# ---------------------------------------------------------------------------------------------------------------------


@njit(**HELP)
def take_input(p, thread, phase, n_tokens, source, stride, gain, bias, matrix):
    """Make the activations that a matrix takes: LayerNorm if there is a gain, integers if the matrix wants them.

    A few tokens are done by every thread for itself, which is sooner than meeting twice; many are shared out.
    Returns the address of the thread's activation record and the next phase.
    """
    never_inline()
    p = i64(p)
    few = n_tokens < TILE
    address = (p[P_OWN] if few else p[P_SHARED]) + thread * X_SIZE * 8
    x = i64(address)
    x[X_FLOAT], x[X_FLOAT_STRIDE] = source, stride
    if gain:
        x[X_FLOAT], x[X_FLOAT_STRIDE] = x[X_NORM], p[P_N_EMBD]
    if few:
        if not is_over(p[P_TEAM], phase):
            for token in range(n_tokens):
                make_activation(p, address, source + token * stride * 4, gain, bias, matrix, token, False)
        return address, phase
    n_chunks = (n_tokens + TILE - 1) // TILE
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        for token in range(chunk * TILE, min(chunk * TILE + TILE, n_tokens)):
            make_activation(p, address, source + token * stride * 4, gain, bias, matrix, token, True)
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return address, finish_phase(p[P_TEAM], phase)


@njit(**HELP)
def make_activation(p, x, source, gain, bias, matrix, token, many):
    """Do one token of `take_input`."""
    never_inline()
    w = i64(matrix)
    if gain:
        epsilon = float_of_bits(int32(p[P_EPSILON]))
        layer_norm(source, gain, bias, epsilon, i64(x)[X_NORM] + token * w[W_N_IN] * 4, w[W_N_IN])
    if w[W_LEVELS] and BYTES and many:
        quantize_to_bytes(x, token, w[W_N_IN])
    elif w[W_LEVELS]:
        quantize(x, token, w[W_N_IN], w[W_LEVELS])


@njit(**HELP)
def rows_of_chunk(p, matrix, n_tokens):
    """Return how many rows a chunk has: an even share for few tokens, a few panels at most for many."""
    share = (i64(matrix)[W_N_OUT] + p[P_CHUNKS] - 1) // p[P_CHUNKS]
    return min((share + PANEL - 1) // PANEL * PANEL, 4 * PANEL if n_tokens >= TILE else 1024)


@njit(**HELP)
def multiply(matrix, x, y, y_stride, n_tokens, row_begin, row_end):
    """Call the matrix's own kernel."""
    call_matmul(i64(matrix)[W_MATMUL], (matrix, x, y, y_stride, n_tokens, row_begin, row_end))


@njit(**HELP)
def embed(p, phase):
    """X = wte[id] + wpe[position]."""
    p = i64(p)
    n_embd, n_tokens = p[P_N_EMBD], p[P_N_TOKENS]
    n_chunks = (n_tokens + TILE - 1) // TILE
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        for token in range(chunk * TILE, min(chunk * TILE + TILE, n_tokens)):
            x, y = p[P_X] + token * n_embd * 4, p[P_Y] + token * p[P_Y_STRIDE] * 4
            call_rows(i64(p[P_WTE])[W_ROWS], (p[P_WTE], i64(p[P_IDS])[token], x))
            call_rows(i64(p[P_WPE])[W_ROWS], (p[P_WPE], i64(p[P_POSITIONS])[token], y))
            for i in range(n_embd):
                f32(x)[i] += f32(y)[i]
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish_phase(p[P_TEAM], phase)


@njit(**HELP)
def attention(program, layer, thread, phase):
    """Z = attention(c_attn(ln_1(x))), a head at a time: its rows of q, k and v are nobody else's business."""
    p, block = i64(program), i64(layer)
    n_tokens, n_head = p[P_N_TOKENS], block[L_N_HEAD]
    x, phase = take_input(
        program, thread, phase, n_tokens, p[P_X], p[P_N_EMBD], block[L_LN_1], block[L_LN_1_BIAS], block[L_C_ATTN]
    )
    head = take_chunk(p[P_TEAM], phase, n_head)
    while head >= 0:
        attend_head(p, block, thread, x, head)
        head = next_chunk(p[P_TEAM], phase, n_head)
    return finish_phase(p[P_TEAM], phase)


@njit(**HELP)
def attend_head(p, block, thread, x, head):
    """Do one head of `attention` for all tokens: new keys and values go to the cache first."""
    never_inline()
    never_inline()
    head_dim, n_tokens, n_head = p[P_HEAD_DIM], p[P_N_TOKENS], block[L_N_HEAD]
    row, width = head * head_dim, n_head * head_dim
    y_stride, z_stride = p[P_Y_STRIDE], p[P_Z_STRIDE]
    for part in range(3):
        begin = part * width + row
        multiply(block[L_C_ATTN], x, p[P_Y], y_stride, n_tokens, begin, begin + head_dim)
    positions, sequences = i64(p[P_POSITIONS]), i64(p[P_SEQUENCES])
    bias, scale = f32(block[L_C_ATTN_BIAS]), float_of_bits(int32(block[L_ATTN_SCALE]))
    head_bytes = p[P_N_POSITIONS] * head_dim * 4
    for token in range(n_tokens):
        at = (sequences[token] * n_head + head) * head_bytes + positions[token] * head_dim * 4
        y, key, value = f32(p[P_Y] + token * y_stride * 4), f32(block[L_KEYS] + at), f32(block[L_VALUES] + at)
        for i in range(row, row + head_dim):
            y[i] = (y[i] + bias[i]) * scale
            key[i - row] = y[i + width] + bias[i + width]
            value[i - row] = y[i + 2 * width] + bias[i + 2 * width]
    runs, scratch = i64(p[P_RUNS]), p[P_SCORES] + thread * p[P_SCORES_STRIDE] * 4
    for run in range(p[P_N_RUNS]):
        begin, end = runs[run], runs[run + 1]
        at = (sequences[begin] * n_head + head) * head_bytes
        keys, values = block[L_KEYS] + at, block[L_VALUES] + at
        q, z = p[P_Y] + (begin * y_stride + row) * 4, p[P_Z] + (begin * z_stride + row) * 4
        if end - begin >= TILE and head_dim % PANEL == 0:
            first = positions[begin]
            attend_tiles(q, y_stride * 4, keys, values, first, end - begin, head_dim, scratch, z, z_stride * 4)
        else:
            for i in range(end - begin):
                seen = positions[begin + i] + 1
                attend(q + i * y_stride * 4, keys, values, seen, head_dim, scratch, z + i * z_stride * 4)


@njit(**HELP)
def add_projection(program, thread, phase, matrix, bias):
    """X += c_proj(z) + bias, the end of both halves of a block."""
    never_inline()
    p = i64(program)
    n_tokens = p[P_N_TOKENS]
    x, phase = take_input(program, thread, phase, n_tokens, p[P_Z], p[P_Z_STRIDE], 0, 0, matrix)
    n_out, step = i64(matrix)[W_N_OUT], rows_of_chunk(p, matrix, n_tokens)
    n_chunks = (n_out + step - 1) // step
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        begin, end = chunk * step, min(chunk * step + step, n_out)
        multiply(matrix, x, p[P_Y], p[P_Y_STRIDE], n_tokens, begin, end)
        for token in range(n_tokens):
            to, y = f32(p[P_X] + token * n_out * 4), f32(p[P_Y] + token * p[P_Y_STRIDE] * 4)
            for i in range(begin, end):
                to[i] += y[i] + f32(bias)[i]
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish_phase(p[P_TEAM], phase)


@njit(**HELP)
def mlp_hidden(program, layer, thread, phase):
    """Z = activation_function(c_fc(ln_2(x)))."""
    p, block = i64(program), i64(layer)
    n_tokens, matrix = p[P_N_TOKENS], block[L_C_FC]
    x, phase = take_input(
        program, thread, phase, n_tokens, p[P_X], p[P_N_EMBD], block[L_LN_2], block[L_LN_2_BIAS], matrix
    )
    n_out, step = i64(matrix)[W_N_OUT], rows_of_chunk(p, matrix, n_tokens)
    n_chunks = (n_out + step - 1) // step
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        begin, end = chunk * step, min(chunk * step + step, n_out)
        multiply(matrix, x, p[P_Y], p[P_Y_STRIDE], n_tokens, begin, end)
        for token in range(n_tokens):
            y, z = p[P_Y] + (token * p[P_Y_STRIDE] + begin) * 4, p[P_Z] + (token * p[P_Z_STRIDE] + begin) * 4
            activate(p[P_ACTIVATION], y, block[L_C_FC_BIAS] + begin * 4, z, end - begin)
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish_phase(p[P_TEAM], phase)


@njit(**HELP)
def logits(program, thread, phase):
    """Logits = lm_head(ln_f(x)) of the tokens to keep, which are moved to the front of z first."""
    p = i64(program)
    n_keep, n_embd, matrix = p[P_N_KEEP], p[P_N_EMBD], p[P_LM_HEAD]
    chunk = take_chunk(p[P_TEAM], phase, 1)
    while chunk >= 0:
        for i in range(n_keep):
            x, z = f32(p[P_X] + i64(p[P_KEEP])[i] * n_embd * 4), f32(p[P_Z] + i * p[P_Z_STRIDE] * 4)
            for j in range(n_embd):
                z[j] = x[j]
        chunk = next_chunk(p[P_TEAM], phase, 1)
    phase = finish_phase(p[P_TEAM], phase)
    x, phase = take_input(program, thread, phase, n_keep, p[P_Z], p[P_Z_STRIDE], p[P_LN_F], p[P_LN_F_BIAS], matrix)
    n_out, step = i64(matrix)[W_N_OUT], rows_of_chunk(p, matrix, n_keep)
    n_chunks = (n_out + step - 1) // step
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        multiply(matrix, x, p[P_LOGITS], n_out, n_keep, chunk * step, min(chunk * step + step, n_out))
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish_phase(p[P_TEAM], phase)


@entry(2)
def forward(program, thread):
    """GPT-2 over the program's tokens: writes their keys and values to the cache and the wanted logits."""
    p = i64(program)
    phase = embed(program, 0)
    for i in range(p[P_N_LAYER]):
        layer = p[P_LAYERS] + i * L_SIZE * 8
        block = i64(layer)
        phase = attention(program, layer, thread, phase)
        phase = add_projection(program, thread, phase, block[L_ATTN_C_PROJ], block[L_ATTN_C_PROJ_BIAS])
        phase = mlp_hidden(program, layer, thread, phase)
        phase = add_projection(program, thread, phase, block[L_MLP_C_PROJ], block[L_MLP_C_PROJ_BIAS])
    if p[P_N_KEEP]:
        logits(program, thread, phase)
