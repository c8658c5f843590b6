"""Parts of a token: they add up to the whole, change nothing, and are measured only when wanted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import cli, layout, ops
from minigpt.errors import BackendError, OptionError
from minigpt.model import GPT2
from minigpt.parts import PARTS, time_parts

compiled = pytest.mark.skipif(ops.backend() == "numpy", reason="needs the compiled backend")


@pytest.fixture
def gpt2(checkpoint):
    return GPT2(checkpoint, 2)


def test_every_account_has_a_label():
    assert sorted(account for account, _ in PARTS.values()) == list(range(layout.LAP_LAST))


@compiled
def test_every_byte_of_the_matrices_is_counted_once(gpt2):
    found = time_parts(gpt2, n_prompt=4, n_tokens=3, runs=2)
    assert list(found) == list(PARTS)
    assert all(part.microseconds.runs == 2 for part in found.values())
    tables = ("wte.weight", "wpe.weight")
    matrices = sum(w.nbytes_first for name, w in gpt2.weights.items() if len(w.shape) == 2 and name not in tables)
    assert sum(part.n_bytes for part in found.values()) - found["attention"].n_bytes == matrices


@compiled
def test_parts_add_up_to_the_time_between_two_tokens(checkpoint):
    gpt2 = GPT2(checkpoint, 1)
    cache = gpt2.new_cache()
    gpt2.forward([1, 2, 3], cache)
    with gpt2.laps() as laps:
        gpt2.forward([4], cache)
        laps[:, : layout.LAP_LAST] = 0
        first = laps[0, layout.LAP_LAST]
        gpt2.forward([5], cache)
        assert laps[0, : layout.LAP_LAST].sum() == laps[0, layout.LAP_LAST] - first
        assert (laps[0, : layout.LAP_LAST] >= 0).all()
        assert (laps[0, [layout.LAP_C_ATTN, layout.LAP_C_FC, layout.LAP_LM_HEAD, layout.LAP_BETWEEN]] > 0).all()
    last = laps.copy()
    gpt2.forward([6], cache)
    np.testing.assert_array_equal(laps, last)  # nobody measures any more


@compiled
def test_measuring_changes_no_bit(gpt2):
    def logits():
        cache = gpt2.new_cache()
        return [gpt2.forward(ids, cache, keep=np.arange(len(ids))) for ids in ([*range(20)], [7])]

    expected = logits()
    with gpt2.laps():
        for a, b in zip(logits(), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_numpy_has_no_parts(monkeypatch):
    model = GPT2(small_checkpoint())
    model._program = None
    with pytest.raises(BackendError, match="does not time its parts"):
        time_parts(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prompt": 0}, r"the prompt's length must be in 1\.\.62, not 0"),
        ({"n_prompt": 63}, "not 63"),
        ({"n_tokens": 0}, r"the number of tokens must be in 1\.\.47, not 0"),
        ({"n_prompt": 60, "n_tokens": 4}, r"in 1\.\.3, not 4"),
        ({"runs": 0}, "runs must be in"),
    ],
)
def test_refusals(gpt2, options, message):
    with pytest.raises(OptionError, match=message):
        time_parts(gpt2, **options)


@compiled
def test_on_the_command_line(model_file, capsys):
    arguments = ["bench", str(model_file), "--parts", "--tokens", "5", "--runs", "1", "--kv-cache", "int8"]
    assert cli.run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [*PARTS, "together"]
    assert cli.run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["waiting"]["microseconds"]["runs"] == 1
