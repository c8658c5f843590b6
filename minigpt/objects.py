"""Machine code of kernels, kept between processes and mapped from files: neither numba nor LLVM on a warm start.

numba compiles an entry point once; its optimized LLVM module is closed (what the never-reached error path refers to
becomes a trap), emitted as an object, made an image (`image.py`) and stored in a folder whose name is a digest of all
that the code depends on. Later processes map that code. Where there are no images, which are for Linux, they let
llvmlite load the object.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import re
import struct
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minigpt import image

PACKAGE = Path(__file__).parent
SOURCES = (*sorted(PACKAGE.glob("kernels/*.py")), PACKAGE / "layout.py")  # what compiled code depends on
SYMBOL = "minigpt_kernel"  # the one name that an object exports
# numba's error path: exceptions, the GIL, reference counts; kernels cannot get there
DECLARED = re.compile(r'^declare ([^\n]*@(?!"?llvm\.)[^\n]*\))[^\n]*$', re.MULTILINE)
EXTERNAL = re.compile(r"^(@\S+ = )external (?:\w+ )*?(global|constant) ([^\n]*?)(?:, align \d+)?$", re.MULTILINE)

HEADER = struct.Struct("<8sIIQ40x")  # of an image: magic, checksum of what follows, number of arguments, entry point
MAGIC = b"MGPTCODE"
# C's function of this name, which LLVM may call where much is set to zero
MEMSET = """
define ptr @memset(ptr %to, i32 %value, i64 %n) {
  %byte = trunc i32 %value to i8
  %first = insertelement <64 x i8> undef, i8 %byte, i32 0
  %line = shufflevector <64 x i8> %first, <64 x i8> undef, <64 x i32> zeroinitializer
  %whole = and i64 %n, -64
  br label %lines
lines:
  %i = phi i64 [ 0, %0 ], [ %after, %fill ]
  %more = icmp ult i64 %i, %whole
  br i1 %more, label %fill, label %rest
fill:
  %at = getelementptr i8, ptr %to, i64 %i
  store <64 x i8> %line, ptr %at, align 1
  %after = add i64 %i, 64
  br label %lines
rest:
  %j = phi i64 [ %whole, %lines ], [ %next, %one ]
  %left = icmp ult i64 %j, %n
  br i1 %left, label %one, label %end
one:
  %to.j = getelementptr i8, ptr %to, i64 %j
  store i8 %byte, ptr %to.j
  %next = add i64 %j, 1
  br label %rest
end:
  ret ptr %to
}
"""

_OWNERS: list[Any] = []  # of the code whose addresses are in use


def load(name: str) -> tuple[int, int] | None:
    """Return the address and the number of arguments of a kernel that was stored before; None if there is none."""
    try:
        with (folder() / name).open("rb") as file:
            code = file.read()
            return _map(code, file.fileno()) if code.startswith(MAGIC) else _link(code)
    except (OSError, RuntimeError):  # not there, no home, not readable or usable as code: compile it again
        return None


def is_stored(name: str) -> bool:
    """Tell whether `load` will find a kernel.

    Raises
    ------
    ImportError
        If llvmlite or numba is not installed.
    """
    with contextlib.suppress(OSError, RuntimeError):
        return (folder() / name).is_file()
    return False


def store(name: str, n_arguments: int, module: str, symbol: str, *target: str) -> tuple[int, int]:
    """Turn the LLVM module of a compiled kernel into an object, keep it if a folder can be written, and load it.

    Parameters
    ----------
    name : str
        Of the kernel.
    n_arguments : int
        How many int64 it takes.
    module : str
        Optimized LLVM IR.
    symbol : str
        Of the function in the module that is the kernel.
    *target : str
        What to generate code for: triple, processor and features, in LLVM's words.

    Returns
    -------
    tuple of int
        The address and the number of arguments of the kernel.
    """
    code = _emit(n_arguments, module, symbol, *target)
    with contextlib.suppress(OSError, RuntimeError):  # a read-only device compiles in every process
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code
        with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as file:
            file.write(code)
        os.replace(file.name, folder() / name)
    if code.startswith(MAGIC):
        with contextlib.suppress(OSError), os.fdopen(os.memfd_create(name), "wb") as memory:
            memory.write(code)
            memory.flush()
            return _map(code, memory.fileno())
        code = _emit(n_arguments, module, symbol, *target, whole=False)  # no memory that is a file may be run
    return _link(code)


@functools.cache
def folder() -> Path:
    """Return where objects for this package, this numba and this processor are kept: below `MINIGPT_CACHE_DIR`."""
    home = os.environ.get("MINIGPT_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    parts = [source.read_bytes() for source in SOURCES]
    parts += [version(package).encode() for package in ("minigpt", "numba", "llvmlite")]
    parts += [sys.platform.encode(), *(_processor() or _processor_by_llvm())]
    parts += [
        f"{key}={value}".encode()
        for key, value in sorted(os.environ.items())
        if key.startswith(("NUMBA_", "MINIGPT_TARGET"))
    ]
    return Path(home, "minigpt", hashlib.sha256(b"\0".join(parts)).hexdigest()[:24])


def closed(module: str) -> str:
    """Return a module that refers to nothing but LLVM's intrinsics: functions of the error path trap."""
    module = DECLARED.sub(r"define internal \1 {\n  unreachable\n}", module)
    return EXTERNAL.sub(r"\1internal \2 \3 zeroinitializer", module)


def _processor() -> list[bytes]:
    """Return what Linux says of the processors: LLVM's name for them follows from it, and needs no LLVM."""
    told = (b"vendor", b"cpu family", b"model", b"stepping", b"flags", b"Features", b"CPU ", b"isa", b"uarch")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        return sorted({line for line in file if line.startswith(told)})
    return []


def _processor_by_llvm() -> list[bytes]:
    from llvmlite import binding

    with contextlib.suppress(RuntimeError):  # LLVM does not know this processor's features
        return [binding.get_host_cpu_name().encode(), str(binding.get_host_cpu_features().flatten()).encode()]
    return [binding.get_host_cpu_name().encode()]


def _emit(n_arguments: int, module: str, symbol: str, *target: str, whole: bool = True) -> bytes:
    """Return what is stored of a kernel: an image with its header, or the number of arguments and an object."""
    if whole and sys.platform == "linux":
        parsed = exporting(module + MEMSET if "llvm.memset" in module else module, symbol, SYMBOL)
        with contextlib.suppress(ValueError):
            elf = bytes(machine(*target, by_distance=True).emit_object(parsed))
            code, entry = image.flatten(elf, SYMBOL, HEADER.size)
            return HEADER.pack(MAGIC, zlib.crc32(code), n_arguments, entry) + code
    return bytes([n_arguments]) + bytes(machine(*target).emit_object(exporting(module, symbol, SYMBOL)))


def exporting(module: str, symbol: str, name: str) -> Any:
    """Return the closed module, parsed, whose one visible name is that of the function which was called `symbol`."""
    from llvmlite import binding

    parsed = binding.parse_assembly(closed(module))
    for function in parsed.functions:
        if function.name == symbol:
            function.name = name
        elif not function.is_declaration:
            function.linkage = "internal"
    for variable in parsed.global_variables:
        variable.linkage = "internal"
    parsed.verify()
    return parsed


def machine(triple: str = "", cpu: str = "", features: str = "", *, by_distance: bool = False) -> Any:
    """Return LLVM's code generator for a processor like this one; `by_distance`: of code that may lie anywhere."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(triple or binding.get_process_triple())
    kind: dict[str, Any] = {"reloc": "pic", "codemodel": "small"} if by_distance else {"jit": True}
    return target.create_target_machine(cpu=cpu, features=features, opt=3, **kind)


def _map(code: bytes, file: int) -> tuple[int, int]:
    """Map an open file with an image, the content of which is `code`, where it can be run."""
    _, checksum, n_arguments, entry = HEADER.unpack_from(code.ljust(HEADER.size))
    if zlib.crc32(memoryview(code)[HEADER.size :]) != checksum or not HEADER.size <= entry < len(code):
        raise RuntimeError("the image of a kernel is damaged")
    mapped = mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    _OWNERS.append(mapped)
    return np.frombuffer(mapped, np.uint8).ctypes.data + entry, n_arguments


def _link(code: bytes) -> tuple[int, int]:
    from llvmlite import binding

    if code[1:5] not in (b"\x7fELF", b"\xcf\xfa\xed\xfe") and code[1:3] not in (b"d\x86", b"d\xaa"):
        raise RuntimeError("not an object of ELF, Mach-O or COFF")  # LLVM would end the process
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code[1:]))
    engine.finalize_object()
    if not (address := engine.get_function_address(SYMBOL)):
        raise RuntimeError("the object has no kernel")
    _OWNERS.append(engine)
    return int(address), code[0]
