"""The arithmetic of GPT-2 in plain NumPy: what the compiled kernels must compute, and what runs without numba.

Pure functions, readable before fast. `kernels/` has a compiled form of each; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TILE_WEIGHTS = 1 << 18  # decode this many weights at a time: 1 MiB of float32 stays in the L2 cache


def layer_norm(x: Floats, gain: Floats, bias: Floats, epsilon: float) -> Floats:
    """Normalize each row to mean 0 and variance 1, then scale and shift (Ba et al. 2016)."""
    centred = x - x.mean(axis=-1, keepdims=True)  # [n_tokens, n_embd]
    variance = np.square(centred).mean(axis=-1, keepdims=True)  # [n_tokens, 1]
    return centred / np.sqrt(variance + np.float32(epsilon)) * gain + bias


def gelu_new(x: Floats) -> Floats:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016): what GPT-2 was trained with.

    0.5 x (1 + tanh u) is x * sigmoid(2u), which needs one exp and no tanh.
    """
    u = x * (1 + np.float32(0.044715) * np.square(x))
    return x * sigmoid(np.float32(2 * np.sqrt(2 / np.pi)) * u)


def gelu(x: Floats) -> Floats:
    """Exact GELU, x * Phi(x), with erf by Numerical Recipes' Chebyshev fit (erfcc, relative error below 1.2e-7)."""
    z = np.abs(x.astype(np.float64)) / np.sqrt(2)
    t = 1 / (1 + z / 2)
    coefficients = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807]
    coefficients += [-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223]
    tail = t * np.exp(-z * z + np.polyval(coefficients, t))  # erfc(|x| / sqrt 2)
    return (x * np.where(x >= 0, 1 - tail / 2, tail / 2)).astype(np.float32)


def relu(x: Floats) -> Floats:
    """Rectifier: negative values become 0."""
    return np.maximum(x, np.float32(0))


def silu(x: Floats) -> Floats:
    """X * sigmoid(x), also called swish."""
    return x * sigmoid(x)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)); exp may overflow to infinity, whose reciprocal is the right 0."""
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "gelu_new": gelu_new,
    "gelu": gelu,
    "relu": relu,
    "silu": silu,
}


def softmax(x: Floats) -> Floats:
    """exp(x) over its sum along the last axis, shifted so that nothing overflows."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """Causal attention of the last n_tokens positions over all n_positions so far.

    Parameters
    ----------
    q : ndarray of shape (n_head, n_tokens, head_dim), dtype=float32
    k, v : ndarray of shape (n_head, n_positions, head_dim), dtype=float32
        Keys and values of the past and of the n_tokens themselves.
    scale : float
        Factor of the scores.

    Returns
    -------
    ndarray of shape (n_head, n_tokens, head_dim), dtype=float32
    """
    n_tokens, n_positions = q.shape[1], k.shape[1]
    scores = q @ k.transpose(0, 2, 1) * np.float32(scale)  # [n_head, n_tokens, n_positions]
    if n_tokens > 1:
        last_seen = np.arange(n_positions - n_tokens, n_positions)[:, None]  # [n_tokens, 1]
        scores = np.where(np.arange(n_positions) <= last_seen, scores, np.float32(-np.inf))
    return softmax(scores) @ v


def activation_levels(n_in: int) -> int:
    """Return the largest magnitude of int16 activations whose products with n_in codes of int8 fit an int32 sum."""
    return min(2**15 - 1, (2**31 - 1) // (127 * n_in))


def quantize_activations(x: Floats) -> tuple[NDArray[np.int16], Floats]:
    """Round each row to integers with one scale, as the integer kernels do.

    Returns
    -------
    codes : ndarray of shape (n_tokens, n_in), dtype=int16
        Within plus or minus `activation_levels(n_in)`: 14.5 bits for 768 inputs, 12.5 for 3072.
    scales : ndarray of shape (n_tokens,), dtype=float32
        x is about codes * scales.
    """
    scales = np.maximum(np.abs(x).max(axis=-1), np.float32(1e-9)) / np.float32(activation_levels(x.shape[-1]))
    return np.rint(x / scales[..., None]).astype(np.int16), scales


def round_activations(x: Floats) -> Floats:
    """Return what is left of x after `quantize_activations`, in float32."""
    codes, scales = quantize_activations(x)
    return codes * scales[..., None]


def round_activations_in_32s(x: Floats) -> Floats:
    """Return what is left of x [n_tokens, n_in] when each 32 columns are rounded to int8 with one scale, in float32."""
    n_groups = -(-x.shape[1] // 32)
    padded = np.pad(x, ((0, 0), (0, 32 * n_groups - x.shape[1])))
    groups = padded.reshape(len(x), n_groups, 32)
    scales = np.maximum(np.abs(groups).max(axis=2, keepdims=True), np.float32(1e-9)) / np.float32(127)
    rounded: Floats = (np.rint(groups / scales) * scales).reshape(padded.shape)[:, : x.shape[1]]
    return rounded


# What kernels of an encoding multiply by
ROUNDED: dict[str, Callable[[Floats], Floats]] = {
    "f32": lambda x: x,
    "i16": round_activations,
    "i8": round_activations_in_32s,
}


def matmul_by_tiles(decode: Callable[[slice], Floats], n_out: int, x: Floats) -> Floats:
    """Multiply x [n_tokens, n_in] by a matrix that is decoded a few rows at a time: [n_tokens, n_out].

    The matrix never exists in float32 as a whole, so the file's size stays the memory's size.
    """
    y = np.empty((len(x), n_out), np.float32)
    step = max(1, TILE_WEIGHTS // x.shape[1])
    for begin in range(0, n_out, step):
        tile = slice(begin, min(begin + step, n_out))
        y[:, tile] = x @ decode(tile).T
    return y


SURE = np.float32(2)  # steps by which a product with an input of length 1 is never wrong: 7 standard deviations
ROUNDING = np.float32(9)  # how much more an input's own rounding error counts: codes are larger than their errors


def screen(codes: NDArray[np.uint8], steps: Floats, middle: float, x: Floats) -> tuple[Floats, Floats]:
    """Multiply by a matrix of which 4 bits a weight are known, (codes - middle) * steps.

    A weight is off by half a step at most and by 0.29 as a rule, one up where another is down, so that a product
    is off by 0.29 |x| steps. The input is rounded to int8.

    Parameters
    ----------
    codes : ndarray of shape (n_out, n_in), dtype=uint8
    steps : ndarray of shape (n_out,), dtype=float32
    middle : float
    x : ndarray of shape (n_tokens, n_in), dtype=float32

    Returns
    -------
    rough, widths : ndarray of shape (n_tokens, n_out), dtype=float32
        Products, and how far from them the exact ones may be.
    """
    scales = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-9)) / np.float32(127)
    rounded = np.rint(x / scales) * scales
    rough: Floats = rounded @ (codes - np.float32(middle)).T * steps
    error = np.linalg.norm(x, axis=1) + ROUNDING * np.linalg.norm(x - rounded, axis=1)  # [n_tokens]
    return rough, SURE * error[:, None] * steps


def refine(rough: Floats, widths: Floats, exact: Floats, margin: float) -> Floats:
    """Return the exact products where they may be within `margin` of the highest, the rough ones elsewhere.

    All are [n_tokens, n_out]. The kernels compute only the exact products that are returned.
    """
    least = (rough - widths).max(axis=1, keepdims=True) - np.float32(margin)
    return np.where(rough + widths >= least, exact, rough)
