"""The processor that code is generated for: what it has, and the sizes of vectors, panels and tiles that follow.

It is the one that runs this, unless `MINIGPT_TARGET` names another as LLVM does: triple, processor, features, with
commas between. Features are as good as named: what a processor's name implies is not known here.
"""

from __future__ import annotations

import os

from llvmlite.binding import get_host_cpu_name, get_process_triple
from numba import config
from numba.core.codegen import get_host_cpu_features

OTHER = os.environ.get("MINIGPT_TARGET")
STAND_IN = "other."  # for "llvm." in names of what this machine's code generator does not know
WANTED = getattr(config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES, or none of them for NUMBA_CPU_NAME=generic
TRIPLE, CPU, FEATURES = (
    OTHER.split(",", 2)
    if OTHER
    else (
        get_process_triple(),
        getattr(config, "CPU_NAME", None) or get_host_cpu_name(),
        get_host_cpu_features() if WANTED is None else WANTED,
    )
)
ARCHITECTURE = TRIPLE.partition("-")[0]
X86 = ARCHITECTURE in ("x86_64", "i386", "i686")
ARM = ARCHITECTURE in ("aarch64", "arm64")  # with 64 bits; 32 lack what is taken for granted here
VECTOR = 64 if "+avx512bw" in FEATURES else 32 if "+avx2" in FEATURES else 16  # bytes of a vector register
HALF_IN_HARDWARE = ARM or "+f16c" in FEATURES  # else the conversion may call a library
LANES = VECTOR // 4  # of 4 bytes
PANEL = 2 * LANES  # rows of a matrix that a tile takes at once: two vectors
# The CPU multiplies bytes four at a time, twice as many as int16
BYTES = (
    (VECTOR == 64 and "+avx512vnni" in FEATURES)
    or (VECTOR == 32 and "+avxvnni" in FEATURES)
    or (ARM and "+dotprod" in FEATURES)
)
# It multiplies at least pairs of them, if their sum fits an int16: tiles of integer matrices take int8 activations
BYTE_PAIRS = BYTES or (X86 and VECTOR == 32)
# Tiles of integers do more than those of float32: `pmaddwd` takes two products where a multiply-add takes one
INTEGERS = X86 or BYTES
OFFSET = 128 if X86 else 0  # added to int8 codes of a tile: x86 multiplies uint8 by int8, ARM int8 by int8
EXPANDS = VECTOR == 64 and "+avx512vbmi2" in FEATURES and "+avx512vl" in FEATURES  # spreads bytes over a mask's bits
SHUFFLES = X86 and VECTOR >= 32 and not EXPANDS  # takes each byte from anywhere in 16: the same, by a table
UNIT = VECTOR // 16  # times 32 columns whose 4-bit codes fill a vector
PARTS = 2 if BYTE_PAIRS else 4  # vectors of activations that those are multiplied by
GROUP = 64  # int8 activations that share a scale: an outlier spoils no more than these
REGISTERS = 32 if ARM or VECTOR == 64 else 16  # that hold a vector
TILE = 12 if REGISTERS == 32 else 6  # tokens of a tile: 2 * TILE accumulators must fit
