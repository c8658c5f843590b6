"""Matrix times vector, the kernel that decoding lives on: every matrix shape of a model, from memory, in GB/s.

A call goes through as many matrices as the model has layers, so that small ones do not stay in a cache that the whole
model would overflow; each thread does its share of the rows.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import models
import numpy as np
import pytest

from minigpt import encodings, layout, ops, reference
from minigpt.program import PANEL, TILE, Activations, aligned, describe

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
pytestmark = [
    pytest.mark.benchmark(group="matrix times vector"),
    pytest.mark.skipif(ops.backend() == "numpy", reason="the NumPy backend has no kernels"),
]


def shape_of(matrix: str, size: str) -> tuple[int, int]:
    d = models.SIZES[size].n_embd
    shapes = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (models.SIZES[size].vocab_size, d))
    return dict(zip(MATRICES, shapes, strict=True))[matrix]


class Vector:
    """One token's activations as a matrix takes them, and the record in which its kernel finds them."""

    def __init__(self, x: np.ndarray, weight: encodings.Weight, descriptor: np.ndarray) -> None:
        width = -(-len(x) // 128) * 128
        self.x, self.meant = x, reference.ROUNDED[weight.encoding.activation](x[None])[0]
        self.memory = Activations(1, width, len(x), aligned((width * PANEL,)), aligned(((TILE + 1) * PANEL,)))
        self.record = self.memory.record
        self.record[layout.X_FLOAT], self.record[layout.X_FLOAT_STRIDE] = x.ctypes.data, len(x)
        rounding()(self.record.ctypes.data, descriptor.ctypes.data)


@functools.cache
def rounding():
    """Return the kernels' own rounding of a token's activations for a matrix."""
    from numba import cfunc, types

    from minigpt.kernels.forward import make_activation
    from minigpt.kernels.intrinsics import i64

    def run(x, matrix):
        make_activation(i64(x), x, i64(x)[layout.X_FLOAT], 0, 0, matrix, 0, False)

    return cfunc(types.void(types.int64, types.int64))(run).ctypes


@pytest.mark.parametrize("matrix", MATRICES)
def test_matrix_times_vector(benchmark, size, matrix, encoding, n_threads):
    encoding = encodings.ENCODINGS[encoding].tables if matrix == "lm_head" else encoding
    n_out, n_in = shape_of(matrix, size)
    rng = np.random.default_rng(0)
    w = encodings.encode(rng.standard_normal((n_out, n_in), np.float32), encoding)
    n_copies = 1 if matrix == "lm_head" else models.SIZES[size].n_layer
    copies = [encodings.Weight(w.encoding, w.shape, {k: v.copy() for k, v in w.parts.items()}) for _ in range(n_copies)]
    descriptors = [describe(copy) for copy in copies]
    x, y = rng.standard_normal(n_in, np.float32), np.zeros(n_out, np.float32)
    vectors = [Vector(x, w, descriptors[0]) for _ in range(n_threads)]
    kernel = ops.kernel(f"matmul_{encoding}").call
    bounds = np.linspace(0, n_out, n_threads + 1).astype(int).tolist()
    jobs = [
        [
            (d.ctypes.data, vectors[thread].record.ctypes.data, y.ctypes.data, n_out, 1, *bounds[thread : thread + 2])
            for d in descriptors
        ]
        for thread in range(n_threads)
    ]

    def run(job):
        for arguments in job:
            kernel(*arguments)

    with ThreadPoolExecutor(n_threads) as pool:
        benchmark(lambda: list(pool.map(run, jobs)) if n_threads > 1 else run(jobs[0]))
    expected = vectors[0].meant.astype(np.float64) @ w.decode().T.astype(np.float64)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.sqrt(n_in))
    benchmark.extra_info["gb_s"] = n_copies * w.nbytes / benchmark.stats.stats.median / 1e9
