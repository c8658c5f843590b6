"""The driver, its calibration text and registry, recipes, flags and the command."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
from conftest import small_checkpoint

import minigpt.compress
from minigpt.checkpoint import load
from minigpt.commands import compress as command
from minigpt.compress import STEPS, Calibration, compress, recipe
from minigpt.compress.calibration import Judge, Statistics, by_layer, collect, final_hidden
from minigpt.compress.step import choice, number, step, switch, updated, wholes
from minigpt.errors import FormatError, MinigptError, OptionError
from minigpt.evaluate import evaluate
from minigpt.model import GPT2
from minigpt.ops import backend
from minigpt.tokenizer import Tokenizer

SONG = "the song on the ring, ere the thing is sung "
TEXT = Calibration((SONG * 60, "other things: 1,2,3 " * 40), n_tokens=512, n_held_out=128, window=32)


# ---- calibration ---------------------------------------------------------------------------------------------


def test_halves_are_whole_windows_that_share_nothing(checkpoint):
    ids = Tokenizer(checkpoint.vocabulary).encode(TEXT.documents[0])
    fitting, held_out = TEXT.fitting(checkpoint), TEXT.held_out(checkpoint)
    assert fitting.shape == (16, 32)
    assert held_out.shape == (4, 33)
    assert fitting[0].tolist() == ids[:32]
    assert held_out[0].tolist() == ids[33:66]


def test_a_short_context_makes_short_windows():
    assert TEXT.fitting(small_checkpoint(n_positions=8)).shape == (64, 8)


@pytest.mark.parametrize("documents", [(), ("",), (SONG,)])
def test_too_little_text(checkpoint, documents):
    with pytest.raises(OptionError, match="too few for two windows of 33"):
        Calibration(documents, window=32).fitting(checkpoint)


@pytest.mark.parametrize("option", ["n_tokens", "n_held_out", "window"])
def test_calibration_options(option):
    with pytest.raises(OptionError, match=f"{option} of the calibration must be at least 1, not 0"):
        Calibration((), **{option: 0})


def test_statistics_are_those_of_the_definition():
    x = np.random.default_rng(0).normal(2, 1, (100, 5)).astype(np.float32)
    statistics = Statistics(5)
    statistics.add(x[:30])
    statistics.add(x[30:])
    assert statistics.n == 100
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, x.var(axis=0), rtol=1e-4)
    np.testing.assert_allclose(statistics.square, np.square(x).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.gram, x.T @ x / 100, rtol=1e-5)
    np.testing.assert_array_equal(statistics.absmax, np.abs(x).max(axis=0))
    with pytest.raises(ValueError, match="without grams"):
        _ = Statistics(5, grams=False).gram


def test_a_map_is_seen_with_the_inputs_it_has(checkpoint):
    """The mean of y = w x + b is w mean(x) + b: holds the c_fc of each block to the LayerNorm before it."""
    statistics = collect(checkpoint, TEXT)
    assert list(statistics) == [
        f"h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert {s.n for s in statistics.values()} == {512}
    assert [statistics[f"h.{i}.mlp.c_proj"].mean.shape for i in range(2)] == [(192,), (100,)]


def test_later_layers_see_what_earlier_ones_became(checkpoint):
    def silence(i, weights, statistics):
        means.append(statistics[f"h.{i}.attn.c_attn"].mean)
        writers = [f"h.{i}.{n}.{part}" for n in ("attn.c_proj", "mlp.c_proj") for part in ("weight", "bias")]
        return {name: np.zeros(weights[name].shape) for name in writers}

    means = []
    silent = by_layer(checkpoint, TEXT, silence)
    expected = collect(silent, TEXT)
    for i in range(2):
        np.testing.assert_allclose(means[i], expected[f"h.{i}.attn.c_attn"].mean, rtol=1e-5)


def test_hidden_states_and_judgement_are_those_of_the_model(checkpoint):
    windows = TEXT.held_out(checkpoint)
    hidden = final_hidden(checkpoint, windows[:, :-1])
    logits = np.concatenate([part for w in windows for part in GPT2(checkpoint).logits(w[:-1])])
    np.testing.assert_allclose(checkpoint.weights["lm_head.weight"].matmul(hidden), logits, rtol=1e-3, atol=1e-3)
    other = small_checkpoint(seed=9)
    judged = Judge(other, windows[:1]).measure(checkpoint)
    expected = evaluate(GPT2(checkpoint), windows[0], checkpoint.vocabulary, context=32, reference=GPT2(other))
    for name, value in judged.items():
        assert value == pytest.approx(getattr(expected, name), rel=1e-3)


# ---- the registry --------------------------------------------------------------------------------------------


@pytest.fixture
def noise():
    """Add a step of every kind of parameter for one test."""

    @step(level=number(0, 2), layers=wholes(0), kind=choice(("even", "odd")), loud=switch())
    def noise(checkpoint, calibration, *, level, layers=None, kind="even", loud=False):
        """Add noise. For tests."""
        w = checkpoint.weights["h.0.mlp.c_fc.weight"].decode()
        return updated(checkpoint, {"h.0.mlp.c_fc.weight": w + level * np.sin(np.arange(w.size)).reshape(w.shape)})

    yield noise
    del STEPS["noise"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "noise needs level"),
        ({"level": 2}, "level of noise must be a number from 0 on, below 2, not 2"),
        ({"level": True}, "not True"),
        ({"level": float("nan")}, "not nan"),
        ({"level": None}, "not None"),
        ({"level": 1, "layers": []}, "layers of noise must be"),
        ({"level": 1, "layers": [0, 1.5]}, "layers of noise must be"),
        ({"level": 1, "kind": "prime"}, "must be one of even, odd, not 'prime'"),
        ({"level": 1, "loud": 1}, "must be yes or no, not 1"),
        ({"level": 1, "colour": "red"}, "noise has no parameter 'colour'; it has level, layers, kind, loud"),
    ],
)
def test_parameters_are_checked_before_anything_happens(checkpoint, noise, parameters, message):
    for call in (lambda: noise(checkpoint, **parameters), lambda: compress(checkpoint, [("noise", parameters)])):
        with pytest.raises(OptionError, match=message):
            call()


def test_flags(noise):
    assert recipe.from_flag("noise", "1") == ("noise", {"level": 1.0})
    assert recipe.from_flag("noise", "1.5,layers=0+2,kind=odd,loud=yes")[1] == {
        "level": 1.5,
        "layers": [0, 2],
        "kind": "odd",
        "loud": True,
    }
    assert recipe.from_flag("noise", "layers=1,level=0")[1] == {"layers": [1], "level": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "level of noise must be a number"),
        ("much", "not 'much'"),
        ("1,2", "'2' must be name=value, once each, of level, layers, kind, loud"),
        ("1,level=1", "once each"),
        ("1,colour=red", "'colour=red' must be name=value"),
        ("1,layers=0:1", "as 1\\+2, not '0:1'"),
        ("1,loud=maybe", "yes or no"),
        ("kind=odd", "noise needs level"),
    ],
)
def test_bad_flags(noise, text, message):
    with pytest.raises(OptionError, match=message):
        recipe.from_flag("noise", text)


def test_recipe(tmp_path, noise):
    path = tmp_path / "r.toml"
    path.write_text('[[step]]\nname = "noise"\nlevel = 1\n\n[[step]]\nname = "depth"\nlayers = [0, 1]\n')
    assert recipe.read_recipe(path) == [("noise", {"level": 1}), ("depth", {"layers": [0, 1]})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[step]", "is not TOML"),
        ("\xff", "is not TOML"),
        ("", r"must consist of \[\[step\]\] tables"),
        ("step = 3", "must consist of"),
        ("[[step]]\nsize = 3", "each with a name"),
        ('seed = 1\n[[step]]\nname = "depth"', "must consist of"),
        ('[[step]]\nname = "shrink"', "there is no step 'shrink'; there are .*depth"),
        ('[[step]]\nname = "depth"\nn_layer = "six"', "n_layer of depth must be a whole number from 1 on, not 'six'"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    path = tmp_path / "r.toml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(OptionError, match=message):
        recipe.read_recipe(path)
    with pytest.raises(OptionError, match="No such file"):
        recipe.read_recipe(tmp_path / "none.toml")


# ---- the driver ----------------------------------------------------------------------------------------------


def test_the_history_tells_what_was_done_and_what_it_cost(checkpoint):
    told = []
    result = compress(
        checkpoint, [("vocabulary", {"size": 260}), ("heads", {"remove": 0.4})], TEXT, progress=told.append
    )
    cut, heads = result.history
    assert (cut["step"], heads["step"]) == ("vocabulary", "heads")
    assert cut["parameters"] == {"size": 260, "minimum": 1, "corpus": None}
    assert cut["before"]["kl"] == cut["after"]["kl"] == pytest.approx(0, abs=1e-6)
    assert cut["after"]["bits_per_byte"] > 0
    row = checkpoint.weights["wte.weight"].nbytes // checkpoint.config.vocab_size
    assert cut["after"]["bytes"] == cut["before"]["bytes"] - 5 * row
    assert heads["before"] == cut["after"]
    assert heads["after"]["kl"] > 0
    assert 0 <= heads["after"]["top1"] < 1
    assert heads["after"]["bytes"] == result.nbytes
    assert any("step 2 of 2, heads: layer 1 of 2" in message for message in told)
    json.dumps(result.history)


def test_without_calibration_only_bytes_are_measured(checkpoint):
    (entry,) = compress(checkpoint, [("context", {"n_positions": 9})]).history
    assert entry["after"] == {"bytes": checkpoint.nbytes - 55 * 48 * 4}
    with pytest.raises(OptionError, match="healing looks at activations; give calibration text"):
        compress(checkpoint, [("context", {"n_positions": 9})], heal=True)


def test_the_same_twice_is_the_same(checkpoint):
    steps = [("neurons", {"remove": 0.5}), ("width", {"n_embd": 30, "method": "pca"})]
    one, two = (compress(checkpoint, steps, TEXT, heal=True) for _ in range(2))
    assert one.history == two.history
    for name, weight in one.weights.items():
        np.testing.assert_array_equal(weight.decode(), two.weights[name].decode())


def test_the_package_is_the_function(checkpoint):
    assert minigpt.compress(checkpoint, []) is checkpoint


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SONG * 80)
    return path


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


def test_flags_and_recipes_run_in_the_order_given(tmp_path, model_file, text_file, capsys):
    recipe_file, out = tmp_path / "r.toml", tmp_path / "out.mgpt"
    recipe_file.write_text('[[step]]\nname = "heads"\nremove = 0.3\n')
    run(
        model_file,
        out,
        "--calibration",
        text_file,
        "--heal",
        "--context",
        32,
        "--recipe",
        recipe_file,
        "--depth",
        "layers=1",
    )
    model = load(out)
    assert [entry["step"] for entry in model.history] == ["context", "heads", "depth"]
    assert (model.config.n_layer, model.config.n_positions) == (1, 32)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["bytes", "perplexity", "bits", "per", "byte", "kl", "top1"]
    assert table[1].startswith("before")
    assert any(line.startswith("heads remove=0.3,score=flap") for line in table)
    assert any(line.startswith("  healed: ") for line in table)


def test_json(tmp_path, model_file, capsys):
    run(model_file, tmp_path / "out.mgpt", "--context", 32, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"][0]["after"]["bytes"] == load(tmp_path / "out.mgpt").nbytes


def test_sparse_forms_are_accounted_for(tmp_path, model_file, capsys):
    prune = ("--prune", "0.6,criterion=magnitude,encoding=bitmap_int8,only=h.1.mlp.c_fc*")
    run(model_file, tmp_path / "out.mgpt", *prune)
    *_, last = capsys.readouterr().out.splitlines()
    assert re.match(r"1 x bitmap_int8 100 x 48: \d+% of the bytes of int8", last)
    assert re.search(r"\dx its speed here", last) or backend() == "numpy"
    run(model_file, tmp_path / "out.mgpt", *prune, "--json")
    (form,) = json.loads(capsys.readouterr().out)["sparse"]
    assert form["share"] < 1
    assert form["speed"] is None if backend() == "numpy" else form["speed"] > 0


def test_a_file_may_replace_itself(model_file):
    run(model_file, model_file, "--context", 32)
    assert load(model_file).config.n_positions == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do; give a step"),
        (("--depth", "3"), r"n_layer must be in 1\.\.2, not 3"),
        (("--depth", "1,method=greedy"), "give calibration text"),
        (("--depth", "1", "--calibration", "nowhere.txt"), "nowhere.txt"),
        (("--heads", "1"), "below 1, not 1"),
        (("--recipe", "nowhere.toml"), "nowhere.toml"),
        (("--depth", "1", "--calibration", "{empty}"), "too few for two windows"),
        (("--heads", "0.5", "--calibration", "{short}"), "the calibration text has 3 tokens, too few"),
        (("--depth", "1", "--calibration", "{text}", "--tokens", "0"), "n_tokens of the calibration"),
        (
            ("--prune", "1.5", "--calibration", "{text}"),
            "sparsity of prune must be a number .* below 1, not 1.5",
        ),
        (("--prune=-0.1", "--calibration", "{text}"), "below 1, not -0.1"),
        (("--recipe", "{recipe}"), "there is no step 'shrink'"),
    ],
)
def test_an_error_leaves_no_file(tmp_path, model_file, text_file, arguments, message):
    places = {"{text}": str(text_file)}
    for name, content in {"empty": "", "short": "the ", "recipe": '[[step]]\nname = "shrink"\n'}.items():
        (tmp_path / name).write_text(content)
        places[f"{{{name}}}"] = str(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MinigptError, match=message) as caught:
        run(model_file, tmp_path / "out.mgpt", *(places.get(a, a) for a in arguments))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_interrupted_or_out_of_space_leaves_no_file(tmp_path, model_file, monkeypatch):
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FormatError, match="No space left"):
            run(model_file, tmp_path / "out.mgpt", "--context", 9)
    monkeypatch.setattr(command, "compress", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model_file, tmp_path / "out.mgpt", "--context", 9)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(OptionError, match="there is no folder"):
        run(model_file, tmp_path / "nowhere" / "out.mgpt", "--context", 9)


def test_progress_is_for_terminals(monkeypatch, capsys):
    with command.progress_line() as progress:
        assert progress is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with command.progress_line() as progress:
        progress("working")
    assert "working" in capsys.readouterr().err
