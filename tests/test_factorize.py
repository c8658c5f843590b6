"""Low rank, codebooks and shared layers against obvious alternatives; whole models."""

from __future__ import annotations

import numpy as np
import pytest
from test_quantize import TEXT, error, logits, problem

from minigpt.checkpoint import load, save
from minigpt.compress import factorize
from minigpt.compress.calibration import Calibration
from minigpt.compress.step import STEPS
from minigpt.compress.sweep import damp
from minigpt.encodings import encode
from minigpt.encodings.codebook import kmeans, nearest
from minigpt.errors import OptionError


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_no_other_factors_are_better(whiten, shape):
    w, gram = problem(*shape)
    gram = damp(gram) if whiten else np.eye(shape[1])
    a, b = factorize.low_rank(w, 4, gram.astype(np.float32) if whiten else None)
    best = error(w, a @ b, gram)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(50):
            other = (a + size * rng.normal(size=a.shape)) @ (b + size * rng.normal(size=b.shape))
            assert error(w, other, gram) >= best * 0.999
    if not whiten:
        assert best == pytest.approx((np.linalg.svd(w)[1][4:] ** 2).sum(), rel=1e-4)


def test_whitening_lowers_the_error_of_products():
    w, gram = problem(32, 64, n=500)
    plain, whitened = (a @ b for a, b in (factorize.low_rank(w, 8), factorize.low_rank(w, 8, gram)))
    assert error(w, whitened, gram) < 0.5 * error(w, plain, gram)
    np.testing.assert_allclose((b := factorize.low_rank(w, 8, gram)[1]) @ b.T, np.eye(8), atol=1e-5)


def test_the_whole_rank_is_the_matrix():
    w, gram = problem(6, 9)
    for a, b in (factorize.low_rank(w, 6), factorize.low_rank(w, 6, gram)):
        np.testing.assert_allclose(a @ b, w, atol=1e-4)


def test_sensitive_columns_get_finer_values():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 400)).astype(np.float32)
    mass = np.where(np.arange(400) < 100, 50, 1).astype(np.float32)
    errors = []
    for weights in (None, mass):
        table = kmeans(w, 16, weights)
        errors.append(np.square(np.take_along_axis(table, nearest(w, table).astype(int), axis=1) - w))
    assert (errors[1] @ mass).sum() < (errors[0] @ mass).sum()


def test_shared_matrix_is_the_least_squares_solution():
    (one, first), (two, second) = problem(5, 12, 0), problem(5, 12, 1)
    common = factorize.shared([one, two], [first, second])
    best = error(one, common, damp(first)) + error(two, common, damp(second))
    rng = np.random.default_rng(0)
    for size in (1e-3, 0.1):
        for _ in range(50):
            other = common + size * rng.normal(size=common.shape)
            assert error(one, other, damp(first)) + error(two, other, damp(second)) >= best
    np.testing.assert_allclose(factorize.shared([one, one], [first, second]), one, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    return Calibration(TEXT, n_tokens=512, n_held_out=128, window=32)


@pytest.mark.parametrize("whiten", [True, False])
def test_lowrank(checkpoint, calibration, whiten, tmp_path):
    result = STEPS["lowrank"](checkpoint, calibration, share=0.5, whiten=whiten)
    weight = result.weights["h.0.mlp.c_fc.weight"]
    rank = int(0.5 * 48 * 192 / (48 + 192))
    assert weight.parts["a"].shape == (192, rank)
    assert result.history[-1]["ranks"]["h.0.mlp.c_fc"] == rank
    assert weight.nbytes <= encode(weight.decode(), "f16").nbytes / 2
    save(result, tmp_path / "out.mgpt")
    np.testing.assert_allclose(logits(load(tmp_path / "out.mgpt")), logits(result), atol=1e-4)


@pytest.mark.parametrize("encoding", factorize.CODEBOOKS)
@pytest.mark.parametrize("weighted", [True, False])
def test_codebook(checkpoint, calibration, encoding, weighted, tmp_path):
    result = STEPS["codebook"](checkpoint, calibration, encoding=encoding, weighted=weighted)
    assert result.weights["h.1.attn.c_attn.weight"].encoding.name == encoding
    assert result.weights["wte.weight"] is checkpoint.weights["wte.weight"]
    save(result, tmp_path / "out.mgpt")
    np.testing.assert_allclose(logits(load(tmp_path / "out.mgpt")), logits(result), atol=1e-4)


def test_share_only_what_has_one_shape(checkpoint, calibration):
    result = STEPS["share"](checkpoint, calibration)
    for linear in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        one, other = (result.weights[f"h.{i}.{linear}.weight"] for i in (0, 1))
        assert one is not other  # the small model's layers differ on purpose


def test_shared_layers_stay_shared_when_quantized(calibration):
    from conftest import small_checkpoint

    even = small_checkpoint(n_head=(3, 3), n_inner=(96, 96))
    result = STEPS["share"](even, calibration, only="h.*.mlp.*")
    assert result.weights["h.0.mlp.c_fc.weight"] is result.weights["h.1.mlp.c_fc.weight"]
    assert result.nbytes < even.nbytes
    for method in ("rtn", "gptq"):
        small = STEPS["quantize"](result, calibration, encoding="int8", method=method)
        assert small.weights["h.0.mlp.c_fc.weight"] is small.weights["h.1.mlp.c_fc.weight"]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("lowrank", {}, "needs share"),
        ("lowrank", {"share": 1.5}, "share of lowrank must be"),
        ("lowrank", {"share": 0.5}, "give calibration text"),
        ("codebook", {}, "give calibration text"),
        ("codebook", {"encoding": "int8"}, "encoding of codebook must be"),
        ("codebook", {"weighted": False, "only": "x"}, "no matrix of a block has a name like 'x'"),
        ("share", {}, "give calibration text"),
        ("share", {"layers": 1}, "layers of share must be"),
    ],
)
def test_bad_parameters(checkpoint, name, parameters, message):
    with pytest.raises(OptionError, match=message):
        STEPS[name](checkpoint, **parameters)
