"""`format`: what goes in comes out, the specification is what the code does, and no broken file gets through.

A broken file must give a one-line `FormatError` that says what is wrong with it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from minigpt import format as mgpt
from minigpt.errors import FormatError
from minigpt.format import Contents, Report, Tensor, let_go, read, verify, write

SPECIFICATION = Path(__file__).parents[1] / "docs" / "format.md"


def small_contents() -> Contents:
    """Return the contents of the file dumped in the specification."""
    codes = np.array([[1, -2], [127, -127], [0, 5]], np.int8)
    parts = {"codes": codes, "scales": np.array([0.5, 0.25, 1.0], np.float32)}
    return Contents(
        meta={"config": {"n_embd": 2, "layer_norm_epsilon": 1e-5}, "history": []},
        tensors={"wte": Tensor("int8", (3, 2), parts)},
        aliases={"head": "wte"},
        blobs={"text": np.frombuffer("aä".encode(), np.uint8)},
    )


def random_contents(seed: int) -> Contents:
    """Return contents with every dtype and rank, in an order that is not the file's."""
    rng = np.random.default_rng(seed)

    def array() -> np.ndarray:
        dtype = rng.choice(list(mgpt.DTYPES.values()))
        shape = tuple(rng.integers(1, 9, size=rng.integers(1, 5)))
        return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

    tensors = {f"h.{i}.weight": Tensor(f"code{i}", (i + 1,), {p: array() for p in "zya"}) for i in (10, 2, 0)}
    meta = {"text": 'naïve \x1b[31m "\n 𝄞', "z": [1, -0.0, 1e-300, None, True], "a": {"": {}}}
    return Contents(meta, tensors, {"tied": "h.2.weight", "again": "h.2.weight"}, {b: array() for b in "cab"})


def assert_equal(left: Contents, right: Contents) -> None:
    assert (left.meta, left.aliases) == (right.meta, right.aliases)
    assert {n: (t.encoding, t.shape, set(t.parts)) for n, t in left.tensors.items()} == {
        n: (t.encoding, t.shape, set(t.parts)) for n, t in right.tensors.items()
    }
    assert set(left.blobs) == set(right.blobs)
    pairs = [(left.blobs[n], right.blobs[n]) for n in left.blobs]
    pairs += [(t.parts[p], right.tensors[n].parts[p]) for n, t in left.tensors.items() for p in t.parts]
    for a, b in pairs:
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a well-formed file."""
    path = tmp_path / "small.mgpt"
    write(path, small_contents())
    return path


def header_of(path: Path) -> tuple[bytes, bytes]:
    """Return the JSON of a file, and what follows it."""
    data = path.read_bytes()
    end = 64 + struct.unpack_from("<Q", data, 24)[0]
    return data[64:end], data[end:]


def seal(path: Path, text: bytes, rest: bytes, **changed: int) -> Path:
    """Write a file whose checksums are right whatever it says; `changed` overrides fields of its header."""
    size = 64 + len(text) + len(rest)
    fields = {
        "version": 1,
        "must": 0,
        "ignore": 0,
        "crc": zlib.crc32(text),
        "length": len(text),
        "size": size,
    }
    head = mgpt.MAGIC + struct.pack("<IIIIQQ20x", *(fields | changed).values())
    path.write_bytes(head + zlib.crc32(head).to_bytes(4, "little") + text + rest)
    return path


def with_json(path: Path, text: bytes) -> Path:
    """Exchange the JSON of a file, keeping its parts in place as far as possible."""
    old, rest = header_of(path)
    parts = rest[-(64 + len(old)) % 64 :]
    return seal(path, text, bytes(-(64 + len(text)) % 64) + parts)


def edited(path: Path, *keys: str, to: object) -> Path:
    """Set the value under `keys` of a file's JSON."""
    header = json.loads(header_of(path)[0])
    place = header
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return with_json(path, json.dumps(header, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode())


def refused(path: object, pattern: str, by=read) -> None:
    """Check that a file is refused in one printable line that names it and says why."""
    with pytest.raises(FormatError, match=pattern) as caught:
        by(path)
    assert str(caught.value).isprintable()
    assert repr(str(path)) in str(caught.value)


# ---- what goes in comes out ----


@pytest.mark.parametrize("seed", range(20))
def test_round_trip(tmp_path, seed):
    contents = random_contents(seed)
    write(tmp_path / "a", contents)
    assert_equal(read(tmp_path / "a"), contents)
    assert verify(tmp_path / "a") == Report((tmp_path / "a").stat().st_size, 3 + 9)


def test_nothing_is_something(tmp_path):
    write(tmp_path / "a", Contents({}, {}, {}, {}))
    assert_equal(read(tmp_path / "a"), Contents({}, {}, {}, {}))
    assert verify(tmp_path / "a").parts == 0


def test_reading_and_writing_again_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a", random_contents(0))
    write(tmp_path / "b", read(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_order_of_insertion_does_not_matter(tmp_path):
    def backwards(d):
        return dict(reversed(list(d.items())))

    c = random_contents(1)
    tensors = {n: Tensor(t.encoding, t.shape, backwards(t.parts)) for n, t in c.tensors.items()}
    write(tmp_path / "a", c)
    write(
        tmp_path / "b",
        Contents(backwards(c.meta), backwards(tensors), backwards(c.aliases), backwards(c.blobs)),
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("change", [np.asfortranarray, lambda a: a.astype(">f4"), lambda a: np.repeat(a, 2, 1)[:, ::2]])
def test_layout_in_memory_does_not_matter(tmp_path, change):
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(tmp_path / "a", Contents({}, {}, {}, {"a": a}))
    write(tmp_path / "b", Contents({}, {}, {}, {"a": change(a)}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_are_plain_aligned_read_only_and_outlive_the_contents(small):
    codes = read(small).tensors["wte"].parts["codes"]
    assert type(codes) is np.ndarray
    assert codes.flags.c_contiguous
    assert codes.ctypes.data % 64 == 0
    assert codes.tolist() == [[1, -2], [127, -127], [0, 5]]
    with pytest.raises(ValueError, match="read-only"):
        codes[0, 0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        codes.flags.writeable = True


def test_values_are_not_judged(tmp_path):
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    write(tmp_path / "a", Contents({}, {}, {}, {"odd": odd}))
    assert read(tmp_path / "a").blobs["odd"].tobytes() == odd.tobytes()


# ---- the specification ----


def golden_bytes() -> bytes:
    dump = re.search(r"```hex\n(.*?)```", SPECIFICATION.read_text("utf-8"), re.DOTALL)[1]
    return b"".join(bytes.fromhex(line[6:53]) for line in dump.splitlines())


def test_specification_dump_is_what_is_written(small):
    assert small.read_bytes() == golden_bytes()


def test_pages_that_are_let_go_come_back(tmp_path):
    values = np.arange(20_000, dtype=np.float32)
    write(tmp_path / "x.mgpt", Contents({}, {}, {}, {"values": values}))
    found = read(tmp_path / "x.mgpt").blobs["values"]
    for array in (found, found[9000:], found[:0], values):
        let_go(array)
    np.testing.assert_array_equal(found, values)


def test_specification_dump_is_read(tmp_path):
    (tmp_path / "golden").write_bytes(golden_bytes())
    assert_equal(read(tmp_path / "golden"), small_contents())
    assert verify(tmp_path / "golden") == Report(588, 3)


def test_specification_states_the_constants():
    text = SPECIFICATION.read_text("utf-8")
    names, sizes = re.search(r"(\| dtype .*\|)\n\|[-|]+\n(\| bytes .*\|)", text).groups()
    table = dict(zip(re.findall(r"`(\w+)`", names), map(int, re.findall(r"\d+", sizes)), strict=True))
    assert table == {name: dtype.itemsize for name, dtype in mgpt.DTYPES.items()}
    assert f"`{mgpt.MAGIC.hex(' ')}`" in text
    assert f"{mgpt.MAX_JSON:,}" in text
    assert f"at most {mgpt.MAX_DEPTH} levels" in text
    assert f"1 to {mgpt.MAX_RANK} integers from\n1 to {mgpt.MAX_DIM:,}" in text


# ---- writing is all or nothing ----


def test_failure_leaves_the_old_file_and_no_other(small, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = small.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(small, random_contents(0))
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(tmp_path / "a", os.strerror(errno.ENOSPC), by=lambda path: write(path, small_contents()))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    refused(tmp_path / "a", "Permission denied", by=lambda path: write(path, small_contents()))


@pytest.mark.parametrize("where", ["missing/a", "folder", "nul\0byte"])
def test_impossible_target(tmp_path, where):
    (tmp_path / "folder").mkdir()
    refused(tmp_path / where, "cannot write", by=lambda path: write(path, small_contents()))
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file", by=lambda path: write(path, small_contents()))
    assert (tmp_path / "pipe").is_fifo()


def test_overwriting_a_file_that_is_mapped(small):
    old = read(small)
    write(small, Contents({}, {}, {}, {"new": np.zeros(1, np.uint8)}))
    assert_equal(old, small_contents())
    write(small, old)
    assert_equal(read(small), small_contents())


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes and links")
def test_mode_and_links_are_those_of_an_ordinary_write(tmp_path):
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "plain").touch()
    write(tmp_path / "link", small_contents())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("contents", "pattern"),
    [
        (Contents({}, {}, {}, {"a": np.zeros(2)}), "blob 'a' has dtype 'float64'"),
        (Contents({}, {}, {}, {"a": np.array([None])}), "dtype 'object'"),
        (Contents({}, {}, {}, {"a": np.zeros((0, 2), np.uint8)}), r"shape \[0, 2\]"),
        (Contents({}, {}, {}, {"a": np.array(1, np.uint8)}), r"shape \[\]"),
        (Contents({}, {}, {}, {"a/b": np.zeros(1, np.uint8)}), "blob is named 'a/b'"),
        (Contents({}, {"a": Tensor("f32", (1,), {})}, {}, {}), "tensor 'a' has no parts"),
        (Contents({}, {}, {"b": "a"}, {}), "'a', which is no tensor"),
        (Contents({"a": math.nan}, {}, {}, {}), "not JSON"),
        (Contents({"a": np.float32(1)}, {}, {}, {}), "not JSON"),
        (Contents({"a": "\ud800"}, {}, {}, {}), "not JSON"),
        (Contents({"a": "x" * (4 << 20)}, {}, {}, {}), "allowed are 4194304"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, contents, pattern):
    refused(tmp_path / "a", pattern, by=lambda path: write(path, contents))
    assert os.listdir(tmp_path) == []


# ---- broken files: the fixed header ----


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"", "empty"),
        (b"GGUF\x03\0\0\0", "GGUF.*minigpt convert"),
        (b"\x40\0\0\0\0\0\0\0{}", "safetensors.*minigpt convert"),
        (b"PK\x03\x04", "PyTorch.*minigpt convert"),
        (b"\x80\x02}q\0.", "PyTorch.*minigpt convert"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n", "not a .mgpt file"),
        (b"hello world", "not a .mgpt file"),
    ],
)
def test_foreign_file(tmp_path, data, pattern):
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path / "a", pattern)


@pytest.mark.parametrize("change", [(b"\r\n", b"\n"), (b"\n", b"\r\n"), (b"\x89", b"\t"), (b"\x89", "\ufffd".encode())])
def test_damage_of_text_mode(small, change):
    small.write_bytes(small.read_bytes().replace(*change))
    refused(small, "binary mode")


def test_big_endian_file(small):
    head = mgpt.MAGIC + struct.pack(">IIIIQQ20x", 1, 0, 0, 0, 2, 66)
    small.write_bytes(head + zlib.crc32(head).to_bytes(4, "big") + b"{}")
    refused(small, "big-endian")


@pytest.mark.parametrize("version", [0, 2, 0xFFFFFFFF])
def test_other_version(small, version):
    refused(seal(small, *header_of(small), version=version), f"version {version}, .*upgrade minigpt")


def test_flags(small):
    assert_equal(read(seal(small, *header_of(small), ignore=0xFFFFFFFF)), small_contents())
    refused(seal(small, *header_of(small), must=0x80000001), "0x80000001.*upgrade minigpt")


def test_reserved_bytes(small):
    head = bytearray(small.read_bytes())
    head[50] = 1
    head[60:64] = zlib.crc32(head[:60]).to_bytes(4, "little")
    small.write_bytes(head)
    refused(small, "reserved")


def test_truncated_anywhere(small):
    data = small.read_bytes()
    for size in range(1, len(data)):
        small.write_bytes(data[:size])
        refused(small, "truncated|first bytes|not a .mgpt file")


def test_trailing_garbage(small):
    small.write_bytes(small.read_bytes() + b"PK")
    refused(small, "2 bytes too many")
    refused(seal(small, *(lambda text, rest: (text, rest + b"PK"))(*header_of(small))), "parts end at byte")


@pytest.mark.parametrize("length", [0, 1, 1000, 2**22 + 1, 2**63, 2**64 - 1])
def test_length_of_the_json(small, length):
    refused(seal(small, *header_of(small), length=length), "header|damaged")


@pytest.mark.parametrize("size", [0, 587, 589, 2**63, 2**64 - 1])
def test_size_of_the_file(small, size):
    refused(seal(small, *header_of(small), size=size), "truncated|too many")


# ---- broken files: the JSON ----

EMPTY = b'{"aliases":{},"blobs":{},"meta":{},"tensors":{}}'


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + EMPTY,
        EMPTY.decode().encode("utf-16"),
        b"[]",
        b"null",
        b"{}",
        EMPTY[:-1],
        EMPTY + b" ",
        EMPTY.replace(b"tensors", b"tensor"),
        EMPTY.replace(b'"meta":{}', b'"meta":[]'),
        EMPTY.replace(b'"meta":{}', b'"meta":null'),
        EMPTY.replace(b'"blobs":{},', b'"blobs":{},"extra":{},'),
        EMPTY.replace(b'"blobs":{},', b'"blobs":{},"blobs":{},'),
        b'{"blobs":{},"aliases":{},"meta":{},"tensors":{}}',
    ],
)
def test_json_of_the_wrong_form(small, text):
    refused(with_json(small, text), "header|JSON")


@pytest.mark.parametrize(
    "value",
    [
        b"NaN",
        b"Infinity",
        b"1e400",
        b"-0",
        b"1.50",
        b"01",
        b"9" * 5000,
        rb'"\ud800"',
        rb'"\u0041"',
        b'{"a":1,"a":1}',
    ],
)
def test_json_that_is_not_canonical(small, value):
    refused(with_json(small, EMPTY.replace(b'"meta":{}', b'"meta":{"a":' + value + b"}")), "JSON")


@pytest.mark.parametrize("depth", [30, 31, 900, 1000, 20_000, 1_000_000])
@pytest.mark.parametrize("place", ["meta", "aliases"])
def test_deep_nesting(small, depth, place):
    deep = b"[" * depth + b"]" * depth
    empty, full = f'"{place}":{{}}'.encode(), f'"{place}":{{"a":'.encode() + deep + b"}"
    seal(small, EMPTY.replace(empty, full), b"")
    if place == "meta" and depth == 30:
        assert list(read(small).meta) == ["a"]
    else:
        refused(small, "recursion|nested deeper than 32|no tensor")


def test_largest_header_costs_little_memory(small):
    text = EMPTY.replace(b'"meta":{}', b'"meta":{"a":[' + b",".join([b"[]"] * 1_390_000) + b"]}")
    seal(small, text, b"")
    tracemalloc.start()
    read(small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * len(text)


BAD_NAMES = ["", "a\0b", "..", ".hidden", "-rf", "a/b", "a b", "a\n", "\x1b[31m", "ä", "\u202e", "x" * 257]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("place", ["tensors", "blobs", "aliases"])
def test_bad_name(small, name, place):
    header = json.loads(header_of(small)[0])
    value = next(iter(header[place].values()))
    refused(edited(small, place, to={name: value}), "is named")


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 8, ["int8"]])
def test_bad_encoding_name(small, name):
    refused(edited(small, "tensors", "wte", "encoding", to=name), "encoding of tensor 'wte' is named")


def test_bad_part_name(small):
    refused(edited(small, "tensors", "wte", "parts", "a\x1b", to={}), r"part of tensor 'wte' is named 'a\\x1b'")


@pytest.mark.parametrize("dtype", ["f64", "F32", "", "i1", None, 4, ["f32"], {}])
def test_unknown_dtype(small, dtype):
    refused(edited(small, "blobs", "text", "dtype", to=dtype), "blob 'text' has dtype .*, known are i8, u8")


def test_dtype_of_another_size(small):
    refused(edited(small, "tensors", "wte", "parts", "scales", "dtype", to="f16"), "parts end at byte")


@pytest.mark.parametrize(
    "shape",
    [
        *(
            [],
            [1] * 5,
            [1] * 33,
            [0],
            [3, 0],
            [-3],
            [2**31],
            [2**63],
            [2**64],
            [10**30],
            [3.0],
            [True],
            ["3"],
        ),
        *([None], [[3]], None, 3, "3", {"0": 3}),
    ],
)
@pytest.mark.parametrize("keys", [("blobs", "text", "shape"), ("tensors", "wte", "shape")])
def test_bad_shape(small, shape, keys):
    refused(edited(small, *keys, to=shape), "(blob 'text'|tensor 'wte') has shape .*, allowed 1 to 4 dimensions")


@pytest.mark.parametrize("shape", [[2], [4], [65536] * 4, [2**31 - 1] * 4, [2**31 - 1, 2**31 - 1, 4, 3]])
def test_shape_that_does_not_fit_the_file_or_wraps(small, shape):
    refused(edited(small, "tensors", "wte", "parts", "scales", "shape", to=shape), "parts end at byte")


@pytest.mark.parametrize("key", ["begin", "offset", "alignment"])
def test_offsets_cannot_be_stated(small, key):
    part = {"crc32": 0, "dtype": "u8", "shape": [3]}
    refused(edited(small, "blobs", "text", to=part | {key: 448}), "blob 'text' is not an object with the keys")


@pytest.mark.parametrize("part", [{}, None, [], 3, "text", {"crc32": 0, "dtype": "u8"}])
def test_bad_part(small, part):
    refused(edited(small, "blobs", "text", to=part), "blob 'text' is not an object with the keys")


@pytest.mark.parametrize("tensor", [{}, None, [], {"encoding": "f32", "shape": [1]}])
def test_bad_tensor(small, tensor):
    refused(edited(small, "tensors", "wte", to=tensor), "tensor 'wte' is not an object with the keys")


@pytest.mark.parametrize("parts", [{}, None, [], [1], "codes"])
def test_bad_parts(small, parts):
    refused(edited(small, "tensors", "wte", "parts", to=parts), "tensor 'wte' has no parts")


@pytest.mark.parametrize("crc32", [-1, 2**32, 1.5, None, True, "0"])
def test_bad_crc32(small, crc32):
    refused(edited(small, "blobs", "text", "crc32", to=crc32), "blob 'text' has crc32")


@pytest.mark.parametrize("aliases", [{"head": "wpe"}, {"head": "head"}, {"wte": "wte"}, {"a": None}, {"a": ["wte"]}])
def test_bad_alias(small, aliases):
    refused(edited(small, "aliases", to=aliases), "alias")


def test_strings_of_meta_are_data(small):
    evil = "\x1b]0;title\x07 {{ ''.__class__ }} %s {0} ../../etc"
    assert read(edited(small, "meta", "history", to=[evil])).meta["history"] == [evil]


# ---- broken files: the parts ----


@pytest.mark.parametrize(
    ("at", "name"),
    [
        (448, "blob 'text'"),
        (512, "'codes'"),
        (587, "'scales'"),
        (447, "padding before blob"),
        (520, "padding before"),
    ],
)
def test_one_flipped_bit_in_the_parts(small, at, name):
    data = bytearray(small.read_bytes())
    data[at] ^= 0x10
    small.write_bytes(data)
    read(small)
    refused(small, f"{name}.*damaged", by=verify)


def test_every_flipped_byte_is_found(small):
    data = small.read_bytes()
    for at in [*range(12), *range(16, len(data))]:
        small.write_bytes(data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :])
        refused(small, ".", by=verify)


# ---- files that are no files ----


@pytest.mark.parametrize("by", [read, verify])
def test_missing_file_folder_and_impossible_path(tmp_path, by):
    refused(tmp_path / "missing", "No such file", by=by)
    refused(tmp_path, "folder; `minigpt convert`", by=by)
    refused("a\0b", "null", by=by)
    refused("x" * 5000, "cannot", by=by)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
def test_pipe_device_loop_and_sparse_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path / "pipe", "not a regular file")
    refused("/dev/zero", "not a regular file")
    refused(tmp_path / "loop", "symbolic links")
    refused(tmp_path / "sparse", "not a .mgpt file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_no_permission(small):
    small.chmod(0)
    refused(small, "Permission denied")


# ---- anything else ----


def complaint(path: Path, by) -> str:
    """Return why a file is refused; nothing if it is not."""
    try:
        by(path)
    except FormatError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_mutations_raise_format_errors_only(small, seed):
    rng = np.random.default_rng(seed)
    good, (text, rest) = small.read_bytes(), header_of(small)
    tracemalloc.start()
    for _ in range(500):
        data = bytearray(good if rng.random() < 0.2 else text)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(data))
            pieces = [rng.bytes(1), b"9", b"{", b'"', b"", data[at // 2 : at]]
            data[at : at + rng.integers(2)] = pieces[rng.integers(len(pieces))]
        whole = data.startswith(mgpt.MAGIC)
        path = small.with_name("mutant")  # a new file each time: the last one may still be mapped
        path.unlink(missing_ok=True)
        if whole:
            path.write_bytes(data)
        else:  # right checksums, so that the mutations reach the parser
            seal(path, bytes(data), bytes(-(64 + len(data)) % 64) + rest[-(64 + len(text)) % 64 :])
        for by in (read, verify):
            assert complaint(path, by).isprintable()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
