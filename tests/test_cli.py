"""The command line as a person or a script meets it: one line for each error, an exit code, text where it belongs."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import small_checkpoint
from golden.folders import assemble

import minigpt
from minigpt import cli
from minigpt.cache import KINDS
from minigpt.checkpoint import save
from minigpt.commands import generate

README = Path(__file__).parent.parent.joinpath("README.md")
TEXT = "the thing that sings\n" * 8
ENDLESS = [*("generate", "the", "--context-shift", "--max-tokens", "1000000000"), *("--ban", "264")]


@pytest.fixture
def minigpt_says(capsys):
    """Run the command line in this process; return exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.run([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def refuses(minigpt_says):
    """Expect one line on stderr, nothing on stdout, and return the line."""

    def run(*arguments, code=1):
        found, out, err = minigpt_says(*arguments)
        assert (found, out) == (code, "")
        assert err.startswith("minigpt")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def stdin_of(data: bytes):
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def process(*arguments, limit="", shell="", **environment):
    """Start the command line as a process of its own, with limits and redirections if wanted."""
    command = shlex.join([sys.executable, "-m", "minigpt", *map(str, arguments)])
    environment = {**os.environ, "MINIGPT_BACKEND": "numpy", **environment}
    return subprocess.Popen(
        ["sh", "-c", f"{limit}exec {command} {shell}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# ---- usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(minigpt_says, command):
    code, out, err = minigpt_says(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: minigpt {command}")
    module = importlib.import_module(f"minigpt.commands.{command}")
    assert module.__doc__.startswith(f"`minigpt {command}`")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND; see minigpt --help"),
        (["frobnicate"], "invalid choice: 'frobnicate' (choose from"),
        (["fro\nb"], "invalid choice"),
        (["generate", "a", "b\nc"], "unrecognized arguments: b c"),
        (["generate", "--temp", "1"], "unrecognized arguments: --temp"),
        (["generate", "--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["generate", "--max-tokens", "1.5"], "argument --max-tokens: invalid int value: '1.5'"),
        (["generate", "--logit-bias", "5"], "'5' is not of the form ID=X"),
        (["eval"], "required: --text"),
        (["verify"], "required: FILE"),
        (["convert", "a", "b", "--encoding", "int3"], "invalid choice: 'int3' (choose from"),
    ],
)
def test_wrong_usage(refuses, arguments, message):
    assert message in refuses(*arguments, code=2)


def test_the_version(minigpt_says):
    code, out, _ = minigpt_says("--version")
    assert code == 0
    assert re.fullmatch(r"minigpt \d+\.\d+\.\d+\n", out)


# ---- generate ----------------------------------------------------------------------------------------------


def test_text_to_stdout_statistics_to_stderr(minigpt_says, model_file):
    options = ["-m", model_file, "--temperature", "0", "--max-tokens", "5"]
    code, out, err = minigpt_says("generate", "the", *options)
    text = minigpt.load(model_file).generate("the", temperature=0, max_tokens=5)
    assert (code, out) == (0, f"the{text}\n")
    assert re.search(r"^\[5 tokens, first after .* s, .* tokens/s, num(ba|py), finished: length\]\n$", err)
    assert minigpt_says("generate", "the", *options, "--expand")[1] == f"the{text}\n"
    assert minigpt_says("generate", "the", *options, "--no-echo", "--quiet") == (0, f"{text}\n", "")


def test_the_prompt_may_come_from_a_pipe(minigpt_says, model_file, monkeypatch):
    options = ["-m", model_file, "--temperature", "0", "--max-tokens", "5", "--quiet"]
    for prompt in ("the é🎉\n", "the\r\nend"):
        monkeypatch.setattr(sys, "stdin", stdin_of(prompt.encode()))
        text = minigpt.load(model_file).generate(prompt.rstrip(), temperature=0, max_tokens=5)
        assert minigpt_says("generate", *options)[1] == f"{prompt.rstrip()}{text}\n"
        monkeypatch.setattr(sys, "stdin", stdin_of(b"not this"))
        assert minigpt_says("generate", prompt, *options)[1].startswith(prompt)


@pytest.mark.parametrize("stdin", [None, stdin_of(b""), stdin_of(b"\n")])
def test_without_a_prompt_there_is_an_example(minigpt_says, model_file, monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, _ = minigpt_says("generate", "-m", model_file, "--context-shift", "--max-tokens", "2")
    assert code == 0
    assert out.startswith(generate.EXAMPLE)


def test_an_empty_prompt_begins_a_text(minigpt_says, model_file):
    options = ["-m", model_file, "--temperature", "0", "--max-tokens", "5", "--quiet"]
    text = minigpt.load(model_file).generate("", temperature=0, max_tokens=5)
    assert minigpt_says("generate", "", *options) == (0, f"{text}\n", "")


def test_the_same_seed_gives_the_same_text(minigpt_says, model_file):
    runs = [minigpt_says("generate", "the", "-m", model_file, "--seed", s, "--quiet") for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_every_option_reaches_the_model(minigpt_says, model_file, monkeypatch):
    given = {}
    monkeypatch.setattr(minigpt.MiniGPT, "complete", lambda self, prompt, **options: given.update(options) or [])
    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "typical_p": 0.75, "no_repeat_ngram": 2}
    values |= {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 2.0, "seed": 7}
    values |= {"max_tokens": 9, "n": 2, "n_beams": 3, "length_penalty": 0.5}
    flags = {"n": "-n", "n_beams": "--beams"}
    arguments = [x for name, value in values.items() for x in (flags.get(name, f"--{name.replace('_', '-')}"), value)]
    arguments += ["--ban", 1, "--ban", 2, "--logit-bias", "3=-1.5", "--stop", "a", "--stop", "b"]
    assert (
        minigpt_says("generate", "x", "-m", model_file, *arguments, "--context-shift", "--json", "--logprobs")[0] == 0
    )
    values |= {"banned": [1, 2], "logit_bias": {3: -1.5}, "stop": ["a", "b"], "context_shift": True, "logprobs": True}
    assert given == values
    assert set(given) == set(generate.OPTIONS)


def test_samples(minigpt_says, model_file):
    options = ["-m", model_file, "-n", 3, "--max-tokens", 5, "--seed", 1]
    code, out, err = minigpt_says("generate", "the", *options)
    expected = minigpt.load(model_file).complete("the", n=3, max_tokens=5, seed=1)
    assert (code, out) == (0, "".join(f"the{c.text}\n" for c in expected))
    assert err == "".join(f"--- {i} ({c.finish_reason})\n" for i, c in enumerate(expected, 1))


def test_beams(minigpt_says, model_file):
    code, out, err = minigpt_says("generate", "the", "-m", model_file, "--beams", 3, "-n", 2, "--max-tokens", 4)
    assert (code, out.count("the"), err.count("score")) == (0, 2, 2)


def test_an_int8_cache_on_the_command_line(minigpt_says, refuses, model_file, text_file):
    code, out, _ = minigpt_says("generate", "the", "-m", model_file, "--kv-cache", "int8", "--max-tokens", "5")
    assert code == 0
    assert out.startswith("the")
    said = [minigpt_says("eval", model_file, "--text", text_file, "--kv-cache", kind, "--json")[1] for kind in KINDS]
    exact, rounded = (json.loads(text)["perplexity"] for text in said)
    assert exact != rounded == pytest.approx(exact, rel=0.01)
    assert "invalid choice: 'int3'" in refuses("generate", "--kv-cache", "int3", code=2)


def test_generate_json(minigpt_says, model_file):
    options = ["-m", model_file, "--max-tokens", 5, "--temperature", 0, "--ban", 264, "--json", "--logprobs"]
    code, out, err = minigpt_says("generate", "thé", *options)
    report = json.loads(out)
    (completion,) = report["completions"]
    assert (code, err, report["prompt"]) == (0, "", "thé")
    assert set(completion) == {"text", "ids", "finish_reason", "logprobs", "score"}
    assert len(completion["ids"]) == len(completion["logprobs"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "max_tokens = 0 is not allowed; give a whole number from 1 up"),
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--top-k", "-1"], "top_k = -1"),
        (["--top-p", "0"], "top_p = 0.0"),
        (["--min-p", "2"], "min_p = 2.0"),
        (["--typical-p", "0"], "typical_p = 0.0"),
        (["--repetition-penalty", "0"], "repetition_penalty = 0.0"),
        (["--presence-penalty", "inf"], "presence_penalty = inf"),
        (["--frequency-penalty", "101"], "frequency_penalty = 101.0"),
        (["--no-repeat-ngram", "-1"], "no_repeat_ngram = -1"),
        (["--seed", "-1"], "seed = -1"),
        (["--logit-bias", "5=nan"], "logit_bias"),
        (["--logit-bias", "265=1"], "token id 265 is outside 0..264"),
        (["--ban", "265"], "token id 265 is outside 0..264"),
        (["--ban", "-1"], "banned = [-1]"),
        (["--stop", ""], "stop = ['']"),
        (["-n", "0"], "n = 0 is not allowed; give a whole number in 1..64"),
        (["-n", "65"], "n = 65"),
        (["--beams", "0"], "n_beams = 0"),
        (["--beams", "2", "-n", "3"], "= 3 is not allowed; give a whole number in 1..2"),
        (["--beams", "2", "--seed", "1"], "a beam search takes no seed"),
        (["--beams", "2", "--ban", "1"], "a beam search takes no banned"),
        (["--length-penalty", "2"], "length_penalty = 2.0 is of a beam search"),
        (["--logprobs"], "add --json"),
        (["--threads", "0"], "n_threads must be an integer in 1..256, not 0"),
        (["--threads", "257"], "not 257"),
    ],
)
def test_values_out_of_range(refuses, model_file, arguments, message):
    assert message in refuses("generate", "the", "-m", model_file, *arguments)


def test_a_prompt_of_every_length(minigpt_says, refuses, model_file):
    for n in (1, 64):
        assert minigpt_says("generate", "x" * n, "-m", model_file, "--max-tokens", 1)[0] == 0
    assert "65 tokens exceed the model's 64 positions" in refuses("generate", "x" * 65, "-m", model_file)
    options = ["-m", model_file, "--context-shift", "--max-tokens", 70, "--ban", 264]
    code, _, err = minigpt_says("generate", "x" * 65, *options)
    assert (code, err[:10]) == (0, "[70 tokens")


@pytest.mark.parametrize("prompt", ["abc\udcff", "\ud83c"])
def test_a_prompt_that_is_not_utf8(refuses, model_file, monkeypatch, prompt):
    assert "not UTF-8 (from " in refuses("generate", prompt, "-m", model_file)
    monkeypatch.setattr(sys, "stdin", stdin_of(prompt.encode("utf-8", "surrogatepass")))
    assert "not UTF-8 (from " in refuses("generate", "-m", model_file)


# ---- files -------------------------------------------------------------------------------------------------


def damaged(path: Path, kind: str) -> Path:
    data = path.read_bytes()
    bad = path.with_name(f"{kind}\n.mgpt")
    match kind:
        case "folder":
            bad.mkdir()
        case "empty":
            bad.write_bytes(b"")
        case "foreign":
            bad.write_bytes(b"GGUF" + bytes(1000))
        case "truncated":
            bad.write_bytes(data[: len(data) // 2])
        case "header":
            bad.write_bytes(data[:100] + b"\xff" + data[101:])
    return bad


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "foreign", "truncated", "header"])
@pytest.mark.parametrize(
    "command", ["generate x -m {}", "inspect {}", "verify {}", "eval {} --text {text}", "warmup {}"]
)
def test_files_that_are_no_model(refuses, model_file, text_file, command, kind):
    bad = damaged(model_file, kind)
    refuses(*(bad if part == "{}" else text_file if part == "{text}" else part for part in command.split()))


def test_a_flipped_bit_is_found(refuses, model_file):
    data = bytearray(model_file.read_bytes())
    data[-10] ^= 1
    model_file.write_bytes(data)
    assert "is damaged" in refuses("verify", model_file)


def test_a_whole_file_is_intact(minigpt_says, model_file):
    code, out, err = minigpt_says("verify", model_file)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(model_file))}: intact \(\d+ parts, [\d,]+ bytes\)\n", out)


def test_weights_that_are_not_numbers(refuses, tmp_path):
    checkpoint = small_checkpoint()
    bias = replace(checkpoint.weights["ln_f.bias"], parts={"values": np.full(48, np.inf, np.float32)})
    save(replace(checkpoint, weights={**checkpoint.weights, "ln_f.bias": bias}), tmp_path / "inf.mgpt")
    assert "ln_f.bias holds NaN or infinity" in refuses("verify", tmp_path / "inf.mgpt")


def test_inspect(minigpt_says, tmp_path):
    checkpoint = replace(small_checkpoint("int8"), history=({"step": "evil\x1b[2J"},))
    save(checkpoint, path := tmp_path / "small.mgpt")
    code, out, err = minigpt_says("inspect", path)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert re.search(r"^n_head +3, 2$", out, re.MULTILINE)
    report = json.loads(minigpt_says("inspect", path, "--json")[1])
    assert set(report) == {"bytes", "parameters", "config", "tied_head", "vocabulary", "tensors", "history"}
    assert report["bytes"] == path.stat().st_size
    names = [tensor["name"] for tensor in report["tensors"]]
    assert names == [name for name in checkpoint.config.shapes() if name != "lm_head.weight"]
    assert sum(tensor["bytes"] for tensor in report["tensors"]) == checkpoint.nbytes


def test_warmup(minigpt_says, model_file):
    code, out, _ = minigpt_says("warmup", model_file)
    assert code == 0
    assert re.match(r"ready after \d|nothing to compile", out)


def test_convert_and_generate(minigpt_says, refuses, tmp_path):
    folder, _ = assemble("base", tmp_path / "source")
    for encoding in ("f32", "int8"):
        code, out, err = minigpt_says("convert", folder, tmp_path / "new.mgpt", "--encoding", encoding)
        assert (code, out) == (0, "")
        assert f"{encoding}, {(tmp_path / 'new.mgpt').stat().st_size:,} bytes, verified" in err
        assert minigpt_says("generate", "a", "-m", tmp_path / "new.mgpt", "--max-tokens", 2)[0] == 0
    assert "config.json" in refuses("convert", tmp_path / "nowhere", tmp_path / "x.mgpt")
    assert "adapter_config.json" in refuses("convert", folder, tmp_path / "x.mgpt", "--lora", tmp_path)
    refuses("convert", folder, tmp_path / "no" / "folder" / "x.mgpt")
    refuses("convert", folder, tmp_path)
    assert not (tmp_path / "x.mgpt").exists()


# ---- eval --------------------------------------------------------------------------------------------------


def test_eval(minigpt_says, model_file, text_file):
    code, out, err = minigpt_says("eval", model_file, "--text", text_file, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert set(report) == {"perplexity", "nll", "bits_per_byte", "tokens", "context", "stride"}
    assert report["perplexity"] == pytest.approx(np.exp(report["nll"]))
    assert (report["context"], report["stride"]) == (64, 64)
    same = json.loads(minigpt_says("eval", model_file, "--text", text_file, "--reference", model_file, "--json")[1])
    assert (same["kl"], same["top1"]) == (pytest.approx(0, abs=1e-6), 1)
    table = minigpt_says("eval", model_file, "--text", text_file, "--context", 32, "--stride", 8)[1]
    assert re.search(r"^context +32\nstride +8\n", table, re.MULTILINE)


def test_documents_are_joined_by_the_end_of_text(minigpt_says, model_file, tmp_path):
    texts = ["the thing\u2028sings\x0b", "", "é\ud800"]  # line ends of other kinds, nothing, half a pair
    lines = [json.dumps({"text": t}, ensure_ascii=t != texts[0]) for t in texts]
    tmp_path.joinpath("texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = json.loads(minigpt_says("eval", model_file, "--text", tmp_path / "texts.jsonl", "--json")[1])
    encode = minigpt.load(model_file).tokenizer.encode
    assert report["tokens"] == sum(len(encode(t)) + 1 for t in texts) - 1


def test_text_without_bytes_has_no_bits_per_byte(minigpt_says, model_file, tmp_path):
    tmp_path.joinpath("empty.jsonl").write_text('{"text": ""}\n' * 3)
    report = json.loads(minigpt_says("eval", model_file, "--text", tmp_path / "empty.jsonl", "--json")[1])
    assert report["tokens"] == 2
    assert "bits_per_byte" not in report


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "check the path"),
        ("latin1.txt", b"caf\xe9", "not UTF-8 (byte 3)"),
        ("empty.txt", b"", "at least two tokens"),
        ("list.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 of"),
        ("number.jsonl", b'{"text": 1}', "line 1 of"),
        ("blank.jsonl", b"\n", "line 1 of"),
        ("deep.jsonl", b"[" * 100_000, "line 1 of"),
    ],
)
def test_texts_that_cannot_be_read(refuses, model_file, tmp_path, name, content, message):
    if content is not None:
        tmp_path.joinpath(name).write_bytes(content)
    assert message in refuses("eval", model_file, "--text", tmp_path / name)
    refuses("eval", model_file, "--text", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "0"], "context must be in 1..64, not 0"),
        (["--context", "65"], "context must be in 1..64, not 65"),
        (["--stride", "0"], "stride must be in 1..64"),
        (["--context", "8", "--stride", "9"], "stride must be in 1..8"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
        (["--threads", "0"], "in 1..256, not 0"),
        (["--reference", ""], "cannot read ''"),
    ],
)
def test_evaluations_out_of_range(refuses, model_file, text_file, arguments, message):
    assert message in refuses("eval", model_file, "--text", text_file, *arguments)


# ---- the process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt, 130, "\n"),
        (MemoryError("no room"), 1, "minigpt: not enough memory (no room); take fewer samples"),
        (minigpt.MinigptError("a\n  b"), 1, "minigpt: a b\n"),
    ],
)
def test_exit_codes(minigpt_says, monkeypatch, error, code, line):
    def fail(options):
        raise error

    monkeypatch.setattr("minigpt.commands.inspect.run", fail)
    found, out, err = minigpt_says("inspect")
    assert (found, out) == (code, "")
    assert err.startswith(line)


def test_ctrl_c_in_mid_stream(model_file):
    running = process(*ENDLESS, "-m", model_file)
    assert running.stdout.read(10).startswith(b"the")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, b"\n")


def test_an_interrupt_that_python_would_lose_ends_the_process():
    script = (
        "import sys; from minigpt import __main__ as m, cli\n"
        "class Lost:\n def __del__(self): raise KeyboardInterrupt\n"
        "cli.run = lambda arguments: Lost() and 0\n"
        "m.main()"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (130, b"")


def test_a_reader_that_leaves(model_file):
    running = process(*ENDLESS, "-m", model_file)
    assert running.stdout.read(10).startswith(b"the")
    running.stdout.close()
    assert running.wait(timeout=60) == 0
    assert running.stderr.read() == b""
    running.stderr.close()


@pytest.mark.parametrize(
    ("shell", "environment", "code", "out", "err"),
    [
        ("<&-", {}, 0, "é🎉", "tokens"),
        (">&-", {}, 0, "", "tokens"),
        ("2>&-", {}, 0, "é🎉", ""),
        ("", {"PYTHONIOENCODING": "ascii"}, 0, r"\xe9\U0001f389", "tokens"),
        (">/dev/full", {}, 1, "", "cannot write the output"),
    ],
)
def test_streams_of_every_kind(model_file, shell, environment, code, out, err):
    if shell == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("no full device")
    running = process("generate", "é🎉", "-m", model_file, "--max-tokens", 2, shell=shell, **environment)
    found = [stream.decode() for stream in running.communicate(timeout=60)]
    assert running.returncode == code
    assert found[0].startswith(out)
    assert bool(found[0]) == bool(out)
    assert err in found[1]
    assert found[1].count("\n") == bool(err)


def test_compress_on_a_disk_that_fills_up(tmp_path, model_file):
    job = process("compress", model_file, tmp_path / "out.mgpt", "--context", "9", limit="ulimit -f 8; ")
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (1, b"")
    assert err.startswith(b"minigpt: cannot write")
    assert err.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == [model_file]


def test_a_name_that_is_not_utf8(minigpt_says, model_file):
    name = model_file.with_name("m\udcff.mgpt")
    try:
        model_file.rename(name)
    except OSError:
        pytest.skip("the file system takes Unicode only")
    for command in ("verify", "inspect"):
        code, out, _ = minigpt_says(command, name)
        assert code == 0
        assert r"m\udcff.mgpt" in out


# ---- what the README promises ------------------------------------------------------------------------------


def test_readme_lists_the_commands():
    rows = re.findall(r"^\| `minigpt (\w+)[^`]*` \|", README.read_text(), re.MULTILINE)
    assert rows == list(cli.COMMANDS)


def test_readme_names_options_that_exist(minigpt_says):
    text = README.read_text()
    for command, usage in re.findall(r"^(?:\| `|    )minigpt (\w+)(.*)", text, re.MULTILINE):
        known = minigpt_says(command, "--help")[1]
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", usage.split("` |")[0]):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"minigpt {command} has no {option}"
    options = re.search(r"`complete` takes(.*?)\.\s", text, re.DOTALL)[1]
    parameters = {"prompt", *generate.OPTIONS}
    assert set(re.findall(r"`(\w+)`", options)) == parameters - {"prompt"}


def test_readme_python_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert "Requirement: " in capsys.readouterr().out
