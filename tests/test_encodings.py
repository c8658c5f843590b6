"""Every registered encoding: round trip within its bound, row lookup, product, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt import reference
from minigpt.encodings import ENCODINGS, Weight, encode
from minigpt.errors import EncodingError

SHAPES = [(1, 1), (3, 32), (5, 33), (7, 64), (64, 65), (16, 768), (2, 3072)]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_within_the_bound(name, shape):
    w = matrix(shape)
    decoded = encode(w, name).decode()
    bound = ENCODINGS[name].max_error * np.abs(w).max(axis=1, keepdims=True)
    assert decoded.dtype == np.float32
    assert decoded.shape == w.shape
    assert (np.abs(decoded - w) <= bound).all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("values", [0.0, 1.0, -3.5], ids="constant {}".format)
def test_constant_rows_are_exact(name, values):
    w = np.full((4, 64), values, np.float32)
    np.testing.assert_allclose(encode(w, name).decode(), w, rtol=1e-6)


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_are_rows_of_the_whole(name):
    weight = encode(matrix((9, 70)), name)
    ids = np.array([8, 0, 3, 3])
    np.testing.assert_array_equal(weight.rows(ids), weight.decode()[ids])
    np.testing.assert_array_equal(weight.rows(slice(2, 5)), weight.decode()[2:5])


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("n_tokens", [1, 2, 33])
def test_product_is_that_of_the_decoded_matrix(name, n_tokens, monkeypatch):
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 500)  # several tiles and a rest
    weight, x = encode(matrix((37, 100)), name), matrix((n_tokens, 100), 1)
    if weight.encoding.activation == "i16":
        x = reference.round_activations(x)
    np.testing.assert_allclose(weight.matmul(x), x @ weight.decode().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_a_decoded_matrix_changes_nothing(name):
    first = encode(matrix((6, 96)), name)
    again = encode(first.decode(), name)
    np.testing.assert_allclose(again.decode(), first.decode(), atol=2e-3 * np.abs(first.decode()).max())


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, bad):
    w = matrix((2, 32))
    w[1, 5] = bad
    with pytest.raises(EncodingError, match="NaN or infinity"):
        encode(w, name)


@pytest.mark.parametrize("name", ["f16", "int4"])
def test_values_beyond_half_precision_are_refused(name):
    with pytest.raises(EncodingError, match="1e\\+06"):
        encode(np.full((1, 32), 1e6, np.float32), name)


def test_unknown_encoding():
    with pytest.raises(EncodingError, match=r"'int7'; known: .*int8"):
        encode(matrix((2, 2)), "int7")


@pytest.mark.parametrize("name", ENCODINGS)
def test_parts_must_fit(name):
    weight = encode(matrix((4, 64)), name)
    part = next(iter(weight.parts))
    with pytest.raises(EncodingError, match="must be"):
        Weight(weight.encoding, (5, 64), weight.parts)
    with pytest.raises(EncodingError, match="must be"):
        Weight(weight.encoding, (4, 64), {**weight.parts, part: weight.parts[part].astype(np.int64)})
    with pytest.raises(EncodingError, match="needs the parts"):
        Weight(weight.encoding, (4, 64), {"other": weight.parts[part]})


def test_parts_are_read_only():
    for name in ENCODINGS:
        for part in encode(matrix((4, 64)), name).parts.values():
            assert not part.flags.writeable
