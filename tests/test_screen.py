"""Tables of which a rough part is read first: bounds that hold, the highest logits exact, and the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import cache as kv
from minigpt import generator, layout, measure, ops, reference
from minigpt.encodings import ENCODINGS, encode
from minigpt.encodings.screened import Screened
from minigpt.model import GPT2
from minigpt.sampling import SamplingOptions

SCREENED = [name for name, encoding in ENCODINGS.items() if isinstance(encoding, Screened)]
PLAIN = {"int8_split": "int8", "f16_screened": "f16", "f32_screened": "f32"}
VOCABULARY = 265

compiled = pytest.mark.skipif(ops.backend() == "numpy", reason="needs the compiled backend")


def random(n_out, n_in, seed=0):
    return np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)


# ---- what is stored ------------------------------------------------------------------------------------------


def test_all_screened_encodings_are_tested():
    assert set(SCREENED) == set(PLAIN)


@pytest.mark.parametrize("n_in", [1, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("encoding", SCREENED)
def test_values_are_those_of_the_plain_encoding(encoding, n_in):
    w = random(7, n_in)
    w[3] = 0
    screened, plain = encode(w, encoding), encode(w, PLAIN[encoding])
    np.testing.assert_array_equal(screened.decode(), plain.decode())
    np.testing.assert_array_equal(screened.rows(np.array([4, 0, 4])), plain.decode()[[4, 0, 4]])
    np.testing.assert_array_equal(screened.expand().decode(), plain.decode())


def test_int8_split_is_no_larger_than_int8():
    assert encode(random(9, 256), "int8_split").nbytes == encode(random(9, 256), "int8").nbytes


@pytest.mark.parametrize("encoding", SCREENED)
def test_a_weight_is_off_by_half_a_step_at_most(encoding):
    w = encode(random(50, 100), encoding)
    codes, steps = w.encoding.rough(w.parts, 100)
    off = np.abs((codes - w.encoding.middle) * steps[:, None] - w.decode()) / steps[:, None]
    assert off.max() <= 0.5 + 1e-3
    assert 0.2 < np.sqrt(np.square(off).mean()) < 0.35


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8", "int4", "codebook8"])
def test_the_head_counts_with_its_rough_part(encoding):
    weights = small_checkpoint(encoding).weights
    n_bytes, table = measure.bytes_per_token(weights)["head"], weights["wte.weight"]
    assert n_bytes == table.nbytes_first < table.nbytes / 1.9


# ---- products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["plain", "outlier", "alike"])
@pytest.mark.parametrize("encoding", SCREENED)
def test_rough_products_are_within_their_widths(encoding, shape):
    w, x = random(2000, 256), random(40, 256, seed=1)
    if shape == "outlier":  # spoils the rounding of x
        x[:, 5] *= 100
    if shape == "alike":  # an error that all rows share
        w += 0.5 * random(1, 256, seed=2)
    w = encode(w, encoding)
    rough, widths = w.encoding.screen(w.parts, w.shape, x)
    off = np.abs(rough - x @ w.decode().T) / widths
    assert off.max() < 0.9
    if shape == "plain":  # nor are they wider than need be: seven standard deviations
        assert 1 / 8 < np.sqrt(np.square(off).mean()) < 1 / 6


def test_refine_is_exact_where_it_matters():
    w, x = encode(random(500, 64), "f32_screened"), random(3, 64, seed=1)
    exact = x @ w.decode().T
    rough, widths = w.encoding.screen(w.parts, w.shape, x)
    for margin in (0, 5, 1e9):
        y = reference.refine(rough, widths, exact, margin)
        near = exact >= exact.max(axis=1, keepdims=True) - margin
        np.testing.assert_array_equal(y[near], exact[near])
        assert (y.argmax(axis=1) == exact.argmax(axis=1)).all()
        assert (y == exact).all() == (margin == 1e9)


@compiled
@pytest.mark.parametrize("n_in", [1, 17, 64, 130, 384])
@pytest.mark.parametrize("encoding", SCREENED)
def test_kernels_equal_numpy(encoding, n_in):
    from test_kernels import activations

    from minigpt.program import describe

    for n_out, n_tokens, begin in [(1, 1, 0), (3, 2, 1), (600, 1, 0), (611, 3, 7)]:
        w, x = encode(random(n_out, n_in), encoding), random(n_tokens, n_in, seed=1)
        scales = w.parts[w.encoding.first[1]][begin:]
        record = describe(w)
        memory, _ = activations(x, record[layout.W_LEVELS])
        y, exact = np.full((2, n_tokens, n_out), 9, np.float32)
        addresses = record.ctypes.data, memory.record.ctypes.data, y.ctypes.data
        rows = n_out, n_tokens, begin, n_out

        tops, widths = np.zeros((2, 16), np.float32)
        ops.kernel(f"screen_{encoding}").call(*addresses, *rows, tops.ctypes.data, widths.ctypes.data)
        assert (y[:, :begin] == 9).all(), "rows of other threads"
        rough, tops, widths = y[:, begin:].copy(), tops[:n_tokens], widths[:n_tokens, None]
        expected, wide = (v[:, begin:] for v in w.encoding.screen(w.parts, w.shape, x))
        # an activation may be rounded up by one of them and down by the other, or not at all without int8 products
        assert (np.abs(rough - expected) < 0.1 * wide).all()
        assert (widths * scales <= wide * 1.001).all()
        assert (widths * scales >= wide * 0.8).all()
        np.testing.assert_allclose(tops, (rough - widths * scales).max(axis=1), rtol=1e-4, atol=1e-4)

        ops.kernel(f"matmul_{encoding}").call(*addresses[:2], exact.ctypes.data, *rows)
        exact = exact[:, begin:]
        assert (np.abs(rough - exact) < widths * scales).all()
        limits = np.full(16, tops.max() - 0.5, np.float32)
        chosen = rough + widths * scales >= limits[0]
        ops.kernel(f"refine_{encoding}").call(*addresses, *rows, limits.ctypes.data, widths.ctypes.data)
        wanted = np.where(chosen if n_tokens == 1 else chosen.any(axis=0), exact, rough)  # of all tokens at once
        np.testing.assert_array_equal(y[:, begin:], wanted)
        if n_tokens == 1:
            assert limits[0] == chosen.sum()


# ---- whole models --------------------------------------------------------------------------------------------


def wide_checkpoint(encoding):
    """A model with many tokens of which few are likely, as real ones have."""
    return small_checkpoint(encoding, n_embd=192, n_head=(3, 3), head_dim=64)


def logits(model, ids, margin, n_tokens=1):
    cache = model.new_cache(n_tokens)
    ids = np.repeat(ids, n_tokens).reshape(-1, n_tokens).T.ravel()
    sequences = np.repeat(np.arange(n_tokens), len(ids) // n_tokens)
    return model.forward(ids, cache, sequences, margin=margin)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("encoding", ["int8", "f16", "f32"])
def test_the_highest_logits_are_exact(encoding, n_threads):
    model = GPT2(wide_checkpoint(encoding), n_threads)
    for prompt in range(20):
        ids = [prompt, 7, 100 + prompt]
        exact = logits(model, ids, None)[0]
        for margin in (0.0, 2.0):
            some = logits(model, ids, margin)[0]
            near = exact >= exact.max() - margin
            np.testing.assert_array_equal(some[near], exact[near])
            assert some.argmax() == exact.argmax()
            assert np.abs(some - exact).max() < 3


@compiled
def test_some_logits_are_rough():
    model = GPT2(wide_checkpoint("int8"))
    exact, some = (logits(model, [1, 2, 3], margin)[0] for margin in (None, 0.0))
    assert (some != exact).any()


@compiled
@pytest.mark.parametrize("n_tokens", [2, 5, 9, 14])
def test_several_sequences_at_once(n_tokens):
    model = GPT2(wide_checkpoint("int8"))
    exact, some = (logits(model, [1, 2, 3], margin, n_tokens) for margin in (None, 0.0))
    assert some.shape == exact.shape == (n_tokens, VOCABULARY)
    np.testing.assert_array_equal(some.argmax(axis=1), exact.argmax(axis=1))


def test_threads_make_no_difference():
    checkpoint = wide_checkpoint("int8")
    results = [logits(GPT2(checkpoint, n_threads), [5, 6], 1.0) for n_threads in (1, 2, 3)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@compiled
def test_a_head_that_cannot_is_exact():
    checkpoint = wide_checkpoint("int8")
    table = encode(checkpoint.weights["wte.weight"].decode(), "int8")
    plain = replace(checkpoint, weights=checkpoint.weights | {"wte.weight": table, "lm_head.weight": table})
    np.testing.assert_array_equal(logits(GPT2(plain), [1, 2], 0.0), logits(GPT2(checkpoint), [1, 2], None))


@compiled
def test_calls_that_are_not_worth_it_are_followed_by_exact_ones():
    model = GPT2(wide_checkpoint("int8"))
    reference_cache, cache = model.new_cache(), model.new_cache()
    exact = []
    for i in range(kv.EXACT_CALLS + 2):
        truth = model.forward([i], reference_cache)[0]
        some = model.forward([i], cache, margin=1e4 if i == 0 else 0.0)[0]  # at first all must be exact
        exact.append((some == truth).all())
    assert all(exact[: kv.EXACT_CALLS + 1])
    assert not exact[-1]


# ---- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        ({"temperature": 0}, 0),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9}, 4),
        ({"temperature": 1, "repetition_penalty": 1.1}, None),
        ({"temperature": 0, "presence_penalty": 0.1}, None),
        ({"temperature": 0, "frequency_penalty": 0.1}, None),
        ({"temperature": 0, "no_repeat_ngram": 2}, None),
        ({"temperature": 0, "banned": [3]}, None),
        ({"temperature": 0, "logit_bias": {3: 2.0}}, None),
    ],
)
def test_margin_of_options(options, margin):
    assert SamplingOptions(**options).margin == margin


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.7, "seed": 3}, {"temperature": 1, "seed": 4}]
)
def test_the_same_text_comes_out(options, monkeypatch):
    model = GPT2(wide_checkpoint("int8"))
    wanted = SamplingOptions(**options)
    some = list(generator.generate(model, [1, 2, 3], options=wanted, max_tokens=40, n=2))
    monkeypatch.setattr(SamplingOptions, "margin", None)
    assert some == list(generator.generate(model, [1, 2, 3], options=wanted, max_tokens=40, n=2))


def test_log_probabilities_are_exact():
    model = GPT2(wide_checkpoint("f16"))
    options = SamplingOptions(temperature=0)
    steps = list(generator.generate(model, [1, 2, 3], options=options, max_tokens=20, logprobs=True))
    ids = [step.id for step in steps]
    expected = generator.score(model, [1, 2, 3, *ids])[2:]
    np.testing.assert_allclose([step.logprob for step in steps], expected, atol=1e-3)
