"""Compiled kernels against plain NumPy, on shapes around every vector width, and what they may refer to."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from minigpt import layout, ops, reference
from minigpt.encodings import ENCODINGS, encode

if ops.backend() == "numpy":
    pytest.skip("needs the compiled backend", allow_module_level=True)
from numba import cfunc, types

from minigpt import kernels
from minigpt.kernels import elementwise, vectors
from minigpt.kernels.entry import float32
from minigpt.kernels.intrinsics import f32, half, u16
from minigpt.program import Activations, aligned, describe

COMPILED = [name for name in ENCODINGS if f"matmul_{name}" in kernels.ENTRIES]
LENGTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 384]
ERROR_PATH = re.compile(r"llvm\.|numba_|NRT_|Py[A-Z]|Py_|_Py")  # the rest of numba's never-reached error path


def compiled(function, n_arguments):
    """Return a function of int64 arguments, called through ctypes."""
    return cfunc(types.void(*[types.int64] * n_arguments), **kernels.FAST)(function).ctypes


def floats(*values):
    return np.array(values, np.float32)


def matrix(encoding, n_out, n_in, rng):
    """Random values that the encoding can hold: half of them zeros, in blocks or 4 of 8, where that is its point."""
    w = rng.normal(size=(n_out, n_in))
    if encoding.startswith(("bitmap", "block")):
        w *= np.repeat(rng.random((n_out, n_in)) < 0.5, 32, axis=1)[:, :n_in] & (rng.random((n_out, n_in)) < 0.8)
    if encoding.startswith("nm"):
        w *= rng.permuted(np.tile(np.arange(8) < 4, (n_out, -(-n_in // 8), 1)), axis=2).reshape(n_out, -1)[:, :n_in]
    return encode(w, encoding)


def in_parts(codes):
    """Arrange int8 of groups [n_tokens, n_groups, 32] as `quantize_in_32s` does: their bytes, [n_tokens, n]."""
    in_bytes = kernels.PARTS == 2
    lanes = np.arange(32) if in_bytes else np.r_[0:16:2, 16:32:2, 1:16:2, 17:32:2]
    parts = codes[..., lanes].astype(np.int8 if in_bytes else np.int16)
    units = parts.reshape(len(codes), -1, kernels.UNIT, kernels.PARTS, 32 // kernels.PARTS)
    return np.ascontiguousarray(units.swapaxes(2, 3)).view(np.uint8).reshape(len(codes), -1)


def activations(x, levels, in_32s=False):
    """Quantize in NumPy as `take_input` does; return the record's owner and the activations that are meant."""
    n_tokens, n_in = x.shape
    width = -(-n_in // 128) * 128
    memory = Activations(n_tokens, width, n_in, aligned((width * 32,)), aligned((13 * 32,)))
    memory.record[layout.X_FLOAT], memory.record[layout.X_FLOAT_STRIDE] = x.ctypes.data, n_in
    padded = np.zeros((n_tokens, width), np.float32)
    padded[:, :n_in] = x
    if not levels:
        return memory, x
    if kernels.BYTE_PAIRS and n_tokens >= kernels.TILE:
        groups = np.zeros((n_tokens, -(-width // kernels.GROUP), kernels.GROUP), np.float32)
        groups.reshape(n_tokens, -1)[:, :width] = padded
        tops = np.abs(groups).max(axis=2)
        if not kernels.BYTES:
            tops = np.maximum(tops, np.abs(groups[..., 0::2] + groups[..., 1::2]).max(axis=2))
        scales = np.maximum(tops, 1e-9) / np.float32(127)
        codes = np.rint(groups / scales[..., None])
        memory._codes.view(np.int8).reshape(-1)[: n_tokens * width] = codes.reshape(n_tokens, -1)[:, :width].ravel()
        n_groups = scales.shape[1]
        memory._group_scales[:, :n_groups] = scales
        memory._sums.view(np.int32)[:, :n_groups] = kernels.OFFSET * codes.sum(axis=2)
        return memory, (codes * scales[..., None]).reshape(n_tokens, -1)[:, :n_in]
    if in_32s and n_tokens < kernels.TILE:
        groups = padded.reshape(n_tokens, -1, 32)
        scales = np.maximum(np.abs(groups).max(axis=2), np.float32(1e-9)) / np.float32(127)
        codes = np.rint(groups / scales[..., None])
        memory._codes.view(np.uint8).reshape(n_tokens, -1)[:, : width * kernels.PARTS // 2] = in_parts(codes)
        memory._group_scales[:], memory._sums[:] = scales, codes.sum(axis=2) * scales
        return memory, (codes * scales[..., None]).reshape(n_tokens, -1)[:, :n_in]
    scales = np.maximum(np.abs(x).max(axis=1), 1e-9) / np.float32(levels)
    memory._codes[:] = np.rint(padded / scales[:, None])
    memory._scales[:] = scales
    return memory, memory._codes[:, :n_in] * scales[:, None]


@pytest.mark.parametrize("n_in", LENGTHS)
@pytest.mark.parametrize("encoding", COMPILED)
def test_matmul_equals_numpy(encoding, n_in):
    rng = np.random.default_rng(n_in)
    matmul = ops.kernel(f"matmul_{encoding}").call
    for n_out, n_tokens in [(1, 1), (70, 1), (5, 3), (33, 12), (70, 13), (64, 30)]:
        w = matrix(encoding, n_out, n_in, rng)
        x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
        record = describe(w)
        memory, meant = activations(x, *record[[layout.W_LEVELS, layout.W_IN_32S]])
        error = 1e-4
        if encoding.startswith("int4") and n_tokens >= kernels.TILE:  # tiles of floats, or of codes rounded
            meant, error = (meant, 0.05) if kernels.INTEGERS else (x, error)
        if encoding.startswith("int8_g") and n_tokens >= kernels.TILE:
            meant = x
        y = np.full((n_tokens, n_out + 3), 7, np.float32)
        begin = n_out // 3
        matmul(record.ctypes.data, memory.record.ctypes.data, y.ctypes.data, n_out + 3, n_tokens, begin, n_out)
        expected = meant.astype(np.float64) @ w.decode().astype(np.float64).T
        np.testing.assert_allclose(y[:, begin:n_out], expected[:, begin:], rtol=error, atol=error * np.sqrt(n_in))
        others = np.delete(y, range(begin, n_out), axis=1)  # rows of other threads
        assert (others == 7).all()


@pytest.mark.parametrize("n_in", [33, 384])
@pytest.mark.parametrize("encoding", COMPILED)
def test_a_row_is_the_same_in_any_chunk(encoding, n_in):
    rng, n_out = np.random.default_rng(n_in), 23
    record = describe(w := matrix(encoding, n_out, n_in, rng))  # which must outlive its record
    for n_tokens in range(1, kernels.TILE, 2):
        x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
        memory, _ = activations(x, *record[[layout.W_LEVELS, layout.W_IN_32S]])
        whole, pieces = np.zeros((2, n_tokens, w.shape[0]), np.float32)
        for y, bounds in ((whole, [0, n_out]), (pieces, [0, 1, 3, 8, 14, n_out])):
            for chunk in itertools.pairwise(bounds):
                arguments = record.ctypes.data, memory.record.ctypes.data, y.ctypes.data, n_out, n_tokens, *chunk
                ops.kernel(f"matmul_{encoding}").call(*arguments)
        np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("n_tokens", [1, kernels.TILE])
@pytest.mark.parametrize("encoding", COMPILED)
def test_extreme_codes_do_not_overflow(encoding, n_tokens):
    n_in = 8192
    ones = np.ones((2, n_in))
    w = encode(ones * (np.arange(n_in) % 2) if encoding.startswith("nm") else ones, encoding)
    record = describe(w)
    x = np.full((n_tokens, n_in), 3, np.float32)
    memory, meant = activations(x, *record[[layout.W_LEVELS, layout.W_IN_32S]])
    if encoding.startswith("int8_g") and n_tokens >= kernels.TILE:  # tiles of floats
        meant = x
    y = np.zeros((n_tokens, 2), np.float32)
    matmul = ops.kernel(f"matmul_{encoding}").call
    matmul(record.ctypes.data, memory.record.ctypes.data, y.ctypes.data, 2, n_tokens, 0, 2)
    np.testing.assert_allclose(y, meant @ w.decode().T, rtol=1e-4)


@pytest.mark.parametrize("n_in", LENGTHS)
@pytest.mark.parametrize("encoding", COMPILED)
def test_rows_equal_decode(encoding, n_in):
    w = matrix(encoding, 3, n_in, np.random.default_rng(0))
    record, y = describe(w), np.zeros(n_in, np.float32)
    for row in range(3):
        ops.kernel(f"rows_{encoding}").call(record.ctypes.data, row, y.ctypes.data)
        np.testing.assert_allclose(y, w.decode()[row], rtol=1e-6, atol=1e-6)


def test_half_precision_conversion_is_exact(monkeypatch):
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]  # subnormals too
    y = np.zeros(len(bits), np.float32)

    def convert(source, target, n):
        for i in range(n):
            f32(target)[i] = half(u16(source)[i])

    for in_hardware in {False, kernels.HALF_IN_HARDWARE}:
        monkeypatch.setattr(vectors, "HALF_IN_HARDWARE", in_hardware)
        compiled(convert, 3)(bits.ctypes.data, y.ctypes.data, len(bits))
        np.testing.assert_array_equal(y, bits.view(np.float16).astype(np.float32))


def test_exp_is_accurate():
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    y = np.zeros_like(x)

    def run(x, y, n):
        for i in range(n):
            f32(y)[i] = elementwise.exp(f32(x)[i])

    compiled(run, 3)(x.ctypes.data, y.ctypes.data, len(x))
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=3e-7)


@pytest.mark.skipif(not kernels.BYTE_PAIRS, reason="tiles of this processor take int16")
@pytest.mark.parametrize("n_in", [1, 63, 64, 97, 768])
def test_activations_rounded_to_bytes(n_in):
    x = np.random.default_rng(n_in).standard_t(2, size=(20, n_in)).astype(np.float32)  # outliers, neighbours too
    x[0], x[1] = 3, -5
    memory, meant = activations(x, 127)
    scales, width = memory._group_scales.copy(), memory.record[layout.X_STRIDE]
    memory._group_scales[:], memory._codes[:] = 7, 7

    def run(record, n_tokens, n):
        for token in range(n_tokens):
            elementwise.quantize_to_bytes(record, token, n)

    compiled(run, 3)(memory.record.ctypes.data, len(x), n_in)
    n_groups = -(-n_in // kernels.GROUP)
    codes = memory._codes.view(np.int8).reshape(-1)[: len(x) * width].reshape(len(x), width).astype(int)
    codes, steps = codes[:, : n_groups * kernels.GROUP], memory._group_scales[:, :n_groups]
    np.testing.assert_allclose(steps, scales[:, :n_groups], rtol=1e-6)
    off = codes[:, :n_in] * steps.repeat(kernels.GROUP, axis=1)[:, :n_in] - meant
    assert (np.abs(off) <= 1.001 * steps.repeat(kernels.GROUP, axis=1)[:, :n_in]).all()  # a tie the other way
    assert (codes[:, n_in:] == 0).all()
    assert np.abs(codes).max() <= 127
    if not kernels.BYTES:  # two products with bytes of 0..255 fit an int16
        assert np.abs(codes[:, 0::2] + codes[:, 1::2]).max() <= 128


@pytest.mark.parametrize("n_in", [1, 31, 32, 97, 130, 768])
def test_activations_rounded_in_32s(n_in):
    x = np.random.default_rng(n_in).standard_t(2, size=(3, n_in)).astype(np.float32)
    x[0] = 0
    memory, meant = activations(x, 127, in_32s=True)
    expected = [array.copy() for array in (memory._codes, memory._group_scales, memory._sums)]
    for array in (memory._codes, memory._group_scales, memory._sums):
        array[:] = 7

    def run(record, n_tokens, n):
        for token in range(n_tokens):
            elementwise.quantize_in_32s(record, token, n)

    compiled(run, 3)(memory.record.ctypes.data, len(x), n_in)
    element, n = (np.int8, 1) if kernels.PARTS == 2 else (np.int16, 2)
    found, codes = (
        array.view(np.uint8).reshape(len(x), -1)[:, : memory.record[layout.X_STRIDE] * n].view(element).astype(int)
        for array in (memory._codes, expected[0])
    )
    assert np.abs(found - codes).max() <= 1  # a tie the other way
    assert (found != codes).mean() < 0.01
    np.testing.assert_allclose(memory._group_scales, expected[1], rtol=1e-6)
    np.testing.assert_allclose(memory._sums, expected[2], rtol=1e-5, atol=1.01 * expected[1].max())
    np.testing.assert_allclose(reference.round_activations_in_32s(x), meant, rtol=1e-6, atol=1e-6)
    x[1, 0] = np.nan
    compiled(run, 3)(memory.record.ctypes.data, len(x), n_in)
    assert np.isnan(memory._group_scales[1, 0])
    assert not np.isnan(memory._group_scales[[0, 2]]).any()


@pytest.mark.parametrize("name", layout.ACTIVATION_FUNCTIONS)
def test_activation_functions_equal_numpy(name):
    x = np.concatenate([np.linspace(-12, 12, 10_001), [0, 1e-30, -1e-30, 80, 1e4, np.nan]]).astype(np.float32)
    bias, y = np.zeros_like(x), np.zeros_like(x)

    def run(function, x, bias, y, n):
        elementwise.activate(function, x, bias, y, n)

    compiled(run, 5)(layout.ACTIVATION_FUNCTIONS.index(name), x.ctypes.data, bias.ctypes.data, y.ctypes.data, len(x))
    np.testing.assert_allclose(y, reference.ACTIVATIONS[name](x), rtol=2e-6, atol=5e-7)


def test_layer_norm_and_softmax_equal_numpy():
    rng = np.random.default_rng(0)
    x, gain, bias = rng.normal(3, 2, (3, 50)).astype(np.float32)
    y = np.zeros(50, np.float32)

    def norm(x, gain, bias, y, n):
        elementwise.layer_norm(x, gain, bias, float32(1e-5), y, n)

    compiled(norm, 5)(x.ctypes.data, gain.ctypes.data, bias.ctypes.data, y.ctypes.data, 50)
    np.testing.assert_allclose(y, reference.layer_norm(x, gain, bias, 1e-5), rtol=1e-5, atol=1e-6)

    def weights(x, y, n):
        f32(y)[0] = elementwise.softmax(x, n, (n + elementwise.PANEL - 1) // elementwise.PANEL)

    for scores in (x, -np.abs(x) - 200, floats(-3.5)):
        n, expected, factor = len(scores), reference.softmax(scores), floats(0)
        padded = np.full(-(-n // 32) * 32, 1e6, np.float32)  # whole panels
        padded[:n] = scores
        compiled(weights, 3)(padded.ctypes.data, factor.ctypes.data, n)
        np.testing.assert_allclose(padded[:n] * factor, expected, rtol=1e-5, atol=1e-9)
        assert not padded[n : -(-n // elementwise.PANEL) * elementwise.PANEL].any()


LIST_REFERENCES = """
import re
from minigpt import kernels, objects
for name in kernels.ENTRIES:
    _, text, *_ = kernels.compile_entry(name)
    assert not re.search(r'^declare [^@]*@(?!"?llvm[.])|^@[^=]* = external', objects.closed(text), re.M)
    for symbol in re.findall(r'^declare [^@]*@"?([^"(]+)"?[(]', text, re.M):
        print(symbol)
    for symbol in re.findall(r'^@"?([^" ]+)"? = external', text, re.M):
        print(symbol)
"""


def run_python(code, tmp_path, **environment):
    environment = {**os.environ, "MINIGPT_CACHE_DIR": str(tmp_path), **environment}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_kernels_refer_to_nothing_outside(tmp_path):
    symbols = run_python(LIST_REFERENCES, tmp_path, NUMBA_OPT="0")
    assert symbols
    assert not [symbol for symbol in symbols if not ERROR_PATH.match(symbol)]


def test_portable_code_calls_no_library_and_uses_no_target_intrinsic(tmp_path):
    code = """
import re
from llvmlite import binding
from minigpt import kernels, objects
assert kernels.VECTOR == 16 and not kernels.BYTES
for name in ("matmul_int8", "matmul_f16", "matmul_int4"):
    _, module, _, *target = kernels.compile_entry(name)
    text = objects.machine(*target).emit_assembly(binding.parse_assembly(module))
    assert not re.search("%[yz]mm", text)
    print(*re.findall(r"(?:call|jmp)q?[ \\t]+(\\w+)@PLT|movabsq[ \\t]+[$](\\w+)", text))
"""
    calls = " ".join(run_python(code, tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    assert not re.search("fma|extendhf|gnu_h2f|rint|floor|sqrt|exp", calls)
