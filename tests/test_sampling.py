from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import sampling
from minigpt.errors import MinigptError, OptionError
from minigpt.sampling import FILTERS, SamplingOptions, draw, largest, log_softmax, make_sampler

INF = np.inf
PROBABILITIES = [0.1, 0.5, 0.25, 0.15]
LOGITS = np.log(np.array(PROBABILITIES, np.float32))  # [4]


def kept(logits: np.ndarray) -> list[int]:
    return np.flatnonzero(logits > -INF).tolist()


# ---- each filter alone, on four elements -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "ids"),
    [
        ("temperature", 0, [1]),
        ("temperature", 0.5, [0, 1, 2, 3]),
        ("top_k", 1, [1]),
        ("top_k", 3, [1, 2, 3]),
        ("top_k", 9, [0, 1, 2, 3]),
        ("top_p", 0.01, [1]),
        ("top_p", 0.49, [1]),
        ("top_p", 0.6, [1, 2]),
        ("top_p", 0.8, [1, 2, 3]),
        ("top_p", 1, [0, 1, 2, 3]),
        ("min_p", 0, [0, 1, 2, 3]),
        ("min_p", 0.25, [1, 2, 3]),
        ("min_p", 0.6, [1]),
        ("min_p", 1, [1]),
        ("typical_p", 0.2, [2]),  # entropy 1.21, surprises 2.30 0.69 1.39 1.90
        ("typical_p", 0.7, [1, 2]),
        ("typical_p", 0.8, [1, 2, 3]),
        ("banned", [0, 1], [2, 3]),
        ("banned", [], [0, 1, 2, 3]),
    ],
)
def test_which_tokens_a_filter_keeps(name, value, ids):
    before = LOGITS.copy()
    after = getattr(sampling, name)(LOGITS, value)
    assert kept(after) == ids
    assert after.dtype == np.float32
    np.testing.assert_array_equal(LOGITS, before)  # filters are pure
    if name != "temperature":
        np.testing.assert_array_equal(after[ids], LOGITS[ids])


@pytest.mark.parametrize(
    ("name", "value", "context", "expected"),
    [
        ("repetition_penalty", 2.0, [0, 1, 1], [0.5, -4.0, 3.0, 0.0]),
        ("repetition_penalty", 2.0, [], [1.0, -2.0, 3.0, 0.0]),
        ("presence_penalty", 0.5, [2, 2, 3], [1.0, -2.0, 2.5, -0.5]),
        ("frequency_penalty", 0.5, [2, 2, 3], [1.0, -2.0, 2.0, -0.5]),
        ("no_repeat_ngram", 1, [0, 3], [-INF, -2.0, 3.0, -INF]),
        ("no_repeat_ngram", 2, [1, 2, 1, 0, 1], [-INF, -2.0, -INF, 0.0]),
        ("no_repeat_ngram", 3, [0, 1, 2, 0, 1], [1.0, -2.0, -INF, 0.0]),
        ("no_repeat_ngram", 3, [0, 1], [1.0, -2.0, 3.0, 0.0]),
    ],
)
def test_filters_that_look_at_the_context(name, value, context, expected):
    logits = np.array([1, -2, 3, 0], np.float32)
    np.testing.assert_array_equal(getattr(sampling, name)(logits, value, context), np.float32(expected))
    np.testing.assert_array_equal(logits, [1, -2, 3, 0])


def test_logit_bias_and_temperature_values():
    logits = np.array([1, -2, 3, 0], np.float32)
    np.testing.assert_array_equal(sampling.logit_bias(logits, {0: 1.5, 3: -2}), np.float32([2.5, -2, 3, -2]))
    np.testing.assert_array_equal(sampling.temperature(logits, 0.5), np.float32([2, -4, 6, 0]))


@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("top_k", 2), ("top_p", 0.3), ("top_p", 0.5)])
def test_equal_tokens_are_taken_by_id(name, value):
    logits = np.zeros(4, np.float32)
    assert kept(getattr(sampling, name)(logits, value)) == [0, 1][: 1 if value in (1,) else 2]


def test_filters_work_on_what_others_have_left():
    logits = sampling.top_k(LOGITS, 2)
    assert kept(sampling.top_p(logits, 0.99)) == [1, 2]
    assert kept(sampling.typical_p(logits, 0.99)) == [1, 2]
    assert kept(sampling.min_p(logits, 0.01)) == [1, 2]


# ---- equal to the naive versions, which sort everything ----------------------------------------------------


def naive_reaching(p: float, weights: np.ndarray, order: np.ndarray) -> list[int]:
    ids = np.argsort(-order, kind="stable")
    before = np.cumsum(weights[ids], dtype=np.float64) - weights[ids]
    return sorted(ids[before < p * float(weights.sum())].tolist())


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 5000, 50257])
@pytest.mark.parametrize("shape", ["spread", "peaked", "flat", "ties", "masked"])
def test_fast_selection_equals_sorting(n, shape):
    rng = np.random.default_rng(n)
    logits = {
        "spread": lambda: rng.standard_normal(n) * 3,
        "peaked": lambda: rng.standard_normal(n) + 15 * (np.arange(n) == n // 2),
        "flat": lambda: np.zeros(n),
        "ties": lambda: rng.integers(-3, 3, n),
        "masked": lambda: np.where(rng.random(n) < 0.99, -INF, rng.standard_normal(n)),
    }[shape]().astype(np.float32)
    logits[n // 3] = 2
    ranked = np.argsort(-logits, kind="stable")
    for k in (1, 7, 40, 128, 600, 8192):
        np.testing.assert_array_equal(largest(logits, k), ranked[:k])
        kept_by_k = sampling.top_k(logits, k)
        assert kept(kept_by_k) == sorted(i for i in ranked[:k].tolist() if logits[i] > -INF)
    weights = np.exp(logits - logits.max())
    for p in (0.1, 0.5, 0.95, 0.999):
        assert kept(sampling.top_p(logits, p)) == naive_reaching(p, weights, weights)
    log_p = log_softmax(logits)
    probabilities = np.exp(log_p)
    possible = probabilities > 0
    entropy = -np.sum(probabilities[possible] * log_p[possible])
    expected = naive_reaching(0.9, probabilities, -np.abs(log_p + entropy))
    assert kept(sampling.typical_p(logits, 0.9)) == expected


def test_log_softmax_is_normalized_and_survives_large_logits():
    logits = np.array([[1000, 999, -1000, 0], [0, 0, 0, 0]], np.float32)
    result = log_softmax(logits)
    assert result.dtype == np.float32
    np.testing.assert_allclose(np.exp(result).sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(result[1], np.log(0.25), rtol=1e-6)


# ---- options -----------------------------------------------------------------------------------------------


def test_every_filter_has_an_option_and_only_seed_is_more():
    assert {field.name for field in dataclasses.fields(SamplingOptions)} == {*FILTERS, "seed"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in FILTERS for value in ("x", None, object())],
        *[(name, float("nan")) for name in FILTERS],
        *[("temperature", v) for v in (-1, 0.001, 101, INF)],
        *[("top_k", v) for v in (-1, 2.5, INF)],
        *[("top_p", v) for v in (0, -0.1, 1.1)],
        *[("typical_p", v) for v in (0, 1.1)],
        *[("min_p", v) for v in (-0.1, 1.1)],
        *[("repetition_penalty", v) for v in (0, -1, 101)],
        *[("presence_penalty", v) for v in (-101, 101, INF)],
        *[("frequency_penalty", v) for v in (-101, 101)],
        *[("no_repeat_ngram", v) for v in (-1, 2.5, 1025)],
        *[("logit_bias", v) for v in ([1], {-1: 0.0}, {"a": 1.0}, {1: INF}, {1.5: 1.0})],
        *[("banned", v) for v in (3, [-1], ["a"], "ab", [1.5])],
    ],
)
def test_invalid_values_are_refused_with_the_allowed_range(name, value):
    context = ([],) if FILTERS[name].uses_context else ()
    for call in (
        lambda: SamplingOptions(**{name: value}),
        lambda: getattr(sampling, name)(LOGITS, value, *context),
    ):
        with pytest.raises(OptionError, match=f"{name} = .* is not allowed; give ") as error:
            call()
        assert FILTERS[name].allowed in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 1.5, "1"])
def test_invalid_seed(seed):
    with pytest.raises(OptionError, match="seed"):
        SamplingOptions(seed=seed)


@pytest.mark.parametrize("options", [{"banned": [4]}, {"logit_bias": {4: 1.0}}])
def test_ids_outside_the_vocabulary(options):
    with pytest.raises(OptionError, match=r"id 4 is outside 0\.\.3"):
        make_sampler(SamplingOptions(**options))(LOGITS, [])


# ---- the sampler -------------------------------------------------------------------------------------------


def test_draw_follows_the_probabilities():
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(LOGITS, rng) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, PROBABILITIES, atol=0.03)


def test_same_seed_same_ids_and_each_sequence_its_own():
    def ids(seed, sequence=0):
        sample = make_sampler(SamplingOptions(temperature=1.0, top_p=1.0, seed=seed), sequence)
        return [sample(LOGITS, []) for _ in range(50)]

    assert ids(7) == ids(7)
    assert ids(7) != ids(8)
    assert ids(7) != ids(7, 1)
    assert ids(7, 1) == ids(7, 1)
    assert ids(None) != ids(None)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"typical_p": 0.1, "min_p": 0.9}, {"top_p": 0.1}])
def test_greedy_takes_the_highest_whatever_else_is_set(options):
    sample = make_sampler(SamplingOptions(temperature=0, **options))
    assert [sample(LOGITS, []), sample(np.zeros(4, np.float32), [])] == [1, 0]


def test_greedy_heeds_penalties_and_bans():
    assert make_sampler(SamplingOptions(temperature=0, banned=[1]))(LOGITS, []) == 2
    assert make_sampler(SamplingOptions(temperature=0, logit_bias={0: 9.0}))(LOGITS, []) == 0
    assert make_sampler(SamplingOptions(temperature=0, presence_penalty=9.0))(LOGITS, [1, 2]) == 3
    assert make_sampler(SamplingOptions(temperature=0, no_repeat_ngram=1))(LOGITS, [1]) == 2


def test_neutral_values_cost_nothing_and_change_nothing():
    neutral = {name: row.off for name, row in FILTERS.items()}
    options = SamplingOptions(**neutral, seed=3)
    rng = np.random.default_rng((3, 0))
    sample = make_sampler(options)
    assert [sample(LOGITS, [1, 2]) for _ in range(20)] == [draw(LOGITS, rng) for _ in range(20)]


CUTS = {"top_k": 40, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize("name", CUTS)
def test_what_is_out_of_reach_makes_no_difference(name):
    logits = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    logits[::3] -= np.float32(40)  # at temperature 0.7 as good as impossible, and a thousand of them
    options = SamplingOptions(**{"top_p": 1.0, name: CUTS[name]}, seed=5)
    sample, rng = make_sampler(options), np.random.default_rng((5, 0))
    whole = FILTERS[name].apply(logits / 0.7, CUTS[name], [])
    ids = [sample(logits, []) for _ in range(200)]
    assert ids == [draw(whole, rng) for _ in range(200)]
    assert len(set(ids)) > 20


def test_only_options_that_cut_have_a_reach():
    logits = np.full(300_001, -12.7, np.float32)  # together nearly as likely as the first
    logits[0] = 0
    for p, reached in ((1.0, True), (0.999, False)):
        sample = make_sampler(SamplingOptions(temperature=1, top_p=p, seed=0))
        assert any(sample(logits, []) for _ in range(40)) == reached


@pytest.mark.parametrize("bad", [np.nan, INF])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite(bad, temperature):
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(MinigptError, match="not finite"):
        make_sampler(SamplingOptions(temperature=temperature))(logits, [])


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_token_left(temperature):
    with pytest.raises(OptionError, match="no token is left"):
        make_sampler(SamplingOptions(temperature=temperature, banned=[0, 1, 2, 3]))(LOGITS, [])


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.01, 0.8, 5.0]),
    st.integers(0, 40),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.integers(0, 2**63),
)
def test_any_mixture_gives_an_allowed_id(logits, temperature, k, p, floor, typical, seed):
    options = SamplingOptions(temperature=temperature, top_k=k, top_p=p, min_p=floor, typical_p=typical, seed=seed)
    values = np.array(logits, np.float32)
    id = make_sampler(options)(values, [0])
    assert 0 <= id < len(logits)
    if k:
        assert id in largest(values, k)
