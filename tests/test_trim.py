"""Every trim against an obvious dense computation on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt.checkpoint import Checkpoint
from minigpt.compress import Calibration, trim
from minigpt.compress.calibration import collect
from minigpt.compress.step import STEPS, updated
from minigpt.errors import OptionError
from minigpt.model import GPT2
from minigpt.sampling import log_softmax
from minigpt.tokenizer import Tokenizer

IDS = np.random.default_rng(3).integers(0, 264, 50)
TEXT = Calibration(
    ("the song on the ring, ere the thing is sung " * 40, "other things: <|endoftext|> 1,2,3 " * 30), window=32
)
DEEP = {
    "n_layer": 5,
    "n_head": (3, 2, 1, 2, 3),
    "n_inner": (64, 32, 96, 64, 32),
    "attn_scale": (0.25, 0.2, 0.3, 0.25, 0.1),
}


def logits(checkpoint: Checkpoint, ids=IDS) -> np.ndarray:
    return np.concatenate(list(GPT2(checkpoint).logits(ids)))


def close(a, b, tolerance=2e-3):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def without(checkpoint, names):
    """Return a model whose listed tensors are zero."""
    return updated(checkpoint, {name: np.zeros(checkpoint.weights[name].shape) for name in names})


def muted(checkpoint, layers):
    """Return a model whose listed layers write nothing."""
    parts = [f"{writer}.{part}" for writer in ("attn.c_proj", "mlp.c_proj") for part in ("weight", "bias")]
    return without(checkpoint, [f"h.{i}.{part}" for i in layers for part in parts])


# ---- depth ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep():
    return small_checkpoint(**DEEP)


@pytest.mark.parametrize("kept", [[0, 1, 4], [2], [0, 1, 2, 3, 4]])
def test_a_removed_layer_is_one_that_writes_nothing(deep, kept):
    cut = STEPS["depth"](deep, layers=kept)
    close(logits(cut), logits(muted(deep, set(range(5)) - set(kept))))
    assert cut.config.n_head == tuple(DEEP["n_head"][i] for i in kept)
    assert cut.config.attn_scale == tuple(DEEP["attn_scale"][i] for i in kept)
    assert cut.history[-1]["layers"] == kept
    assert cut.tied


@pytest.mark.parametrize(
    ("n_layer", "kept"), [(6, [0, 1, 2, 9, 10, 11]), (5, [0, 1, 2, 10, 11]), (1, [0]), (12, [*range(12)])]
)
def test_the_talks_rule(n_layer, kept):
    model = small_checkpoint(n_layer=12, n_head=(1,) * 12, n_inner=(8,) * 12, attn_scale=(0.25,) * 12)
    assert STEPS["depth"](model, n_layer=n_layer).history[-1]["layers"] == kept


@pytest.mark.parametrize("method", ["angular", "greedy"])
def test_layers_that_write_nothing_go_first(deep, method):
    cut = STEPS["depth"](muted(deep, [1, 3]), TEXT, n_layer=3, method=method)
    assert cut.history[-1]["layers"] == [0, 2, 4]


def test_a_linear_span_is_replaced_exactly():
    """A span that adds a constant and a multiple of what the MLP before it wrote is a linear map of it."""
    model = muted(small_checkpoint(**DEEP), [1, 2, 3])
    constant = np.random.default_rng(0).normal(0, 1, 48)
    model = updated(model, {f"h.{i}.mlp.c_proj.bias": constant * i for i in (1, 3)})
    plain, folded = (STEPS["depth"](model, TEXT, layers=[0, 2, 4], fold=fold) for fold in (False, True))
    ids = TEXT.held_out(model)[0, :-1]
    close(logits(folded, ids), logits(model, ids), 2e-2)
    assert np.abs(logits(plain, ids) - logits(model, ids)).max() > 0.5


def test_folding_brings_the_stream_closer(deep):
    cut, folded = (STEPS["depth"](deep, TEXT, layers=[0, 1, 4], fold=fold) for fold in (False, True))
    ids = TEXT.held_out(deep)[0, :-1]
    plain, better = (np.square(logits(m, ids) - logits(deep, ids)).mean() for m in (cut, folded))
    assert better < plain


# ---- width ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_energy_drops_channels_that_nothing_is_written_into(tied):
    """Channels that are empty everywhere only change LayerNorm's mean and variance, which the gain can undo."""
    model = small_checkpoint(tied=tied)
    names = [n for n in model.weights if n.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))]
    empty = np.arange(0, 48, 3)
    changes = {n: model.weights[n].decode().copy() for n in names if not (tied and n == "lm_head.weight")}
    for table in changes.values():
        table[:, empty] = 0
    for i in range(2):
        for name in (f"h.{i}.attn.c_proj", f"h.{i}.mlp.c_proj"):
            for part in ("weight", "bias"):
                changes[f"{name}.{part}"] = model.weights[f"{name}.{part}"].decode().copy()
                changes[f"{name}.{part}"][empty] = 0
    model = updated(model, changes)
    cut = STEPS["width"](model, n_embd=32)
    assert cut.config.n_embd == 32
    assert cut.tied is tied
    kept = np.setdiff1d(np.arange(48), empty)
    np.testing.assert_array_equal(cut.weights["wte.weight"].decode(), model.weights["wte.weight"].decode()[:, kept])
    np.testing.assert_array_equal(
        cut.weights["h.1.mlp.c_proj.weight"].decode(), model.weights["h.1.mlp.c_proj.weight"].decode()[kept]
    )
    np.testing.assert_array_equal(cut.weights["h.1.ln_2.bias"].decode(), model.weights["h.1.ln_2.bias"].decode()[kept])


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotation_at_full_width_changes_nothing(tied):
    model = small_checkpoint(tied=tied)
    rotated = STEPS["width"](model, TEXT, n_embd=48, method="pca")
    close(logits(rotated), logits(model))
    assert not rotated.tied
    for i in range(2):  # LayerNorm is left with a constant gain and nothing to subtract
        assert np.ptp(rotated.weights[f"h.{i}.ln_1.weight"].decode()) == 0
        np.testing.assert_allclose(rotated.weights[f"h.{i}.mlp.c_proj.weight"].decode().sum(axis=0), 0, atol=1e-4)


def test_a_stream_of_few_directions_is_cut_exactly():
    """The tables and writers of this model span 20 directions; 21 channels hold them, the ones direction included."""
    model, rng = small_checkpoint(), np.random.default_rng(5)
    basis = np.linalg.qr(rng.normal(size=(48, 20)))[0]
    changes = {}
    for name, weight in model.weights.items():
        if name in ("wte.weight", "wpe.weight"):
            changes[name] = weight.decode() @ basis @ basis.T
        elif "c_proj" in name:
            changes[name] = basis @ (basis.T @ weight.decode())
    model = updated(model, changes)
    cut = STEPS["width"](model, TEXT, n_embd=21, method="pca")
    close(logits(cut), logits(model), 5e-3)
    assert cut.config.n_embd == 21


def test_rotation_beats_selection_and_a_tied_head_costs_little_where_gains_are_even():
    model = small_checkpoint()
    model = updated(model, {"ln_f.weight": np.full(48, 1.3)})
    ids = TEXT.held_out(model)[0, :-1]
    error = {}
    for method in ("energy", "pca", "pca-tied"):
        cut = STEPS["width"](model, TEXT, n_embd=40, method=method)
        error[method] = np.square(logits(cut, ids) - logits(model, ids)).mean()
        assert cut.tied is (method != "pca")
    assert error["pca"] < error["energy"]
    full = STEPS["width"](model, TEXT, n_embd=48, method="pca-tied")
    centred = logits(model, ids) - logits(full, ids)
    close(centred, np.broadcast_to(centred[:1], centred.shape), 5e-3)  # all that is missing is a constant


# ---- heads and neurons ---------------------------------------------------------------------------------------


def units_left(model, cut, i):
    """Return which neurons of a layer are still there, found by their weights."""
    before, after = (m.weights[f"h.{i}.mlp.c_fc.weight"].decode() for m in (model, cut))
    return [int(np.flatnonzero((before == row).all(axis=1))[0]) for row in after]


@pytest.mark.parametrize("score", trim.SCORES)
@pytest.mark.parametrize("scope", trim.SCOPES)
def test_a_removed_neuron_is_one_that_gives_its_mean(score, scope):
    model = small_checkpoint()
    cut = STEPS["neurons"](model, TEXT, remove=0.25, score=score, scope=scope, multiple=4)
    changes = {}
    for i in range(2):
        name = f"h.{i}.mlp.c_proj"
        gone = np.setdiff1d(np.arange(model.config.n_inner[i]), units_left(model, cut, i))
        mean = collect(model, TEXT)[name].mean
        w, b = (model.weights[f"{name}.{part}"].decode().copy() for part in ("weight", "bias"))
        b += w[:, gone] @ mean[gone]
        w[:, gone] = 0
        changes |= {f"{name}.weight": w, f"{name}.bias": b}
    close(logits(cut), logits(updated(model, changes)))
    assert all(n % 4 == 0 for n in cut.config.n_inner)
    assert cut.config.n_inner == (144, 76) or scope == "global"


def test_a_removed_head_is_one_that_is_zero():
    """Without calibration text there are no means: the head just goes."""
    model = small_checkpoint(n_head=(3, 4))
    cut = STEPS["heads"](model, remove=0.4, score="norm")
    assert cut.config.n_head == (2, 2)
    changes = {}
    for i in range(2):
        w = model.weights[f"h.{i}.attn.c_proj.weight"].decode().copy()
        v = model.weights[f"h.{i}.attn.c_attn.weight"].decode()[-w.shape[1] :]
        out = w.T.reshape(-1, 16, 48)
        size = [np.linalg.norm(a) * np.linalg.norm(b) for a, b in zip(v.reshape(-1, 16, 48), out, strict=True)]
        for head in np.argsort(size)[: len(size) - 2]:
            w[:, 16 * head : 16 * (head + 1)] = 0
        changes[f"h.{i}.attn.c_proj.weight"] = w
    close(logits(cut), logits(updated(model, changes)))


@pytest.mark.parametrize("score", ["wanda", "flap"])
def test_heads_that_give_nothing_or_a_constant_go_first(score):
    model = small_checkpoint(n_head=(3, 3))
    w, b = (model.weights[f"h.0.attn.c_attn.{part}"].decode().copy() for part in ("weight", "bias"))
    w[96 + 16 : 96 + 32] = 0  # the values of the second head do not depend on the text
    b[96 + 16 : 96 + 32] = 0 if score == "wanda" else 3
    model = updated(model, {"h.0.attn.c_attn.weight": w, "h.0.attn.c_attn.bias": b})
    cut = STEPS["heads"](model, TEXT, remove=0.2, score=score, scope="global")
    assert cut.config.n_head == (2, 3)
    close(logits(cut), logits(model))


def test_no_layer_loses_everything():
    model = small_checkpoint()
    assert STEPS["heads"](model, TEXT, remove=0.99, scope="global").config.n_head == (1, 1)
    assert STEPS["neurons"](model, TEXT, remove=0.99, multiple=32).config.n_inner == (32, 32)
    assert STEPS["neurons"](model, TEXT, remove=0, multiple=32).config.n_inner == (192, 96)


# ---- vocabulary and context ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_kept_tokens_have_the_same_logits(tied):
    model = small_checkpoint(tied=tied)
    text = Calibration(("the thing then", "on on"))
    cut = STEPS["vocabulary"](model, text)
    before, after = Tokenizer(model.vocabulary), Tokenizer(cut.vocabulary)
    assert cut.config.vocab_size == len(cut.vocabulary) < 265
    assert cut.tied is tied
    tokens = [after.token(i) for i in range(after.n_vocab)]
    assert {b"the", b"th", b" the", b"on", b"in", b"ing", b"<|endoftext|>"} <= set(tokens)
    assert not {b"er", b" s"} & set(tokens)
    assert after.token(cut.config.eos_token_id) == b"<|endoftext|>"
    old_ids = [next(i for i in range(265) if before.token(i) == token) for token in tokens]
    assert old_ids == sorted(old_ids)
    ids = after.encode("the thing then")
    assert [old_ids[i] for i in ids] == before.encode("the thing then")
    close(logits(cut, ids), logits(model, [old_ids[i] for i in ids])[:, old_ids])
    ratio = cut.history[-1]["tokens_per_character"]
    assert ratio["before"] == ratio["after"] < 1


@pytest.mark.parametrize(
    "text", ["", "the serving of error", "naïve 日本 \U0001f600 \x00", " <|endoftext|>\n\n", "sssss the"]
)
def test_any_text_survives_a_cut_to_bytes(checkpoint, text):
    cut = STEPS["vocabulary"](checkpoint, TEXT, size=257)
    tokenizer = Tokenizer(cut.vocabulary)
    assert len(cut.vocabulary.merges) == 0
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("the<|endoftext|>", special=True)
    assert ids == [*b"the", 256]


def test_a_target_size_is_met_and_filled_in_merge_order(checkpoint, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("on on")
    sizes = {size: STEPS["vocabulary"](checkpoint, corpus=str(path), size=size) for size in (258, 260, 265)}
    assert [len(cut.vocabulary) for cut in sizes.values()] == [258, 260, 265]
    tokens = [Tokenizer(sizes[260].vocabulary).token(i) for i in range(256, 260)]
    assert tokens == [b"th", b"the", b"on", b"<|endoftext|>"]
    close(logits(sizes[265]), logits(checkpoint))


@pytest.mark.parametrize("liked", [b"er", b" s"])
def test_of_unused_tokens_those_stay_that_the_model_expects(checkpoint, liked):
    text = Calibration(("on and on, " * 100,), window=32)
    tokens = [Tokenizer(checkpoint.vocabulary).token(i) for i in range(265)]
    head = checkpoint.weights["lm_head.weight"].decode().copy()
    head[tokens.index(liked)] = 0.1 * trim.final_hidden(checkpoint, text.fitting(checkpoint)).mean(axis=0)
    checkpoint = updated(checkpoint, {"lm_head.weight": head})
    expected = trim.expected_tokens(checkpoint, text.fitting(checkpoint))
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    seen = np.concatenate([np.exp(log_softmax(logits(checkpoint, window))) for window in text.fitting(checkpoint)])
    close(expected, seen.mean(axis=0))
    cut = STEPS["vocabulary"](checkpoint, text, size=259)
    kept = {Tokenizer(cut.vocabulary).token(i) for i in range(256, 259)}
    assert kept == {b"on", liked, b"<|endoftext|>"}


def test_rare_tokens_go(checkpoint):
    cut = STEPS["vocabulary"](checkpoint, Calibration(("on", "on er", "on")), minimum=2)
    assert len(cut.vocabulary) == 256 + 1 + 1


def test_a_corpus_file(checkpoint, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("on")
    assert len(STEPS["vocabulary"](checkpoint, corpus=str(path)).vocabulary) == 258
    path.write_text("")
    with pytest.raises(OptionError, match="no text"):
        STEPS["vocabulary"](checkpoint, corpus=str(path))


def test_context(checkpoint):
    cut = STEPS["context"](checkpoint, n_positions=20)
    assert cut.config.n_positions == 20
    np.testing.assert_array_equal(logits(cut, IDS[:20]), logits(checkpoint, IDS[:20]))


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("depth", {}, "either n_layer or the layers"),
        ("depth", {"n_layer": 1, "layers": [0]}, "either n_layer or the layers"),
        ("depth", {"n_layer": 3}, r"1\.\.2, not 3"),
        ("depth", {"layers": [0, 2]}, r"0\.\.1, not 0\+2"),
        ("depth", {"layers": [1, 0]}, "ascending"),
        ("depth", {"n_layer": 1, "method": "angular"}, "give calibration text"),
        ("depth", {"n_layer": 1, "method": "greedy"}, "give calibration text"),
        ("depth", {"n_layer": 1, "fold": True}, "give calibration text"),
        ("width", {"n_embd": 49}, r"2\.\.48, not 49"),
        ("width", {"n_embd": 8, "method": "pca"}, "give calibration text"),
        ("heads", {"remove": 0.5}, "score=norm"),
        ("vocabulary", {}, "give calibration text"),
        ("vocabulary", {"size": 266}, r"256\.\.265, not 266"),
        ("vocabulary", {"size": 256, "corpus": __file__}, "at least 257"),
        ("context", {"n_positions": 65}, r"1\.\.64, not 65"),
    ],
)
def test_bad_parameters(checkpoint, name, parameters, message):
    with pytest.raises(OptionError, match=message):
        STEPS[name](checkpoint, **parameters)


def test_the_input_stays_as_it_is(checkpoint):
    before = {name: weight.decode().copy() for name, weight in checkpoint.weights.items()}
    for name, parameters in {
        "depth": {"n_layer": 1, "fold": True},
        "width": {"n_embd": 24, "method": "pca"},
        "heads": {"remove": 0.5},
        "neurons": {"remove": 0.5},
        "vocabulary": {"size": 260},
        "context": {"n_positions": 8},
    }.items():
        after = STEPS[name](replace(checkpoint, history=({"step": "converted"},)), TEXT, **parameters)
        assert [entry["step"] for entry in after.history] == ["converted", name]
        assert after.history[-1]["parameters"].items() >= parameters.items()
    for name, values in before.items():
        np.testing.assert_array_equal(checkpoint.weights[name].decode(), values)
