"""The forward pass: cache, batches, chunks and refusals, on whichever backend runs."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import model as m
from minigpt.errors import ContextError, MinigptError, OptionError
from minigpt.model import GPT2, KVCache

IDS = np.random.default_rng(1).integers(0, 265, 40)


@pytest.fixture(scope="module", params=["f32", "f16", "int8", "int4"])
def gpt2(request):
    return GPT2(small_checkpoint(request.param))


def close(a, b, gpt2):
    """Compare logits; integer kernels round activations, to 8 bits in prompts where the CPU gains by it."""
    activation = gpt2.weights["h.0.mlp.c_fc.weight"].encoding.activation
    np.testing.assert_allclose(a, b, rtol=1e-3, atol={"f32": 1e-3, "i16": 0.6, "i8": 0.8}[activation])
    assert activation == "f32" or np.corrcoef(np.ravel(a), np.ravel(b))[0, 1] > 0.995


def full(gpt2, ids=IDS):
    return np.concatenate(list(gpt2.logits(ids)))


def test_one_token_at_a_time_equals_all_at_once(gpt2):
    cache = KVCache(gpt2.config)
    steps = np.concatenate([gpt2.forward([i], cache) for i in IDS])
    close(steps, full(gpt2), gpt2)
    assert cache.lengths.tolist() == [len(IDS)]


def test_the_usual_token_is_like_any_other(gpt2):
    usual, other = KVCache(gpt2.config, 2), KVCache(gpt2.config, 2)
    for cache in (usual, other):
        gpt2.forward(IDS[:9], cache, [0] * 4 + [1] * 5)
    for i in IDS[9:14].tolist():  # a list of one int takes a shorter way than an array
        np.testing.assert_array_equal(gpt2.forward([i], usual), gpt2.forward(np.array([i]), other))
    assert usual.lengths.tolist() == other.lengths.tolist() == [9, 5]
    for a, b in zip((*usual.k, *usual.v), (*other.k, *other.v), strict=True):
        np.testing.assert_array_equal(a.read(0, 9), b.read(0, 9))


def test_a_prompt_in_pieces_equals_the_whole(gpt2):
    cache = KVCache(gpt2.config)
    for piece in (IDS[:1], IDS[1:17], IDS[17:]):
        last = gpt2.forward(piece, cache)
    close(last, full(gpt2)[-1:], gpt2)


def test_chunks_do_not_show(gpt2, monkeypatch):
    whole = full(gpt2)
    monkeypatch.setattr(m, "CHUNK", 7)
    monkeypatch.setattr(m, "SHOWN", 16)
    close(full(gpt2), whole, gpt2)
    kept = gpt2.forward(IDS, KVCache(gpt2.config), keep=[0, 6, 7, 39])
    close(kept, whole[[0, 6, 7, 39]], gpt2)


def test_sequences_of_a_batch_do_not_see_each_other(gpt2):
    cache = KVCache(gpt2.config, 3)
    a, b, c = IDS[:5], IDS[5:6], IDS[6:20]
    of = [0] * 5 + [2] * 1 + [1] * 14
    first = gpt2.forward(np.concatenate([a, b, c]), cache, of)
    assert first.shape == (3, 265)
    second = gpt2.forward([7, 8, 9], cache, [0, 1, 2])
    assert cache.lengths.tolist() == [6, 15, 2]
    for row, text in zip(second, ([*a, 7], [*c, 8], [*b, 9]), strict=True):
        close(row, full(gpt2, text)[-1], gpt2)


def test_reorder_and_truncate(gpt2):
    cache = KVCache(gpt2.config, 2)
    gpt2.forward(IDS[:10], cache, [0] * 4 + [1] * 6)
    cache.reorder([1, 0])
    assert cache.lengths.tolist() == [6, 4]
    close(gpt2.forward([5], cache), full(gpt2, [*IDS[4:10], 5])[-1:], gpt2)
    cache.truncate(2)
    close(gpt2.forward([5], cache), full(gpt2, [*IDS[4:6], 5])[-1:], gpt2)


def test_the_context_is_full(gpt2):
    cache = KVCache(gpt2.config)
    gpt2.forward(np.zeros(63, int), cache)
    gpt2.forward([1], cache)
    with pytest.raises(ContextError, match="65 tokens"):
        gpt2.forward([1], cache)
    assert cache.lengths.tolist() == [64]
    with pytest.raises(ContextError, match="65 tokens"):
        gpt2.forward(np.zeros(65, int), KVCache(gpt2.config))


@pytest.mark.parametrize(
    ("ids", "sequences", "message"),
    [
        ([], None, "at least one id"),
        ([[1, 2]], None, "one dimension"),
        ([265], None, "265 is outside"),
        ([-1], None, "-1 is outside"),
        ([1, 2], [0], "one sequence per id"),
        ([1], [1], r"0\.\.0"),
        ([1], [-1], r"0\.\.0"),
    ],
)
def test_bad_input(checkpoint, ids, sequences, message):
    gpt2 = GPT2(checkpoint)
    with pytest.raises(OptionError, match=message):
        gpt2.forward(np.array(ids, int), KVCache(gpt2.config), sequences)


@pytest.mark.parametrize("ids", ["text", ["a", "b"], [0.5, 1.0], [[1], [2, 3]], [True], None])
def test_ids_are_integers(checkpoint, ids):
    gpt2 = GPT2(checkpoint)
    with pytest.raises(OptionError, match="must be integers"):
        gpt2.forward(ids, gpt2.new_cache())
    with pytest.raises(OptionError, match="must be integers"):
        next(gpt2.logits(ids))


def test_scattered_sequences_are_refused(checkpoint):
    gpt2 = GPT2(checkpoint)
    with pytest.raises(OptionError, match="next to each other"):
        gpt2.forward([1, 2, 3], KVCache(gpt2.config, 2), [0, 1, 0])


def test_uneven_layers_untied_head_and_every_activation():
    for activation in ("gelu_new", "gelu", "relu", "silu"):
        gpt2 = GPT2(small_checkpoint(tied=False, activation_function=activation))
        assert np.isfinite(full(gpt2)).all()


@pytest.mark.parametrize("keep", [[3, 1], [2, 2], [-1], [0, 40]])
def test_tokens_to_keep_ascend(gpt2, keep):
    with pytest.raises(OptionError, match=r"ascend within 0\.\.39"):
        gpt2.forward(IDS, KVCache(gpt2.config), keep=keep)


@pytest.mark.parametrize("keep", [[5, 39], [*range(1, 30)], [*range(40)]])
def test_what_is_kept_does_not_change_a_token(gpt2, keep):
    close(gpt2.forward(IDS, KVCache(gpt2.config), keep=keep), full(gpt2)[keep], gpt2)


# ---- the likeliest tokens, several at once -------------------------------------------------------------------


def one_by_one(gpt2, prompt, n):
    """Ask `likeliest` n times."""
    cache, ids = gpt2.new_cache(), list(prompt)
    for _ in range(n):
        ids.append(gpt2.likeliest(ids[int(cache.lengths[0]) :], cache))
    return ids[len(prompt) :]


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("encoding", ["f32", "int8", "int4", "bitmap_int8"])
def test_following_is_asking_again_and_again(encoding, n_threads, monkeypatch):
    monkeypatch.setattr(m, "AHEAD", 1e9)  # as many as there may be at once
    gpt2 = GPT2(small_checkpoint(encoding, n_embd=64, n_positions=128), n_threads)
    for prompt in ([1], IDS[:9].tolist()):
        cache = gpt2.new_cache()
        found = []
        for id in gpt2.follow(prompt, cache, 100):
            assert cache.lengths.tolist() == [len(prompt) + len(found)]
            found.append(id)
        assert found == one_by_one(gpt2, prompt, 100)
        assert len(set(found)) > 5


def test_following_ends_after_a_stop_id_or_where_the_context_is_full(gpt2):
    everything = one_by_one(gpt2, IDS[:4], 61)
    assert list(gpt2.follow(IDS[:4], gpt2.new_cache(), 1000)) == everything  # 64 positions, and one beyond
    for stop in (everything[0], everything[30]):
        until = everything[: everything.index(stop) + 1]
        assert list(gpt2.follow(IDS[:4], gpt2.new_cache(), 1000, {stop, 264})) == until
    assert list(gpt2.follow(IDS[:4], gpt2.new_cache(), 3)) == everything[:3]
    assert list(gpt2.follow(IDS[:4], gpt2.new_cache(), 0)) == []
    with pytest.raises(ContextError, match="65 tokens"):
        next(gpt2.follow([1] * 65, gpt2.new_cache(), 3))


def test_what_was_computed_ahead_does_not_show(gpt2):
    cache, prompt = gpt2.new_cache(), IDS[:5].tolist()
    tokens = gpt2.follow(prompt, cache, 50)
    taken = [next(tokens) for _ in range(7)]
    tokens.close()
    assert cache.lengths.tolist() == [5 + 6]
    other = gpt2.new_cache()
    gpt2.forward(prompt, other)
    for id in taken[:-1]:
        gpt2.forward([id], other)
    np.testing.assert_array_equal(gpt2.forward([3], cache), gpt2.forward([3], other))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("name", ["h.1.mlp.c_proj.bias", "ln_f.bias"])
def test_following_refuses_logits_that_are_not_finite(name, bad):
    checkpoint = small_checkpoint("int8")
    (values,) = checkpoint.weights[name].parts.values()
    gpt2, cache = GPT2(checkpoint), KVCache(checkpoint.config)
    tokens = gpt2.follow([1, 2], cache, 50)
    next(tokens)
    values.setflags(write=True)
    values[3] = bad
    with pytest.raises(MinigptError, match="not finite"):
        list(tokens)


def test_a_step_that_was_too_dear_ends_what_is_computed_ahead(monkeypatch):
    """Whatever the cache says about the next calls, the tokens are the same."""
    monkeypatch.setattr(m, "AHEAD", 1e9)
    expected = one_by_one(GPT2(small_checkpoint("int8")), [1], 60)
    for worth in (-1.0, 0.001, 0.02):
        monkeypatch.setattr("minigpt.program.WORTH", worth)
        monkeypatch.setattr("minigpt.cache.WORTH", worth)
        gpt2, counts = GPT2(small_checkpoint("int8")), []
        if gpt2._program is not None:
            run = gpt2._program.run_greedily

            def counted(*arguments, run=run, counts=counts):
                found = run(*arguments)
                counts.append(len(found))
                return found

            monkeypatch.setattr(gpt2._program, "run_greedily", counted)
        assert list(gpt2.follow([1], gpt2.new_cache(), 60)) == expected
        assert worth > 0 or set(counts) <= {1}
