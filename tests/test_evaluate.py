"""The evaluation protocol against a direct computation, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import evaluate as ev
from minigpt.errors import MinigptError, OptionError
from minigpt.model import GPT2
from minigpt.sampling import log_softmax
from minigpt.tokenizer import Tokenizer

IDS = np.random.default_rng(2).integers(0, 264, 150)


@pytest.fixture(scope="module")
def small():
    checkpoint = small_checkpoint()
    return GPT2(checkpoint), checkpoint.vocabulary


def nll_of(gpt2, window):
    log_p = log_softmax(np.concatenate(list(gpt2.logits(window[:-1]))))
    return -log_p[np.arange(len(window) - 1), window[1:]]


def test_windows_without_overlap(small):
    gpt2, vocabulary = small
    result = ev.evaluate(gpt2, IDS, vocabulary)
    expected = np.concatenate([nll_of(gpt2, IDS[0:65]), nll_of(gpt2, IDS[64:129])])  # the last 21 are dropped
    assert result.tokens == 128
    assert (result.context, result.stride) == (64, 64)
    assert result.nll == pytest.approx(expected.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    n_bytes = sum(len(Tokenizer(vocabulary).token(int(i))) for i in IDS[1:129])
    assert result.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / n_bytes, rel=1e-5)


def test_stride_scores_each_target_once(small):
    gpt2, vocabulary = small
    result = ev.evaluate(gpt2, IDS, vocabulary, context=30, stride=10)
    expected = [nll_of(gpt2, IDS[0:31])]
    expected += [nll_of(gpt2, IDS[b : b + 31])[-10:] for b in range(10, 120, 10)]
    assert result.tokens == 30 + 11 * 10
    assert result.nll == pytest.approx(np.concatenate(expected).mean(), rel=1e-5)


def test_a_short_text_is_one_window(small):
    gpt2, vocabulary = small
    result = ev.evaluate(gpt2, IDS[:2], vocabulary)
    assert (result.tokens, result.context) == (1, 1)
    assert ev.evaluate(gpt2, IDS, vocabulary, max_tokens=10).tokens == 10


def test_a_model_agrees_with_itself_and_not_with_another(small):
    gpt2, vocabulary = small
    same = ev.evaluate(gpt2, IDS, vocabulary, reference=gpt2)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1
    other = ev.evaluate(gpt2, IDS, vocabulary, reference=GPT2(small_checkpoint(seed=9)))
    assert other.kl > 0.1
    assert other.top1 < 0.5


def test_kl_is_that_of_the_definition(small):
    gpt2, vocabulary = small
    other = GPT2(small_checkpoint(seed=9))
    p, q = (log_softmax(np.concatenate(list(m.logits(IDS[:10]))).astype(np.float64)) for m in (gpt2, other))
    expected = (np.exp(q) * (q - p)).sum(axis=1).mean()
    assert ev.evaluate(gpt2, IDS[:11], vocabulary, reference=other).kl == pytest.approx(expected, rel=1e-4)


def test_models_side_by_side_are_measured_as_alone(small):
    gpt2, vocabulary = small
    other = GPT2(small_checkpoint(seed=9))
    together = ev.evaluate_together([gpt2, other], IDS, vocabulary, context=30, stride=10, reference=gpt2)
    for model, result in zip((gpt2, other), together, strict=True):
        assert result == ev.evaluate(model, IDS, vocabulary, context=30, stride=10, reference=gpt2)


def test_intervals(small):
    gpt2, vocabulary = small
    result = ev.evaluate(gpt2, IDS, vocabulary, context=15)
    assert result.perplexity_low < result.perplexity < result.perplexity_high
    assert result.bits_per_byte_low < result.bits_per_byte < result.bits_per_byte_high
    assert result.windows.shape == (9, 3)
    assert result.windows.sum(axis=0)[:2] == pytest.approx([result.nll * result.tokens, result.tokens])
    assert ev.evaluate(gpt2, IDS, vocabulary, max_tokens=10).perplexity_low is None


def test_the_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(1).normal(5, 2, (400, 1))
    low, high = ev.interval(ev.resampled(values)[:, 0] / 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert (low, high) == ev.interval(ev.resampled(values)[:, 0] / 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be in 1..64, not 0"),
        ({"context": 65}, "not 65"),
        ({"stride": 0}, "stride must be in 1..64"),
        ({"context": 8, "stride": 9}, "stride must be in 1..8"),
    ],
)
def test_options_out_of_range(small, options, message):
    with pytest.raises(OptionError, match=message):
        ev.evaluate(small[0], IDS, small[1], **options)


def test_nothing_to_predict(small):
    for ids in (IDS[:0], IDS[:1]):
        with pytest.raises(OptionError, match="at least two tokens"):
            ev.evaluate(small[0], ids, small[1])


def test_documents(tmp_path):
    plain, lines, broken = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("one\ntwo\n")
    lines.write_text('{"text": "one"}\n{"text": "zwei \\u00e4", "more": 1}\n')
    assert ev.read_documents(plain) == ["one\ntwo\n"]
    assert ev.read_documents(lines) == ["one", "zwei \u00e4"]
    for bad in ("{}", "3", '{"text": ', '{"text": 3}'):
        broken.write_text('{"text": "fine"}\n' + bad)
        with pytest.raises(MinigptError, match="line 2"):
            ev.read_documents(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(MinigptError, match="not UTF-8"):
        ev.read_documents(broken)
    with pytest.raises(MinigptError, match="No such file"):
        ev.read_documents(tmp_path / "none.txt")


def test_documents_are_joined_by_end_of_text(small):
    tokenizer = Tokenizer(small[1])
    ids = ev.encode_documents(tokenizer, ["the", "on"], 264)
    assert ids.tolist() == [*tokenizer.encode("the"), 264, *tokenizer.encode("on"), 264]
    assert ev.encode_documents(tokenizer, ["the"], None).tolist() == tokenizer.encode("the")
