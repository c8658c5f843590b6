"""Text in, text out: what scripts rely on, on a tiny model, and a few times on the embedded one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import small_checkpoint

import minigpt
from minigpt import api, generator
from minigpt.checkpoint import save
from minigpt.encodings import encode
from minigpt.errors import ContextError, FormatError, MinigptError, OptionError
from minigpt.sampling import log_softmax

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def model():
    return minigpt.MiniGPT(small_checkpoint())


@pytest.fixture
def says(model, monkeypatch):
    """Let the model's samples consist of given texts, one token per byte, as a batch would bring them."""

    def script(*texts, end="length"):
        ids = [list(text.encode()) if isinstance(text, str) else list(text) for text in texts]
        steps = [
            generator.Step(s, row[i], None, end if i == len(row) - 1 else None)
            for i in range(max(map(len, ids)))
            for s, row in enumerate(ids)
            if i < len(row)
        ]
        monkeypatch.setattr(generator, "generate", lambda *_, **__: iter(steps))

    return script


# ---- opening and closing -----------------------------------------------------------------------------------


def test_load_takes_any_path_or_none(model_file):
    for path in (str(model_file), model_file):
        with minigpt.load(path) as model:
            assert isinstance(model.generate("a", max_tokens=3), str)
    assert Path(api.default_path()).is_file()


@pytest.mark.parametrize("encoding", ["bitmap_int8", "nm_int8", "int4_g64"])
def test_a_sparse_model_says_the_same_when_it_is_expanded(tmp_path, checkpoint, encoding):
    name = "h.0.mlp.c_fc.weight"
    w = checkpoint.weights[name].decode() * (np.arange(48) % 2)
    save(replace(checkpoint, weights={**checkpoint.weights, name: encode(w, encoding)}), tmp_path / "sparse.mgpt")
    logits = [minigpt.load(tmp_path / "sparse.mgpt", expand=expand).logits([1, 2, 3]) for expand in (False, True)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["missing.mgpt", ""])
def test_load_of_what_is_no_model(tmp_path, name):
    with pytest.raises(FormatError):
        minigpt.load(tmp_path / name)


@pytest.mark.parametrize("n_threads", [0, -1, 257, 1.5, "two"])
def test_threads_out_of_range(model_file, n_threads):
    with pytest.raises(OptionError, match=r"1\.\.256"):
        minigpt.load(model_file, n_threads=n_threads)


def test_a_closed_model_says_so(model_file):
    model = minigpt.load(model_file)
    begun = model.stream("a", max_tokens=5, **GREEDY)
    model.close()
    model.close()
    uses = [
        lambda: model.generate("a"),
        lambda: model.stream("a"),
        lambda: model.score("a"),
        lambda: model.logits([1]),
        lambda: model.tokenizer,
        lambda: model.checkpoint,
    ]
    for use in uses:
        with pytest.raises(MinigptError, match="closed"):
            use()
    assert "".join(begun) == minigpt.load(model_file).generate("a", max_tokens=5, **GREEDY)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files")
def test_closing_unmaps_the_file(model_file):
    mapped = lambda: str(model_file) in Path("/proc/self/maps").read_text()  # noqa: E731
    with minigpt.load(model_file) as model:
        model.generate("a", max_tokens=2)
        model.score("abc")
        assert mapped()
    assert not mapped()


def test_the_package_offers_what_it_says():
    assert all(hasattr(minigpt, name) for name in dir(minigpt))
    with pytest.raises(AttributeError, match="nonsense"):
        minigpt.nonsense  # noqa: B018


# ---- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "a", "the thing", "é🎉", "\ud800", "<|endoftext|>", "\0\n\r"])
def test_any_text_is_a_prompt(model, prompt):
    completion = model.complete(prompt, max_tokens=5, logit_bias={model.checkpoint.config.eos_token_id: -99})[0]
    assert len(completion.ids) == 5
    assert completion.finish_reason == "length"


def test_an_empty_prompt_begins_a_text(model):
    end = model.checkpoint.config.eos_token_id
    first = model.complete("", max_tokens=1, **GREEDY)[0].ids[0]
    assert first == model.logits([end])[-1].argmax()


def test_an_empty_prompt_needs_an_end_of_text_token():
    model = minigpt.MiniGPT(small_checkpoint(eos_token_id=None))
    with pytest.raises(OptionError, match="at least one token"):
        model.generate("")
    assert model.generate("a", max_tokens=2, **GREEDY)


def test_special_text_is_plain_text(model):
    assert len(model.tokenizer.encode("<|endoftext|>")) > 1


def test_a_full_context_gives_one_token_and_a_fuller_one_an_error(model):
    n = model.checkpoint.config.n_positions
    full = model.complete("x" * n, max_tokens=9, banned=[model.checkpoint.config.eos_token_id])[0]
    assert (len(full.ids), full.finish_reason) == (1, "length")
    for use in (model.generate, model.stream, model.complete):
        with pytest.raises(ContextError, match=f"{n + 1} tokens exceed the model's {n} positions"):
            use("x" * (n + 1))
    with pytest.raises(ContextError, match=str(n)):
        model.complete("x" * (n + 1), n_beams=2)
    banned = [model.checkpoint.config.eos_token_id]
    assert len(model.complete("x" * (n + 1), max_tokens=n, context_shift=True, banned=banned)[0].ids) == n


def test_the_embedded_models_context():
    with minigpt.load() as model:
        assert len(model.tokenizer.encode(" the" * 1024)) == 1024
        assert len(model.complete(" the" * 1024)[0].ids) == 1
        assert len(model.score(" the" * 1024).ids) == 1024
        for use in (model.generate, model.score):
            with pytest.raises(ContextError, match=r"102[56] tokens"):
                use(" the" * 1025)


def test_the_embedded_model_writes_requirements():
    with minigpt.load() as model:
        record = model.complete("Product: Loan portal\nFeature: Loan renewal\n", seed=1)[0]
        bare = model.complete("The system shall", seed=1, max_tokens=20)[0]
    assert record.finish_reason == "stop"
    assert [line.split(":")[0] for line in record.text.splitlines()] == [
        *("Type", "Requirement", "Rationale", "Verification", "Priority")
    ]
    assert " shall " in record.text
    assert bare.text.startswith(" ")


# ---- options -----------------------------------------------------------------------------------------------


def test_the_ways_to_generate_agree(model):
    options = {"max_tokens": 20, "seed": 3}
    text = model.generate("the", **options)
    assert text == model.complete("the", **options)[0].text
    assert text == "".join(model.stream("the", **options))
    assert text == "".join(piece.text for piece in model.pieces("the", **options))
    assert text != model.generate("the", max_tokens=20, seed=4)


def test_samples_are_different_and_each_is_reproducible(model):
    three = model.complete("the", n=3, max_tokens=20, seed=3)
    assert len({c.text for c in three}) == 3
    assert three == model.complete("the", n=3, max_tokens=20, seed=3)
    assert three[0].text == model.generate("the", max_tokens=20, seed=3)


def test_log_probabilities(model):
    ids = model.tokenizer.encode("the")
    completion = model.complete("the", max_tokens=5, logprobs=True, **GREEDY)[0]
    rows = log_softmax(model.logits([*ids, *completion.ids]))[len(ids) - 1 : -1]
    expected = [row[id] for row, id in zip(rows, completion.ids, strict=True)]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    assert model.complete("the", max_tokens=5)[0].logprobs is None


def test_beam_search(model):
    found = model.complete("the", n_beams=3, n=2, max_tokens=4)
    assert found[0].score >= found[1].score
    assert model.generate("the", n_beams=3, max_tokens=4) == found[0].text
    assert model.generate("the", n_beams=1, max_tokens=4) == model.generate("the", max_tokens=4, **GREEDY)
    cut = model.complete("the", n_beams=3, max_tokens=4, stop=[found[0].text[1:]])[0]
    assert (cut.text, cut.finish_reason) == (found[0].text[:1], "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 .* from 1 up"),
        ({"max_tokens": 2.5}, "max_tokens = 2.5"),
        ({"n": 0}, r"n = 0 .* 1\.\.64"),
        ({"n": 10**12}, r"1\.\.64"),
        ({"n": "2"}, r"n = '2'"),
        ({"stop": "end"}, "stop = 'end' .* a list"),
        ({"stop": [""]}, "not empty"),
        ({"temprature": 1}, "unknown option 'temprature'; known: temperature"),
        ({"temperature": -1}, r"temperature = -1 .* 0\.01\.\.100"),
        ({"seed": -1}, "seed = -1"),
        ({"length_penalty": 2.0}, "length_penalty = 2.0 .* n_beams"),
        ({"n_beams": 0}, r"n_beams = 0 .* 1\.\.64"),
        ({"n_beams": 2, "n": 3}, r"= 3 .* 1\.\.2"),
        ({"n_beams": 2, "length_penalty": float("nan")}, r"length_penalty = nan .* -10\.\.10"),
        ({"n_beams": 2, "seed": 1}, "beam search takes no seed"),
        ({"n_beams": 2, "logprobs": True}, "beam search takes no logprobs"),
        ({"banned": [999]}, r"999 is outside 0\.\.264"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(OptionError, match=message) as caught:
        model.complete("a", **options)
    assert "\n" not in str(caught.value)


def test_methods_that_give_one_text_refuse_several(model):
    for method in (model.generate, model.stream):
        with pytest.raises(OptionError, match="complete"):
            method("a", n=2)


def test_errors_come_with_the_call_not_with_the_first_piece(model):
    for options in ({"top_p": 0}, {"stop": [""]}, {"n": 65}):
        with pytest.raises(OptionError):
            model.pieces("a", **options)


# ---- text from tokens --------------------------------------------------------------------------------------


def test_a_stream_is_made_of_whole_characters(model, says):
    says("hé🎉é!")
    pieces = [piece.text for piece in model.pieces("")]
    assert [text for text in pieces if text] == ["h", "é", "🎉", "é", "!"]


def test_a_character_that_stays_incomplete_is_replaced(model, says):
    says("é".encode()[:1])
    assert model.generate("") == "\ufffd"
    says(b"a\xffb")
    assert model.generate("") == "a\ufffdb"


def test_the_stop_token_is_no_text(model, says):
    says("ab!", end="stop")
    completion = model.complete("")[0]
    assert (completion.text, completion.finish_reason, len(completion.ids)) == ("ab", "stop", 3)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["lo w"], "hel", "stop"),
        (["🎉"], "hello world ", "stop"),
        (["world", "hel"], "", "stop"),
        (["🎉!", "worlds"], "hello world 🎉", "length"),
        (["🎉 and more"], "hello world 🎉", "length"),
    ],
)
def test_stop_strings_work_across_tokens(model, says, stop, text, reason):
    says("hello world 🎉")
    completion = model.complete("", stop=stop)[0]
    assert (completion.text, completion.finish_reason) == (text, reason)


def test_a_stop_string_ends_its_own_sample_only(model, says):
    says("one. two", "three", "four. five")
    first, second, third = model.complete("", n=3, stop=["."])
    assert (first.text, second.text, third.text) == ("one", "three", "four")
    assert (first.finish_reason, second.finish_reason, len(first.ids)) == ("stop", "length", 4)


# ---- numbers -----------------------------------------------------------------------------------------------


def test_scores_are_the_models_log_probabilities(model):
    text = "the thing"
    score = model.score(text)
    ids = model.tokenizer.encode(text)
    rows = log_softmax(model.logits([model.checkpoint.config.eos_token_id, *ids]))
    expected = np.array([row[id] for row, id in zip(rows, ids, strict=False)])
    assert score.ids == tuple(ids)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
    assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)


def test_scores_without_an_end_of_text_token_begin_with_the_second():
    model = minigpt.MiniGPT(small_checkpoint(eos_token_id=None))
    assert model.score("ab").ids == (ord("b"),)
    with pytest.raises(OptionError, match="too short"):
        model.score("a")


def test_texts_that_cannot_be_scored(model):
    with pytest.raises(OptionError, match="too short"):
        model.score("")
    assert len(model.score("x" * 64).ids) == 64
    with pytest.raises(ContextError, match=r"66 tokens .* 64 positions"):
        model.score("x" * 65)


def test_logits(model):
    logits = model.logits(list(range(64)))
    assert (logits.shape, logits.dtype) == ((64, 265), np.float32)
    np.testing.assert_allclose(model.logits(np.arange(3)), logits[:3], atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], OptionError, "at least one"),
        ([-1], OptionError, r"-1 is outside 0\.\.264"),
        ([265], OptionError, r"265 is outside 0\.\.264"),
        ([0] * 65, ContextError, "65 tokens .* 64 positions"),
    ],
)
def test_ids_that_have_no_logits(model, ids, error, message):
    with pytest.raises(error, match=message):
        model.logits(ids)


def test_damaged_weights_are_no_text(tmp_path):
    checkpoint = small_checkpoint()
    weights = dict(checkpoint.weights)
    gain = weights["ln_f.weight"]
    weights["ln_f.weight"] = replace(gain, parts={"values": np.full(48, np.nan, np.float32)})
    save(replace(checkpoint, weights=weights), tmp_path / "nan.mgpt")
    with pytest.raises(MinigptError, match="minigpt verify"):
        minigpt.load(tmp_path / "nan.mgpt").generate("a")


# ---- threads and processes ---------------------------------------------------------------------------------


def test_threads_may_share_a_model(model):
    alone = {letter: model.generate(letter, max_tokens=30, seed=1) for letter in LETTERS[:6]}
    together = {}
    threads = [
        threading.Thread(
            target=lambda a: together.update({a: model.generate(a, max_tokens=30, seed=1)}), args=(letter,)
        )
        for letter in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_generations_may_take_turns_in_one_thread(model):
    options = {"max_tokens": 20, "banned": [model.checkpoint.config.eos_token_id], **GREEDY}
    one, other = (model.pieces(letter, **options) for letter in "ab")
    mixed = [(next(one).id, next(other).id) for _ in range(20)]
    assert list(zip(*mixed, strict=True)) == [model.complete(letter, **options)[0].ids for letter in "ab"]


FORK = """
import os, sys, minigpt
model = minigpt.load(sys.argv[1], n_threads=2)
say = lambda: model.generate("the", max_tokens=30, seed=1)
before = say()
child = os.fork()
if child == 0:
    os._exit(say() != before)
assert os.waitpid(child, 0)[1] == 0 and say() == before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_may_go_on(model_file):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, model_file], check=True, timeout=120)
