from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import tokenizer as module
from minigpt.checkpoint import Vocabulary
from minigpt.errors import ConversionError, TokenizerError
from minigpt.tokenizer import Tokenizer, from_gpt2, from_tokenizer_json, read_merges

TEXT = """The quick brown fox doesn't jump over the lazy dog; they'll see we've gone.  It's 2024, isn't it?
The system shall return the 12 latest renewals within 300 ms.\n\n    def f(x):\n\treturn x  # naïve café
Die Größe über alles; 漢字かな交じり文 and emoji 👩‍👩‍👧 again 👩‍👩‍👧, the end of the theme.
"""
NASTY = [
    "",
    " ",
    "\0",
    "a\0b",
    "    deep    spaces  \n\n\n \t x ",
    "\r\n\r mixed \n\r newlines \u2028 \x85 \xa0 end",
    "don't I'LL we'Ve they're 'tis 's",
    "👩‍👩‍👧 🇩🇪 e\u0301\u0323 漢字 かな ﷽ ‮rtl",
    "²½Ⅷ ٣٤ 1234567890",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|> b",
    "<|endoftext",
    "!!!???---___===",
    "\ufffd\ufeff",
    TEXT * 3,
]


@pytest.fixture(scope="module")
def published():
    """Return what a folder holds: a byte-level BPE trained with the library, as tokenizer.json."""
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator([TEXT] * 4, trainer)
    return pipeline


@pytest.fixture(scope="module")
def document(published):
    return json.loads(published.to_str())


@pytest.fixture(scope="module")
def vocabulary(document):
    return from_tokenizer_json(document)


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Tokenizer(vocabulary)


# ---- text -> ids -> text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY)
def test_same_ids_as_the_library(published, vocabulary, tokenizer, text):
    with_special = published.encode(text).ids
    assert tokenizer.encode(text, special=True) == with_special
    assert Tokenizer(vocabulary).encode(text, special=True) == with_special  # by the encoder of a first text
    plain = tokenizer.encode(text)
    assert plain == Tokenizer(vocabulary).encode(text)
    assert tokenizer.decode(plain) == text
    if "<|endoftext|>" in text:
        assert vocabulary.special_tokens["<|endoftext|>"] not in plain
    else:
        assert plain == with_special


@given(st.text())
def test_any_text_survives(tokenizer, vocabulary, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert Tokenizer(vocabulary).encode(text) == ids


def test_long_texts_are_encoded_in_parts_without_a_seam(published, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_PARTS", re.compile(module._PARTS.pattern.replace("65536", "10")))
    text = "".join(NASTY) * 2 + TEXT
    assert len(module._PARTS.findall(text)) > 20
    assert tokenizer.encode(text, special=True) == published.encode(text).ids


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.encode("a\ud800b\udcff") == tokenizer.encode("a\ufffdb\ufffd")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")  # a pair is a character


def test_overlapping_special_tokens_are_caught_longest_first(vocabulary, document):
    added = [{"id": 400, "content": "<|end|>"}, {"id": 401, "content": "<|end|>ing Ω"}]
    tokens = from_tokenizer_json({**document, "added_tokens": document["added_tokens"] + added})
    tokenizer = Tokenizer(tokens)
    assert tokenizer.encode("<|end|>ing Ω<|end|>", special=True) == [401, 400]
    assert tokenizer.decode([401]) == "<|end|>ing Ω"
    assert not {400, 401} & set(tokenizer.encode("<|end|>ing Ω<|end|>"))


def test_ids_outside_the_vocabulary(tokenizer):
    for id in (-1, 400):
        with pytest.raises(TokenizerError, match=rf"{id} is outside 0\.\.399"):
            tokenizer.decode([id])


def test_invalid_utf8_decodes_to_replacement_characters(tokenizer):
    ids = [tokenizer.encode("é")[0], *tokenizer.encode("x")]
    byte_of_e_acute = next(id for id in range(400) if tokenizer.token(id) == b"\xc3")
    assert tokenizer.decode([byte_of_e_acute, *ids[1:]]) == "\ufffdx"


def test_decoding_needs_no_library(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.decode(range(400))
    with pytest.raises(ImportError):
        tokenizer.encode("x")


# ---- streaming ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 399)))
def test_stream_equals_decode_and_never_emits_half_a_character(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_stream_holds_back_an_incomplete_character(tokenizer):
    stream = tokenizer.stream()
    single = {tokenizer.token(id): id for id in range(400)}
    emoji = [single[bytes([byte])] for byte in "🦊".encode()]
    assert [stream.push(id) for id in emoji] == ["", "", "", "🦊"]
    assert [stream.push(id) for id in emoji[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(id) for id in emoji] == ["", "", "", "🦊"]  # as new


# ---- vocabularies that contradict themselves ---------------------------------------------------------------


def changed(vocabulary: Vocabulary, tokens=None, **fields) -> Vocabulary:
    if tokens is not None:
        fields["token_bytes"] = np.frombuffer(b"".join(tokens), np.uint8)
        fields["token_ends"] = np.cumsum([len(t) for t in tokens], dtype=np.uint32)
    return dataclasses.replace(vocabulary, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, t: changed(v, [*t[:-1], b""]), "token 399 of 400 is empty"),
        (lambda v, t: changed(v, []), "token 0 of 0 is empty"),
        (lambda v, t: changed(v, token_ends=v.token_ends[::-1].copy()), "is empty"),
        (lambda v, t: changed(v, token_ends=v.token_ends[:-1]), "the tokens end at byte"),
        (lambda v, t: changed(v, token_bytes=v.token_bytes[:-1]), "the tokens end at byte"),
        (lambda v, t: changed(v, [b"xyz" if x == b"\xc3" else x for x in t]), "byte 0xc3 has no token"),
        (lambda v, t: changed(v, merges=np.array([[0, 400]], np.uint32)), r"outside 0\.\.399"),
        (lambda v, t: changed(v, merges=np.zeros((3, 3), np.uint32)), r"shape \(3, 3\)"),
        (lambda v, t: changed(v, special_tokens={"<|endoftext|>": 7}), "is not the token 7"),
        (lambda v, t: changed(v, special_tokens={"<|endoftext|>": "0"}), "is not the token '0'"),
        (lambda v, t: changed(v, special_tokens={"<|endoftext|>": 400}), r"outside 0\.\.399"),
        (lambda v, t: changed(v, [*t[:-1], t[-2]]), "the tokens 398 and 399 are equal"),
        (lambda v, t: changed(v, merges=np.array([[0, 0]], np.uint32)), "a merge makes no token"),
    ],
)
def test_contradictions_are_named(vocabulary, tokenizer, change, message):
    tokens = [tokenizer.token(id) for id in range(400)]
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer(change(vocabulary, tokens)).prepare()
    assert "\n" not in str(error.value)


def test_no_merges_at_all(vocabulary):
    bytes_only = changed(
        vocabulary, [bytes([b]) for b in range(256)], merges=np.zeros((0, 2), np.uint32), special_tokens={}
    )
    for tokenizer in (Tokenizer(bytes_only), Tokenizer(bytes_only)):
        assert tokenizer.encode("é<|endoftext|>", special=True) == list("é<|endoftext|>".encode())
        tokenizer.prepare()


# ---- from published files ----------------------------------------------------------------------------------


def test_vocab_json_with_merges_txt_of_either_line_end(document, vocabulary):
    lines = ["#version: 0.2", *(" ".join(pair) for pair in document["model"]["merges"]), ""]
    for end in ("\n", "\r\n"):
        made = from_gpt2(document["model"]["vocab"], read_merges(end.join(lines)))
        assert made.special_tokens == {"<|endoftext|>": 0}
        for name in ("token_bytes", "token_ends", "merges"):
            np.testing.assert_array_equal(getattr(made, name), getattr(vocabulary, name))
            assert getattr(made, name).dtype == (np.uint8 if name == "token_bytes" else np.uint32)


def test_merges_written_as_strings(document, vocabulary):
    old = {**document["model"], "merges": [" ".join(pair) for pair in document["model"]["merges"]]}
    np.testing.assert_array_equal(from_tokenizer_json({**document, "model": old}).merges, vocabulary.merges)


def test_a_merge_may_begin_with_a_hash():
    assert read_merges("#version: 0.2\n# #\n") == [["#", "#"]]


@pytest.mark.parametrize("text", ["a", "a b c", "a  b", " a"])
def test_lines_that_are_no_merge(text):
    with pytest.raises(TokenizerError, match="must be two tokens"):
        read_merges(f"x y\n{text}\n")


@pytest.mark.parametrize(
    ("tokens", "merges", "special", "message"),
    [
        ({"zz": 402}, [], None, "no token has the id 400"),
        ({"zz": 399}, [], None, "id 399 belongs to two tokens"),
        ({"a b": 400}, [], None, "token 'a b' holds ' ', which stands for no byte"),
        ({}, [("a", "Ω")], None, "which stands for no byte"),
        ({}, [("a", "aqqqa")], None, "a merge names b'aqqqa', which is no token"),
        ({}, [("q", "q")], None, "a merge makes no token"),
        ({}, [], {"<|endoftext|>": 5}, "has the ids 0 and 5"),
        ({}, [], {"<|pad|>": 5}, "has the id 5 of another token"),
    ],
)
def test_published_files_that_contradict_themselves(document, tokens, merges, special, message):
    with pytest.raises(TokenizerError, match=message):
        from_gpt2({**document["model"]["vocab"], **tokens}, merges, special)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", {"type": "WordPiece"}, "model.type = 'WordPiece'"),
        ("model", {"byte_fallback": True}, "model.byte_fallback = True"),
        ("model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix = '</w>'"),
        ("model", {"dropout": 0.1}, "dropout = 0.1"),
        ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space = True"),
        ("pre_tokenizer", {"use_regex": False}, "use_regex = False"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer.type = 'Whitespace'"),
        ("post_processor", {"type": "TemplateProcessing"}, "post_processor.type"),
    ],
)
def test_other_tokenizers_are_refused_by_name(document, part, change, message):
    with pytest.raises(ConversionError, match=message):
        from_tokenizer_json({**document, part: {**document[part], **change}})


def test_normalizers_and_stripping_tokens_are_refused_by_name(document):
    with pytest.raises(ConversionError, match="normalizer = "):
        from_tokenizer_json({**document, "normalizer": {"type": "NFC"}})
    token = {"id": 0, "content": "<|endoftext|>", "lstrip": True}
    with pytest.raises(ConversionError, match="lstrip = True"):
        from_tokenizer_json({**document, "added_tokens": [token]})


# ---- a real one --------------------------------------------------------------------------------------------


@pytest.mark.skipif("MINIGPT_TEST_MODELS" not in os.environ, reason="MINIGPT_TEST_MODELS names no folder of models")
def test_gpt2_itself():
    from tokenizers import Tokenizer as Pipeline

    folder = Path(os.environ["MINIGPT_TEST_MODELS"]) / "tech-gpt2-124m"
    published = Pipeline.from_file(str(folder / "tokenizer.json"))
    vocabulary = from_tokenizer_json(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.n_vocab == 50257
    assert vocabulary.special_tokens == {"<|endoftext|>": 50256}
    for text in NASTY:
        ids = published.encode(text).ids
        assert Tokenizer(vocabulary).encode(text, special=True) == ids
        assert tokenizer.encode(text, special=True) == ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
