"""What is done number by number: activation functions, LayerNorm, softmax, rounding to integers.

Functions are polynomials, so that LLVM vectorizes the loops around them and no mathematical library is needed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.entry import EXACT, HELP, float32, instruction, int32, int64, void
from minigpt.kernels.intrinsics import bits_of_float, f32, float_of_bits, i8, i16, i32, i64, never_inline, square_root
from minigpt.kernels.target import BYTE_PAIRS, BYTES, GROUP, LANES, OFFSET, PANEL, PARTS, UNIT, VECTOR
from minigpt.kernels.vectors import (
    F32,
    I8,
    I16,
    I32,
    accumulators,
    advance,
    broadcast,
    exponential,
    load,
    multiply_add,
    shuffle,
    store,
    sum_lanes,
    vector_of,
    word,
)
from minigpt.layout import *


@njit(**EXACT)
def nearest(x):
    """Round to the nearest integer, ties to even: a float32 of size 2^23 has no room for a fraction. |x| < 2^22."""
    return int32((x + float32(12582912.0)) - float32(12582912.0))


@instruction(float32, float32)
def exponential_of(b: Any, x: Any) -> Any:
    """Return e^x; only in functions that are EXACT, as numba lends their flags to every instruction."""
    return exponential(b, x)


@njit(**EXACT)
def exp(x):
    """Return e^x, or e^88 if x is larger."""
    return exponential_of(min(x, float32(88)))


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
        y[i] = scaled(x[i] - mean, factor) * gain[i] + bias[i]


@njit(**EXACT)
def scaled(x, factor):
    """Return x * factor. If that could be reordered, LLVM would divide by the inverse of the factor."""
    return x * factor


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


@instruction(float32, int64, int64, int64)
def weigh(b: Any, x: Any, n: Any, n_panels: Any) -> Any:
    """Turn n scores into e^(score - the highest), and what follows up to n_panels * PANEL into 0; return the sum."""
    lanes, least = vector_of(F32, LANES), ir.Constant(vector_of(F32, LANES), [float("-inf")] * LANES)
    tops, sums = accumulators(b, lanes, 2), accumulators(b, lanes, 2)
    places = lambda panel: [advance(b, advance(b, x, panel, 4 * PANEL), i * VECTOR) for i in range(2)]  # noqa: E731
    higher = lambda v, w: b.select(b.fcmp_ordered(">", v, w), v, w)  # noqa: E731
    whole = b.udiv(n, word(PANEL))
    with cgutils.for_range(b, b.sub(n_panels, whole)) as loop:
        panel = b.add(whole, loop.index)
        rest = b.trunc(b.sub(n, b.mul(panel, word(PANEL))), I32)
        for i, at in enumerate(places(panel)):
            numbers = ir.Constant(vector_of(I32, LANES), list(range(i * LANES, (i + 1) * LANES)))
            is_score = b.icmp_signed("<", numbers, broadcast(b, rest, numbers.type))
            store(b, b.select(is_score, load(b, at, lanes, 4), least), at)
    for top in tops:
        b.store(least, top)
    with cgutils.for_range(b, n_panels) as loop:
        for at, top in zip(places(loop.index), tops, strict=True):
            b.store(higher(load(b, at, lanes, 4), b.load(top)), top)
    highest = higher(*(b.load(top) for top in tops))
    for distance in (1 << i for i in range(LANES.bit_length() - 1)):
        highest = higher(highest, shuffle(b, highest, highest, [lane ^ distance for lane in range(LANES)]))
    with cgutils.for_range(b, n_panels) as loop:
        for at, total in zip(places(loop.index), sums, strict=True):
            weights = exponential(b, b.fsub(load(b, at, lanes, 4), highest))
            store(b, weights, at)
            b.store(b.fadd(b.load(total), weights), total)
    return sum_lanes(b, b.fadd(*(b.load(total) for total in sums)))


@njit(**EXACT)
def softmax(x, n, n_panels):
    """Turn n scores into weights, but for the division: return the inverse of their sum.

    Whole panels at a time: what follows the n, up to n_panels * PANEL, becomes 0.
    """
    never_inline()
    return float32(1) / weigh(x, n, n_panels)


@instruction(void, *[int64] * 4)
def round_32(b: Any, source: Any, to: Any, scale: Any, total: Any) -> None:
    """Round 32 floats to int8 with a scale, and leave the sum of what they are then.

    They are taken apart as the 4-bit codes of a vector are, into PARTS of them: columns 0..15 and 16..31, or, where
    bytes are not multiplied, as int16 for the four nibbles of a word: 0, 2, .. 14, then 16, .. 30, then the odd ones.
    """
    values, ints = load(b, source, vector_of(F32, 32), 4), vector_of(I32, 32)
    constant = lambda v: ir.Constant(ints, [v] * 32)  # noqa: E731
    tops = b.and_(b.bitcast(values, ints), constant(0x7FFFFFFF))
    for distance in (16, 8, 4, 2, 1):
        halves = [shuffle(b, tops, tops, [first + i for i in range(distance)]) for first in (0, distance)]
        tops = b.select(b.icmp_signed(">", *halves), *halves)
    top = b.bitcast(b.extract_element(tops, ir.Constant(I32, 0)), F32)
    least = ir.Constant(F32, 1e-9)
    top = b.select(b.fcmp_ordered("<", top, least), least, top)  # NaN remains NaN
    inverse = broadcast(b, b.fdiv(ir.Constant(F32, 127), top), values.type)
    magic = ir.Constant(values.type, [12582912.0] * 32)  # see `nearest`
    codes = b.sub(b.bitcast(multiply_add(b, values, inverse, magic), ints), constant(0x4B400000))
    element, size = (I8, 16) if BYTE_PAIRS else (I16, 8)
    narrow = b.trunc(codes, vector_of(element, 32))
    for i, first in enumerate((0, 16) if BYTE_PAIRS else (0, 16, 1, 17)):
        lanes = [first + j * (1 if BYTE_PAIRS else 2) for j in range(size)]
        store(b, shuffle(b, narrow, narrow, lanes), advance(b, to, 16 * UNIT * i))
    step = b.fmul(top, ir.Constant(F32, 1 / 127))
    store(b, step, scale)
    store(b, b.fmul(b.sitofp(sum_lanes(b, codes), F32), step), total)


@njit(**EXACT)
def quantize_in_32s(x, token, n_in):
    """Round a token's float activations to int8, each 32 of them with a scale and a sum of its own."""
    never_inline()
    x = i64(x)
    source, codes = x[X_FLOAT] + token * x[X_FLOAT_STRIDE] * 4, x[X_CODES] + token * x[X_STRIDE] * 2
    first, padded = token * x[X_STRIDE] // 32 * 4, x[X_TILE]
    scales, sums = x[X_GROUP_SCALES] + first, x[X_SUMS] + first
    n = (n_in + 127) // 128 * 4  # up to the widest group
    for i in range(n):
        floats = source + i * 128
        if i * 32 + 32 > n_in:
            for j in range(32):
                f32(padded)[j] = f32(floats)[j] if i * 32 + j < n_in else float32(0)
            floats = padded
        to = codes + (i // UNIT * PARTS * UNIT + i % UNIT) * 16
        round_32(floats, to, scales + i * 4, sums + i * 4)


@njit(**EXACT)
def quantize(x, token, n_in, levels):
    """Round a token's float activations to integers -levels..levels with one scale."""
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


@njit(**HELP)
def quantize_to_bytes(x, token, n_in):
    """Round a token's float activations to int8, each GROUP of them with a scale and a sum of its own."""
    never_inline()
    x = i64(x)
    source, codes = x[X_FLOAT] + token * x[X_FLOAT_STRIDE] * 4, x[X_CODES] + token * x[X_STRIDE]
    first = token * x[X_STRIDE] // 32 * 4
    scales, sums = x[X_GROUP_SCALES] + first, x[X_SUMS] + first
    n_groups, rest = n_in // GROUP, n_in % GROUP
    for i in range(n_groups):
        round_group(source + i * GROUP * 4, GROUP, codes + i * GROUP, scales + i * 4, sums + i * 4)
    if rest:
        begin = n_groups * GROUP
        round_group(source + begin * 4, rest, codes + begin, scales + n_groups * 4, sums + n_groups * 4)
        for i in range(n_in, begin + GROUP):
            i8(codes)[i] = 0


@njit(**EXACT, forceinline=True)  # if sums could be reordered, LLVM would divide instead of multiplying by the inverse
def round_group(source, n, codes, scale, total):
    """Do n floats; in whole groups the compiler knows how many.

    Without BYTES a pair's sum counts too: codes c, d with |c| + |d| <= 128 times two of 0..255 fit an int16. That
    costs half a bit on average, where 7 bits for each code would cost a whole one.
    """
    top, sum_of_codes = int32(0), int32(0)
    for i in range(n):
        top = max(top, int32(i32(source)[i] & int32(0x7FFFFFFF)))
    if not BYTES:
        for i in range(n // 2):
            both = bits_of_float(f32(source)[2 * i] + f32(source)[2 * i + 1])
            top = max(top, int32(both & int32(0x7FFFFFFF)))
    f32(scale)[0] = max(float_of_bits(top), float32(1e-9)) / float32(127)
    inverse = float32(1) / f32(scale)[0]
    for i in range(n):
        code = nearest(f32(source)[i] * inverse)
        i8(codes)[i] = code
        sum_of_codes = int32(sum_of_codes + code)
    i32(total)[0] = int32(sum_of_codes * int32(OFFSET))
