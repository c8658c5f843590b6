"""A fresh process to its first token, part by part, and what it keeps in memory."""

from __future__ import annotations

import pytest

from minigpt import measure


@pytest.mark.benchmark(group="first token")
def test_first_token(benchmark, model_file, size, encoding):
    path = model_file(size, encoding)
    starts = []

    def start():
        starts.append(measure.start(path, n_tokens=2, runs=1))

    benchmark.pedantic(start, rounds=1, warmup_rounds=0)  # `start` warms up itself
    (result,) = starts
    assert list(result.stages) == list(measure.STAGES)
    assert 0 < result.ttft_s.median < benchmark.stats.stats.median
    benchmark.extra_info |= {
        "ttft_s": result.ttft_s.median,
        "peak_rss_mb": result.peak_rss_mb.median,
        **{f"{name}_s": stage.seconds.median for name, stage in result.stages.items()},
    }
