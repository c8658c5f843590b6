"""Rounding against slow, obvious implementations; folding leaves the model as it is; whole models."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt.checkpoint import load, save
from minigpt.compress import quantize
from minigpt.compress.calibration import Calibration
from minigpt.compress.step import STEPS
from minigpt.compress.sweep import damp, inverse_factor, sweep
from minigpt.encodings import ENCODINGS, Grid, encode
from minigpt.errors import EncodingError, OptionError
from minigpt.model import GPT2

GRIDS = ["int8", "int8_g32", "int4", "int4_g64", "int4_g128"]


def problem(n_out=6, n_in=24, seed=0, n=200):
    """A matrix and the gram of correlated inputs, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, n_in)) @ rng.normal(size=(n_in, n_in)) * np.exp(rng.normal(size=n_in))
    return rng.normal(size=(n_out, n_in)).astype(np.float32), (x.T @ x / n).astype(np.float32)


def error(w, changed, gram):
    d = changed.astype(np.float64) - w
    return float(np.einsum("oi,ij,oj->", d, gram.astype(np.float64), d))


def exact_obs(w, gram, value, order=None):
    """Optimal brain quantization, one row at a time, the inverse of what is left recomputed after every column.

    `value(row, j, v)` is what weight v of that row and column becomes; without an order, the column that costs least
    is next.
    """
    h, result = damp(gram), w.astype(np.float64)
    for r, row in enumerate(result):
        left = list(range(w.shape[1]))
        while left:
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            costs = [(row[j] - value(r, j, row[j])) ** 2 / inverse[k, k] for k, j in enumerate(left)]
            k = left.index(order[len(order) - len(left)]) if order is not None else int(np.argmin(costs))
            j = left[k]
            new = value(r, j, row[j])
            row[left] -= (row[j] - new) / inverse[k, k] * inverse[k]
            row[j] = new
            left.remove(j)
    return result


def to_grid(encoding, grid, n_in):
    scales, minimums = grid.columns(n_in, encoding.group)

    def value(r, j, v):
        step = float(scales[r, j]) or 1.0
        code = np.clip(np.rint((v - minimums[r, j]) / step), encoding.lowest, encoding.highest)
        return code * scales[r, j] + minimums[r, j]

    return value


def test_inverse_factor():
    for n in (3, 64, 65, 200):
        gram = problem(1, n)[1]
        u = inverse_factor(gram).astype(np.float64)
        np.testing.assert_array_equal(u, np.triu(u))
        np.testing.assert_allclose(u.T @ u @ damp(gram), np.eye(n), atol=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_gptq_is_exact_in_its_order(name, act_order):
    w, gram = problem(4, 40)
    encoding = ENCODINGS[name]
    grid = encoding.grid(w)
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(40)
    expected = exact_obs(w, gram, to_grid(encoding, grid, 40), list(order))
    found = sweep(w, gram, encoding=encoding, grid=grid, act_order=act_order).w
    differ = np.abs(found - expected) > 1e-4  # a weight half way between two codes may fall on either side
    assert differ.mean() < 0.03
    assert error(w, found, gram) == pytest.approx(error(w, expected, gram), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_about_as_good_as_the_greedy_order_and_better_than_rounding(seed):
    w, gram = problem(seed=seed)
    encoding = ENCODINGS["int4"]
    grid = encoding.grid(w)
    greedy = error(w, exact_obs(w, gram, to_grid(encoding, grid, 24)), gram)
    swept = error(w, sweep(w, gram, encoding=encoding, grid=grid, act_order=True).w, gram)
    assert swept < 2 * greedy
    assert swept < error(w, encode(w, "int4").decode(), gram)


@pytest.mark.parametrize("n_in", [128, 256, 200])
def test_blocks_of_columns_are_the_sweep_without_blocks(n_in, monkeypatch):
    w, gram = problem(8, n_in, n=600)
    kept = np.random.default_rng(1).random(w.shape) < 0.5
    blocked = sweep(w, gram, kept=kept).w
    monkeypatch.setattr("minigpt.compress.sweep.BLOCK", 1024)
    np.testing.assert_allclose(blocked, sweep(w, gram, kept=kept).w, atol=2e-3)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "gptq-act-order"])
def test_methods_store_what_they_computed(method, name):
    w, gram = problem(5, 200, n=600)
    weight = quantize.METHODS[method](w, gram, ENCODINGS[name])
    assert weight.encoding.name == name
    if method != "rtn":
        swept = sweep(w, gram, kept=w != 0, encoding=ENCODINGS[name], act_order="act" in method)
        np.testing.assert_allclose(weight.decode(), swept.w, atol=1e-6)
    else:
        np.testing.assert_array_equal(weight.decode(), encode(w, name).decode())


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_makes_a_smaller_error_than_rounding(name):
    w, gram = problem(16, 256, n=1000)
    rounded = error(w, encode(w, name).decode(), gram)
    assert error(w, quantize.gptq(w, gram, ENCODINGS[name]).decode(), gram) < 0.7 * rounded


def test_hqq_lowers_the_error_that_it_minimizes():
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, size=(32, 256)).astype(np.float32)
    shifted, plain = quantize.hqq(w, None, ENCODINGS["int4"]).decode(), encode(w, "int4").decode()
    assert (np.abs(shifted - w) ** 0.7).sum() < (np.abs(plain - w) ** 0.7).sum()


def test_hqq_without_a_minimum_is_rounding():
    w = problem(4, 64)[0]
    np.testing.assert_array_equal(quantize.hqq(w, None, ENCODINGS["int8"]).decode(), encode(w, "int8").decode())


@pytest.mark.parametrize("name", [*GRIDS, "bitmap_int8", "nm_int8", "nm_int4", "block_int8"])
@pytest.mark.parametrize("method", quantize.METHODS)
def test_zeros_of_a_pruned_matrix_stay_zeros(method, name):
    w, gram = problem(8, 128, n=600)
    w[np.arange(128) % 8 >= np.arange(8)[:, None] % 4 + 1] = 0
    weight, _ = quantize.rounded(w, gram, name, method)
    assert (weight.decode()[w == 0] == 0).all()
    assert weight.decode().any(axis=1).all()


def test_asymmetric_int4_moves_the_zeros_of_a_pruned_matrix():
    w, _ = problem(8, 64)
    w[:, ::2] = 0
    weight, _ = quantize.rounded(w, None, "int4", symmetric=False)
    moved = np.abs(weight.decode()[w == 0])
    assert moved.any()
    assert (moved <= weight.parts["scales"].max() / 2 + 1e-3).all()


def test_zero_inputs_do_no_harm():
    w, gram = problem(4, 64)
    gram[3], gram[:, 3] = 0, 0
    assert np.isfinite(quantize.gptq(w, gram, ENCODINGS["int4"]).decode()).all()
    assert np.isfinite(quantize.gptq(w, 0 * gram, ENCODINGS["int4"]).decode()).all()


# ---------------------------------------------------------------------------------------------------------------------
# Folding
# ---------------------------------------------------------------------------------------------------------------------


def logits(checkpoint, n=20):
    return np.concatenate(list(GPT2(checkpoint).logits(np.arange(n) * 7 % 256)))


@pytest.mark.parametrize("linear", quantize.FOLDED)
def test_a_fold_leaves_the_logits_as_they_are(checkpoint, linear):
    tensors = {name: weight.decode() for name, weight in checkpoint.weights.items()}
    n_in = tensors[f"h.1.{linear}.weight"].shape[1]
    s = np.exp(np.random.default_rng(0).normal(size=n_in)).astype(np.float32)
    changes = quantize.fold(tensors, 1, linear, s)
    folded = quantize.updated(checkpoint, changes)
    np.testing.assert_allclose(logits(folded), logits(checkpoint), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(changes[f"h.1.{linear}.weight"], tensors[f"h.1.{linear}.weight"] * s)


def test_awq_helps_where_some_inputs_are_large():
    w, gram = problem(32, 128, n=600)
    encoding = ENCODINGS["int4_g128"]
    s = quantize.awq(w, gram, np.ones(128), encoding)
    scaled = quantize.rtn(w * s, None, encoding).decode() / s
    assert error(w, scaled, gram) < 0.8 * error(w, encode(w, "int4_g128").decode(), gram)


def test_smoothquant_balances_inputs_and_weights():
    w, _ = problem(8, 32)
    absmax = np.exp(np.random.default_rng(0).normal(size=32)).astype(np.float32)
    s = quantize.smoothquant(w, None, absmax, ENCODINGS["int8"])
    inputs, weights = absmax / s, np.abs(w * s).max(axis=0)
    np.testing.assert_allclose(inputs / weights, (inputs / weights)[0], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------

TEXT = ("the thing on the other end sings in the sun and then the ring is on the stone " * 60,)


@pytest.fixture(scope="module")
def calibration():
    return Calibration(TEXT, n_tokens=512, n_held_out=128, window=32)


@pytest.mark.parametrize("fold", ["none", "awq", "smoothquant"])
@pytest.mark.parametrize("method", quantize.METHODS)
def test_quantize_a_model(checkpoint, calibration, method, fold, tmp_path):
    result = STEPS["quantize"](checkpoint, calibration, encoding="int4", method=method, fold=fold)
    names = {n: w.encoding.name for n, w in result.weights.items() if len(w.shape) == 2}
    assert names.pop("wpe.weight") == "f16"
    assert names.pop("wte.weight") == names.pop("lm_head.weight") == "int8_split"
    assert result.tied
    assert set(names.values()) == {"int4"}
    entry = result.history[-1]
    assert entry["step"] == "quantize"
    assert entry["stored"] == {"int4": 8, "int8_split": 1, "f16": 1}
    save(result, tmp_path / "out.mgpt")
    np.testing.assert_allclose(logits(load(tmp_path / "out.mgpt")), logits(result), atol=1e-4)


def test_rounding_to_nearest_needs_no_text_and_is_what_encode_does(checkpoint):
    result = STEPS["quantize"](checkpoint, encoding="int8")
    for name, weight in result.weights.items():
        if weight.encoding.name == "int8":
            np.testing.assert_array_equal(weight.decode(), encode(checkpoint.weights[name].decode(), "int8").decode())


def test_only_some_matrices(checkpoint):
    result = STEPS["quantize"](checkpoint, encoding="int4_g64", only="h.*.mlp.*")
    stored = [name for name, weight in result.weights.items() if weight.encoding.name == "int4_g64"]
    assert stored == [f"h.{i}.mlp.{m}.weight" for i in (0, 1) for m in ("c_fc", "c_proj")]


def test_a_fold_without_the_other_matrix_keeps_its_encoding(calibration):
    result = STEPS["quantize"](
        small_checkpoint("f16"), calibration, encoding="int4", fold="awq", only="h.*.attn.c_proj.*"
    )
    assert result.weights["h.0.attn.c_attn.weight"].encoding.name == "f16"


def test_narrow_tables_only_when_asked_and_with_a_warning(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STEPS["quantize"](checkpoint, encoding="int4")
    with pytest.warns(UserWarning, match="less than 8 bits"):
        result = STEPS["quantize"](checkpoint, encoding="int4", tables="int4")
    assert result.weights["wte.weight"].encoding.name == "int4"


def test_sparse_forms_only_where_they_are_smaller(checkpoint):
    result = STEPS["quantize"](checkpoint, encoding="bitmap_int8")
    assert result.weights["h.0.mlp.c_fc.weight"].encoding.name == "int8"
    assert "bitmap_int8" in result.history[-1]["chosen"]["h.0.mlp.c_fc.weight"]


@pytest.mark.parametrize(
    ("zeros", "expected"),
    [
        (lambda w: w, "int8"),
        (lambda w: np.where(np.arange(w.size).reshape(w.shape) % 5 < 2, 0, w), "bitmap_int8"),
        (lambda w: np.where(np.arange(w.shape[1]) % 4 < 2, 0, w), "nm_int8"),
        (lambda w: np.where(np.arange(w.shape[1]) // 32 % 2, 0, w), "block_int8"),
    ],
)
def test_the_smallest_form_is_chosen(zeros, expected):
    w = zeros(problem(64, 256)[0])
    weight, why = quantize.rounded(w, None, "sparse")
    assert weight.encoding.name == expected
    assert why.startswith(expected)
    np.testing.assert_array_equal(weight.decode(), encode(w, "int8").decode())


def test_n_of_m_encodings_refuse_a_dense_matrix(checkpoint):
    with pytest.raises(EncodingError, match="prune with the pattern"):
        STEPS["quantize"](checkpoint, encoding="nm_int8", only="h.0.*")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"encoding": "int7"}, "encoding of quantize"),
        ({"method": "magic"}, "method of quantize"),
        ({"only": "h.9.*"}, "no matrix has a name like"),
        ({"method": "gptq"}, "give calibration text"),
        ({"fold": "awq"}, "give calibration text"),
    ],
)
def test_bad_parameters(checkpoint, parameters, message):
    with pytest.raises(OptionError, match=message):
        STEPS["quantize"](checkpoint, **parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision
# ---------------------------------------------------------------------------------------------------------------------


def test_mix_within_a_size(checkpoint, calibration):
    least = STEPS["quantize"](checkpoint, encoding="int4_g64").nbytes
    most = STEPS["quantize"](checkpoint, encoding="int8").nbytes
    budget = (least + most) / 2
    result = STEPS["mix"](checkpoint, calibration, size=budget / 1e6)
    assert least < result.nbytes <= budget
    assert result.nbytes > budget - 0.2 * (most - least)
    assert set(result.history[-1]["mixed"]) == {"int4_g64", "int8"}


def test_mix_within_a_kl(checkpoint, calibration):
    coarse, fine = (STEPS["mix"](checkpoint, calibration, kl=kl) for kl in (1.0, 3e-3))
    assert coarse.nbytes < fine.nbytes
    assert fine.history[-1]["kl"] <= 3e-3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs a budget"),
        ({"size": 1.0, "kl": 1.0}, "not both"),
        ({"size": 0.001}, "size must be at least"),
        ({"kl": 1e-9}, "kl must be at least"),
        ({"size": 1.0, "encodings": "int4+int9"}, "unknown encoding 'int9'"),
    ],
)
def test_budgets_that_cannot_be(checkpoint, calibration, parameters, message):
    with pytest.raises(OptionError, match=message):
        STEPS["mix"](checkpoint, calibration, **parameters)


def test_grid_columns():
    grid = Grid(np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(grid.columns(5, 2).scales, [[0, 0, 1, 1, 2], [3, 3, 4, 4, 5]])
