"""Decoding beside busy processes, on one thread and on all: more threads must not be slower than one.

    python benchmarks/busy.py FILE.mgpt [--busy 0 1 2] [--rounds 6]

Both teams take turns in every round, the other one first each time, because a shared machine changes its speed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from minigpt import measure
from minigpt.checkpoint import load
from minigpt.model import GPT2
from minigpt.team import default_threads

TOKENS = 128


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="busy processes")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    checkpoint, many = load(options.file), default_threads()
    models = [GPT2(checkpoint, n_threads) for n_threads in (1, many)]
    print(f"| {options.file.stem}, busy processes | 1 thread, tokens/s | {many} threads | ratio, median of rounds |")
    print("|---|---|---|---|")
    for n_busy in options.busy:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
        try:
            for model in models:
                measure.decode(model, TOKENS)
            rounds = []
            for i in range(options.rounds):  # who comes second is a little slower, whoever it is
                order = models[:: -1 if i % 2 else 1]
                rates = {model: measure.decode(model, TOKENS)[0] for model in order}
                rounds.append([rates[model] for model in models])
        finally:
            for process in busy:
                process.kill()
        one, all_threads = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"| {n_busy} | {one:.0f} | {all_threads:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
