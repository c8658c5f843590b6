"""Whole models: decoding, prefill and loading, on random weights."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt import layers, measure
from minigpt.cache import KINDS
from minigpt.checkpoint import load
from minigpt.model import GPT2, KVCache
from minigpt.tokenizer import Tokenizer

TOLERANCE = {"f32": 1e-3, "f16": 1e-3, "int8": 2e-2, "int4": 5e-2}  # of the spread of the logits: rounded activations


def numpy_logits(checkpoint, ids):
    """Return the logits of the last token in plain NumPy, [vocab_size]."""
    config, weights, positions = checkpoint.config, checkpoint.weights, np.arange(len(ids))
    cache, batch = KVCache(config), layers.runs(np.zeros(len(ids), np.int64), positions)
    x = layers.embed(weights, ids, positions)  # [n, n_embd]
    for i in range(config.n_layer):
        x = layers.block(weights, config, i, x, cache.k[i], cache.v[i], batch)
    return layers.head(weights, config, x[-1:])[0]


def check(logits, checkpoint, ids, encoding):
    expected = numpy_logits(checkpoint, ids)
    assert np.abs(logits - expected).max() < TOLERANCE.get(encoding, 5e-2) * np.ptp(expected)


@pytest.mark.benchmark(group="32 tokens")
def test_decode(benchmark, checkpoint, size, encoding, n_threads):
    opened = checkpoint(size, encoding)
    model, cache, n_tokens = GPT2(opened, n_threads), KVCache(opened.config), 32
    prompt = measure.some_ids(16, opened.config.vocab_size)
    first = model.forward(prompt, cache)[0]
    check(first, opened, prompt, encoding)
    tokens = []

    def generate():
        cache.truncate(len(prompt))
        tokens[:] = [first.argmax()]
        for _ in range(n_tokens):
            tokens.append(model.forward(tokens[-1:], cache)[0].argmax())

    benchmark(generate)
    check(model.forward(tokens[-1:], cache)[0], opened, np.append(prompt, tokens), encoding)
    speed = n_tokens / benchmark.stats.stats.median
    read = sum(measure.bytes_per_token(opened.weights).values())
    benchmark.extra_info |= {"tokens_per_s": speed, "gb_s": speed * read / 1e9}


@pytest.mark.benchmark(group="a token after 900 others")
@pytest.mark.parametrize("kv_cache", KINDS)
def test_long_context(benchmark, checkpoint, size, encoding, n_threads, kv_cache):
    opened, n_tokens = checkpoint(size, encoding), 900
    model = GPT2(opened, n_threads, kv_cache)
    ids, cache = measure.some_ids(n_tokens + 1, opened.config.vocab_size), model.new_cache()
    model.forward(ids[:n_tokens], cache)

    def read_one():
        cache.truncate(n_tokens)
        return model.forward(ids[n_tokens:], cache)[0]

    check(benchmark(read_one), opened, ids, encoding)
    benchmark.extra_info |= {"ms": benchmark.stats.stats.median * 1e3, "cache_mb": cache.nbytes / 1e6}


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("n_tokens", [16, 512])
def test_prefill(benchmark, checkpoint, size, encoding, n_threads, n_tokens):
    opened = checkpoint(size, encoding)
    model, ids = GPT2(opened, n_threads), measure.some_ids(n_tokens, opened.config.vocab_size)
    logits = benchmark(lambda: model.forward(ids, KVCache(opened.config)))
    check(logits[0], opened, ids, encoding)
    benchmark.extra_info["tokens_per_s"] = n_tokens / benchmark.stats.stats.median


@pytest.mark.benchmark(group="load")
def test_load(benchmark, model_file, size, encoding):
    path = model_file(size, encoding)
    model = benchmark(lambda: GPT2(load(path)))
    assert model.config.n_layer > 0


@pytest.mark.benchmark(group="tokenizer")
def test_tokenizer(benchmark, checkpoint, size):
    vocabulary = checkpoint(size, "int8").vocabulary
    ids = benchmark(lambda: Tokenizer(vocabulary).encode(measure.TEXT))
    assert Tokenizer(vocabulary).decode(ids) == measure.TEXT
