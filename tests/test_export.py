"""From `.mgpt` to a Hugging Face folder and back; what the layout cannot hold is refused by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt.checkpoint import load
from minigpt.cli import run
from minigpt.converters import convert
from minigpt.converters.export import export
from minigpt.encodings import encode
from minigpt.errors import ConversionError
from minigpt.model import GPT2
from minigpt.tokenizer import Tokenizer

EVEN = {"n_head": (3, 3), "n_inner": (100, 100)}
IDS = list(range(0, 260, 9))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [(0.25, 0.25), (1.0, 1.0), (0.25, 0.125), (1.0, 0.5)], ids=str)
def test_there_and_back(tmp_path, scale, tied):
    original = small_checkpoint(tied=tied, attn_scale=scale, **EVEN)
    export(original, tmp_path / "hf")
    back = convert(tmp_path / "hf", tmp_path / "back.mgpt")
    assert dataclasses.replace(back.config, attn_scale=scale) == original.config
    np.testing.assert_allclose(back.config.attn_scale, scale)
    assert back.tied == tied
    for name, weight in original.weights.items():
        np.testing.assert_array_equal(back.weights[name].decode(), weight.decode())
    assert back.vocabulary.special_tokens == original.vocabulary.special_tokens
    text = "the thing, <|endoftext|> on \u00e9\U0001f600"
    assert Tokenizer(back.vocabulary).encode(text) == Tokenizer(original.vocabulary).encode(text)


def test_a_quantized_model_comes_back_as_what_it_computes(tmp_path):
    original = small_checkpoint("int8", **EVEN)
    export(original, tmp_path / "hf", "f32")
    back = convert(tmp_path / "hf", tmp_path / "back.mgpt")
    logits = [np.concatenate(list(GPT2(c).logits(IDS))) for c in (original, back)]
    assert np.corrcoef(*map(np.ravel, logits))[0, 1] > 0.995


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_file_is_read_by_others(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.numpy")
    original = small_checkpoint(**EVEN)
    export(original, tmp_path / "hf", dtype)
    found = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    name = "h.1.attn.c_attn.weight"
    expected = original.weights[name].decode().T
    assert found[f"transformer.{name}"].dtype.itemsize == int(dtype[1:]) // 8
    np.testing.assert_allclose(found[f"transformer.{name}"], expected, rtol=1e-3)
    assert "lm_head.weight" not in found


def test_logits_equal_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    original = small_checkpoint(**EVEN)
    export(original, tmp_path / "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(list(GPT2(original).logits(IDS))), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": (3, 2), "n_inner": (100, 100)}, "n_head differs"),
        ({"n_head": (3, 3), "n_inner": (100, 99)}, "n_inner differs"),
        ({"n_head": (2, 2), "n_inner": (100, 100)}, "2 heads of 16 are not n_embd 48"),
        (EVEN | {"attn_scale": (0.3, 0.25)}, "attn_scale"),
    ],
)
def test_what_the_layout_cannot_hold(tmp_path, changes, message):
    with pytest.raises(ConversionError, match=message):
        export(small_checkpoint(**changes), tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_places_that_are_taken(tmp_path):
    checkpoint = small_checkpoint(**EVEN)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for place in ("file", "full"):
        with pytest.raises(ConversionError, match="is not an empty folder"):
            export(checkpoint, tmp_path / place)
    with pytest.raises(ConversionError, match="cannot write"):
        export(checkpoint, tmp_path / "none" / "hf")
    export(checkpoint, tmp_path / "empty")
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_values_beyond_f16(tmp_path):
    checkpoint = small_checkpoint(**EVEN)
    huge = dict(checkpoint.weights) | {"ln_f.bias": encode(np.full(48, 1e6), "f32")}
    with pytest.raises(ConversionError, match=r"ln_f\.bias holds values beyond f16"):
        export(dataclasses.replace(checkpoint, weights=huge), tmp_path / "hf", "f16")
    with pytest.raises(ConversionError, match="dtype"):
        export(checkpoint, tmp_path / "hf", "int8")
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path, model_file, capsys):
    from minigpt.checkpoint import save

    save(small_checkpoint("f16", **EVEN), even := tmp_path / "even.mgpt")
    assert run(["export", str(even), str(tmp_path / "hf"), "--dtype", "f16"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["n_inner"] == 100
    assert load(even).config.n_layer == 2
    assert run(["export", str(model_file), str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
