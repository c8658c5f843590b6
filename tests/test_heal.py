"""Closed-form refits against plain least squares, and that healing never makes a model worse."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt.compress import Calibration, compress
from minigpt.compress.calibration import Judge, residuals
from minigpt.compress.heal import REFITS, SAMPLE, Pair, Regression, common_basis, masked_solve, refit
from minigpt.compress.step import STEPS, updated
from minigpt.encodings import encode

TEXT = Calibration(("the song on the ring, ere the thing is sung " * 60, "other things: 1,2,3 " * 40), window=32)
RNG = np.random.default_rng(4)


def pair_of(checkpoint, layers=(0, 1)):
    return Pair(checkpoint, layers, TEXT.fitting(checkpoint))


def last_stream(checkpoint):
    *_, x = residuals(checkpoint, TEXT.fitting(checkpoint))
    return x


# ---- least squares -------------------------------------------------------------------------------------------


def data(n=200, n_in=6, n_out=4):
    x = RNG.normal(1, 2, (n, n_in)).astype(np.float32)
    return x, (x @ RNG.normal(size=(n_in, n_out)) + RNG.normal(size=(n, n_out)) + 3).astype(np.float32)


def regression(x, y):
    sums = Regression(x.shape[1], y.shape[1])
    for begin in range(0, len(x), 64):
        sums.add(x[begin : begin + 64], y[begin : begin + 64])
    return sums


def test_without_ridge_it_is_least_squares():
    x, y = data()
    w, b = regression(x, y).solve(np.ones((4, 6), np.float32), ridge=0)
    expected = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    np.testing.assert_allclose(w, expected[:-1].T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(b, expected[-1], rtol=1e-3, atol=1e-3)


def test_the_ridge_pulls_towards_the_old_map():
    x, y = data()
    old = RNG.normal(size=(4, 6)).astype(np.float32)
    w, b = regression(x, y).solve(old, ridge=1e6)
    np.testing.assert_allclose(w, old, atol=1e-3)
    np.testing.assert_allclose(b, (y - x @ old.T).mean(axis=0), atol=1e-2)
    pull = 0.5 * np.trace(np.cov(x.T, bias=True)) / 6
    xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
    stacked = np.vstack([xc / np.sqrt(len(x)), np.sqrt(pull) * np.eye(6)])
    expected = np.linalg.lstsq(stacked, np.vstack([yc / np.sqrt(len(x)), np.sqrt(pull) * old.T]), rcond=None)[0]
    np.testing.assert_allclose(regression(x, y).solve(old, ridge=0.5)[0], expected.T, rtol=1e-3, atol=1e-3)


def test_zeros_stay_and_the_rest_is_the_best_there_is():
    x, y = data()
    old = np.where(RNG.random((4, 6)) < 0.5, 0, 1).astype(np.float32)
    w, _ = regression(x, y).solve(old, ridge=0)
    assert (w[old == 0] == 0).all()
    xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
    for row, kept, target in zip(w, old != 0, yc.T, strict=True):
        expected = np.linalg.lstsq(xc[:, kept], target, rcond=None)[0]
        np.testing.assert_allclose(row[kept], expected, rtol=1e-3, atol=1e-3)


def test_a_sample_is_the_same_fit_of_fewer_outputs():
    x, y = data(n_out=20)
    sums, old = regression(x, y), RNG.normal(size=(20, 6)).astype(np.float32)
    for some, each in zip(sums.sample().solve(old[::SAMPLE], 0.1), sums.solve(old, 0.1), strict=True):
        np.testing.assert_allclose(some, each[::SAMPLE], rtol=1e-4, atol=1e-4)


def test_the_error_is_that_of_the_map():
    x, y = data()
    w, b = RNG.normal(size=(4, 6)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
    expected = np.square(y - x @ w.T - b).sum(axis=1).mean() - np.square(y).sum(axis=1).mean()
    assert regression(x, y).error(w, b) == pytest.approx(expected, rel=1e-4)
    both = regression(x[:70], y[:70])
    both.merge(regression(x[70:], y[70:]))
    assert both.error(w, b) == pytest.approx(expected, rel=1e-4)


def test_masked_solve_of_nothing():
    assert not masked_solve(np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32), np.zeros((2, 3), np.bool_)).any()


# ---- refits --------------------------------------------------------------------------------------------------


def test_biases_restore_the_mean():
    model = small_checkpoint()
    shifted = updated(model, {f"h.{i}.mlp.c_proj.bias": RNG.normal(size=48) for i in range(2)})
    healed = refit(shifted, pair_of(model), ["biases"])
    for i in range(2):
        name = f"h.{i}.mlp.c_proj.bias"
        np.testing.assert_allclose(healed.weights[name].decode(), model.weights[name].decode(), atol=1e-3)


def test_gains_restore_a_layer_norm():
    model = small_checkpoint()
    names = [f"{ln}.{part}" for ln in ("h.0.ln_1", "h.1.ln_2", "ln_f") for part in ("weight", "bias")]
    spoilt = updated(model, {name: model.weights[name].decode() + 0.3 for name in names})
    healed = refit(spoilt, pair_of(model), ["gains"])
    for name in names:
        np.testing.assert_allclose(healed.weights[name].decode(), model.weights[name].decode(), atol=2e-2)


@pytest.mark.parametrize("method", ["energy", "pca"])
def test_gains_know_what_a_cut_put_into_the_map_that_reads(method):
    model = small_checkpoint()
    cut = STEPS["width"](model, TEXT, n_embd=44, method=method)
    healed = refit(cut, pair_of(model), ["gains"])
    judge = Judge(model, TEXT.held_out(model))
    assert judge.measure(healed)["kl"] < judge.measure(cut)["kl"]


def test_outputs_make_up_for_removed_neurons_and_leave_quantized_or_shared_maps_alone():
    model = small_checkpoint()
    cut = STEPS["neurons"](model, TEXT, remove=0.5, multiple=1)
    healed = refit(cut, pair_of(model), ["outputs"])
    target, before, after = (last_stream(m) for m in (model, cut, healed))
    assert np.square(after - target).mean() < 0.7 * np.square(before - target).mean()
    name = "h.0.mlp.c_proj.weight"
    for weight in (encode(cut.weights[name].decode(), "int8"), cut.weights[name]):
        twins = {"h.0.mlp.c_proj.weight": weight, "h.1.mlp.c_proj.weight": weight}
        shared = updated(small_checkpoint(n_inner=(96, 96)), twins)
        assert refit(shared, pair_of(model), ["outputs"]).weights[name] is weight


def test_targets_skip_removed_layers():
    shape = {"n_layer": 3, "n_head": (2, 2, 2), "n_inner": (32, 32, 32), "attn_scale": (0.25,) * 3}
    model = small_checkpoint(**shape)
    cut = STEPS["depth"](model, layers=[0, 2])
    pair = pair_of(model, (0, 2))
    streams = list(residuals(model, pair.windows))
    places = [x for x, _ in pair.targets(cut)]
    for x, place in zip(places, (0, 1, 4, 5, 6), strict=True):
        np.testing.assert_allclose(x, streams[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["energy", "pca"])
def test_the_tables_tell_where_a_channel_went(method):
    model = small_checkpoint()
    cut = STEPS["width"](model, TEXT, n_embd=32, method=method)
    basis = common_basis(model, cut)
    x, y = (next(residuals(m, TEXT.fitting(m))) for m in (model, cut))
    np.testing.assert_allclose(x @ basis, y, atol=1e-3)


# ---- all together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        ("heads", {"remove": 0.4}),
        ("neurons", {"remove": 0.5, "multiple": 1}),
        ("width", {"n_embd": 40}),
        ("width", {"n_embd": 40, "method": "pca"}),
        ("depth", {"layers": [1]}),
    ],
)
def test_healing_brings_the_kl_down(step):
    model = small_checkpoint()
    entry = compress(model, [step], TEXT, heal=True).history[-1]
    assert entry["healed"]["kl"] < entry["after"]["kl"]
    assert set(entry["healed"]["refits"]) <= set(REFITS)


def test_a_model_that_lost_nothing_is_left_alone():
    model = small_checkpoint()
    result = compress(model, [("depth", {"n_layer": 2})], TEXT, heal=True)
    assert result.history[-1]["after"]["kl"] == pytest.approx(0, abs=1e-6)
    judge = Judge(model, TEXT.held_out(model))
    assert judge.measure(result)["kl"] == pytest.approx(0, abs=1e-6)


def test_healing_across_a_new_vocabulary_and_fewer_positions():
    steps = [
        ("vocabulary", {"size": 258}),
        ("context", {"n_positions": 16}),
        ("neurons", {"remove": 0.5, "multiple": 1}),
    ]
    history = compress(small_checkpoint(), steps, TEXT, heal=True).history
    assert history[0]["after"]["kl"] == pytest.approx(0, abs=1e-6)
    assert history[2]["healed"]["kl"] < history[2]["after"]["kl"]
