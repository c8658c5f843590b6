"""The processor that code is generated for: what it has, and the sizes of vectors, panels and tiles that follow."""

from __future__ import annotations

import platform

from llvmlite.binding import get_host_cpu_name
from numba import config
from numba.core.codegen import get_host_cpu_features

WANTED = getattr(config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES, or none of them for NUMBA_CPU_NAME=generic
FEATURES = get_host_cpu_features() if WANTED is None else WANTED
CPU = getattr(config, "CPU_NAME", None) or get_host_cpu_name()
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
VECTOR = 64 if "+avx512bw" in FEATURES else 32 if "+avx2" in FEATURES else 16  # bytes of a vector register
HALF_IN_HARDWARE = not X86 or "+f16c" in FEATURES  # else the conversion would call a library
LANES = VECTOR // 4  # of 4 bytes
PANEL = 2 * LANES  # rows of a matrix that a tile takes at once: two vectors
# The CPU multiplies bytes four at a time, twice as many as int16: tiles of integer matrices take int8 activations
BYTES = (VECTOR == 64 and "+avx512vnni" in FEATURES) or (VECTOR == 32 and "+avxvnni" in FEATURES)
EXPANDS = VECTOR == 64 and "+avx512vbmi2" in FEATURES and "+avx512vl" in FEATURES  # spreads bytes over a mask's bits
# The same for 8 bytes in a word; before Zen 3, AMD took hundreds of cycles for it
DEPOSITS = X86 and "+bmi2" in FEATURES and CPU not in ("znver1", "znver2")
GROUP = 64  # int8 activations that share a scale: an outlier spoils no more than these
TILE = 6 if X86 and VECTOR < 64 else 12  # tokens of a tile: 2 * TILE accumulators must fit the 16 or 32 registers
