from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from golden.folders import assemble
from hypothesis import given
from hypothesis import strategies as st

from minigpt.checkpoint import Config
from minigpt.converters import convert
from minigpt.errors import ContextError, MinigptError, OptionError
from minigpt.generator import Hypothesis, Step, StopStrings, beam_search, generate, score
from minigpt.model import GPT2
from minigpt.sampling import SamplingOptions, log_softmax, make_sampler

GREEDY = SamplingOptions(temperature=0)


class FakeGPT2(GPT2):
    """A model whose logits depend on every cached token and its position, so that a wrong cache shows.

    `table` maps a text, as a tuple of ids, to logits; by default they are drawn with the text as seed.
    """

    def __init__(self, vocab_size=5, n_positions=16, table=None):
        self.config = Config(vocab_size, n_positions, 1, 1, 1, (1,), (1,), (1.0,))
        self.table = table or self.drawn
        self.n_evaluated, self.kv_cache = 0, "f32"
        self._program = self

    def drawn(self, text):
        return np.random.default_rng(text).standard_normal(self.config.vocab_size) * 2

    def logits_of(self, text):
        return np.asarray(self.table(tuple(text)), np.float32)

    def run(self, ids, positions, sequences, cache, keep, margin=None):
        """Stand in for `Program.run`."""
        rows = []
        for i, (id, position, s) in enumerate(zip(ids, positions, sequences, strict=True)):
            (keys,) = cache.k[0].parts
            keys[s, 0, position, 0] = id
            if i in keep:
                rows.append(self.logits_of(keys[s, 0, : position + 1, 0].astype(int).tolist()))
        self.n_evaluated += len(ids)
        return np.array(rows, np.float32).reshape(len(rows), -1)

    def run_one(self, id, position, cache, margin=None):
        return self.run([id], [position], [0], cache, [0], margin)

    def run_greedily(self, id, position, cache, n_tokens, stop_ids):
        """Stand in for `Program.run_greedily`: two tokens at most, as it may find fewer than asked for."""
        found = []
        while len(found) < min(n_tokens, 2) and not (found and found[-1] in stop_ids):
            id = int(self.run_one(id, position + len(found), cache).argmax())
            found.append(id)
        return found


def greedy_ids(model, prompt, n):
    text = list(prompt)
    for _ in range(n):
        text.append(int(model.logits_of(text).argmax()))
    return text[len(prompt) :]


# ---- sampling ----------------------------------------------------------------------------------------------


def test_greedy_equals_evaluating_everything_each_time():
    model = FakeGPT2()
    steps = list(generate(model, [1, 2, 3], options=GREEDY, max_tokens=8))
    assert [step.id for step in steps] == greedy_ids(model, [1, 2, 3], 8)
    assert [step.finish_reason for step in steps] == [None] * 7 + ["length"]
    assert {(step.sequence, step.logprob) for step in steps} == {(0, None)}
    assert model.n_evaluated == 3 + 7  # the prompt once, then one token each


def test_log_probabilities_are_the_models_own():
    model = FakeGPT2()
    options = SamplingOptions(temperature=0.3, top_k=2, presence_penalty=3.0, seed=1)
    text = [4]
    for step in generate(model, [4], options=options, max_tokens=6, logprobs=True):
        assert step.logprob == pytest.approx(log_softmax(model.logits_of(text))[step.id], abs=1e-5)
        text.append(step.id)


def test_a_stop_id_ends_a_sequence():
    model = FakeGPT2()
    expected = greedy_ids(model, [1], 10)
    stop = expected[3]
    ids = [step.id for step in generate(model, [1], options=GREEDY, max_tokens=10, stop_ids=[stop])]
    assert ids == expected[: expected.index(stop) + 1]
    *others, last = generate(model, [1], options=GREEDY, max_tokens=10, stop_ids={stop})
    assert last.finish_reason == "stop"
    assert all(step.finish_reason is None for step in others)


def test_several_samples_share_the_prompt_and_are_what_each_is_alone():
    model = FakeGPT2()
    options = SamplingOptions(temperature=1.0, top_p=1.0, repetition_penalty=1.2, seed=5)
    prompt = [1, 2, 3, 4, 0]
    steps = list(generate(model, prompt, options=options, max_tokens=6, n=4, stop_ids=[0]))
    assert model.n_evaluated < len(prompt) + 4 * 6
    by_sequence = [[step for step in steps if step.sequence == s] for s in range(4)]
    assert len({tuple(step.id for step in sample) for sample in by_sequence}) > 1
    assert {sample[-1].finish_reason for sample in by_sequence} == {"stop", "length"}
    alone = list(generate(FakeGPT2(), prompt, options=options, max_tokens=6, stop_ids=[0]))
    assert by_sequence[0] == alone
    for s, sample in enumerate(by_sequence):
        sampler, text = make_sampler(options, s), list(prompt)
        for step in sample:
            assert sampler(model.logits_of(text), text) == step.id
            text.append(step.id)


def test_same_seed_same_ids():
    def ids(seed):
        options = SamplingOptions(temperature=2.0, seed=seed)
        return [step.id for step in generate(FakeGPT2(), [1], options=options, max_tokens=12)]

    assert ids(1) == ids(1) != ids(2)


# ---- the end of the context --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_prompt", [1, 15, 16])
def test_a_full_context_ends_the_sequence(n_prompt):
    model = FakeGPT2(n_positions=16)
    prompt = [1] * n_prompt
    steps = list(generate(model, prompt, options=GREEDY))
    assert [step.id for step in steps] == greedy_ids(model, prompt, 17 - n_prompt)
    assert steps[-1].finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_an_error_at_once():
    with pytest.raises(ContextError, match="17 tokens exceed the model's 16 positions"):
        generate(FakeGPT2(n_positions=16), [1] * 17)


@pytest.mark.parametrize(("n_prompt", "head", "expected_head"), [(3, None, 3), (9, None, 4), (9, 2, 2), (9, 0, 0)])
@pytest.mark.parametrize("n", [1, 3])
def test_context_shift_keeps_the_head_and_evaluates_a_tail(n_prompt, head, expected_head, n):
    model = FakeGPT2(n_positions=16, vocab_size=7)
    prompt = [*range(n_prompt - 2), 1, 2]
    prompt = [id % 7 for id in prompt]
    seen, text = list(prompt), list(prompt)
    expected = []
    for _ in range(40):
        if len(seen) > 16:
            seen = text[:expected_head] + text[-8:]
        id = int(model.logits_of(seen).argmax())
        expected.append(id)
        text.append(id)
        seen.append(id)
    steps = list(generate(model, prompt, options=GREEDY, max_tokens=40, n=n, context_shift=True, keep_head=head))
    for s in range(n):
        assert [step.id for step in steps if step.sequence == s] == expected


def test_context_shift_takes_a_prompt_of_any_length():
    model = FakeGPT2(n_positions=16)
    prompt = [i % 5 for i in range(50)]
    step = next(iter(generate(model, prompt, options=GREEDY, context_shift=True)))
    assert step.id == greedy_ids(model, prompt[:4] + prompt[-8:], 1)[0]


def test_context_shift_in_the_smallest_context():
    model = FakeGPT2(n_positions=1)
    steps = list(generate(model, [1, 2], options=GREEDY, context_shift=True, max_tokens=3))
    assert [step.id for step in steps] == [
        (a := greedy_ids(model, [2], 1)[0]),
        (b := greedy_ids(model, [a], 1)[0]),
        greedy_ids(model, [b], 1)[0],
    ]


# ---- what can go wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "at least one token"),
        ([[1]], {}, "at least one token"),
        ([1.5], {}, "at least one token"),
        (["a"], {}, "at least one token"),
        ([5], {}, r"token id 5 is outside 0\.\.4"),
        ([-1], {}, r"token id -1 is outside 0\.\.4"),
        ([1], {"max_tokens": 0}, "max_tokens = 0 is not allowed; give a whole number from 1 up"),
        ([1], {"max_tokens": 1.5}, "max_tokens = 1.5"),
        ([1], {"n": 0}, "n = 0"),
        ([1], {"keep_head": 8}, r"keep_head = 8 is not allowed; give a whole number in 0\.\.7"),
    ],
)
def test_invalid_arguments_are_refused_before_the_first_step(prompt, arguments, message):
    with pytest.raises(OptionError, match=message):
        generate(FakeGPT2(), prompt, **arguments)


def test_whoever_stops_asking_can_start_anew():
    model = FakeGPT2()
    steps = generate(model, [1], options=GREEDY)
    first = next(steps)
    steps.close()
    assert next(steps, None) is None
    assert next(generate(model, [1], options=GREEDY)) == first == Step(0, greedy_ids(model, [1], 1)[0])


def test_an_interruption_passes_through():
    def interrupted(text):
        if len(text) == 3:
            raise KeyboardInterrupt
        return np.zeros(5)

    steps = generate(FakeGPT2(table=interrupted), [1], options=GREEDY)
    assert [next(steps).id, next(steps).id] == [0, 0]
    with pytest.raises(KeyboardInterrupt):
        next(steps)


def test_logits_that_are_not_finite():
    model = FakeGPT2(table=lambda text: [np.nan] * 5)
    with pytest.raises(MinigptError, match="not finite"):
        next(generate(model, [1]))
    with pytest.raises(MinigptError, match="not finite"):
        beam_search(model, [1], max_tokens=2)


# ---- beam search -------------------------------------------------------------------------------------------


def all_hypotheses(model, prompt, limit, stops, penalty):
    """Return every possible continuation with its score, best first."""
    found = []
    for ids in itertools.product(range(model.config.vocab_size), repeat=limit):
        length = next((i + 1 for i, id in enumerate(ids) if id in stops), limit)
        if any(ids[length:]):
            continue  # count what follows a stop only once
        text, total = list(prompt), 0.0
        for id in ids[:length]:
            total += float(log_softmax(model.logits_of(text))[id])
            text.append(id)
        reason = "stop" if ids[length - 1] in stops else "length"
        found.append(Hypothesis(ids[:length], total / length**penalty, reason))
    return sorted(found, key=lambda hypothesis: -hypothesis.score)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.7, 1.0, 2])
@pytest.mark.parametrize("stops", [(), (3,), (0, 3)])
def test_wide_beams_find_what_exhaustive_search_finds(penalty, stops):
    model = FakeGPT2(vocab_size=4)
    expected = all_hypotheses(model, [1, 2], 3, stops, penalty)[:3]
    found = beam_search(model, [1, 2], n_beams=64, n_hypotheses=3, length_penalty=penalty, max_tokens=3, stop_ids=stops)
    assert [(h.ids, h.finish_reason) for h in found] == [(h.ids, h.finish_reason) for h in expected]
    np.testing.assert_allclose([h.score for h in found], [h.score for h in expected], atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "stops", "penalty", "limit", "expected"),
    [  # transformers 5.24: generate(num_beams=4, num_return_sequences=3, early_stopping="never")
        (
            [5, 9],
            [],
            2.0,
            6,
            [
                ((229, 217, 123, 123, 267, 267), -0.51169),
                ((229, 217, 217, 217, 217, 217), -0.51968),
                ((229, 217, 217, 217, 12, 229), -0.52037),
            ],
        ),
        (
            [5, 9],
            [267],
            -1.0,
            12,
            [
                ((229, 217, 229, 267), -49.59845),
                ((229, 217, 123, 123, 267), -77.79497),
                ((229, 217, 123, 90, 267), -78.31219),
            ],
        ),
        (
            [1, 2, 3],
            [217, 270],
            0.0,
            8,
            [
                ((276, 102, 217), -8.57784),
                ((276, 102, 252, 217), -11.72213),
                ((276, 102, 298, 266, 217), -14.63535),
            ],
        ),
        (
            [1, 2, 3],
            [217, 270],
            1.0,
            8,
            [
                ((276, 102, 217), -2.85928),
                ((276, 102, 298, 266, 217), -2.92707),
                ((276, 102, 252, 217), -2.93053),
            ],
        ),
    ],
)
def test_beam_search_equals_transformers(tmp_path, prompt, stops, penalty, limit, expected):
    source, _ = assemble("base", tmp_path / "source")
    model = GPT2(convert(source, tmp_path / "model.mgpt"))
    found = beam_search(model, prompt, n_hypotheses=3, stop_ids=stops, length_penalty=penalty, max_tokens=limit)
    assert [hypothesis.ids for hypothesis in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], [x for _, x in expected], rtol=1e-4)


def test_one_beam_is_greedy():
    model = FakeGPT2()
    (found,) = beam_search(model, [1], n_beams=1, max_tokens=10)
    assert list(found.ids) == greedy_ids(model, [1], 10)
    assert found.finish_reason == "length"


def test_beams_see_past_a_greedy_mistake():
    chances = {(0,): [0.0, 0.6, 0.4], (0, 1): [0.34, 0.33, 0.33], (0, 2): [0.0, 0.05, 0.95]}
    model = FakeGPT2(3, table=lambda text: np.log(np.array(chances[text]) + 1e-9))
    first, second = beam_search(model, [0], n_beams=2, n_hypotheses=2, max_tokens=2)
    assert (first.ids, second.ids) == ((2, 2), (1, 0))
    assert first.score == pytest.approx(math.log(0.4 * 0.95) / 2, abs=1e-5)


def test_beams_reorder_their_caches():
    model = FakeGPT2(vocab_size=6, n_positions=12)
    for hypothesis in beam_search(model, [1], n_beams=5, n_hypotheses=5, stop_ids=[2]):
        text, total = [1], 0.0
        for id in hypothesis.ids:
            total += float(log_softmax(model.logits_of(text))[id])
            text.append(id)
        assert hypothesis.score == pytest.approx(total / len(hypothesis.ids), abs=1e-5)


def test_beam_search_stops_where_the_context_ends():
    (found,) = beam_search(FakeGPT2(n_positions=16), [1] * 14)
    assert (len(found.ids), found.finish_reason) == (3, "length")


def test_nothing_but_stops():
    found = beam_search(FakeGPT2(vocab_size=3), [1], n_beams=4, n_hypotheses=4, stop_ids=[0, 1, 2])
    assert sorted(hypothesis.ids for hypothesis in found) == [(0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_beams": 0}, r"n_beams = 0 is not allowed; give a whole number in 1\.\.64"),
        ({"n_beams": 2, "n_hypotheses": 3}, r"n_hypotheses = 3 .* in 1\.\.2"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"length_penalty": math.nan}, "length_penalty = nan"),
        ({"length_penalty": "1"}, "length_penalty = '1'"),
    ],
)
def test_invalid_arguments_of_beam_search(arguments, message):
    with pytest.raises(OptionError, match=message):
        beam_search(FakeGPT2(), [1], **arguments)
    with pytest.raises(ContextError):
        beam_search(FakeGPT2(), [1] * 17)


# ---- scoring -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 300])
def test_score_is_the_log_probability_of_each_token(n):
    model = FakeGPT2(n_positions=299, table=lambda text: np.sin(np.arange(5.0) * (sum(text) + len(text))))
    text = [i * i % 5 for i in range(n)]
    expected = [log_softmax(model.logits_of(text[:i]))[text[i]] for i in range(1, n)]
    scores = score(model, text)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.array(expected, np.float32).reshape(n - 1), atol=1e-5)


def test_texts_that_cannot_be_scored():
    with pytest.raises(ContextError, match="18 tokens"):
        score(FakeGPT2(n_positions=16), [1] * 18)
    with pytest.raises(OptionError, match="at least one token"):
        score(FakeGPT2(), [])


# ---- stop strings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "rest"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ["a", "", "", "", ""], None),
        (["END"], ["xEN", "x", "EEND"], ["x", "ENx", "E"], None),
        (["END"], ["say EN"], ["say "], "EN"),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], None),
        (["abcd", "bc"], ["a", "b", "c", "d"], ["", "", "a", ""], None),
        (["bc", "abc"], ["xabc"], ["x"], None),
        (["aab"], ["aaaab"], ["aa"], None),
        ([], ["a", "", "b"], ["a", "", "b"], ""),
    ],
)
def test_stop_strings(stops, pieces, shown, rest):
    watcher = StopStrings(stops)
    assert [watcher.push(piece) for piece in pieces] == shown
    assert watcher.stopped == (rest is None)
    assert watcher.flush() == (rest or "")


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab", max_size=5), max_size=8),
)
def test_where_the_text_is_cut_makes_no_difference(stops, pieces):
    def shown(parts):
        watcher = StopStrings(stops)
        return "".join([watcher.push(part) for part in parts]) + watcher.flush(), watcher.stopped

    text = "".join(pieces)
    assert shown(pieces) == shown(list(text)) == shown([text])
    result, stopped = shown(pieces)
    assert text.startswith(result)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or result == text
    assert not any(stop in result for stop in stops)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "END", [1]])
def test_invalid_stop_strings(stops):
    with pytest.raises(OptionError, match="give a list of strings that are not empty"):
        StopStrings(stops)
