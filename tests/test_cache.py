"""Ways to keep keys and values: what they lose, what they take, and that all of it moves together."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_checkpoint

import minigpt
from minigpt.cache import KINDS, CentredInt8Store, F32Store, Int8Store, KVCache
from minigpt.errors import OptionError
from minigpt.generator import beam_search, generate, score
from minigpt.layout import CENTRED
from minigpt.model import GPT2
from minigpt.sampling import SamplingOptions

IDS = np.random.default_rng(5).integers(0, 265, 150)
LONG = {"n_positions": 200, "head_dim": 32, "n_embd": 48}


def model(kind, **changes):
    return GPT2(small_checkpoint("f32", **LONG | changes), kv_cache=kind)


def rows_of(n_tokens, seed=0):
    return np.random.default_rng(seed).normal(2, 1, (3, n_tokens, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_kind_is_refused_by_name(kind, model_file):
    assert minigpt.load(model_file, kv_cache=kind).model.new_cache(2).kind == kind
    with pytest.raises(OptionError, match="kv_cache = 'int3' is not allowed; give one of f32, int8"):
        minigpt.load(model_file, kv_cache="int3")


@pytest.mark.parametrize(("store", "loss"), [(F32Store, 0), (Int8Store, 0.5 / 127), (CentredInt8Store, 1 / 127)])
@pytest.mark.parametrize("piece", [1, 7, 200])
def test_pieces_are_read_as_they_were_written(store, loss, piece):
    kept, rows = store((2, 3, 200, 16)), rows_of(150)
    for begin in range(0, 150, piece):
        kept.write(1, slice(begin, min(begin + piece, 150)), rows[:, begin : begin + piece])
    found = kept.read(1, 150)
    assert found.dtype == np.float32
    assert np.abs(found - rows).max() <= loss * np.abs(rows).max() * 1.001
    assert not kept.read(0, 150).any()


def test_centres_are_exact_and_make_what_is_common_free():
    rows = 100 + rows_of(150)
    plain, centred = Int8Store((1, 3, 200, 16)), CentredInt8Store((1, 3, 200, 16))
    for store in (plain, centred):
        store.write(0, slice(0, 150), rows)
    np.testing.assert_array_equal(centred.read(0, 150)[:, ::CENTRED], rows[:, ::CENTRED])
    errors = [np.abs(store.read(0, 150) - rows).max() for store in (plain, centred)]
    assert errors[1] < errors[0] / 5


def test_int8_takes_little_more_than_a_quarter():
    config = small_checkpoint(**LONG | {"n_positions": 1024, "head_dim": 64}).config
    exact, rounded = (KVCache(config, 2, kind).nbytes for kind in ("f32", "int8"))
    assert 0.25 < rounded / exact < 0.28


@pytest.mark.parametrize("length", [1, CENTRED - 1, CENTRED, CENTRED + 1, 2 * CENTRED + 1, 199, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_reordering_moves_everything_that_is_used(kind, length):
    cache = KVCache(small_checkpoint(**LONG).config, 3, kind)
    for s in range(3):
        for i, store in enumerate((*cache.k, *cache.v)):
            n_head = store.parts[0].shape[1]
            store.write(s, slice(0, length), np.full((n_head, length, 32), 1 + 10 * s + i, np.float32) * np.arange(32))
    cache.lengths[:] = length
    before = [[store.read(s, length).copy() for store in (*cache.k, *cache.v)] for s in range(3)]
    cache.reorder([2, 2, 0])
    for s, source in enumerate([2, 2, 0]):
        for store, expected in zip((*cache.k, *cache.v), before[source], strict=True):
            np.testing.assert_array_equal(store.read(s, length), expected)


@pytest.mark.parametrize("piece", [1, 40, 150])
def test_logits_are_near_those_of_f32(piece):
    logits = []
    for kind in KINDS:
        gpt2 = model(kind)
        cache = gpt2.new_cache()
        parts = [
            gpt2.forward(IDS[i : i + piece], cache, keep=np.arange(len(IDS[i : i + piece])))
            for i in range(0, 150, piece)
        ]
        logits.append(np.concatenate(parts))
    spread = logits[0].std()
    assert 0 < np.abs(logits[1] - logits[0]).mean() < 0.02 * spread


def test_truncating_within_a_block_keeps_its_centre():
    gpt2 = model("int8")
    cache = gpt2.new_cache()
    gpt2.forward(IDS[:120], cache)
    for length in (100, CENTRED, 10):
        cache.truncate(length)
        again = gpt2.forward(IDS[length:130], cache)
        fresh = gpt2.forward(IDS[:130], gpt2.new_cache())
        np.testing.assert_allclose(again, fresh, rtol=0, atol=0.02 * fresh.std())


def test_beams_are_scored_as_their_texts_are():
    gpt2, prompt = model("int8"), IDS[: CENTRED - 5].tolist()
    for found in beam_search(gpt2, prompt, n_beams=4, n_hypotheses=4, max_tokens=12, length_penalty=0):
        total = score(gpt2, [*prompt, *found.ids])[-len(found.ids) :].sum()
        assert found.score == pytest.approx(total, abs=0.05)


def test_the_context_shift_reads_on():
    gpt2, n_positions = model("int8", n_positions=96), 96
    greedy = SamplingOptions(temperature=0)
    steps = generate(gpt2, IDS[:90], options=greedy, max_tokens=8, context_shift=True, keep_head=24)
    text = [*IDS[:90].tolist(), *(step.id for step in steps)]
    latest = text[n_positions + 1 - n_positions // 2 : n_positions + 1]  # when the context was full
    logits = gpt2.forward([*text[:24], *latest], gpt2.new_cache())[0]
    assert logits.argmax() == text[n_positions + 1]
