"""Reads and writes `.safetensors` files with NumPy alone: a validated header over mapped arrays, float32 on demand.

BF16 has no NumPy dtype: its 16 bits are the upper half of a float32. It is read, never written.
Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import ConversionError

Floats = NDArray[np.float32]

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file; nothing is read until `read`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # [n_bytes]

    def read(self, transpose: bool = False) -> Floats:
        """Return an own float32 copy, C-contiguous, transposed on the way if asked for.

        Raises
        ------
        ConversionError
            If the dtype is none of F32, F16, BF16.
        """
        if self.dtype not in FLOATS:
            raise ConversionError(
                f"tensor {self.name} has dtype {self.dtype!r}; allowed: {', '.join(FLOATS)}; "
                "save the model again without quantization, in one of these"
            )
        values = self.data.view(FLOATS[self.dtype]).reshape(self.shape)
        values = values.T if transpose else values
        if self.dtype != "BF16":
            return values.astype(np.float32, order="C")
        bits = values.astype(np.uint32, order="C")
        bits <<= 16
        return bits.view(np.float32)

    def same_values(self, other: Stored) -> bool:
        """Whether both hold the same bits in the same shape."""
        same_kind = (self.dtype, self.shape) == (other.dtype, other.shape)
        return same_kind and np.array_equal(self.data, other.data)


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Map a file and return its tensors by name.

    Raises
    ------
    ConversionError
        If the file cannot be read, or its header contradicts itself or the file's size.
    """
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_header > LARGEST_HEADER:
                raise ValueError(f"a header of {n_header} bytes; at most {LARGEST_HEADER} are allowed")
            header = json.loads(file.read(n_header), object_pairs_hook=_unique)
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return _tensors(header, mapped[8 + n_header :])
    except OSError as error:
        raise ConversionError(f"cannot read {path.name}: {error.strerror}; check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path.name} is no intact safetensors file ({error!r}); copy it again") from None


def write_safetensors(
    path: Path, dtype: str, shapes: dict[str, tuple[int, ...]], values: Iterable[NDArray[Any]]
) -> None:
    """Write tensors of one dtype, F32 or F16, whose values come one by one in the order of the shapes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * FLOATS[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in values:
            file.write(np.ascontiguousarray(array, FLOATS[dtype]).data)


def strip(name: str, wrappers: set[str]) -> str:
    """Return a tensor's name without the parts that wrappers of a model have added."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _tensors(header: dict[str, Any], data: NDArray[np.uint8]) -> dict[str, Stored]:
    header.pop("__metadata__", None)
    tensors = {}
    position = 0  # tensors fill the data without holes or overlaps
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = _sizes(name, entry["data_offsets"])
        shape = _sizes(name, entry["shape"])
        dtype = str(entry["dtype"])
        if not name.isprintable():  # names end up in messages
            raise ValueError(f"a tensor is called {name!r}")
        if begin != position or not begin <= end <= len(data):
            raise ValueError(f"tensor {name} lies at {begin}..{end} in {len(data)} bytes, expected at {position}")
        if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != end - begin:
            raise ValueError(f"tensor {name} of {dtype} {shape} has {end - begin} bytes")
        tensors[name] = Stored(name, dtype, shape, data[begin:end])
        position = end
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes after the last tensor")
    return tensors


def _sizes(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"tensor {name} has a size or offset that is no whole number: {values}")
    return tuple(values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return unique
