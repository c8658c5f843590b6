"""Every kernel as an object file for another machine, made on this one: what compiling ahead of time will build on.

    python benchmarks/cross.py FOLDER aarch64-unknown-linux-gnu [--cpu cortex-a53] [--features +dotprod]

Writes FOLDER/NAME.o for each kernel, with one exported function of that name, and prints what it refers to. Makes no
library of them: that takes a linker for the machine.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

SYMBOL = {  # of an ELF file, by the bytes of an address
    8: [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")],
    4: [("name", "<u4"), ("value", "<u4"), ("size", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("triple")
    parser.add_argument("--cpu", default="generic")
    parser.add_argument("--features", default="", help="those that the kernels may choose by, as +a,-b")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="default: all")
    args = parser.parse_args()
    os.environ["MINIGPT_TARGET"] = f"{args.triple},{args.cpu},{args.features}"
    os.environ["NUMBA_OPT"] = "0"  # numba would optimize for this machine
    warnings.filterwarnings("ignore", category=UserWarning)  # about code without optimization
    args.folder.mkdir(parents=True, exist_ok=True)
    from minigpt import kernels

    machine = machine_of(args.triple, args.cpu, args.features)
    for name in args.kernels or kernels.ENTRIES:
        code = emit(name, machine)
        (args.folder / f"{name}.o").write_bytes(code)
        print(f"{name}: {len(code)} bytes, refers to {', '.join(undefined(code)) or 'nothing'}", flush=True)


def machine_of(triple: str, cpu: str, features: str) -> Any:
    """Return LLVM's code generator."""
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic")


def emit(name: str, machine: Any) -> bytes:
    """Compile a kernel and return its object file."""
    from llvmlite import binding

    from minigpt import kernels, objects
    from minigpt.kernels import target

    _, text, symbol, *_ = kernels.compile_entry(name)
    text = re.sub("^target .*\n", "", text, flags=re.MULTILINE).replace(f"@{target.STAND_IN}", "@llvm.")
    layout = f'target datalayout = "{machine.target_data}"\ntarget triple = "{machine.triple}"\n'
    module = objects.exporting(layout + text, symbol, name)
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = True
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def undefined(code: bytes) -> list[str]:
    """Return the names that an ELF object expects from elsewhere."""
    from llvmlite import binding

    sections = {section.name(): section.data() for section in binding.ObjectFileRef.from_data(code).sections()}
    symbols = np.frombuffer(sections[b".symtab"], SYMBOL[8 if code[4] == 2 else 4])
    names = sections[b".strtab"]
    starts = symbols["name"][(symbols["section"] == 0) & (symbols["name"] > 0)]
    return sorted(names[start : names.index(b"\0", start)].decode() for start in starts)


if __name__ == "__main__":
    main()
