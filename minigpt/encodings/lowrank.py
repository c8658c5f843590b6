"""`lowrank`: w = a b, two thin matrices in f16.

Smaller than a dense f16 matrix below the rank n_out n_in / (n_out + n_in), than `int8` below half of it.
"""

from __future__ import annotations

import numpy as np

from minigpt.encodings.base import ANY, Encoding, Floats, Parts, Rows
from minigpt.encodings.f16 import F16
from minigpt.errors import EncodingError

NOTHING = 1e-6  # singular values below this share of the largest are rounding noise of float32


class LowRank(Encoding):
    """Two factors of the rank that the matrix has; lowering the rank is a compression step."""

    name = "lowrank"
    part_dtypes = {"a": "<f2", "b": "<f2"}
    tables = positions = twin = "f16"
    # b has orthonormal rows and a the norm of the matrix's rows, at most sqrt(n_in) of their largest magnitude:
    # rounding both to 2^-11 costs at most 2^-10 sqrt(n_in) of that, here for n_in up to 4096
    max_error = 2.0**-10 * 64

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Two matrices that share the rank."""
        n_out, n_in = shape
        return {"a": (n_out, ANY), "b": (ANY, n_in)}

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Compare the ranks."""
        if parts["a"].shape[1] != parts["b"].shape[0]:
            raise EncodingError(
                f"the factors of a lowrank matrix have the ranks {parts['a'].shape[1]} and {parts['b'].shape[0]}; "
                "make the file again"
            )

    def encode(self, w: Floats) -> Parts:
        """Factor by singular values, without those that are rounding noise."""
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        rank = max(1, int((s > NOTHING * s[0]).sum()))
        a = np.ascontiguousarray(u[:, :rank] * s[:rank])
        return {"a": F16().encode(a)["values"], "b": vt[:rank].astype("<f2")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Multiply the chosen rows of a by b."""
        w: Floats = parts["a"][rows].astype(np.float32) @ parts["b"].astype(np.float32)
        return w

    def matmul(self, parts: Parts, shape: tuple[int, ...], x: Floats) -> Floats:
        """Multiply by one factor after the other: rank (n_out + n_in) products for each token."""
        y: Floats = (x @ parts["b"].astype(np.float32).T) @ parts["a"].astype(np.float32).T
        return y
