"""Converters: every spelling of one model gives one result, and what cannot be represented is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.folders import GOLDEN, assemble, write_safetensors

from minigpt.checkpoint import Checkpoint, encoding_for, load
from minigpt.converters import _common, convert
from minigpt.converters._safetensors import open_safetensors
from minigpt.encodings import ENCODINGS, encode
from minigpt.errors import ConversionError, EncodingError, MinigptError, TokenizerError

Tensors = dict[str, np.ndarray]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return assemble("base", tmp_path / "source")[0]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return {name: t.read() for name, t in open_safetensors(GOLDEN / "base" / "model.safetensors").items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("expected")
    return convert(assemble("base", folder / "source")[0], folder / "base.mgpt")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    assert checkpoint.config == expected.config
    assert checkpoint.tied == expected.tied
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(checkpoint.weights[name].decode(), weight.decode())


# ---- spellings of one model -----------------------------------------------------------------------------------------

MASK = np.tril(np.ones((1, 1, 8, 8), bool))
SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "bare": lambda t: {name.removeprefix("transformer."): w for name, w in t.items()},
    "compiled": lambda t: {f"_orig_mod.{name}": w for name, w in t.items()},
    "compiled blocks": lambda t: {name.replace(".attn.", "._orig_mod.attn."): w for name, w in t.items()},
    "data parallel": lambda t: {f"module._orig_mod.{name}": w for name, w in t.items()},
    "masks": lambda t: t | {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": np.float32(-1e4)},
    "head as well": lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]},
    "head only": lambda t: {name.replace("transformer.wte", "lm_head"): w for name, w in t.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_names(
    spelling: Callable[[Tensors], Tensors], source: Path, tensors: Tensors, expected: Checkpoint
) -> None:
    write_safetensors(source / "model.safetensors", spelling(tensors))
    assert_same(convert(source, source / "out.mgpt"), expected)


def test_an_untied_configuration_with_equal_tables_is_stored_tied(
    source: Path, tensors: Tensors, expected: Checkpoint
) -> None:
    edit(source / "config.json", tie_word_embeddings=False)
    write_safetensors(source / "model.safetensors", SPELLINGS["head as well"](tensors))
    assert_same(convert(source, source / "out.mgpt"), expected)


def test_defaults_of_the_configuration_may_be_left_out(source: Path, expected: Checkpoint) -> None:
    config = json.loads((source / "config.json").read_text())
    kept = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "eos_token_id")
    (source / "config.json").write_text(json.dumps({field: config[field] for field in kept}))
    assert_same(convert(source, source / "out.mgpt"), expected)


def test_both_forms_of_the_tokenizer_give_one_vocabulary(source: Path, expected: Checkpoint) -> None:
    (source / "tokenizer.json").unlink()
    vocabulary = convert(source, source / "out.mgpt").vocabulary
    for part in ("token_bytes", "token_ends", "merges"):
        np.testing.assert_array_equal(getattr(vocabulary, part), getattr(expected.vocabulary, part))
    assert vocabulary.special_tokens == expected.vocabulary.special_tokens == {"<|endoftext|>": 299}


def test_added_tokens_are_part_of_the_older_form(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    vocab = json.loads((source / "vocab.json").read_text())
    last = next(token for token, id in vocab.items() if id == 299)
    (source / "vocab.json").write_text(json.dumps({t: id for t, id in vocab.items() if t != last}))
    (source / "added_tokens.json").write_text('{"<|pad|>": 299}')
    assert convert(source, source / "out.mgpt").vocabulary.special_tokens == {"<|pad|>": 299}


def test_rows_that_no_token_has_are_dropped(tmp_path: Path) -> None:
    checkpoint = convert(assemble("padded", tmp_path / "source")[0], tmp_path / "out.mgpt")
    assert checkpoint.config.vocab_size == len(checkpoint.vocabulary) == 300
    assert checkpoint.history[0]["padding_rows_dropped"] == 20


@pytest.mark.parametrize(("eos", "kept"), [(299, 299), ([7], 7), (50256, None), (None, None)])
def test_end_of_text(source: Path, eos: object, kept: int | None) -> None:
    edit(source / "config.json", eos_token_id=eos)
    assert convert(source, source / "out.mgpt").config.eos_token_id == kept


# ---- encodings ------------------------------------------------------------------------------------------------------


def half_of_each_column(w: np.ndarray) -> np.ndarray:
    """Return w [n_in, n_out] with two of four successive inputs removed, as the sparsest encodings want it."""
    return w * (np.arange(len(w)) % 4 < 2)[:, None].astype(np.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_follow_the_policy_and_reopen_equal(source: Path, tensors: Tensors, encoding: str) -> None:
    halves = {name: half_of_each_column(w) if ".c_" in name and w.ndim == 2 else w for name, w in tensors.items()}
    write_safetensors(source / "model.safetensors", halves)
    checkpoint = convert(source, source / "out.mgpt", encoding)
    for name, weight in checkpoint.weights.items():
        assert weight.encoding.name == encoding_for(name, encoding)
    wte = encode(tensors["transformer.wte.weight"], encoding_for("wte.weight", encoding))
    for part, values in checkpoint.weights["wte.weight"].parts.items():
        np.testing.assert_array_equal(values, wte.parts[part])
    assert checkpoint.history[0] | {"encoding": encoding, "source": "source"} == checkpoint.history[0]


def test_lora_is_recorded(tmp_path: Path) -> None:
    source, lora = assemble("lora", tmp_path / "source")
    history = convert(source, tmp_path / "out.mgpt", lora=lora).history
    assert history[0]["lora"] == {"source": "lora", "r": 4, "lora_alpha": 8, "use_rslora": False, "maps": 8}


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(source: Path, tensors: Tensors) -> dict[str, Tensors]:
    """Two shards and their index, as the tensors they hold."""
    (source / "model.safetensors").unlink()
    names, parts = list(tensors), {"model-1.safetensors": slice(0, 9), "model-2.safetensors": slice(9, None)}
    held = {shard: {name: tensors[name] for name in names[part]} for shard, part in parts.items()}
    write_shards(source, held, {name: shard for shard, part in held.items() for name in part})
    return held


def write_shards(folder: Path, shards: dict[str, Tensors], places: dict[str, str]) -> None:
    for shard, held in shards.items():
        write_safetensors(folder / shard, held)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(source: Path, shards: dict[str, Tensors], expected: Checkpoint) -> None:
    assert_same(convert(source, source / "out.mgpt"), expected)


def test_a_missing_shard(source: Path, shards: dict[str, Tensors]) -> None:
    (source / "model-2.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"cannot read model-2\.safetensors"):
        convert(source, source / "out.mgpt")


def test_a_tensor_in_two_shards(source: Path, shards: dict[str, Tensors]) -> None:
    name = next(iter(shards["model-1.safetensors"]))
    write_safetensors(
        source / "model-2.safetensors",
        shards["model-2.safetensors"] | {name: shards["model-1.safetensors"][name]},
    )
    with pytest.raises(ConversionError, match=f"tensor {name} lies in model-2"):
        convert(source, source / "out.mgpt")


def test_a_tensor_that_its_shard_lacks(source: Path, shards: dict[str, Tensors]) -> None:
    places = {name: shard for shard, part in shards.items() for name in part}
    write_shards(source, shards, places | {"transformer.h.9.ln_1.bias": "model-1.safetensors"})
    with pytest.raises(ConversionError, match=r"h\.9\.ln_1\.bias is not in model-1"):
        convert(source, source / "out.mgpt")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b", "", ".."])
def test_the_index_cannot_lead_out_of_the_folder(source: Path, shards: dict[str, Tensors], shard: str) -> None:
    write_shards(source, {}, {"transformer.wte.weight": shard})
    with pytest.raises(ConversionError):
        convert(source, source / "out.mgpt")


def test_pickles_are_not_opened(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin.*safe_serialization=True"):
        convert(source, source / "out.mgpt")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "merges.txt", "vocab.json"])
def test_missing_files(source: Path, missing: str) -> None:
    (source / "tokenizer.json").unlink()
    (source / missing).unlink()
    with pytest.raises(ConversionError):
        convert(source, source / "out.mgpt")


def test_a_source_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "out.mgpt")


def damaged() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Ways to break a safetensors file; a header that claims anything else than what is there must not pass."""

    def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
        def apply(data: bytes) -> bytes:
            n = int.from_bytes(data[:8], "little")
            fields = json.loads(data[8 : 8 + n])
            fields = change(fields) or fields
            text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
            return len(text).to_bytes(8, "little") + text + data[8 + n :]

        return apply

    ln = "transformer.ln_f.bias"
    yield "empty", lambda data: b""
    yield "cut in the length", lambda data: data[:5]
    yield "cut in the header", lambda data: data[:100]
    yield "cut by a byte", lambda data: data[:-1]
    yield "a byte too long", lambda data: data + b"\0"
    yield "huge header", lambda data: (2**63 - 1).to_bytes(8, "little") + data[8:]
    yield "header beyond the end", lambda data: len(data).to_bytes(8, "little") + data[8:]
    yield "no JSON", header(lambda fields: b"{" + b"\xff" * 20)
    yield "deep JSON", header(lambda fields: b"[" * 200_000)
    yield "a list", header(lambda fields: [fields])
    yield "twice", header(lambda f: f'{{"a":{json.dumps(f[ln])},"a":{json.dumps(f[ln])}}}'.encode())
    yield "no offsets", header(lambda fields: fields[ln].pop("data_offsets") and None)
    yield "text as size", header(lambda fields: fields[ln].update(shape=["32"]))
    yield "fraction", header(lambda fields: fields[ln].update(shape=[32.0]))
    yield "negative", header(lambda fields: fields[ln].update(shape=[-32]))
    yield "other size", header(lambda fields: fields[ln].update(shape=[31]))
    yield "huge size", header(lambda fields: fields[ln].update(shape=[2**62, 2**62]))
    yield "overlap", header(lambda fields: fields[ln].update(data_offsets=[0, 128]))
    yield "beyond the end", header(lambda fields: fields[ln].update(data_offsets=[2**40, 2**40 + 128]))
    yield "unprintable name", header(lambda fields: fields.update({"\x1b[2J": fields.pop(ln)}))
    yield "no tensor entry", header(lambda fields: fields.update({ln: None}))


DAMAGED = dict(damaged())


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights(source: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ConversionError, match=r"model\.safetensors is no intact safetensors file"):
        convert(source, source / "out.mgpt")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_damaged_json(source: Path, file: str, text: str) -> None:
    (source / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConversionError, match=file):
        convert(source, source / "out.mgpt")


@pytest.mark.parametrize("document", [{}, {"model": {}}, {"model": {"vocab": [], "merges": []}}])
def test_a_tokenizer_that_is_none(source: Path, document: dict[str, Any]) -> None:
    (source / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises((ConversionError, TokenizerError)):
        convert(source, source / "out.mgpt")


def test_the_reader_equals_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    written = {"a": rng.normal(size=(3, 5)).astype("f4"), "b.c": rng.normal(size=7).astype("f2"), "d": np.float32(2)}
    library.save_file({name: np.asarray(w) for name, w in written.items()}, tmp_path / "x.safetensors")
    read = open_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == written.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(read[name].read(), values)
        np.testing.assert_array_equal(read[name].read(transpose=True), np.asarray(values).T)


def test_bf16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    bits = np.array([[0x3F80, 0xC049, 0x0001], [0x7F7F, 0x8000, 0x0080]], np.uint16)
    write_safetensors(tmp_path / "x.safetensors", {"w": bits})
    w = open_safetensors(tmp_path / "x.safetensors")["w"].read(transpose=True)
    assert w.flags.c_contiguous
    np.testing.assert_array_equal(w.view(np.uint32), bits.T.astype(np.uint32) << 16)


# ---- what cannot be represented -------------------------------------------------------------------------------------

REFUSED_FIELDS = {
    "model_type": ("llama", "model_type is 'llama'"),
    "add_cross_attention": (True, "add_cross_attention"),
    "quantization_config": ({"bits": 4}, "quantization_config"),
    "activation_function": ("gelu_fast", "gelu_fast.*allowed: gelu_new"),
    "n_head": (5, "n_embd 32 is no multiple of n_head 5"),
    "n_layer": (3, "n_layer is 3, but the weights have 2"),
    "n_embd": (64, "asks for"),
    "n_positions": (1024, r"wpe\.weight is \(256, 32\); config.json asks for \(1024, 32\)"),
    "n_inner": (100, r"mlp\.c_fc"),
    "vocab_size": (299, "the tokenizer has 300 tokens, but the table only 299"),
    "layer_norm_epsilon": ("small", "layer_norm_epsilon is 'small'"),
    "scale_attn_weights": ("false", "scale_attn_weights is 'false'"),
    "tie_word_embeddings": (False, r"lm_head\.weight is missing"),
    "eos_token_id": ([1, 2], r"eos_token_id is \[1, 2\]"),
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_configurations_that_are_refused(source: Path, field: str) -> None:
    value, message = REFUSED_FIELDS[field]
    edit(source / "config.json", **{field: value})
    with pytest.raises(ConversionError, match=message):
        convert(source, source / "out.mgpt")


@pytest.mark.parametrize("value", [0, -1, 2**40, "2", 2.0, None, True, [1]])
@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_sizes_out_of_range(source: Path, field: str, value: object) -> None:
    edit(source / "config.json", **{field: value})
    with pytest.raises(ConversionError, match=f"{field} is "):
        convert(source, source / "out.mgpt")


VECTOR = np.zeros(32, np.float32)
REFUSED_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "classifier": (lambda t: t | {"score.weight": VECTOR}, r"score\.weight has no place"),
    "cross-attention": (lambda t: t | {"transformer.h.0.ln_cross_attn.weight": VECTOR}, "ln_cross_attn"),
    "head's bias": (lambda t: t | {"lm_head.bias": VECTOR}, r"lm_head\.bias"),
    "missing": (lambda t: {n: w for n, w in t.items() if "0.ln_2.bias" not in n}, r"h\.0\.ln_2\.bias is missing"),
    "two names": (lambda t: t | {"wpe.weight": t["transformer.wpe.weight"]}, r"wpe\.weight and wpe\.weight"),
    "other head": (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "differs from wte"),
    "quantized": (lambda t: t | {"transformer.ln_f.bias": np.zeros(32, np.int8)}, r"ln_f\.bias has dtype 'I8'"),
    "transposed": (lambda t: {n: w.T for n, w in t.items()}, "asks for"),
    "not a number": (
        lambda t: t | {"transformer.wpe.weight": t["transformer.wpe.weight"] * np.nan},
        r"tensor wpe\.weight",
    ),
    "infinite": (lambda t: t | {"transformer.ln_f.bias": VECTOR + np.inf}, r"tensor ln_f\.bias"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors_that_are_refused(
    source: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], message: str
) -> None:
    write_safetensors(source / "model.safetensors", change(tensors))
    with pytest.raises(ConversionError, match=message):
        convert(source, source / "out.mgpt")


def test_values_beyond_an_encoding_are_named(source: Path, tensors: Tensors) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    write_safetensors(source / "model.safetensors", tensors | {name: tensors[name] * 1e6})
    with pytest.raises(ConversionError, match=r"tensor h\.1\.mlp\.c_fc\.weight: .* use f32"):
        convert(source, source / "out.mgpt", "f16")


# ---- LoRA -----------------------------------------------------------------------------------------------------------

A, B = (f"base_model.model.transformer.h.0.attn.c_attn.lora_{factor}.weight" for factor in "AB")
REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors], str]] = {
    "other method": ({"peft_type": "LOHA"}, dict, "peft_type is 'LOHA'"),
    "DoRA": ({"use_dora": True}, dict, "use_dora"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, dict, "modules_to_save"),
    "other base": ({"init_lora_weights": "pissa"}, dict, "init_lora_weights is 'pissa'"),
    "rank": ({"r": 5}, dict, "has rank 4, but adapter_config.json says 5"),
    "bad pattern": ({"rank_pattern": {"(": 4}}, dict, "unusable"),
    "bad alpha": ({"lora_alpha": "much"}, dict, "unusable"),
    "no A": ({}, lambda t: {n: w for n, w in t.items() if n != A}, r"c_attn\.lora_A\.weight is missing"),
    "shape": ({}, lambda t: t | {B: np.zeros((95, 4), np.float32)}, r"\(95, 4\) by \(4, 32\)"),
    "no such layer": ({}, lambda t: {n.replace("h.1", "h.7"): w for n, w in t.items()}, r"h\.7\."),
    "table": ({}, lambda t: t | {"base_model.model.transformer.wte.lora_embedding_A": VECTOR}, "lora_embedding_A"),
    "magnitude": ({}, lambda t: t | {A.replace("A.weight", "magnitude_vector"): VECTOR}, "magnitude_vector"),
    "whole matrix": ({}, lambda t: t | {"base_model.model.lm_head.weight": VECTOR}, r"lm_head\.weight"),
    "bias of B": ({}, lambda t: t | {B.replace("weight", "bias"): VECTOR[:1]}, r"a bias \(1,\)"),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "lora", tmp_path / "lora"))


@pytest.mark.parametrize(("fields", "change", "message"), REFUSED_ADAPTERS.values(), ids=REFUSED_ADAPTERS)
def test_adapters_that_are_refused(
    source: Path, adapter: Path, fields: dict[str, Any], change: Callable[[Tensors], Tensors], message: str
) -> None:
    held = {name: t.read() for name, t in open_safetensors(adapter / "adapter_model.safetensors").items()}
    write_safetensors(adapter / "adapter_model.safetensors", change(held))
    edit(adapter / "adapter_config.json", **fields)
    with pytest.raises(ConversionError, match=message):
        convert(source, source / "out.mgpt", lora=adapter)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter(source: Path, adapter: Path, missing: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(ConversionError, match=missing):
        convert(source, source / "out.mgpt", lora=adapter)


# ---- the written file -----------------------------------------------------------------------------------------------


def test_a_file_that_reads_back_differently_is_not_put_in_place(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source / "out.mgpt"
    out.write_bytes(b"precious")

    def load_other(path: Path) -> Checkpoint:
        checkpoint = load(path)
        other = encode(checkpoint.weights["ln_f.bias"].decode() + 1)
        return Checkpoint(
            checkpoint.config,
            checkpoint.vocabulary,
            {**checkpoint.weights, "ln_f.bias": other},
            checkpoint.history,
        )

    monkeypatch.setattr(_common, "load", load_other)
    with pytest.raises(ConversionError, match=r"ln_f\.bias differs after writing"):
        convert(source, out)
    assert out.read_bytes() == b"precious"
    assert not [f for f in source.iterdir() if f.name.startswith(".")]


def test_an_existing_file_is_replaced(source: Path, expected: Checkpoint) -> None:
    (source / "out.mgpt").write_bytes(b"old")
    assert_same(convert(source, source / "out.mgpt"), expected)
    assert not [f for f in source.iterdir() if f.name.startswith(".")]


def test_places_that_cannot_be_written(source: Path) -> None:
    for out in (source, source / "nowhere" / "out.mgpt"):
        with pytest.raises(ConversionError, match="cannot write"):
            convert(source, out)


def test_an_unknown_encoding(source: Path) -> None:
    with pytest.raises(EncodingError, match="int3"):
        convert(source, source / "out.mgpt", "int3")


@pytest.mark.parametrize("field", ["model_type", "activation_function", "n_head", "eos_token_id"])
def test_messages_are_one_line(source: Path, field: str) -> None:
    edit(source / "config.json", **{field: ["a\nb", "\x1b[2J"]})
    with pytest.raises(MinigptError) as caught:
        convert(source, source / "out.mgpt")
    assert str(caught.value).isprintable()
