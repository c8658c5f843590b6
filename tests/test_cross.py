"""Kernels compiled for other machines: what their objects refer to, and an emulated aarch64 against NumPy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt import ops

if ops.backend() == "numpy":
    pytest.skip("needs the compiled backend", allow_module_level=True)

import test_kernels
import test_program
from llvmlite import binding

from minigpt import image, kernels
from minigpt.program import Program

CROSS = Path(__file__).parent.parent / "benchmarks" / "cross.py"
AARCH64 = "aarch64-unknown-linux-gnu"
SOME = ["matmul_int8", "matmul_f16", "attend_f32", "run_team", "forward"]
OF_BYTES = [f"{kind}_{name}" for kind in ("matmul", "rows") for name in ("int8", "int8_split", "int4", "bitmap_int8")]
NETWORK = ["attend_f32", "matmul_f16", "rows_f16", "screen_int8_split", "refine_int8_split", "run_team", "forward"]
TARGETS = {
    "aarch64": [AARCH64],
    "cortex-a53": [AARCH64, "--cpu=cortex-a53", "--kernels", *SOME],
    "cortex-a76": [AARCH64, "--cpu=cortex-a76", "--features=+dotprod", "--kernels", *OF_BYTES, *NETWORK],
    "armv7": ["armv7-unknown-linux-gnueabihf", "--cpu=cortex-a7", "--features=+neon,+vfp4"],
    "riscv64": ["riscv64-unknown-linux-gnu", "--cpu=generic-rv64", "--features=+m,+a,+f,+d,+c,+v"],
}
EXPECTED = re.compile(r"memset|__aeabi_\w+")  # of the C library; 64-bit integers on 32 bits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of objects for each target that LLVM has here, all made at the same time."""
    binding.initialize_all_targets()
    root, started = tmp_path_factory.mktemp("objects"), {}
    for name, (triple, *options) in TARGETS.items():
        try:
            binding.Target.from_triple(triple)
        except RuntimeError:
            continue
        command = [sys.executable, CROSS, root / name, triple, *options]
        started[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = {name: process.communicate()[0] for name, process in started.items()}
    assert not any(process.returncode for process in started.values())
    return {name: (root / name, text) for name, text in printed.items()}


def of_target(folders, name):
    if name not in folders:
        pytest.skip(f"this LLVM has no {name}")
    return folders[name]


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_for(name, folders):
    folder, printed = of_target(folders, name)
    *_, wanted = " ".join(TARGETS[name]).partition(" --kernels ")
    assert {path.stem for path in folder.iterdir()} == set(wanted.split() or kernels.ENTRIES)
    names = re.findall(r"refers to (.*)", printed)
    assert len(names) == len(wanted.split() or kernels.ENTRIES)
    outside = {symbol for line in names if line != "nothing" for symbol in line.split(", ")}
    assert not [symbol for symbol in outside if not EXPECTED.fullmatch(symbol)]


# One thread of an aarch64 processor. Its memory is this process's: pages are shown to it where it asks for them

MEMSET = """
target triple = "aarch64-unknown-linux-gnu"
define ptr @memset(ptr %to, i32 %value, i64 %n) {
  %byte = trunc i32 %value to i8
  br label %test
test:
  %i = phi i64 [ 0, %0 ], [ %next, %fill ]
  %more = icmp ult i64 %i, %n
  br i1 %more, label %fill, label %end
fill:
  %at = getelementptr i8, ptr %to, i64 %i
  store i8 %byte, ptr %at
  %next = add i64 %i, 1
  br label %test
end:
  ret ptr %to
}
"""
PAGE, HOME, STACK = 4096, 0x1000, 1 << 20


class Emulator:
    """Kernels of another processor, one that unicorn knows, behind the interface of `ops.kernel`."""

    def __init__(self, folder: Path, processor: str) -> None:
        self.processor = processor
        binding.initialize_all_asmprinters()
        machine = binding.Target.from_triple(AARCH64).create_target_machine(reloc="pic")
        memset = binding.parse_assembly(MEMSET)
        self.engine = binding.create_mcjit_compiler(memset, machine)
        for path in folder.iterdir():
            self.engine.add_object_file(binding.ObjectFileRef.from_path(str(path)))
        self.engine.finalize_object()
        self.stack = np.zeros(STACK, np.uint8)

    def kernel(self, name: str) -> ops.Kernel:
        address = self.engine.get_function_address(name)
        return ops.Kernel(name, address, lambda *arguments: self.call(address, *arguments))

    def call(self, address: int, *arguments: int) -> int:
        import unicorn
        from unicorn import arm64_const as arm

        processor = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        processor.ctl_set_cpu_model(getattr(arm, f"UC_CPU_ARM64_{self.processor}"))

        def show(uc, access, address, size, value, data):
            page = address // PAGE * PAGE
            uc.mem_map_ptr(page, PAGE, unicorn.UC_PROT_ALL, page)
            return page >= PAGE * 16  # a process has nothing below

        processor.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, show)
        processor.reg_write(arm.UC_ARM64_REG_SP, (self.stack.ctypes.data + STACK) // 16 * 16)
        processor.reg_write(arm.UC_ARM64_REG_LR, HOME)
        for i, value in enumerate(arguments):
            processor.reg_write(arm.UC_ARM64_REG_X0 + i, int(value))
        processor.emu_start(address, HOME)
        return processor.reg_read(arm.UC_ARM64_REG_X0)


@pytest.fixture(scope="module")
def emulator(folders):
    pytest.importorskip("unicorn")
    folder, _ = of_target(folders, "aarch64")
    return Emulator(folder, "A53")  # the least that there is


@pytest.fixture
def aarch64(emulator, monkeypatch):
    """Everything that asks for a kernel gets one of the emulated processor."""
    replace_kernels(monkeypatch, emulator.kernel, BYTES=False, BYTE_PAIRS=False, INTEGERS=False)


@pytest.fixture(scope="module")
def multiplier(folders):
    pytest.importorskip("unicorn")
    folder, _ = of_target(folders, "cortex-a76")
    return Emulator(folder, "MAX")


@pytest.fixture
def dotprod(multiplier, monkeypatch):
    """The same of one that multiplies bytes four at a time."""
    replace_kernels(monkeypatch, multiplier.kernel, BYTES=True, BYTE_PAIRS=True, INTEGERS=True, OFFSET=0)


def replace_kernels(monkeypatch, kernel, **target):
    monkeypatch.setattr(ops, "kernel", kernel)
    monkeypatch.setattr(test_program, "Program", lambda checkpoint, n_threads: Program(checkpoint, 1))
    parts = 2 if target["BYTE_PAIRS"] else 4
    for name, value in {**target, "TILE": 12, "UNIT": 1, "PARTS": parts}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("n_in", [1, 16, 33, 130])
@pytest.mark.parametrize("encoding", test_kernels.COMPILED)
def test_matmul_on_aarch64(encoding, n_in, aarch64):
    test_kernels.test_matmul_equals_numpy(encoding, n_in)


@pytest.mark.parametrize("encoding", test_kernels.COMPILED)
def test_rows_on_aarch64(encoding, aarch64):
    test_kernels.test_rows_equal_decode(encoding, 130)


@pytest.mark.parametrize("encoding", test_kernels.COMPILED)
def test_forward_on_aarch64(encoding, aarch64):
    test_program.test_forward_equals_numpy(encoding, 1)


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("kind", test_program.KINDS)
def test_caches_on_aarch64(kind, head_dim, aarch64):
    test_program.test_every_kind_of_cache(kind, head_dim)


@pytest.mark.parametrize("n_in", [1, 33, 130])
@pytest.mark.parametrize("encoding", ["int8", "int8_split", "int4", "bitmap_int8"])
def test_matmul_of_bytes(encoding, n_in, dotprod):
    test_kernels.test_matmul_equals_numpy(encoding, n_in)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_forward_of_bytes(encoding, dotprod):
    test_program.test_forward_equals_numpy(encoding, 1)


def test_images_on_aarch64(folders, emulator, monkeypatch):
    """Objects become images without a linker, but for those that call `memset`; code counts pages there."""
    folder, printed = of_target(folders, "aarch64")
    begin = 64
    paths = [path for path in folder.iterdir() if not re.search(f"^{path.stem}: .*memset", printed, re.MULTILINE)]
    images = {path.stem: image.flatten(path.read_bytes(), path.stem, begin) for path in paths}
    wanted = [f"{kind}_{encoding}" for kind in ("rows", "matmul") for encoding in ("int8", "f16", "int4")]
    run = [name for name in wanted if name in images]
    assert len(run) >= 4
    memory = {name: np.zeros(len(images[name][0]) + 2 * image.PAGE, np.uint8) for name in run}

    def kernel(name):
        if name not in memory:
            return emulator.kernel(name)
        code, entry = images[name]
        page = -memory[name].ctypes.data % image.PAGE
        memory[name][page + begin : page + begin + len(code)] = np.frombuffer(code, np.uint8)
        address = memory[name].ctypes.data + page + entry
        return ops.Kernel(name, address, lambda *arguments: emulator.call(address, *arguments))

    replace_kernels(monkeypatch, kernel, BYTES=False, BYTE_PAIRS=False, INTEGERS=False)
    for name in run:
        kind, encoding = name.split("_")
        if kind == "rows":
            test_kernels.test_rows_equal_decode(encoding, 130)
        else:
            test_kernels.test_matmul_equals_numpy(encoding, 130)
