"""Measurements: their structure and sanity on a tiny model; never how fast anything is."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import small_checkpoint

from minigpt import measure, ops
from minigpt.checkpoint import save
from minigpt.errors import FormatError, MinigptError, OptionError
from minigpt.model import GPT2


@pytest.fixture(scope="module")
def path(tmp_path_factory, checkpoint):
    path = tmp_path_factory.mktemp("measure") / "small.mgpt"
    save(checkpoint, path)
    return path


def is_sane(spread, runs):
    return spread.runs == runs and 0 <= spread.minimum <= spread.median <= spread.maximum


def test_spread():
    assert measure.spread([3, 1, 2, 10]) == measure.Spread(2.5, 1, 10, 4)


def test_repeat_does_not_count_the_first_run():
    figures = iter([100.0, 1.0, 3.0, 2.0])
    assert measure.repeat(lambda: next(figures), runs=3) == measure.Spread(2.0, 1.0, 3.0, 3)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_bytes", [8, 1 << 20])
def test_bandwidth(n_bytes, n_threads):
    assert 0 < measure.bandwidth(n_bytes, n_threads, seconds=0.005) < 1e5  # GB/s


def test_decode_and_prefill(checkpoint):
    model = GPT2(checkpoint, 1)
    speed, cpu = measure.decode(model, 8)
    assert speed > 0
    assert cpu >= 0
    assert measure.prefill(model, 32) > 0


def test_some_ids_are_in_the_vocabulary_and_differ():
    ids = measure.some_ids(512, 50257)
    assert ids.min() >= 0
    assert ids.max() < 50257
    assert len(set(ids.tolist())) > 500


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_per_token(encoding, tied):
    checkpoint = small_checkpoint(encoding, tied=tied)
    parts = measure.bytes_per_token(checkpoint.weights)
    weights = checkpoint.weights
    assert parts["head"] == weights["lm_head.weight"].nbytes_first
    assert parts["mlp"] == sum(w.nbytes for name, w in weights.items() if ".mlp." in name)
    assert parts["attention"] == sum(w.nbytes for name, w in weights.items() if ".attn." in name)
    norms = sum(w.nbytes for name, w in weights.items() if ".ln_" in name or name.startswith("ln_f"))
    rows = sum(-(-weights[name].nbytes // weights[name].shape[0]) for name in ("wte.weight", "wpe.weight"))
    assert parts["other"] == norms + rows
    assert sum(parts.values()) <= checkpoint.nbytes + rows


@pytest.mark.skipif(ops.backend() == "numpy", reason="NumPy expands nothing")
@pytest.mark.parametrize("sparse", ["bitmap_int8", "block_int8"])
def test_an_expanded_model_reads_dense_matrices(sparse):
    checkpoint = small_checkpoint(sparse)
    read = [sum(measure.bytes_per_token(GPT2(checkpoint, expand=e).weights).values()) for e in (False, True)]
    dense = small_checkpoint(checkpoint.weights["h.0.mlp.c_fc.weight"].encoding.twin)
    assert read[0] == sum(measure.bytes_per_token(checkpoint.weights).values())
    assert read[1] == sum(measure.bytes_per_token(dense.weights).values())


def test_start_watches_every_stage(path):
    start = measure.start(path, n_threads=1, n_tokens=3, runs=2)
    assert list(start.stages) == list(measure.STAGES)
    for stage in start.stages.values():
        assert is_sane(stage.seconds, 2)
        assert is_sane(stage.cpu_s, 2)
        assert is_sane(stage.megabytes, 2)
    assert is_sane(start.ttft_s, 2)
    assert is_sane(start.cpu_s, 2)
    for name in ("token_ms_p50", "token_ms_p95", "token_cpu_ms", "utilisation"):
        assert is_sane(getattr(start, name), 2)
    assert start.token_ms_p50.minimum <= start.token_ms_p95.maximum
    if start.pss_mb is not None:
        assert start.peak_rss_mb.maximum > start.pss_mb.maximum > start.mapped_mb.maximum > 0
    assert start.peak_rss_mb.minimum > start.stages["python"].megabytes.maximum > 0
    assert start.ttft_s.minimum >= start.stages["numpy"].seconds.minimum


def test_start_names_the_stage_that_failed(tmp_path):
    with pytest.raises(MinigptError, match=r"failed at 'file': .*FormatError"):
        measure.start(tmp_path / "none.mgpt", runs=1)


def test_benchmark(path, monkeypatch):
    monkeypatch.setattr(measure, "BEYOND_CACHES", 1 << 20)
    result = measure.benchmark(path, n_threads=1, n_prompt=24, n_tokens=5, runs=2)
    spreads = [value for value in vars(result).values() if isinstance(value, measure.Spread)]
    assert len(spreads) == 7
    assert all(is_sane(spread, 2) for spread in spreads)
    assert result.decode_tokens_per_s.minimum > 0
    assert result.bandwidth_share.minimum > 0
    assert (result.n_prompt, result.n_tokens) == (24, 5)
    assert result.file_bytes == os.path.getsize(path)
    assert result.machine["threads"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prompt": 65}, r"the prompt's length must be in 1\.\.64, not 65"),
        ({"n_prompt": 0}, r"in 1\.\.64, not 0"),
        ({"n_tokens": 1}, r"the number of tokens must be in 2\.\.49, not 1"),
        ({"n_tokens": 50}, r"not 50"),
        ({"runs": 0}, r"runs must be in 1\.\.1000, not 0"),
        ({"n_threads": 0}, r"n_threads"),
    ],
)
def test_benchmark_refuses(path, options, message):
    with pytest.raises(OptionError, match=message):
        measure.benchmark(path, **options)


def test_benchmark_needs_a_model(tmp_path):
    with pytest.raises(FormatError):
        measure.benchmark(tmp_path / "none.mgpt")


def test_peak_rss_is_this_process_alone():
    """A child of a large process must not inherit its peak, as it does in `ru_maxrss`."""
    ballast = bytearray(200_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        peak = measure.peak_rss(child.pid)
        child.communicate(b"\n")
    assert measure.peak_rss(os.getpid()) > 200_000_000 > peak > 0


def test_proportional_memory_tells_a_mapped_file_apart(tmp_path):
    path = tmp_path / "a file.bin"
    np.ones(5_000_000, np.int8).tofile(path)
    mapped = np.memmap(path, np.int8, "r")
    assert mapped.sum() == 5_000_000
    found = measure.proportional(os.getpid(), str(path))
    if found is None:
        pytest.skip("this system has no smaps")
    total, of_file = found
    assert total > of_file >= 5_000_000


def test_energy(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "POWERCAP", str(tmp_path))
    assert measure.spent(measure.energy_counters(), measure.energy_counters()) is None
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "energy_uj").write_text("2000000\n")
        tmp_path.joinpath(name, "max_energy_range_uj").write_text("9000000\n")
    before = measure.energy_counters()
    assert [name.rpartition(":")[2] for name in before] == ["0", "1"]
    tmp_path.joinpath("intel-rapl:0", "energy_uj").write_text("3500000\n")
    tmp_path.joinpath("intel-rapl:1", "energy_uj").write_text("1000000\n")  # has begun anew
    assert measure.spent(before, measure.energy_counters()) == pytest.approx(1.5 + 8.0)


def test_peak_rss_without_proc_and_psutil(monkeypatch):
    monkeypatch.setattr(measure, "_read", lambda path: "")
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MinigptError, match="pip install psutil"):
        measure.peak_rss(os.getpid())


def test_machine_without_proc(monkeypatch):
    monkeypatch.setattr(measure, "_read", lambda path: "")
    found = measure.machine(2)
    assert found["cpu"]
    assert found["features"] == []
    assert found["memory_gb"] is None


def test_machine():
    found = measure.machine(3)
    assert found["threads"] == 3
    assert found["numpy"].count(".") >= 1
    assert found["processors"] >= 1
