"""Everything that is compiled: matrices times activations, attention, the whole network, the threads' meetings.

Every entry point takes addresses and integers (records are described in `layout.py`), holds no Python object, allocates
nothing and cannot raise, so that it runs without the GIL and can be compiled ahead of time for other machines.
`reference.py` has the same arithmetic in NumPy. Nothing here validates: whoever fills the records does.

Read upwards in size: `target` (the processor), `entry` (Python to machine code), `vectors` and `intrinsics` (what to
write kernels with), `elementwise`; `tiles` and the matrices `floats`, `int8`, `int4`, `sparse`; `phases` (how threads
share work), `attention`, `forward`, `follow`.
"""

from minigpt.kernels import attention, follow, forward, int4, screen, sparse  # noqa: F401  (they fill ENTRIES, as what they import does)
from minigpt.kernels.entry import ENTRIES, FAST, compile_entry
from minigpt.kernels.target import (
    BYTE_PAIRS,
    BYTES,
    GROUP,
    HALF_IN_HARDWARE,
    INTEGERS,
    OFFSET,
    PARTS,
    TILE,
    UNIT,
    VECTOR,
)

__all__ = [
    "BYTES",
    "BYTE_PAIRS",
    "ENTRIES",
    "FAST",
    "GROUP",
    "HALF_IN_HARDWARE",
    "INTEGERS",
    "OFFSET",
    "PARTS",
    "TILE",
    "UNIT",
    "VECTOR",
    "compile_entry",
]
