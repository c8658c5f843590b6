"""What is done number by number: activation functions, LayerNorm, softmax, rounding to integers.

Functions are polynomials, so that LLVM vectorizes the loops around them and no mathematical library is needed.
"""

from __future__ import annotations

from numba import njit

from minigpt.kernels.entry import EXACT, HELP, float32, int32
from minigpt.kernels.intrinsics import f32, float_of_bits, i8, i16, i32, i64, never_inline, square_root
from minigpt.kernels.target import GROUP, OFFSET
from minigpt.layout import *


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
def softmax(x, n):
    """Turn n scores into weights, but for the division: return the inverse of their sum."""
    never_inline()
    top = largest(x, n, False)
    x, total = f32(x), float32(0)
    for i in range(n):
        x[i] = exp(x[i] - top)
        total += x[i]
    return float32(1) / total


@njit(**EXACT)
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
    """Do n floats; in whole groups the compiler knows how many."""
    top, sum_of_codes = int32(0), int32(0)
    for i in range(n):
        top = max(top, int32(i32(source)[i] & int32(0x7FFFFFFF)))
    f32(scale)[0] = max(float_of_bits(top), float32(1e-9)) / float32(127)
    inverse = float32(1) / f32(scale)[0]
    for i in range(n):
        code = nearest(f32(source)[i] * inverse)
        i8(codes)[i] = code
        sum_of_codes = int32(sum_of_codes + code)
    i32(total)[0] = int32(sum_of_codes * int32(OFFSET))
