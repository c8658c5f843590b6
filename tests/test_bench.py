"""`minigpt bench`: what it prints, for people and for machines."""

from __future__ import annotations

import json

import pytest

from minigpt import cli, measure

KEYS = ("decode_tokens_per_s", "prefill_tokens_per_s", "load_s", "ttft_s", "peak_rss_mb", "bandwidth_share")
SHORT = ["--prompt", "8", "--tokens", "4", "--runs", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(measure, "BEYOND_CACHES", 1 << 20)


def test_json(model_file, capsys):
    assert cli.run(["bench", str(model_file), "--json", *SHORT]) == 0
    report = json.loads(capsys.readouterr().out)
    for key in (*KEYS, "bandwidth_gb_s", "memory_gb_s", "cpu_s"):
        assert 0 < report[f"{key}_min"] <= report[key] <= report[f"{key}_max"]
    assert report["bytes_per_token"] == sum(report["bytes_per_token_by_part"].values()) > 0
    assert (report["prompt"], report["tokens"], report["runs"]) == (8, 4, 1)
    assert report["machine"]["threads"] == 1
    assert set(report["stages"]["backend"]) == {"seconds", "cpu_s", "megabytes"}


def test_table(model_file, capsys):
    assert cli.run(["bench", str(model_file), "--expand", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "prefill, 8 tokens" in out
    for unit in ("tokens/s", " s\n", " MB", " ms", "GB/s"):
        assert unit in out
    assert "{" not in out


@pytest.mark.parametrize("arguments", [["--prompt", "65"], ["--tokens", "1"], ["--threads", "0"], ["--runs", "0"]])
def test_refuses(model_file, capsys, arguments):
    assert cli.run(["bench", str(model_file), *arguments]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_help_explains_the_protocol(capsys):
    assert cli.run(["bench", "--help"]) == 0
    assert "median" in capsys.readouterr().out
