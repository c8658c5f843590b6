"""The report: one quick run on a tiny model, looked at from all sides, and its arithmetic on curves made by hand."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import cli, report
from minigpt.checkpoint import load, save
from minigpt.compress.recipe import from_flag, read_recipe
from minigpt.encodings import encode
from minigpt.errors import MinigptError
from minigpt.evaluate import encode_documents, evaluate, read_documents
from minigpt.model import GPT2
from minigpt.report import curves, figures, page, plots, resistance, stages
from minigpt.tokenizer import Tokenizer

pytest.importorskip("matplotlib")

TEXT = "the thing that sings on the ring\n" * 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    save(small_checkpoint(), folder / "tuned.mgpt")
    save(small_checkpoint(seed=3), folder / "raw.mgpt")
    save(small_checkpoint("int8", seed=5, n_positions=40), folder / "short.mgpt")
    folder.joinpath("text.txt").write_text(TEXT)
    folder.joinpath("more.jsonl").write_text("".join(json.dumps({"text": TEXT[i : i + 300]}) + "\n" for i in range(40)))
    return folder


def arguments(files, *more):
    return [str(a) for a in ("report", files / "tuned.mgpt", "--text", files / "text.txt", "--quick", *more)]


@pytest.fixture(scope="module")
def made(files):
    """Run the whole command once; return its folder."""
    raw = ["--raw", files / "raw.mgpt", "--raw-text", files / "more.jsonl"]
    more = ["--calibration", files / "more.jsonl", "--stage", f"short=one={files / 'short.mgpt'}"]
    options = arguments(files, *raw, *more, "--threads", 1, "--output", files / "out" / "deep")
    assert cli.run(options) == 0
    return files / "out" / "deep"


@pytest.fixture(scope="module")
def found(made):
    return json.loads(made.joinpath("report.json").read_text())


# ---- the whole ---------------------------------------------------------------------------------------------


def test_three_files_and_nothing_else(made):
    assert {path.name for path in made.iterdir()} == {"report.json", "report.md", "report.html"}


def test_keys(found):
    assert set(found) == {
        *("models", "files", "stages", "curves", "resistance", "verdicts", "sensitivity", "left_out"),
        *("protocol", "machine", "seconds"),
    }
    assert [stage["name"] for stage in found["stages"]] == ["original", *stages.RECIPES, "short=one"]
    assert set(found["protocol"]["figures"]) == set(figures.FIGURES)
    assert found["machine"]["threads"] == 1
    for stage in found["stages"]:
        assert list(stage["figures"]) == list(figures.FIGURES)
        for value in stage["figures"].values():
            assert set(value) == {"absent"} or value["low"] <= value["value"] <= value["high"]


def test_figures_are_those_of_the_files(found, files):
    original, *_, short = found["stages"]
    assert original["bytes"] == (files / "tuned.mgpt").stat().st_size
    assert short["bytes"] == (files / "short.mgpt").stat().st_size
    checkpoint = load(files / "tuned.mgpt")
    ids = encode_documents(Tokenizer(checkpoint.vocabulary), [TEXT], checkpoint.config.eos_token_id)
    expected = evaluate(GPT2(checkpoint), ids, checkpoint.vocabulary, context=40)  # what the shortest one has
    assert original["figures"]["perplexity"]["value"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert original["figures"]["perplexity"]["low"] == pytest.approx(expected.perplexity_low, rel=1e-6)
    assert original["figures"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert original["figures"]["top1"]["value"] == 1


def test_a_trimmed_vocabulary_is_compared_by_bytes(found):
    stage = next(stage for stage in found["stages"] if stage["name"] == "gradient-free")
    assert stage["model"]["vocab_size"] < found["stages"][0]["model"]["vocab_size"]
    assert stage["figures"]["kl"] == {"absent": "another vocabulary"}
    perplexity, bits = (stage["figures"][name]["value"] for name in ("perplexity", "bits_per_byte"))
    original = [found["stages"][0]["figures"][name]["value"] for name in ("perplexity", "bits_per_byte")]
    assert math.log(perplexity) / bits == pytest.approx(math.log(original[0]) / original[1])


def test_what_is_absent_has_a_reason(found, made):
    for stage in found["stages"]:
        energy = stage["figures"]["joules_per_token"]
        assert "powercap" in energy.get("absent", "powercap")
    assert "another vocabulary" in (made / "report.md").read_text()


def test_curves_begin_with_the_untouched_model(found):
    for techniques in found["curves"].values():
        assert list(techniques) == list(curves.TECHNIQUES)
        for points in techniques.values():
            assert points[0]["removed"] == 0
            assert points[0]["windows"] == techniques["bits"][0]["windows"]
            removed = [point["removed"] for point in points]
            assert removed == sorted(removed)
            for point in points:
                nll, n = np.sum(point["windows"], axis=0)
                assert point["perplexity"] == pytest.approx(math.exp(nll / n), rel=1e-3)


def test_sensitivity_of_every_layer(found):
    for rows in found["sensitivity"].values():
        assert list(rows) == list(curves.DAMAGES)
        assert all(len(row) == 2 and min(row) > 0 for row in rows.values())


def test_samples_side_by_side(found):
    prompts = [[sample["prompt"] for sample in stage["samples"]] for stage in found["stages"]]
    assert all(p == prompts[0] for p in prompts)
    assert len(prompts[0][0].split()) == figures.PROMPT_WORDS


def test_one_verdict_per_technique(found):
    assert len(found["verdicts"]) == len(curves.TECHNIQUES)
    assert all("resists more" in sentence for sentence in found["verdicts"])


class References(HTMLParser):
    """Collects whatever a page could load, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self.open = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_outside_itself(made):
    text = (made / "report.html").read_text()
    page = References()
    page.feed(text)
    assert not page.open
    assert len(page.found) == len(plots.PLOTS)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.found)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(", text)


def test_the_page_says_what_the_table_says(made, found):
    text, table = (made / "report.html").read_text(), (made / "report.md").read_text()
    for sentence in found["verdicts"]:
        assert sentence in table
    for plot in plots.PLOTS.values():
        assert plot.title in text
    for stage in found["stages"]:
        assert stage["name"] in text
        assert f"`{stage['made']}`" in table


def test_plots_are_the_same_each_time(found):
    assert plots.drawn(found) == plots.drawn(found)


def test_text_of_a_model_is_no_markup(found):
    evil = json.loads(json.dumps(found))
    evil["stages"][1]["samples"][0]["text"] = "<script>|\n"
    assert "<script>" not in page.html(evil, {name: b"" for name in plots.PLOTS})
    assert "<script>\\|<br>" in page.markdown(evil)


# ---- other ways to call it ---------------------------------------------------------------------------------


def test_a_recipe_alone_as_json(files, tmp_path, capsys):
    tmp_path.joinpath("mine.toml").write_text('[[step]]\nname = "quantize"\nencoding = "int8"\n')
    options = arguments(
        files, "--recipe", tmp_path / "mine.toml", "--json", "--output", tmp_path / "o", "--tokens", 100
    )
    assert cli.run(options) == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in result["stages"]] == ["original", "mine"]
    assert result["stages"][1]["made"] == "--quantize encoding=int8"
    assert (result["verdicts"], list(result["curves"])) == ([], ["fine-tuned"])
    assert result == json.loads((tmp_path / "o" / "report.json").read_text())


def test_without_calibration_a_recipe_is_left_out(files, monkeypatch):
    seen = {}
    monkeypatch.setattr(stages, "build", lambda original, recipes, *more: seen.update(recipes) or [])
    monkeypatch.setattr(report, "measured", lambda *more: [])
    result = report.make(files / "tuned.mgpt", files / "text.txt", effort=report.QUICK)
    assert result["left_out"] == ["gradient-free"] == [name for name in stages.RECIPES if name not in seen]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--raw", "x.mgpt"], "--raw and --raw-text belong together"),
        (["--tokens", "1"], "--tokens must be at least 2, not 1"),
        (["--stage", "name"], "a stage must be of the form NAME=FILE.mgpt, not 'name'"),
        (["--stage", "name=none.mgpt"], "none.mgpt"),
        (["--recipe", "none.toml"], "cannot read the recipe none.toml"),
        (["--calibration", "none.txt"], "cannot read the text 'none.txt'"),
        (["--threads", "0"], "n_threads must be"),
        (["--output", __file__], "which is no folder"),
    ],
)
def test_refuses(files, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments(files, "--output", "out", *more)) == 1
    out, err = capsys.readouterr()
    *progress, last = err.splitlines()
    assert out == ""
    assert last.startswith("minigpt: ")
    assert message in last
    assert all(" min  " in line for line in progress)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(arguments(files, "--output", tmp_path / "out")) == 1
    assert "pip install 'minigpt[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MinigptError("a stage failed"), 1)])
def test_an_end_before_the_end_leaves_nothing(files, tmp_path, monkeypatch, error, code):
    def fail(*more):
        assert list(tmp_path.iterdir())  # the stages' folder
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(figures, "cost", fail)
    assert cli.run(arguments(files, "--output", tmp_path / "out")) == code
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(found, tmp_path):
    tmp_path.joinpath("file").write_text("")
    with pytest.raises(MinigptError, match="check the folder"):
        page.write(found, tmp_path / "file" / "under")


# ---- stages and text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stages.RECIPES)
def test_recipes_are_written_as_the_command_line_reads_them(name):
    plan = stages.RECIPES[name].plan(small_checkpoint().config)
    for step, parameters in plan:
        _, text = stages.flag(step, parameters).split(" ", 1)
        assert from_flag(step, text) == (step, parameters)


def test_an_embedded_file_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (stage,) = stages.given(["default=weights/requirements-6x384-pruned40.mgpt"])
    assert stage.path.exists()


def test_two_recipes_of_one_name(tmp_path):
    paths = [tmp_path / folder / "a.toml" for folder in "xy"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('[[step]]\nname = "depth"\nn_layer = 1\n')
    with pytest.raises(MinigptError, match="two stages would be called 'a'"):
        stages.from_files([str(path) for path in paths], False)


def test_excerpts(files):
    tokenizer = Tokenizer(small_checkpoint().vocabulary)
    documents = read_documents(files / "more.jsonl")
    assert figures.excerpt(tokenizer, documents, 10**6) == documents
    short = figures.excerpt(tokenizer, documents, 1000)
    assert sum(len(tokenizer.encode(text)) + 1 for text in short) == pytest.approx(1000, rel=0.2)
    assert (short[0], short[-1]) == (documents[0].rstrip("\n"), documents[-1].rstrip("\n"))
    long = "some words " * 5000
    cut = figures.excerpt(tokenizer, [long], 3000)
    assert all(len(text) <= figures.PASSAGE and text in long for text in cut)


def test_prompts_of_short_and_empty_documents():
    assert figures.prompts(["", "one two"], 3) == ["one two"]
    assert figures.prompts([" "], 1) == []


@pytest.mark.parametrize("n_in", [64, 48])
def test_four_bits_are_those_of_int4(n_in):
    w = np.random.default_rng(0).normal(size=(5, n_in)).astype(np.float32)
    assert np.abs(curves.to_bits(w, 4) - encode(w, "int4").decode()).mean() < 0.01
    errors = [np.abs(curves.to_bits(w, bits) - w).max() for bits in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_techniques_on_a_small_model():
    checkpoint = small_checkpoint()
    for technique in curves.TECHNIQUES.values():
        values = technique.values(checkpoint.config)
        removed = [technique.removed(checkpoint.config, value) for value in values]
        assert removed == sorted(removed)
        assert removed[0] > 0
        assert removed[-1] < 1
        assert technique.apply(checkpoint, values[0]).config.vocab_size == checkpoint.config.vocab_size


# ---- what the documentation promises -----------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs"


def test_the_three_ways_to_compress_are_one(tmp_path):
    text = DOCS.joinpath("compression.md").read_text()
    recipe, code = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("toml", "python"))
    tmp_path.joinpath("small.toml").write_text(recipe)
    plan = read_recipe(tmp_path / "small.toml")
    assert plan == ast.literal_eval(re.search(r"steps = (\[.*?^\])", code, re.DOTALL | re.MULTILINE)[1])
    flags = re.search(r"--vocabulary (\S+) --prune (\S+) --quantize \"(\S+)\"", text).groups()
    assert plan == [from_flag(name, text) for (name, _), text in zip(plan, flags, strict=True)]


@pytest.mark.parametrize("page", ["compression.md", "report/README.md"])
def test_documented_options_exist(page, capsys):
    text = DOCS.joinpath(page).read_text().replace("\\\n", " ")
    for command, usage in re.findall(r"^    minigpt (\w+) +(.*)", text, re.MULTILINE):
        assert cli.run([command, "--help"]) == 0
        known = capsys.readouterr().out
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"minigpt {command} has no {option}"


def test_links_of_the_documentation():
    for document in (DOCS / "compression.md", DOCS / "report" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document} links to {target}"


# ---- resistance --------------------------------------------------------------------------------------------

REMOVED = np.array([0.0, 0.5, 1.0])


def test_resistance_is_read_off_the_curve():
    curve = np.array([[2.0, 2.1, 3.1], [1.0, 2.0, 1.5], [2.0, 1.9, 2.0]])
    np.testing.assert_allclose(resistance.ten_percent(REMOVED, curve, 10), [0.55, 0.05, 1.0])
    np.testing.assert_allclose(resistance.tenth_of_a_nat(REMOVED, curve, 10), [0.5, 0.05, 1.0])


def test_the_area_is_one_for_what_does_not_change_and_counts_guessing_as_nothing():
    vocab_size = round(math.e**3)
    guess = math.log(vocab_size)
    curve = np.array([[1.0, 1.0, 1.0], [1.0, guess, 99.0], [1.0, (1 + guess) / 2, guess]])
    np.testing.assert_allclose(resistance.kept_area(REMOVED, curve, vocab_size), [1, 0.25, 0.5])


def points(*curve):
    return [
        {"removed": float(r), "windows": [[100 * value * shift, 100] for shift in (0.9, 1.0, 1.1)]}
        for r, value in zip(REMOVED, curve, strict=True)
    ]


@pytest.mark.parametrize(
    ("tuned", "raw", "words"),
    [
        ((2.0, 2.0, 3.0), (2.0, 3.0, 4.0), "holds"),
        ((2.0, 3.0, 4.0), (2.0, 2.0, 3.0), "does not hold: it resists less"),
        ((2.0, 2.5, 3.0), (2.0, 2.5, 3.0), "is not decided by this text"),
        ((1.0, 1.12, 3.0), (4.0, 4.3, 6.0), "depends on the measure"),
    ],
)
def test_verdicts(tuned, raw, words):
    curves = {"fine-tuned": {"sparsity": points(*tuned)}, "raw": {"sparsity": points(*raw)}}
    rows = resistance.compared(curves, {"fine-tuned": 1000, "raw": 1000})
    assert [row["measure"] for row in rows] == list(resistance.MEASURES)
    (sentence,) = resistance.verdicts(rows, {"sparsity": "growing sparsity"})
    assert f'With growing sparsity, "a fine-tuned model resists more" {words}.' in sentence


def test_what_is_never_reached_is_said():
    rows = resistance.compared({"fine-tuned": {"sparsity": points(2.0, 2.0, 2.0)}}, {"fine-tuned": 1000})
    assert [row["values"]["fine-tuned"]["beyond"] for row in rows] == [True, True, False]
    assert "finding" not in rows[0]


def test_the_front():
    assert plots.front_of([(3, 1), (1, 9), (2, 9), (2, 4), (4, 2)]) == [(1, 9), (2, 4), (3, 1)]
