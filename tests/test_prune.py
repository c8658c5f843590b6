"""Criteria, patterns and the sweep against brute force; whole models, also rounded on the way."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from test_quantize import TEXT, error, exact_obs, logits, problem

from minigpt.checkpoint import load, save
from minigpt.compress import prune
from minigpt.compress.calibration import Calibration
from minigpt.compress.prune import CRITERIA, SOLVING, Pattern, Rule, allocate, lowest
from minigpt.compress.step import STEPS
from minigpt.compress.sweep import damp, sweep
from minigpt.compress.walk import Seen, by_linear
from minigpt.encodings import ENCODINGS
from minigpt.errors import OptionError

PATTERNS = ["unstructured", "2:4", "4:8", "1x32"]
MATRIX = "h.0.mlp.c_fc.weight"


class Inputs(Seen):
    """Inputs of a given gram that are the same in both models."""

    def __init__(self, gram):
        self.given = gram

    gram = covariance = property(lambda self: self.given)
    square = property(lambda self: np.diagonal(self.given))

    def target(self, w):
        return w


def zeros(w):
    return float((w == 0).mean())


@pytest.fixture(scope="module")
def calibration():
    return Calibration(TEXT, n_tokens=512, n_held_out=128, window=32)


# ---------------------------------------------------------------------------------------------------------------------
# Criteria
# ---------------------------------------------------------------------------------------------------------------------


def test_criteria_by_their_definitions():
    w, gram = problem(3, 10)
    seen = Inputs(gram)
    inverse = np.linalg.inv(damp(gram))
    for o, i in np.ndindex(w.shape):
        assert CRITERIA["magnitude"](w, seen)[o, i] == abs(w[o, i])
        assert CRITERIA["wanda"](w, seen)[o, i] == pytest.approx(abs(w[o, i]) * gram[i, i] ** 0.5)
        assert CRITERIA["sparsegpt"](w, seen)[o, i] == pytest.approx(w[o, i] ** 2 / inverse[i, i], rel=1e-3)


def test_random_scores_are_repeatable_and_differ_between_matrices():
    one, other = problem(seed=0)[0], problem(seed=1)[0]
    np.testing.assert_array_equal(prune.random(one, None), prune.random(one, None))
    assert (prune.random(one, None) != prune.random(other, None)).any()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_imported_scores_decide(checkpoint, tmp_path, suffix):
    w = checkpoint.weights[MATRIX].decode()
    scores = np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
    path = tmp_path / f"scores{suffix}"
    if suffix == ".npz":
        np.savez(path, **{MATRIX: scores})
    else:
        pytest.importorskip("safetensors.numpy").save_file({MATRIX: scores}, path)
    result = STEPS["prune"](checkpoint, sparsity=0.3, criterion=str(path), only=MATRIX)
    pruned = result.weights[MATRIX].decode() == 0
    assert scores[pruned].max() < scores[~pruned].min()
    with pytest.raises(OptionError, match=r"must hold scores \(48, 192\) for h.0.mlp.c_proj.weight, not \(0,\)"):
        STEPS["prune"](checkpoint, sparsity=0.3, criterion=str(path), only="h.0.mlp.c_proj.weight")


def test_files_that_hold_no_scores(checkpoint, tmp_path):
    path = tmp_path / "scores.npz"
    for content in (b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(OptionError, match="cannot read scores"):
            STEPS["prune"](checkpoint, sparsity=0.3, criterion=str(path))
    with pytest.raises(OptionError, match="cannot read scores from wandaa"):
        STEPS["prune"](checkpoint, sparsity=0.3, criterion="wandaa")


# ---------------------------------------------------------------------------------------------------------------------
# Patterns
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.5, 0.97])
def test_the_lowest_are_removed(by_row, sparsity):
    scores = np.random.default_rng(0).permutation(240).reshape(6, 40).astype(np.float32)
    kept = lowest(scores, sparsity, by_row)
    for part, keep in zip(scores, kept, strict=True) if by_row else [(scores.ravel(), kept.ravel())]:
        expected = np.sort(part)[round(sparsity * part.size) :]
        np.testing.assert_array_equal(np.sort(part[keep]), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 8)])
@pytest.mark.parametrize("n_in", [16, 18])
def test_n_of_m_keeps_the_best_of_all_choices(n, m, n_in):
    scores = np.random.default_rng(0).random((5, n_in)).astype(np.float32)
    kept = Pattern.parse(f"{n}:{m}").keep(scores, 0.0)
    for row, keep in zip(scores, kept, strict=True):
        for begin in range(0, n_in, m):
            group = row[begin : begin + m]
            best = max(combinations(range(len(group)), min(n, len(group))), key=lambda c, g=group: g[list(c)].sum())
            assert set(np.flatnonzero(keep[begin : begin + m])) == set(best)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("n_in", [128, 136])
def test_blocks_are_kept_or_removed_as_a_whole(sparsity, n_in):
    scores = np.random.default_rng(0).random((8, n_in)).astype(np.float32)
    kept = Pattern.parse("1x32").keep(scores, sparsity)
    sums = [(scores[o, b : b + 32].sum(), o, b) for o in range(8) for b in range(0, n_in, 32)]
    removed = {(o, b) for _, o, b in sorted(sums)[: round(sparsity * len(sums))]}
    for _, o, b in sums:
        assert kept[o, b : b + 32].all() != ((o, b) in removed)
        assert kept[o, b : b + 32].any() != ((o, b) in removed)


@pytest.mark.parametrize("bad", ["", "4:2", "4:4", "0:4", "2:5", "1x0", "1x33", "2x32", "blocks", "-1:4"])
def test_patterns_that_are_none(bad):
    with pytest.raises(OptionError, match="pattern must be"):
        Pattern.parse(bad)


# ---------------------------------------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------------------------------------


def test_sparsegpt_with_a_given_mask_is_exact():
    w, gram = problem(4, 40)
    kept = np.random.default_rng(0).random(w.shape) < 0.6
    expected = exact_obs(w, gram, lambda r, j, v: v if kept[r, j] else 0.0, list(range(40)))
    np.testing.assert_allclose(sweep(w, gram, kept=kept).w, expected, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_about_as_good_as_the_greedy_order_and_better_than_a_mask(seed):
    w, gram = problem(6, 24, seed)
    h, exact = damp(gram), w.astype(np.float64)
    for row in exact:  # one weight after the other, the cheapest first, the others make up for it
        left = list(range(24))
        for _ in range(12):
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            k = int(np.argmin(row[left] ** 2 / np.diagonal(inverse)))
            row[left] -= row[left[k]] / inverse[k, k] * inverse[k]
            row[left.pop(k)] = 0
    rule = Rule("sparsegpt", Pattern(), update=True)
    swept, _ = rule.apply("", w, Inputs(gram), 0.5)
    masked, _ = Rule("wanda", Pattern(), by_row=True).apply("", w, Inputs(gram), 0.5)
    assert error(w, swept, gram) < 3 * error(w, exact, gram)
    assert error(w, swept, gram) < error(w, masked, gram)


def test_alternating_finds_nearly_the_best_of_all_masks():
    found = best = 0.0
    for seed in range(8):
        w, gram = problem(4, 10, seed)
        result, _ = Rule("alps", Pattern(), by_row=True, update=True).apply("", w, Inputs(gram), 0.5)
        assert (np.count_nonzero(result, axis=1) == 5).all()
        h = damp(gram).astype(np.float64)
        for row, pruned in zip(w, result, strict=True):
            found += (row - pruned) @ h @ (row - pruned)
            best += min(least_error(row, h, list(kept)) for kept in combinations(range(10), 5))
    assert best <= found * 1.001
    assert found < 1.25 * best


def least_error(row, h, kept):
    values = np.zeros(len(row))
    values[kept] = np.linalg.solve(h[np.ix_(kept, kept)], (h @ row)[kept])
    return (row - values) @ h @ (row - values)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("update", [False, True])
def test_every_criterion_in_every_pattern(criterion, pattern, update):
    w, gram = problem(16, 256, n=800)
    rule = Rule(criterion, Pattern.parse(pattern), update=update)
    result, _ = rule.apply(MATRIX, w, Inputs(gram), 0.5)
    assert zeros(result) == pytest.approx(0.5, abs=0.01)
    groups = result.reshape(16, -1, {"2:4": 4, "4:8": 8}.get(pattern, 32)) != 0
    if ":" in pattern:
        assert (groups.sum(axis=2) == groups.shape[2] // 2).all()
    if pattern == "1x32":
        assert (groups.all(axis=2) | ~groups.any(axis=2)).all()


def test_making_up_for_the_loss_lowers_the_error():
    w, gram = problem(16, 256, n=800)
    for criterion in CRITERIA:
        plain, updated = (
            Rule(criterion, Pattern(), update=u).apply("", w, Inputs(gram), 0.5)[0] for u in (False, True)
        )
        assert error(w, updated, gram) < 0.8 * error(w, plain, gram)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_zeros_stay_zeros_and_count(criterion):
    w, gram = problem(16, 256, n=800)
    w[:, ::4] = 0
    result, _ = Rule(criterion, Pattern(), update=criterion in SOLVING).apply("", w, Inputs(gram), 0.5)
    assert (result[:, ::4] == 0).all()
    assert zeros(result) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("pattern", "encoding"),
    [
        ("unstructured", "int8"),
        ("unstructured", "bitmap_int8"),
        ("2:4", "nm_int8"),
        ("4:8", "nm_int4"),
        ("2:4", "int4"),
        ("1x32", "block_int8"),
    ],
)
def test_rounding_on_the_way_is_no_worse_than_afterwards(pattern, encoding):
    w, gram = problem(32, 256, n=1000)
    at_once, _ = Rule("sparsegpt", Pattern.parse(pattern), update=True, encoding=encoding).apply(
        "", w, Inputs(gram), 0.5
    )
    swept, _ = Rule("sparsegpt", Pattern.parse(pattern), update=True).apply("", w, Inputs(gram), 0.5)
    afterwards, _ = prune.rounded(swept, None, encoding)
    assert at_once.encoding.name == encoding
    assert zeros(at_once.decode()) >= 0.49
    assert error(w, at_once.decode(), gram) < 1.01 * error(w, afterwards.decode(), gram)


# ---------------------------------------------------------------------------------------------------------------------
# Two models side by side
# ---------------------------------------------------------------------------------------------------------------------


def seen(w, bias, gap=0.0, n=400):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(n, w.shape[1])) @ rng.normal(size=(w.shape[1], w.shape[1])) + 3
    noise = gap * rng.normal(size=x.shape)
    found = Seen(w.shape)
    for half in np.split(np.arange(n), 4):
        found.add((x + noise)[half].astype(np.float32), (x @ w.T + bias)[half].astype(np.float32))
    return found, x + noise, x @ w.T + bias


def test_seen_sums():
    w, bias = problem(4, 9)[0], np.arange(4)
    found, x, _ = seen(w, bias)
    np.testing.assert_allclose(found.gram, x.T @ x / len(x), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(found.square, (x * x).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.covariance, np.cov(x.T, bias=True), atol=1e-2)
    np.testing.assert_allclose(found.target(w), w, atol=1e-3)
    np.testing.assert_allclose(found.bias(w), bias, atol=1e-2)


def test_the_target_is_drawn_to_the_old_map_the_less_was_seen():
    w = problem(4, 9)[0]
    found, x, y = seen(w, np.zeros(4), gap=1.0)
    centred = x - x.mean(axis=0)
    h = centred.T @ centred / len(x)
    h += 9 / 400 * np.trace(h) / 9 * np.eye(9)
    gradient = (y - x @ w.T).T @ centred / len(x)
    np.testing.assert_allclose(found.target(w), w + np.linalg.solve(h, gradient.T).T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pruned", [False, True])
def test_target_makes_up_for_other_inputs(pruned):
    w, bias = problem(4, 9)[0], np.arange(4)
    if pruned:
        w[:, ::3] = 0
    found, x, y = seen(w, bias, gap=1.0)
    target = found.target(w)

    def loss(w):
        return np.square(x @ w.T + found.bias(w) - y).sum()

    assert (target[w == 0] == 0).all()
    assert loss(target) < 0.98 * loss(w)


def test_a_walk_without_changes_sees_the_same_in_both_models(checkpoint, calibration):
    names = []

    def change(name, weights, found):
        w, bias = weights[f"{name}.weight"].decode(), weights[f"{name}.bias"].decode()
        names.append(name)
        np.testing.assert_allclose(found.bias(w), bias, atol=1e-3)
        np.testing.assert_allclose(found.target(w), w, atol=1e-2)
        return {}

    assert by_linear(checkpoint, calibration, change).weights == checkpoint.weights
    assert names == [f"h.{i}.{m}" for i in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_a_walk_sees_what_earlier_changes_did(checkpoint, calibration):
    def halve(name, weights, found):
        if name == "h.0.attn.c_proj":
            return {f"{name}.weight": 0.5 * weights[f"{name}.weight"].decode()}
        if name == "h.0.mlp.c_fc":
            assert np.abs(found.target(w := weights[f"{name}.weight"].decode()) - w).max() > 0.01
        return {}

    by_linear(checkpoint, calibration, halve)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_prune_a_model(checkpoint, calibration, criterion):
    result = STEPS["prune"](checkpoint, calibration, sparsity=0.4, criterion=criterion)
    for name, weight in result.weights.items():
        pruned = name.startswith("h.") and len(weight.shape) == 2
        assert zeros(weight.decode()) == pytest.approx(0.4 if pruned else 0, abs=0.02)
    assert result.history[-1]["zeros"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("scope", ["model", "sensitivity"])
@pytest.mark.parametrize(
    ("criterion", "pattern"), [("magnitude", "unstructured"), ("wanda", "1x32"), ("sparsegpt", "unstructured")]
)
def test_uneven_sparsity_adds_up(checkpoint, calibration, criterion, pattern, scope):
    result = STEPS["prune"](checkpoint, calibration, sparsity=0.4, criterion=criterion, pattern=pattern, scope=scope)
    entry = result.history[-1]
    assert entry["zeros"] == pytest.approx(0.4, abs=0.15 if pattern == "1x32" else 0.02)  # rows end in narrower blocks
    assert len(set(entry["sparsities"].values())) > 1


def test_one_threshold_for_the_model_is_global_magnitude_pruning(checkpoint):
    result = STEPS["prune"](checkpoint, sparsity=0.3, criterion="magnitude", scope="model")
    names = [n for n, w in checkpoint.weights.items() if n.startswith("h.") and len(w.shape) == 2]
    before, after = (np.concatenate([c.weights[n].decode().ravel() for n in names]) for c in (checkpoint, result))
    expected = np.abs(before) > np.quantile(np.abs(before), 0.3)
    assert ((after != 0) == expected).mean() > 0.99


def test_allocation_follows_the_scores_within_its_bounds():
    flat = np.linspace(0, 1, 1001)
    shares = allocate({"weak": flat * 0.1, "strong": flat}, {"weak": 100, "strong": 300}, 0.5, 0.2)
    assert shares["weak"] == pytest.approx(0.7, abs=0.002)
    assert (100 * shares["weak"] + 300 * shares["strong"]) / 400 == pytest.approx(0.5, abs=0.002)
    free = allocate({"weak": flat * 0.1, "strong": flat}, {"weak": 100, "strong": 100}, 0.5)
    assert free["weak"] == pytest.approx(0.909, abs=0.01)


def test_pruned_and_stored_at_once(checkpoint, calibration, tmp_path):
    result = STEPS["prune"](checkpoint, calibration, sparsity=0.6, encoding="sparse")
    assert result.weights[MATRIX].encoding.name == "bitmap_int8"
    assert result.history[-1]["chosen"][MATRIX].startswith("bitmap_int8: int8 ")
    save(result, tmp_path / "out.mgpt")
    np.testing.assert_allclose(logits(load(tmp_path / "out.mgpt")), logits(result), atol=1e-4)


def test_quantizing_keeps_the_zeros(checkpoint, calibration):
    pruned = STEPS["prune"](checkpoint, calibration, pattern="2:4", criterion="wanda")
    for encoding, method in [("nm_int8", "rtn"), ("int8", "gptq"), ("int4", "gptq"), ("nm_int4", "gptq")]:
        result = STEPS["quantize"](pruned, calibration, encoding=encoding, method=method)
        assert (result.weights[MATRIX].decode()[pruned.weights[MATRIX].decode() == 0] == 0).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs sparsity"),
        ({"sparsity": 1.0}, "sparsity of prune must be"),
        ({"sparsity": -0.1}, "sparsity of prune must be"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "removes 0.5 of every matrix"),
        ({"pattern": "2:4", "scope": "model"}, "removes 0.5 of every matrix"),
        ({"sparsity": 0.4, "pattern": "3x3"}, "pattern must be"),
        ({"sparsity": 0.4, "only": "h.7.*"}, "no matrix of a block has a name like"),
        ({"sparsity": 0.4}, "give calibration text"),
        ({"sparsity": 0.4, "criterion": "wanda"}, "give calibration text"),
        ({"sparsity": 0.4, "encoding": "int9"}, "encoding of prune must be"),
    ],
)
def test_bad_parameters(checkpoint, parameters, message):
    with pytest.raises(OptionError, match=message):
        STEPS["prune"](checkpoint, **parameters)


def test_every_sparse_encoding_can_be_asked_for():
    assert {"bitmap_int8", "bitmap_f16", "nm_int8", "nm_int4", "block_int8"} <= set(ENCODINGS)
