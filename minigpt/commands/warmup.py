"""`minigpt warmup`: compile what a model needs, once, so that no later start has to."""

from __future__ import annotations

import argparse
import time

from minigpt import ops
from minigpt.commands import common
from minigpt.model import GPT2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser, positional=True)
    common.add_kv_cache(parser)


def run(options: argparse.Namespace) -> None:
    """Run one token and a short prompt: what that compiles is in numba's cache from then on."""
    common.announce_compiling()
    checkpoint = common.open_model(options.model)
    if ops.backend() == "numpy":
        print("nothing to compile: the NumPy backend is in use")
        return
    began = time.perf_counter()
    model = GPT2(checkpoint, kv_cache=options.kv_cache)
    cache = model.new_cache()
    for n_tokens in (1, min(16, model.config.n_positions - 1)):
        model.forward([0] * n_tokens, cache)
    print(f"ready after {time.perf_counter() - began:.1f} s")
