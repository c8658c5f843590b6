"""Options of the suites and the models that they share.

make bench
pytest benchmarks --benchmark-only --sizes=m2 --encodings=int8 --thread-counts=2 -k decode
"""

from __future__ import annotations

import functools

import models
import pytest

from minigpt.team import default_threads


def pytest_addoption(parser):
    counts = sorted({1, default_threads()})
    parser.addoption("--sizes", default="m1,m2", help=f"of {', '.join(models.SIZES)} (default: %(default)s)")
    parser.addoption("--encodings", default="int8,int4,f16,f32", help="default: %(default)s")
    parser.addoption("--thread-counts", default=",".join(map(str, counts)), help="default: %(default)s")


def pytest_generate_tests(metafunc):
    for argument, option in {"size": "sizes", "encoding": "encodings", "n_threads": "thread_counts"}.items():
        if argument in metafunc.fixturenames:
            values = metafunc.config.getoption(option).split(",")
            values = [int(value) if argument == "n_threads" else value for value in values]
            ids = [f"{value}threads" if argument == "n_threads" else value for value in values]
            metafunc.parametrize(argument, values, ids=ids, scope="session")


def pytest_terminal_summary(terminalreporter, config):
    """Print the figures of extra_info, which pytest-benchmark keeps for its JSON."""
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in bench.extra_info.items())
        if figures:
            terminalreporter.write_line(f"{bench.name}: {figures}")


@pytest.fixture(scope="session")
def model_file():
    """Return a function (size, encoding) -> path of a model with random weights."""
    return models.model_file


@pytest.fixture(scope="session")
def checkpoint():
    """Return a function (size, encoding) -> Checkpoint, opened once."""
    from minigpt.checkpoint import load

    return functools.cache(lambda size, encoding: load(models.model_file(size, encoding)))
