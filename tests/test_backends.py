"""The engine wherever it has to run: without numba, without a writable cache, on one thread and on many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import small_checkpoint

import minigpt
from minigpt import ops
from minigpt.errors import BackendError, OptionError

GENERATE = ["generate", "the", "--temperature", "0", "--max-tokens", "30"]
NO_NUMBA = {
    "missing": "raise ImportError('No module named numba')",
    "unwilling": "raise SystemError('numba needs another version of NumPy')",
}


def run(*arguments, **environment):
    """Run python in a new process."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(params=NO_NUMBA)
def without_numba(request, tmp_path):
    """Put a package before numba on the path that cannot be imported."""
    folder = tmp_path / "block" / "numba"
    folder.mkdir(parents=True)
    folder.joinpath("__init__.py").write_text(NO_NUMBA[request.param])
    kernels = str(tmp_path)  # none that a working numba has left
    return {"PYTHONPATH": str(folder.parent), "MINIGPT_BACKEND": "auto", "MINIGPT_CACHE_DIR": kernels}


@pytest.mark.skipif(ops.backend() == "numpy", reason="numba is absent anyway")
def test_without_numba_the_text_is_the_same(model_file, without_numba):
    expected = minigpt.load(model_file).generate("the", temperature=0, max_tokens=30)
    found = run("-m", "minigpt", *GENERATE, "-m", model_file, **without_numba)
    assert found.stdout == f"the{expected}\n"
    assert "numpy" in found.stderr
    assert found.returncode == 0


def test_numba_on_demand_must_be_there(model_file, without_numba):
    found = run("-m", "minigpt", *GENERATE, "-m", model_file, **{**without_numba, "MINIGPT_BACKEND": "numba"})
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("minigpt: numba cannot be loaded (")
    assert found.stderr.count("\n") == 1


def test_the_backend_is_chosen_by_name(monkeypatch):
    choose = ops.backend.__wrapped__  # the function behind its cache
    monkeypatch.setenv("MINIGPT_BACKEND", "numpy")
    assert choose() == "numpy"
    monkeypatch.setenv("MINIGPT_BACKEND", "fast")
    with pytest.raises(BackendError, match="one of auto, numba, numpy, not 'fast'"):
        choose()


@pytest.mark.skipif(ops.backend() == "numpy", reason="needs numba")
@pytest.mark.parametrize("encoding", ["f32", "f16"])
def test_both_backends_agree(encoding, monkeypatch):
    checkpoint = small_checkpoint(encoding)
    ids = np.random.default_rng(0).integers(0, 265, 64)
    compiled = minigpt.MiniGPT(checkpoint).logits(ids)
    monkeypatch.setattr(ops, "backend", lambda: "numpy")
    monkeypatch.setattr(ops, "kernel", lambda name: None)
    np.testing.assert_allclose(compiled, minigpt.MiniGPT(checkpoint).logits(ids), atol=1e-4)


NARROWER = """
import test_program
from minigpt import kernels
assert kernels.VECTOR == {vector} and not kernels.BYTES
for encoding in ("int8", "int4", "f16", "bitmap_int8", "nm_int8"):
    test_program.test_forward_equals_numpy(encoding, 2)
print("equal")
"""
AVX2 = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2,+ssse3"


@pytest.mark.skipif(ops.backend() == "numpy", reason="needs numba")
@pytest.mark.parametrize(("name", "features", "vector"), [("generic", "", 16), ("haswell", AVX2, 32)])
def test_a_processor_with_narrower_vectors(name, features, vector, tmp_path):
    if vector == 32:
        from minigpt import kernels

        if kernels.VECTOR != 64:
            pytest.skip("only where vectors are wider: elsewhere the other tests run this, or nothing can")
    narrower = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "PYTHONPATH": str(Path(__file__).parent)}
    found = run("-c", NARROWER.format(vector=vector), MINIGPT_CACHE_DIR=str(tmp_path), **narrower)
    assert (found.returncode, found.stdout) == (0, "equal\n"), found.stderr


WIDER = """
from minigpt.kernels import target
target.VECTOR, target.LANES, target.PANEL, target.REGISTERS, target.TILE = 64, 16, 32, 32, 12
target.BYTES = target.BYTE_PAIRS = {in_bytes}
target.UNIT, target.PARTS = 4, 2 if {in_bytes} else 4
target.EXPANDS = target.SHUFFLES = False
from minigpt.kernels import vectors
def multiply_bytes(b, w, x, total):
    n = total.type.count
    wide = vectors.vector_of(vectors.I32, 4 * n)
    products = b.mul((b.zext if target.X86 else b.sext)(w, wide), b.sext(x, wide))
    for i in range(4):
        total = b.add(total, vectors.shuffle(b, products, products, list(range(i, 4 * n, 4))))
    return total
vectors.multiply_bytes = multiply_bytes
import test_kernels, test_program
for encoding in ("int8", "int4", "int4_g128", "int8_split", "nm_int8"):
    for n_in in (97, 130, 384):
        test_kernels.test_matmul_equals_numpy(encoding, n_in)
if {in_bytes}:
    test_program.test_forward_equals_numpy("int4", 2)
print("equal")
"""


@pytest.mark.skipif(ops.backend() == "numpy", reason="needs numba")
@pytest.mark.parametrize("in_bytes", [True, False])
def test_a_processor_with_wider_vectors(in_bytes, tmp_path):
    """LLVM makes vectors of 64 bytes of what there is; of instructions that are not there, a plain form stands in."""
    from minigpt import kernels

    if kernels.VECTOR == 64 and in_bytes == kernels.BYTES:
        pytest.skip("the other tests run this")
    environment = {"MINIGPT_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    found = run("-c", WIDER.format(in_bytes=in_bytes), **environment)
    assert (found.returncode, found.stdout) == (0, "equal\n"), found.stderr


CACHELESS = """
from minigpt import ops
told = []
ops.COMPILING.append(lambda: told.append(1))
assert ops.kernel("rows_f32").address
assert ops.kernel("rows_f16").address
print(told)
"""


@pytest.mark.skipif(ops.backend() == "numpy", reason="needs numba")
def test_without_a_writable_cache_kernels_are_compiled_anyway():
    found = run("-c", CACHELESS, MINIGPT_CACHE_DIR="/dev/null")
    assert (found.returncode, found.stdout) == (0, "[1]\n"), found.stderr


@pytest.mark.parametrize("n_threads", [2, 3, 16])
def test_the_number_of_threads_does_not_show(n_threads):
    checkpoint = small_checkpoint("int8")
    one, many = (minigpt.MiniGPT(checkpoint, n) for n in (1, n_threads))
    ids = list(range(40))
    np.testing.assert_allclose(one.logits(ids), many.logits(ids), atol=1e-5)
    assert one.generate("the", seed=1, max_tokens=20) == many.generate("the", seed=1, max_tokens=20)


@pytest.mark.parametrize("value", ["0", "-1", "257", "two", "1.5"])
def test_threads_from_the_environment(monkeypatch, value):
    if ops.backend() == "numpy":
        pytest.skip("NumPy's threads are its own affair")
    monkeypatch.setenv("MINIGPT_NUM_THREADS", value)
    with pytest.raises(OptionError, match=rf"MINIGPT_NUM_THREADS .* 1\.\.256, not '{value}'"):
        minigpt.MiniGPT(small_checkpoint())


def test_numba_computes_where_it_is_installed():
    """Else kernels that cannot be imported would go unnoticed: plain NumPy stands in for them."""
    pytest.importorskip("numba")
    if os.environ.get("MINIGPT_BACKEND", "auto") == "auto":
        assert ops.backend() == "numba"
