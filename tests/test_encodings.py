"""Every registered encoding: round trip within its bound, row lookup, product, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt import reference
from minigpt.encodings import ENCODINGS, Weight, encode
from minigpt.encodings.codebook import kmeans
from minigpt.errors import EncodingError

SHAPES = [(1, 1), (3, 32), (5, 33), (7, 64), (64, 65), (16, 768), (2, 3072)]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def thin(w, name):
    """Leave 4 of 8 columns to the encodings that hold no more."""
    return np.where(np.arange(w.shape[1]) % 8 < 4, w, 0) if name.startswith("nm_") else w


def sparse(shape, seed=0):
    """About a fifth of the weights, at most 4 of 8 columns, some rows and some blocks of 32 without any."""
    rng = np.random.default_rng(seed)
    w = np.where(rng.random(shape) < 0.4, rng.normal(size=shape), 0) * (np.arange(shape[1]) % 8 < 4)
    w[:, 32:64] = 0
    w[1] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_within_the_bound(name, shape):
    w = thin(matrix(shape), name)
    decoded = encode(w, name).decode()
    bound = ENCODINGS[name].max_error * np.abs(w).max(axis=1, keepdims=True)
    assert decoded.dtype == np.float32
    assert decoded.shape == w.shape
    assert (np.abs(decoded - w) <= bound).all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("values", [0.0, 1.0, -3.5], ids="constant {}".format)
def test_constant_rows_are_exact(name, values):
    w = thin(np.full((4, 64), values, np.float32), name)
    symmetric_in_f16 = name == "nm_int4" or name.startswith("int8_g")  # the scale is rounded, or half a step off
    rtol = ENCODINGS[name].max_error if symmetric_in_f16 else 1e-6
    np.testing.assert_allclose(encode(w, name).decode(), w, rtol=rtol)


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_are_rows_of_the_whole(name):
    weight = encode(thin(matrix((9, 70)), name), name)
    off = 1e-6 if name == "lowrank" else 0  # rows are products, whose sums BLAS orders by their number
    for ids in np.array([8, 0, 3, 3]), slice(2, 5):
        np.testing.assert_allclose(weight.rows(ids), weight.decode()[ids], rtol=0, atol=off)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 33])
def test_product_is_that_of_the_decoded_matrix(name, n_tokens, monkeypatch):
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 500)  # several tiles and a rest
    weight, x = encode(thin(matrix((37, 100)), name), name), matrix((n_tokens, 100), 1)
    x = reference.ROUNDED[weight.encoding.activation](x)
    np.testing.assert_allclose(weight.matmul(x), x @ weight.decode().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_a_decoded_matrix_changes_nothing(name):
    first = encode(thin(matrix((6, 96)), name), name)
    again = encode(first.decode(), name)
    atol = ENCODINGS[name].max_error if name == "nm_int4" else 2e-3  # symmetric: the range ends half a step further out
    np.testing.assert_allclose(again.decode(), first.decode(), atol=atol * np.abs(first.decode()).max())


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, bad):
    w = matrix((2, 32))
    w[1, 5] = bad
    with pytest.raises(EncodingError, match="NaN or infinity"):
        encode(w, name)


@pytest.mark.parametrize("name", ["f16", "int4", "bitmap_f16", "codebook4", "codebook8"])
def test_values_beyond_half_precision_are_refused(name):
    with pytest.raises(EncodingError, match="1e\\+06"):
        encode(np.full((1, 32), 1e6, np.float32), name)


def test_unknown_encoding():
    with pytest.raises(EncodingError, match=r"'int7'; known: .*int8"):
        encode(matrix((2, 2)), "int7")


@pytest.mark.parametrize("name", ENCODINGS)
def test_parts_must_fit(name):
    weight = encode(thin(matrix((4, 64)), name), name)
    part = next(iter(weight.parts))
    with pytest.raises(EncodingError, match="must be"):
        Weight(weight.encoding, (5, 64), weight.parts)
    with pytest.raises(EncodingError, match="must be"):
        Weight(weight.encoding, (4, 64), {**weight.parts, part: weight.parts[part].astype(np.int64)})
    with pytest.raises(EncodingError, match="needs the parts"):
        Weight(weight.encoding, (4, 64), {"other": weight.parts[part]})


def test_parts_are_read_only():
    for name in ENCODINGS:
        for part in encode(thin(matrix((4, 64)), name), name).parts.values():
            assert not part.flags.writeable


@pytest.mark.parametrize("shape", [(6, 96), (5, 77), (3, 130)], ids=str)
@pytest.mark.parametrize("name", ENCODINGS)
def test_expanded_matrix_has_the_same_values_and_is_plain(name, shape):
    weight = encode(sparse(shape), name)
    plain = weight.expand()
    assert plain.encoding.name in ("f32", "f16", "int8", "int4")
    np.testing.assert_allclose(plain.decode(), weight.decode(), rtol=2e-3 if name == "lowrank" else 1e-6, atol=1e-6)


SPARSE = [name for name in ENCODINGS if name.startswith(("bitmap", "nm_", "block"))]


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_encodings_keep_zeros_and_hold_what_their_dense_twin_holds(name):
    w = sparse((7, 200))
    decoded = encode(w, name).decode()
    assert (decoded[w == 0] == 0).all()
    if name != "nm_int4":  # its twin int4 has a minimum of its own
        np.testing.assert_array_equal(decoded, encode(w, ENCODINGS[name].twin).decode())
    assert encode(w, name).nbytes < encode(w, ENCODINGS[name].twin).nbytes + 64


@pytest.mark.parametrize("name", SPARSE)
def test_a_matrix_of_zeros(name):
    weight = encode(np.zeros((3, 64), np.float32), name)
    assert not weight.decode().any()
    assert all(part.size for part in weight.parts.values())


def spoil(name, part, change):
    """Encode a sparse matrix and change a copy of one part."""
    weight = encode(sparse((6, 96)), name)
    parts = {key: value.copy() for key, value in weight.parts.items()}
    parts[part] = change(parts[part])
    return lambda: Weight(weight.encoding, weight.shape, parts)


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("bitmap_int8", "offsets", put(3, 2**31), "contradict"),
        ("bitmap_int8", "offsets", put(0, 1), "contradict"),
        ("bitmap_int8", "bitmap", put((2, 0), 255), "contradict"),
        ("bitmap_f16", "values", lambda v: v[:-1], "must have"),
        ("bitmap_f16", "values", lambda v: np.append(v, v[:1]), "must have"),
        ("nm_int8", "masks", put((0, 0), 0b11111), "does not keep 4"),
        ("nm_int4", "masks", put((0, 0), 0b111), "does not keep 4"),
        ("block_int8", "pointers", put(1, 2**32 - 1), "do not rise"),
        ("block_int8", "pointers", put(-1, 1), "do not rise"),
        ("block_int8", "columns", put(0, 3), "names block 3, the last is 2"),
        ("block_int8", "columns", put(slice(0, 2), [2, 0]), "not ascending"),
        ("block_int8", "columns", put(slice(0, 2), 2), "not ascending"),
        ("block_int8", "codes", lambda c: c[:-1], "has codes for"),
        ("lowrank", "a", lambda a: np.ascontiguousarray(a[:, :-1]), "have the ranks"),
    ],
)
def test_parts_that_lead_outside_are_refused(name, part, change, message):
    with pytest.raises(EncodingError, match=message):
        spoil(name, part, change)()


def test_bits_beyond_the_last_column_are_refused():
    weight = encode(np.ones((1, 33), np.float32), "bitmap_int8")
    bitmap = np.array([[255, 255, 255, 127, 3, 0, 0, 0]], np.uint8)  # as many bits, one of them in column 33
    with pytest.raises(EncodingError, match="beyond column 32"):
        Weight(weight.encoding, (1, 33), {**weight.parts, "bitmap": bitmap})


def test_more_than_4_of_8_are_refused():
    with pytest.raises(EncodingError, match=r"row 1 has 5 weights in columns 8\.\.15"):
        encode(np.array([[0] * 16, [0] * 8 + [1, 0, 1, 0, 1, 0, 1, 1]], np.float32), "nm_int8")


@pytest.mark.parametrize(("name", "bits"), [("nm_int8", 5), ("nm_int4", 3.25), ("int4_g128", 4.25), ("int8_g64", 8.25)])
def test_bits_a_weight(name, bits):
    weight = encode(thin(matrix((64, 768)), name), name)
    scales = weight.parts["scales"].nbytes if name == "nm_int8" else 0
    assert (weight.nbytes - scales) * 8 / (64 * 768) == bits


@pytest.mark.parametrize(("sparsity", "bits"), [(0.4, 5.8), (0.5, 5.0), (0.8, 2.6)])
def test_bits_of_a_bitmap(sparsity, bits):
    rng = np.random.default_rng(0)
    w = np.where(rng.random((256, 768)) < sparsity, 0, np.sign(rng.normal(size=(256, 768))))
    assert encode(w, "bitmap_int8").nbytes * 8 / w.size == pytest.approx(bits, abs=0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_is_lloyds_algorithm(weighted):
    rng = np.random.default_rng(3)
    w = rng.normal(size=(4, 200)).astype(np.float32)
    mass = rng.random(200).astype(np.float32) if weighted else np.ones(200, np.float32)
    for row, found in zip(w, kmeans(w, 8, mass, rounds=7), strict=True):
        steps = (np.arange(8) + 0.5) / 8
        centres = (row.min() + (row.max() - row.min()) * steps + np.sort(row)[(steps * 200).astype(int)]) / 2
        for _ in range(7):
            nearest = np.abs(row[:, None] - centres).argmin(axis=1)
            for c in range(8):
                if (nearest == c).any():
                    centres[c] = np.average(row[nearest == c], weights=mass[nearest == c])
        np.testing.assert_allclose(found, centres, atol=1e-5)


def test_kmeans_keeps_few_values():
    w = np.random.default_rng(0).choice([-1.5, 0, 0.25, 7], size=(3, 50)).astype(np.float32)
    assert all(set(row) <= set(table) for row, table in zip(w, kmeans(w, 16), strict=True))
