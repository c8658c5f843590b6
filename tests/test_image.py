"""Objects made images: what they may hold, and how kernels get on where images cannot be had."""

from __future__ import annotations

import os
import struct
import sys

import numpy as np
import pytest

from minigpt import image, objects, ops

if ops.backend() == "numpy":
    pytest.skip("needs the compiled backend", allow_module_level=True)

from llvmlite import binding

linux = pytest.mark.skipif(sys.platform != "linux", reason="images are for Linux")

CALLS = """
declare void @elsewhere()
define i64 @minigpt_kernel(i64 %x) {
  call void @elsewhere()
  ret i64 %x
}
"""
ADDS = """
@seven = internal global i64 7
@zero = internal global [1000 x i64] zeroinitializer
define i64 @minigpt_kernel(i64 %x) {
  %a = load i64, ptr @seven
  %p = getelementptr i64, ptr @zero, i64 %x
  %b = load i64, ptr %p
  %y = call i64 @twice(i64 %a)
  %c = add i64 %y, %b
  ret i64 %c
}
define internal i64 @twice(i64 %x) noinline {
  %y = add i64 %x, %x
  ret i64 %y
}
"""


def emitted(text):
    return bytes(objects.machine(by_distance=True).emit_object(binding.parse_assembly(text)))


@linux
def test_an_image_runs_wherever_it_lies(tmp_path):
    code, entry = image.flatten(emitted(ADDS), objects.SYMBOL, objects.HEADER.size)
    path = tmp_path / "image"
    path.write_bytes(objects.HEADER.pack(objects.MAGIC, objects.zlib.crc32(code), 1, entry) + code)
    from ctypes import CFUNCTYPE, c_int64

    for _ in range(2):
        with path.open("rb") as file:
            address, n_arguments = objects._map(path.read_bytes(), file.fileno())
        assert n_arguments == 1
        assert CFUNCTYPE(c_int64, c_int64)(address)(999) == 14


def test_what_refers_to_the_outside_is_refused():
    with pytest.raises(ValueError, match="elsewhere"):
        image.flatten(emitted(CALLS), objects.SYMBOL)


def test_a_missing_function_is_refused():
    with pytest.raises(ValueError, match="no function other"):
        image.flatten(emitted(ADDS), "other")


def test_other_files_are_refused():
    elf = bytearray(emitted(ADDS))
    struct.pack_into("<H", elf, 18, 243)  # RISC-V
    for content in (b"", b"text", bytes(100), bytes(elf)):
        with pytest.raises(ValueError, match="not an object"):
            image.flatten(content, objects.SYMBOL)


@linux
def test_memset_is_that_of_c():
    machine = objects.machine(by_distance=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(objects.MEMSET.replace("@memset", "@fill")), machine)
    engine.finalize_object()
    from ctypes import CFUNCTYPE, c_int64

    fill = CFUNCTYPE(c_int64, c_int64, c_int64, c_int64)(engine.get_function_address("fill"))
    for n in (0, 1, 63, 64, 65, 200):
        memory = np.zeros(300, np.uint8)
        assert fill(memory.ctypes.data + 10, 0x1FE, n) == memory.ctypes.data + 10
        assert (memory == np.where((np.arange(300) >= 10) & (np.arange(300) < 10 + n), 0xFE, 0)).all()


@linux
def test_where_memory_of_files_may_not_be_run_llvm_loads(tmp_path, monkeypatch):
    """Such as a folder on a disk that is mounted noexec."""
    monkeypatch.setattr(objects, "folder", lambda: tmp_path)
    monkeypatch.setattr(objects, "_map", lambda *_: (_ for _ in ()).throw(PermissionError()))
    from minigpt import kernels

    address, n_arguments = objects.store("rows_f32", *kernels.compile_entry("rows_f32"))
    assert address
    assert n_arguments == 3
    assert (tmp_path / "rows_f32").read_bytes().startswith(objects.MAGIC)
    assert objects.load("rows_f32") is None  # so that it is compiled again


@linux
def test_a_start_takes_neither_numba_nor_llvm(tmp_path):
    import subprocess

    script = "import sys; from minigpt import ops; ops.kernel('rows_f32'); ops.kernel('forward'); "
    script += "print('numba' in sys.modules, 'llvmlite' in sys.modules)"
    environment = {**os.environ, "MINIGPT_CACHE_DIR": str(tmp_path)}
    run = lambda: subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)  # noqa: E731
    assert run().stdout.split() == ["True", "True"]
    assert run().stdout.split() == ["False", "False"]


@linux
@pytest.mark.parametrize("place", [0, 8, 20, 64, 500])
def test_a_damaged_image_is_compiled_again(tmp_path, monkeypatch, place):
    from minigpt import kernels

    monkeypatch.setattr(objects, "folder", lambda: tmp_path)
    objects.store("rows_f32", *kernels.compile_entry("rows_f32"))
    code = bytearray((tmp_path / "rows_f32").read_bytes())
    code[place] ^= 64
    (tmp_path / "rows_f32").write_bytes(code)
    assert objects.load("rows_f32") is None
    (tmp_path / "rows_f32").write_bytes(code[:place])
    assert objects.load("rows_f32") is None
