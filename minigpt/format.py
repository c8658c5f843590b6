"""The `.mgpt` container: bytes on disk <-> named raw arrays and a JSON object of metadata.

Opening validates everything but the checksums of the parts; `verify` reads those too. What the
arrays mean (configuration, vocabulary, how a matrix is encoded) is the business of `checkpoint` and
`encodings`, and no value of a weight is looked at here. Byte-exact specification: docs/format.md.

Two rules keep the reader short. No offset is stored: parts follow one another in the order of the
header, so none can overlap, leave a hole or wrap around. And the header is canonical JSON, so
whatever a plain parser lets pass (duplicate keys, NaN, 1e400, a lone surrogate) differs from its
own re-encoding and is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from minigpt.errors import FormatError

# magic, version, must-understand flags, may-ignore flags, crc32 of the JSON, length of the JSON,
# size of the file, reserved zeros, crc32 of the 60 bytes before it
HEADER = struct.Struct("<8sIIIIQQ20sI")
MAGIC = b"\x89MGP\r\n\x1a\n"  # like PNG's: a transfer in text mode changes one of these bytes
VERSION = 1
UNDERSTOOD = 0  # must-understand flags that this reader knows: none so far
ALIGNMENT = 64  # bytes: a cache line, and the widest vector load

DTYPES: dict[str, np.dtype[Any]] = {
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
    "i16": np.dtype("<i2"),
    "u16": np.dtype("<u2"),
    "i32": np.dtype("<i4"),
    "u32": np.dtype("<u4"),
    "i64": np.dtype("<i8"),
    "u64": np.dtype("<u8"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
}
MAX_JSON = 4 << 20  # bytes: what a hostile header can cost; GPT-2 XL needs a twentieth of it
MAX_DEPTH = 32  # of objects and lists within one another: what any walk over them can afford
MAX_RANK = 4
MAX_DIM = (1 << 31) - 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")  # safe in a terminal and as a file name

AGAIN = "copy or download it again"
CONVERT = "`minigpt convert` makes a .mgpt file from a Hugging Face folder"
FOREIGN = {  # how other files begin: what they are, and what to do
    rb"\Z": f"it is empty; {AGAIN}",
    rb".{0,3}MGP": "its first bytes were damaged, as in text mode; copy it again in binary mode",
    rb"GGUF": f"it is a GGUF file; {CONVERT}",
    rb".{8}\{": f"it is a safetensors file; {CONVERT}",
    rb"PK\x03\x04": f"it is a zip archive, perhaps a PyTorch checkpoint; {CONVERT}",
    rb"\x80[\x02-\x05]": f"it is a pickle, perhaps a PyTorch checkpoint; {CONVERT}",
    rb"version https:": "it is a Git LFS pointer, not the model; run `git lfs pull`",
    rb"": f"it is not a .mgpt file; {CONVERT}",
}

Array = npt.NDArray[Any]
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Tensor:
    """One weight as stored: the name of its encoding, its logical shape, its raw arrays."""

    encoding: str
    shape: tuple[int, ...]
    parts: Mapping[str, Array]


@dataclass(frozen=True)
class Contents:
    """Everything in a file: a JSON object, weights, second names of weights, and other arrays."""

    meta: dict[str, Any]
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    blobs: Mapping[str, Array]


@dataclass(frozen=True)
class Report:
    """What `verify` has checked: the size of the file in bytes and the number of its parts."""

    bytes: int
    parts: int


@dataclass(frozen=True)
class _Part:
    """One array's place in the file."""

    label: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int
    crc32: int


@dataclass(frozen=True)
class _Index:
    """A validated header; `parts` has the keys of `_arrays` and is in file order."""

    json: dict[str, Any]
    json_end: int
    parts: dict[tuple[str, ...], _Part]
    file_size: int


# ---- writing ----


def write(path: StrPath, contents: Contents) -> None:
    """Write a file, whole or not at all; the same contents give the same bytes.

    The data go to a temporary file in the same folder, which replaces `path` once it is on the
    disk. A reader that has the old file mapped keeps it. `meta` is stored as JSON: tuples come back
    as lists. An array without elements cannot be stored; leave it out.

    Raises
    ------
    FormatError
        If the contents cannot be represented, or the file cannot be written.
    """
    with _named("write", path):
        arrays = _arrays(contents)
        json_bytes = _canonical(
            {
                "aliases": dict(contents.aliases),
                "blobs": {name: _describe(blob) for name, blob in contents.blobs.items()},
                "meta": contents.meta,
                "tensors": {
                    name: {
                        "encoding": tensor.encoding,
                        "parts": {key: _describe(part) for key, part in tensor.parts.items()},
                        "shape": tensor.shape,
                    }
                    for name, tensor in contents.tensors.items()
                },
            }
        )
        index = _parse(json_bytes)  # the reader's checks: what it would refuse is not written
        with _replacing(path) as file:
            file.write(_pack(json_bytes, index.file_size) + json_bytes)
            position = index.json_end
            for key, part in index.parts.items():
                file.write(bytes(part.begin - position))
                file.write(_raw(arrays[key]))
                position = part.end


def _arrays(contents: Contents) -> dict[tuple[str, ...], Array]:
    """Return the arrays of the contents by ("blobs", name) or ("tensors", name, part)."""
    arrays: dict[tuple[str, ...], Array] = {}
    arrays |= {("blobs", name): blob for name, blob in contents.blobs.items()}
    for name, tensor in contents.tensors.items():
        arrays |= {("tensors", name, part): array for part, array in tensor.parts.items()}
    return arrays


def _describe(array: Array) -> dict[str, Any]:
    """Return the header's entry of an array."""
    little = array.dtype.newbyteorder("<")
    known = next((name for name, dtype in DTYPES.items() if dtype == little), None)
    return {
        "crc32": zlib.crc32(_raw(array)) if known else 0,
        "dtype": known or str(array.dtype),  # an unknown one is refused by `_parse`
        "shape": array.shape,
    }


def _raw(array: Array) -> memoryview:
    """Return an array's bytes as they lie in the file; copies only a strided or big-endian one."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data  # [nbytes]


def _canonical(value: object) -> bytes:
    """Return the one JSON text of a value: keys sorted, no spaces, UTF-8, finite numbers."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise FormatError(f"the metadata is not JSON ({_one_line(error)})") from error


def _pack(json_bytes: bytes, file_size: int) -> bytes:
    """Return the fixed header of a file."""
    fields = (VERSION, 0, 0, zlib.crc32(json_bytes), len(json_bytes), file_size, bytes(20))
    head = HEADER.pack(MAGIC, *fields, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


@contextlib.contextmanager
def _replacing(path: StrPath) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` at the end; links are followed."""
    target = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        _require_regular(os.stat(target).st_mode)  # os.replace would not spare a device
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".mgpt-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # after a success there is nothing to remove
            os.remove(temporary)
    with contextlib.suppress(OSError):  # the file is in place; not every system can sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- reading ----


def read(path: StrPath) -> Contents:
    """Map a file and return its contents; the header is validated, the parts are not read.

    Returns
    -------
    Contents
        Arrays are read-only views, 64-byte aligned, of one mapping that lives as long as any of
        them. Never truncate a mapped file in place: the system kills a process that touches the
        lost bytes (`write` replaces files and is safe).

    Raises
    ------
    FormatError
        If the file cannot be opened or is not a well-formed `.mgpt` file.
    """
    with _named("read", path), _opened(path) as file:
        index = _read_index(file)
        mapped = mmap.mmap(file.fileno(), index.file_size, access=mmap.ACCESS_READ)
    with contextlib.suppress(AttributeError, OSError):  # what comes from the disk now may come in pages of 2 MB
        mapped.madvise(mmap.MADV_HUGEPAGE)
    arrays = {key: _view(mapped, part) for key, part in index.parts.items()}
    tensors = {
        name: Tensor(
            entry["encoding"],
            tuple(entry["shape"]),
            {part: arrays["tensors", name, part] for part in entry["parts"]},
        )
        for name, entry in index.json["tensors"].items()
    }
    blobs = {name: arrays["blobs", name] for name in index.json["blobs"]}
    return Contents(index.json["meta"], tensors, index.json["aliases"], blobs)


def _view(mapped: mmap.mmap, part: _Part) -> Array:
    flat = np.frombuffer(mapped, part.dtype, math.prod(part.shape), part.begin)
    return flat.reshape(part.shape)


def let_go(array: Array) -> None:
    """Tell the system that a mapped array's pages may leave memory until somebody reads them again.

    They would leave when memory is short anyway; this keeps a walk through a large model small from the beginning.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = getattr(base, "obj", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise") and array.size:
        begin = array.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, page, begin + array.nbytes - page)


def verify(path: StrPath) -> Report:
    """Read a whole file and compare every checksum and every byte of padding.

    The file is read, not mapped, so that a failing disk gives an error and not a dead process.

    Raises
    ------
    FormatError
        As `read`, and naming the first damaged part.
    """
    with _named("verify", path), _opened(path) as file:
        index = _read_index(file)
        file.seek(index.json_end)
        for part in index.parts.values():
            padding = file.read(part.begin - file.tell())
            _require(not any(padding), f"padding before {part.label} is damaged; {AGAIN}")
            crc32 = 0
            while chunk := file.read(min(1 << 20, part.end - file.tell())):
                crc32 = zlib.crc32(chunk, crc32)
            _require(crc32 == part.crc32, f"{part.label} is damaged; {AGAIN}")
    return Report(index.file_size, len(index.parts))


@contextlib.contextmanager
def _opened(path: StrPath) -> Iterator[BinaryIO]:
    """Open a regular file; looking first, because opening a FIFO would wait for a writer."""
    _require_regular(os.stat(path).st_mode)
    with open(path, "rb") as file:
        yield file


def _read_index(file: BinaryIO) -> _Index:
    """Read and check the header of a file, doubting every number from its first byte on."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise FormatError(next(FOREIGN[k] for k in FOREIGN if re.match(k, head, re.DOTALL)))
    _require(len(head) == HEADER.size, f"it is truncated to {len(head)} bytes; {AGAIN}")
    _, version, must, _, json_crc32, json_length, file_size, reserved, crc32 = HEADER.unpack(head)
    computed = zlib.crc32(head[:-4])
    swapped = head[-4:] == computed.to_bytes(4, "big")
    damage = "is big-endian; .mgpt files are little-endian" if swapped else f"is damaged; {AGAIN}"
    _require(crc32 == computed, f"its header {damage}")
    _require(
        1 <= version <= VERSION,
        f"it has format version {version}, this minigpt reads 1 to {VERSION}; upgrade minigpt",
    )
    _require(
        not must & ~UNDERSTOOD,
        f"it needs features {must & ~UNDERSTOOD:#x} that this minigpt lacks; upgrade minigpt",
    )
    _require(not any(reserved), "reserved header bytes are not zero")
    _require(size >= file_size, f"it is truncated: {size} of {file_size} bytes; {AGAIN}")
    _require(size == file_size, f"it has {size - file_size} bytes too many at its end; {AGAIN}")
    _require(json_length <= MAX_JSON, f"its header is {json_length} bytes long, allowed are {MAX_JSON}")
    json_bytes = file.read(json_length)
    _require(len(json_bytes) == json_length, f"header of {json_length} bytes in a file of {size} bytes")
    _require(zlib.crc32(json_bytes) == json_crc32, f"its JSON header is damaged; {AGAIN}")
    index = _parse(json_bytes)
    end = index.file_size
    _require(end == size, f"its parts end at byte {end}, the file at {size}")
    return index


def _parse(json_bytes: bytes) -> _Index:
    """Check a JSON header and place its parts; allocate nothing by what it claims."""
    length = len(json_bytes)
    _require(length <= MAX_JSON, f"its header is {length} bytes long, allowed are {MAX_JSON}")
    try:
        header = json.loads(json_bytes)
    except ValueError as error:
        raise FormatError(f"its header is not JSON ({_one_line(error)})") from error
    level = _nested([header])
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _nested(outer)]
    _require(not level, f"its header is nested deeper than {MAX_DEPTH} levels")
    _require(
        json_bytes == _canonical(header),
        "its header is not canonical JSON (sorted unique keys, no spaces, finite numbers)",
    )
    _keys(header, ("aliases", "blobs", "meta", "tensors"), "the header")
    for key, value in header.items():
        _require(isinstance(value, dict), f"{key!r} in the header is not an object")

    position = json_end = HEADER.size + len(json_bytes)
    parts: dict[tuple[str, ...], _Part] = {}
    for key, label, entry in _entries(header):
        _keys(entry, ("crc32", "dtype", "shape"), label)
        crc32, name, shape = entry["crc32"], entry["dtype"], _shape(entry["shape"], label)
        _require(_is_int(crc32, 0, 0xFFFFFFFF), f"{label} has crc32 {_brief(crc32)}, not 32 bits")
        _require(
            isinstance(name, str) and name in DTYPES,
            f"{label} has dtype {_brief(name)}, known are {', '.join(DTYPES)}",
        )
        begin = -(-position // ALIGNMENT) * ALIGNMENT
        position = begin + DTYPES[name].itemsize * math.prod(shape)
        parts[key] = _Part(label, DTYPES[name], shape, begin, position, crc32)

    for alias, name in header["aliases"].items():
        _name(alias, "alias")
        _require(alias not in header["tensors"], f"{alias!r} is both an alias and a tensor")
        _require(
            isinstance(name, str) and name in header["tensors"],
            f"alias {alias!r} stands for {_brief(name)}, which is no tensor",
        )
    return _Index(header, json_end, parts, position)


def _entries(header: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield key, label and entry of each array in file order: blobs, tensors, each by name."""
    for name, entry in header["blobs"].items():
        _name(name, "blob")
        yield ("blobs", name), f"blob {name!r}", entry
    for name, tensor in header["tensors"].items():
        _name(name, "tensor")
        label = f"tensor {name!r}"
        _keys(tensor, ("encoding", "parts", "shape"), label)
        _name(tensor["encoding"], f"encoding of {label}")
        _shape(tensor["shape"], label)
        _require(isinstance(tensor["parts"], dict) and tensor["parts"], f"{label} has no parts")
        for part, entry in tensor["parts"].items():
            _name(part, f"part of {label}")
            yield ("tensors", name, part), f"{label} part {part!r}", entry


def _nested(value: dict[str, Any] | list[Any]) -> list[Any]:
    """Return the objects and lists right inside one."""
    inner = value.values() if isinstance(value, dict) else value
    return [item for item in inner if isinstance(item, dict | list)]


def _shape(value: object, label: str) -> tuple[int, ...]:
    """Return a shape as a tuple of Python integers, which do not wrap when multiplied."""
    if not (isinstance(value, list) and 1 <= len(value) <= MAX_RANK and all(_is_int(dim, 1, MAX_DIM) for dim in value)):
        allowed = f"1 to {MAX_RANK} dimensions of 1 to {MAX_DIM}"
        raise FormatError(f"{label} has shape {_brief(value)}, allowed {allowed}")
    return tuple(value)


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # not isinstance: true is no number


def _keys(value: object, keys: tuple[str, ...], label: str) -> None:
    valid = isinstance(value, dict) and set(value) == set(keys)
    _require(valid, f"{label} is not an object with the keys {', '.join(keys)}")


def _name(value: object, kind: str) -> None:
    valid = isinstance(value, str) and NAME.fullmatch(value)
    _require(valid, f"{kind} is named {_brief(value)}, allowed 1 to 256 of A-Z a-z 0-9 _ . -")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise FormatError(message)


def _require_regular(mode: int) -> None:
    _require(not stat.S_ISDIR(mode), f"it is a folder; {CONVERT}")
    _require(stat.S_ISREG(mode), "it is a device, pipe or socket, not a regular file")


def _brief(value: object) -> str:
    """Return a doubtful value in printable ASCII, short enough for a message."""
    return f"{value!a:.60}"


def _one_line(error: BaseException) -> str:
    return f"{error!s:.120}".encode("ascii", "replace").decode().replace("\n", " ")


@contextlib.contextmanager
def _named(action: str, path: StrPath) -> Iterator[None]:
    """Turn what goes wrong with a file into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"cannot {action} {str(path)!r}: {error.strerror or error}") from error
    except (FormatError, ValueError, RecursionError) as error:  # a null byte in the path; deep JSON
        raise FormatError(f"cannot {action} {str(path)!r}: {error}") from error
