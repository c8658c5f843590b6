"""Machine code of kernels, kept between processes and loaded by llvmlite alone: no `import numba` on a warm start.

numba compiles an entry point once; its optimized LLVM module is closed (what the never-reached error path refers to
becomes a trap), emitted as an object file and stored in a folder whose name is a digest of all that the code depends
on. Later processes map that code in a tenth of the time and of the memory that loading numba takes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
SOURCES = (*sorted(PACKAGE.glob("kernels/*.py")), PACKAGE / "layout.py")  # what compiled code depends on
SYMBOL = "minigpt_kernel"  # the one name that an object exports
# numba's error path: exceptions, the GIL, reference counts; kernels cannot get there
DECLARED = re.compile(r'^declare ([^\n]*@(?!"?llvm\.)[^\n]*\))[^\n]*$', re.MULTILINE)
EXTERNAL = re.compile(r"^(@\S+ = )external (?:\w+ )*?(global|constant) ([^\n]*?)(?:, align \d+)?$", re.MULTILINE)

_ENGINES: list[Any] = []  # they own the code whose addresses are in use


def load(name: str) -> tuple[int, int] | None:
    """Return the address and the number of arguments of a kernel that was stored before; None if there is none."""
    try:
        return _link((folder() / name).read_bytes())
    except (OSError, RuntimeError):  # not there, no home, or not readable as code: compile it again
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
    code = bytes([n_arguments]) + bytes(machine(*target).emit_object(exporting(module, symbol, SYMBOL)))
    with contextlib.suppress(OSError, RuntimeError):  # a read-only device compiles in every process
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code
        with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as file:
            file.write(code)
        os.replace(file.name, folder() / name)
    return _link(code)


@functools.cache
def folder() -> Path:
    """Return where objects for this package, this numba and this processor are kept: below `MINIGPT_CACHE_DIR`."""
    from llvmlite import binding

    home = os.environ.get("MINIGPT_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    parts = [source.read_bytes() for source in SOURCES]
    parts += [version(package).encode() for package in ("minigpt", "numba", "llvmlite")]
    parts += [sys.platform.encode(), binding.get_host_cpu_name().encode(), _host_features().encode()]
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


def _host_features() -> str:
    from llvmlite import binding

    try:
        return str(binding.get_host_cpu_features().flatten())
    except RuntimeError:  # LLVM does not know this processor's features
        return ""


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


def machine(triple: str = "", cpu: str = "", features: str = "") -> Any:
    """Return LLVM's code generator for a processor like this one."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(triple or binding.get_process_triple())
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True)


def _link(code: bytes) -> tuple[int, int]:
    from llvmlite import binding

    if code[1:5] not in (b"\x7fELF", b"\xcf\xfa\xed\xfe") and code[1:3] not in (b"d\x86", b"d\xaa"):
        raise RuntimeError("not an object of ELF, Mach-O or COFF")  # LLVM would end the process
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code[1:]))
    engine.finalize_object()
    if not (address := engine.get_function_address(SYMBOL)):
        raise RuntimeError("the object has no kernel")
    _ENGINES.append(engine)
    return int(address), code[0]
