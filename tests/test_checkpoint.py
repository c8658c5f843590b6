"""Config, Checkpoint and their way to a file and back; what contradicts itself is refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import checkpoint as cp
from minigpt import format as mgpt
from minigpt.encodings import encode
from minigpt.errors import ConfigError, FormatError, MinigptError


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("encoding", ["f32", "f16", "int8", "int4"])
def test_a_file_gives_back_the_checkpoint(tmp_path, encoding, tied):
    saved = dataclasses.replace(small_checkpoint(encoding, tied=tied), history=({"step": "made", "seed": 0},))
    cp.save(saved, tmp_path / "m.mgpt")
    loaded = cp.load(tmp_path / "m.mgpt")
    assert loaded.config == saved.config
    assert loaded.history == saved.history
    assert loaded.tied == tied
    assert loaded.nbytes == saved.nbytes
    assert loaded.vocabulary.special_tokens == saved.vocabulary.special_tokens
    for field in ("token_bytes", "token_ends", "merges"):
        np.testing.assert_array_equal(getattr(loaded.vocabulary, field), getattr(saved.vocabulary, field))
    for name, weight in saved.weights.items():
        assert loaded.weights[name].encoding is weight.encoding
        for part, values in weight.parts.items():
            np.testing.assert_array_equal(loaded.weights[name].parts[part], values)


def test_a_tied_head_is_stored_once(tmp_path):
    sizes = []
    for tied in (True, False):
        cp.save(small_checkpoint(tied=tied), tmp_path / "m.mgpt")
        sizes.append((tmp_path / "m.mgpt").stat().st_size)
    assert sizes[1] - sizes[0] >= 265 * 48 * 4


def test_loading_maps_and_does_not_copy(model_file):
    values = cp.load(model_file).weights["wte.weight"].parts["values"]
    assert not values.flags.owndata
    assert not values.flags.writeable
    assert type(values) is np.ndarray


BAD_FIELDS = [
    ("vocab_size", 0),
    ("vocab_size", 2.0),
    ("n_embd", -1),
    ("n_embd", "48"),
    ("n_layer", True),
    ("n_positions", 1 << 40),
    ("n_head", (3,)),
    ("n_head", (3, 0)),
    ("n_inner", (192, 1.5)),
    ("attn_scale", (0.25, float("nan"))),
    ("layer_norm_epsilon", 0.0),
    ("layer_norm_epsilon", float("inf")),
    ("activation_function", "tanh"),
    ("eos_token_id", 10**6),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: str(v))
def test_config_names_the_bad_field(checkpoint, field, value):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(checkpoint.config, **{field: value})


def test_config_json_round_trip(checkpoint):
    fields = checkpoint.config.to_json()
    assert cp.Config.from_json(fields) == checkpoint.config
    with pytest.raises(ConfigError, match="'rope'"):
        cp.Config.from_json(fields | {"rope": 1})
    del fields["n_embd"]
    with pytest.raises(ConfigError, match="lacks 'n_embd'"):
        cp.Config.from_json(fields)


def test_weights_must_match_the_config(checkpoint):
    weights = dict(checkpoint.weights)
    cases = {
        "is missing": {n: w for n, w in weights.items() if n != "h.1.ln_2.bias"},
        "no place": weights | {"h.2.ln_1.bias": weights["h.1.ln_1.bias"]},
        r"\(48,\)": weights | {"ln_f.bias": encode(np.zeros(47), "f32")},
        "must be f32": weights | {"ln_f.bias": encode(np.zeros(48), "f16")},
    }
    for message, changed in cases.items():
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(checkpoint, weights=changed)


def test_vocabulary_must_match_the_config(checkpoint):
    short = dataclasses.replace(checkpoint.vocabulary, token_ends=checkpoint.vocabulary.token_ends[:-1])
    with pytest.raises(ConfigError, match="264 tokens"):
        dataclasses.replace(checkpoint, vocabulary=short)


def test_encoding_policy():
    assert cp.encoding_for("h.0.attn.c_attn.weight", "int4") == "int4"
    assert cp.encoding_for("wte.weight", "int4") == "int8_split"
    assert cp.encoding_for("wpe.weight", "int8") == "f16"
    assert cp.encoding_for("h.0.ln_1.weight", "int8") == "f32"
    assert cp.encoding_for("h.3.mlp.c_fc.bias", "f16") == "f32"


def damaged(contents, **changes):
    return dataclasses.replace(contents, **changes)


def test_containers_that_hold_no_model(tmp_path, model_file):
    contents = mgpt.read(model_file)
    meta, tensors = contents.meta, dict(contents.tensors)
    wte = tensors["wte.weight"]
    config = meta["config"]
    cases = [
        (FormatError, "config", damaged(contents, meta={k: v for k, v in meta.items() if k != "config"})),
        (FormatError, "complete", damaged(contents, meta=meta | {"history": 3})),
        (FormatError, "complete", damaged(contents, meta=meta | {"vocabulary": []})),
        (FormatError, "token_bytes", damaged(contents, blobs={})),
        (
            FormatError,
            "'int9'",
            damaged(contents, tensors=tensors | {"wte.weight": dataclasses.replace(wte, encoding="int9")}),
        ),
        (ConfigError, "n_layer", damaged(contents, meta=meta | {"config": config | {"n_layer": 1.5}})),
        (ConfigError, "shape", damaged(contents, meta=meta | {"config": config | {"n_embd": 47}})),
        (
            MinigptError,
            "wrong type|n_head",
            damaged(contents, meta=meta | {"config": config | {"n_head": 3}}),
        ),
    ]
    for error, message, broken in cases:
        mgpt.write(tmp_path / "broken.mgpt", broken)
        with pytest.raises(error, match=message):
            cp.load(tmp_path / "broken.mgpt")


def test_layers_that_share_a_matrix_store_it_once(tmp_path):
    checkpoint = small_checkpoint(n_head=(3, 3), n_inner=(100, 100))
    shared = {"h.1.mlp.c_fc.weight": checkpoint.weights["h.0.mlp.c_fc.weight"]}
    cp.save(checkpoint, tmp_path / "apart.mgpt")
    cp.save(dataclasses.replace(checkpoint, weights={**checkpoint.weights, **shared}), tmp_path / "shared.mgpt")
    loaded = cp.load(tmp_path / "shared.mgpt")
    assert loaded.weights["h.1.mlp.c_fc.weight"] is loaded.weights["h.0.mlp.c_fc.weight"]
    assert loaded.tied
    apart, together = ((tmp_path / f"{name}.mgpt").stat().st_size for name in ("apart", "shared"))
    assert apart - together >= 100 * 48 * 4
