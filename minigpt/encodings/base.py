"""The contract of a way to store a matrix: `Encoding` (one subclass, one file) and `Weight` (one encoded matrix).

Everything above this floor sees matrices as `Weight`s and never asks how they are stored. A new encoding
is one file here, one kernel in `kernels/`, and one row in `docs/format.md`; tests and benchmarks run over
`ENCODINGS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from minigpt import reference
from minigpt.errors import EncodingError
from minigpt.format import let_go

Array = NDArray[Any]
Floats = NDArray[np.float32]
Parts = Mapping[str, Array]
Rows = slice | NDArray[np.integer]  # which rows of a matrix: a range, or ids in any order

ANY = -1  # a size in `part_shapes` that depends on the values: how many of them are not zero, or a rank

ENCODINGS: dict[str, Encoding] = {}


class Encoding(ABC):
    """One way of storing a matrix as a few plain arrays; a subclass registers itself under its name.

    Attributes
    ----------
    name : str
        The name in files, on the command line and of the kernels `matmul_<name>`, `rows_<name>`.
    part_dtypes : dict of str to str
        Names and NumPy dtypes of the parts, in the order in which kernels take them.
    activation : str
        What the kernel multiplies by: "f32", "i16" (at least 12 bits, one scale per token) or "i8" (one scale for
        each 32 columns).
    tables, positions : str
        The encodings of wte / lm_head and of wpe in a file whose other matrices have this encoding.
    max_error : float
        Bound of |decode(encode(w)) - w| relative to the largest magnitude of the row; the tests hold it.
    first : tuple of str
        Parts that are read before others, or instead of them, where only the highest products matter; none: all.
    twin : str
        The plain encoding that `expand` returns and that a sparse matrix must be smaller than.
    """

    name: ClassVar[str]
    part_dtypes: ClassVar[dict[str, str]]
    activation: ClassVar[str] = "f32"
    tables: ClassVar[str]
    positions: ClassVar[str]
    max_error: ClassVar[float]
    first: ClassVar[tuple[str, ...]] = ()
    twin: ClassVar[str] = "f32"

    def __init_subclass__(cls) -> None:
        """Register one instance under the subclass's name; a common base of several encodings has none."""
        if "name" in cls.__dict__:
            ENCODINGS[cls.name] = cls()

    @abstractmethod
    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every part of a matrix of the given shape; ANY where the values decide."""

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:  # noqa: B027  (most have nothing to add)
        """Check what shapes cannot say and kernels rely on, such as indices within their range.

        Raises
        ------
        EncodingError
            If following the parts would lead outside them.
        """

    @abstractmethod
    def encode(self, w: Floats) -> Parts:
        """Return the parts of `w`, float32 [n_out, n_in]."""

    @abstractmethod
    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Return the chosen rows in float32 [n_rows, n_in]."""

    def expand(self, parts: Parts, shape: tuple[int, ...]) -> Weight:
        """Return the same values in the encoding `twin`: for a backend without kernels for this one."""
        return encode(self.decode(parts, shape[-1], slice(None)), self.twin)

    def matmul(self, parts: Parts, shape: tuple[int, ...], x: Floats) -> Floats:
        """Multiply x [n_tokens, n_in] by the transpose of the matrix: [n_tokens, n_out], in plain NumPy."""
        n_out, n_in = shape
        x = reference.ROUNDED[self.activation](x)
        return reference.matmul_by_tiles(lambda rows: self.decode(parts, n_in, rows), n_out, x)


@dataclass(frozen=True)
class Weight:
    """A matrix [n_out, n_in] (or a vector [n], always f32) in some encoding.

    Attributes
    ----------
    encoding : Encoding
        How it is stored.
    shape : tuple of int
        The shape of the decoded matrix.
    parts : mapping of str to ndarray
        Plain read-only C-contiguous arrays, mapped from a file or owned.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Parts

    def __post_init__(self) -> None:
        """Check dtypes and shapes and make the parts C-contiguous, so that a kernel may trust its pointers.

        Raises
        ------
        EncodingError
            If a part is missing, superfluous, has another dtype or shape than the encoding states, or fails its check.
        """
        contiguous = {part: np.ascontiguousarray(array) for part, array in self.parts.items()}
        object.__setattr__(self, "parts", contiguous)
        shapes = self.encoding.part_shapes(self.shape)
        if list(self.parts) != list(shapes):
            raise EncodingError(f"{self.encoding.name} needs the parts {list(shapes)}, not {list(self.parts)}")
        for part, array in self.parts.items():
            dtype = np.dtype(self.encoding.part_dtypes[part])
            fits = array.ndim == len(shapes[part]) and all(
                allowed in (size, ANY) for size, allowed in zip(array.shape, shapes[part], strict=True)
            )
            if array.dtype != dtype or not fits:
                wanted = str(shapes[part]).replace(str(ANY), "any")
                raise EncodingError(
                    f"part {part!r} of a {self.encoding.name} matrix {self.shape} must be {dtype} "
                    f"{wanted}, not {array.dtype} {array.shape}"
                )
        self.encoding.check(self.parts, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def nbytes_first(self) -> int:
        """Bytes that are read to find the highest products, but for the few rows that are read in full."""
        return sum(self.parts[part].nbytes for part in self.encoding.first or self.parts)

    def decode(self) -> Floats:
        """Return the whole matrix or vector in float32."""
        return self.rows(slice(None)).reshape(self.shape)

    def rows(self, rows: Rows) -> Floats:
        """Return the chosen rows in float32 [n_rows, n_in]: the embedding lookup."""
        return self.encoding.decode(self.parts, self.shape[-1], rows)

    def expand(self) -> Weight:
        """Return the same values in the plain encoding `Encoding.twin`."""
        return self.encoding.expand(self.parts, self.shape)

    def let_go(self) -> None:
        """Let pages of a mapped file leave memory until they are read again."""
        for part in self.parts.values():
            let_go(part)

    def matmul(self, x: Floats) -> Floats:
        """Multiply x [n_tokens, n_in] by the transpose: [n_tokens, n_out]."""
        return self.encoding.matmul(self.parts, self.shape, x)


def encode(w: NDArray[np.floating], encoding: str = "f32") -> Weight:
    """Encode a matrix [n_out, n_in] or, in f32 only, a vector [n].

    Raises
    ------
    EncodingError
        If the encoding is unknown, cannot hold this shape, or a value is not finite.
    """
    if encoding not in ENCODINGS:
        raise EncodingError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    values = np.ascontiguousarray(w, dtype=np.float32)
    if not np.isfinite(values).all():
        raise EncodingError(f"a matrix {values.shape} holds NaN or infinity; only finite weights can be stored")
    parts = dict(ENCODINGS[encoding].encode(values))
    for part in parts.values():
        part.setflags(write=False)
    return Weight(ENCODINGS[encoding], values.shape, parts)
