"""Speed and bytes of sparse matrices against their sparsity, dense int8 beside them: a table and a figure.

    python benchmarks/sparsity.py [--threads 2] [--rounds 75] [--output docs/sparsity]

The matrices of a model's blocks are random and pruned by magnitude, single weights or blocks of 32 in a
row, and multiplied with one vector; so many copies of them take turns that no cache holds them. Each round times every
encoding and sparsity once, each right after dense int8; a figure is the median of the rounds' ratios. Results are
compared with those of the same matrices in dense int8.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
from test_kernel_speed import Vector, shape_of

from minigpt import ops
from minigpt.encodings import Weight, encode
from minigpt.program import describe

SPARSITIES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BYTES = 80e6  # of dense int8 that a pass reads: more than caches hold
TITLES = {"bitmap_int8": "bitmap + values", "nm_int8": "4 of 8", "block_int8": "blocks of 32"}
COLOURS = {"bitmap_int8": "#0072B2", "nm_int8": "#009E73", "block_int8": "#D55E00"}  # Okabe and Ito
NAMES = {"m1": "12 x 768", "m2": "6 x 384"}


def prune(w: np.ndarray, share: float, group: int) -> np.ndarray:
    """Zero a share of the groups of neighbours in a row, those with the smallest sums of squares."""
    sizes = np.square(w).reshape(len(w), -1, group).sum(axis=2)
    keep = sizes > np.quantile(sizes, share) if share else sizes > -1
    return (w.reshape(len(w), -1, group) * keep[..., None]).reshape(w.shape)


def prune_4_of_8(w: np.ndarray) -> np.ndarray:
    """Zero the 4 smallest of every 8 neighbours."""
    groups = np.abs(w).reshape(-1, 8)
    mask = np.argsort(np.argsort(groups, axis=1), axis=1) >= 4
    return w * mask.reshape(w.shape)


class Pass:
    """All matrices of a model in one encoding, several times over, times one vector each, on several threads."""

    def __init__(self, matrices: list[np.ndarray], encoding: str, n_threads: int, n_copies: int = 0) -> None:
        weights = [encode(w, encoding) for w in matrices]
        n_copies = n_copies or max(1, round(BYTES / sum(w.size for w in matrices)))
        self.nbytes = sum(w.nbytes for w in weights)
        self.weights = [
            Weight(w.encoding, w.shape, {k: v.copy() for k, v in w.parts.items()})
            for _, w in itertools.product(range(n_copies), weights)
        ]
        descriptors = [describe(w) for w in self.weights]
        rng = np.random.default_rng(1)
        self.y = [np.zeros(len(w), np.float32) for w in matrices]
        x = [rng.standard_normal(w.shape[1], np.float32) for w in matrices]
        self.owners = (
            descriptors,
            [[Vector(v, w, d) for v, w, d in zip(x, weights, descriptors, strict=False)] for _ in range(n_threads)],
        )
        self.kernel = ops.kernel(f"matmul_{encoding}").address
        self.jobs = []
        for thread, vectors in enumerate(self.owners[1]):
            job = []
            for i, descriptor in enumerate(descriptors):
                y, vector = self.y[i % len(x)], vectors[i % len(x)]
                begin, end = (len(y) * (thread + k) // n_threads for k in (0, 1))
                pointers = descriptor.ctypes.data, vector.record.ctypes.data, y.ctypes.data
                job.append((*pointers, len(y), 1, begin, end))
            self.jobs.append(np.array(job, np.int64))

    def seconds(self, pool: ThreadPoolExecutor) -> float:
        """Return how long one pass takes."""
        run, start = runner(), time.perf_counter()
        list(pool.map(lambda job: run(self.kernel, job.ctypes.data, len(job)), self.jobs))
        return time.perf_counter() - start


@functools.cache
def runner():
    """Return a function that calls a kernel with many sets of arguments, int64 [n, 7], without Python in between."""
    from numba import cfunc, types

    from minigpt.kernels.intrinsics import call_matmul, i64

    def run_all(kernel, jobs, n):
        jobs = i64(jobs)
        for i in range(0, 7 * n, 7):
            arguments = jobs[i], jobs[i + 1], jobs[i + 2], jobs[i + 3], jobs[i + 4], jobs[i + 5], jobs[i + 6]
            call_matmul(kernel, arguments)

    return cfunc(types.void(types.int64, types.int64, types.int64))(run_all).ctypes


def measure(size: str, n_threads: int, rounds: int) -> list[dict]:
    """Return rows: size, encoding, sparsity, bytes and speed as shares of dense int8."""
    rng = np.random.default_rng(0)
    dense = [rng.standard_normal(shape_of(matrix, size), np.float32) for matrix in MATRICES]
    pruned = {("nm_int8", 0.5): [prune_4_of_8(w) for w in dense]}
    for sparsity, (name, group) in itertools.product(SPARSITIES, (("bitmap_int8", 1), ("block_int8", 32))):
        pruned[name, sparsity] = [prune(w, sparsity, group) for w in dense]
    plain = Pass(dense, "int8", n_threads)
    passes = {key: Pass(matrices, key[0], n_threads) for key, matrices in pruned.items()}
    ratios = {key: [] for key in passes}
    with ThreadPoolExecutor(n_threads) as pool:
        for _, (key, sparse) in itertools.product(range(rounds), passes.items()):
            ratios[key].append(plain.seconds(pool) / sparse.seconds(pool))
        for key, sparse in passes.items():
            twin = Pass(pruned[key], "int8", n_threads, n_copies=1)
            twin.seconds(pool)
            for ours, theirs in zip(sparse.y, twin.y, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    rows = []
    for (name, sparsity), sparse in passes.items():
        speed, share = float(np.median(ratios[name, sparsity])), sparse.nbytes / plain.nbytes
        rows.append({"size": size, "encoding": name, "sparsity": sparsity, "bytes": share, "speed": speed})
        print(f"{size} {name:12} {sparsity:4.0%}  bytes {share:.2f}  speed {speed:.2f}", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, one line per sparsity."""
    columns = [(size, name) for size in NAMES for name in TITLES]
    found = {(r["size"], r["encoding"], r["sparsity"]): r for r in rows}
    lines = ["| zeros | " + " | ".join(f"{NAMES[size]}, {TITLES[name]}" for size, name in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for sparsity in SPARSITIES:
        cells = [found.get((*column, sparsity)) for column in columns]
        texts = [f"{cell['speed']:.2f}x, {cell['bytes']:.0%}" if cell else "" for cell in cells]
        lines.append(f"| {sparsity:.0%} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Draw speed and bytes against sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, title in zip(panels, ("speed", "bytes"), ("Speed", "Bytes"), strict=True):
        panel.axhline(1, color="black", linewidth=1)
        for (size, style), name in itertools.product({"m1": "-", "m2": "--"}.items(), TITLES):
            points = [(r["sparsity"], r[key]) for r in rows if (r["size"], r["encoding"]) == (size, name)]
            marker = {"bitmap_int8": "o", "nm_int8": "D", "block_int8": "s"}[name]
            fill = COLOURS[name] if size == "m1" else "white"
            label = f"{TITLES[name]}, {NAMES[size]}"
            panel.plot(
                *zip(*points, strict=True), style, marker=marker, color=COLOURS[name], markerfacecolor=fill, label=label
            )
        panel.set(xlabel="share of zeros", ylabel=f"{title.lower()}, dense int8 = 1", title=title, xlim=(-0.02, 0.98))
        panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%gx"))
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=160)


def processor() -> str:
    """Return the processor's name, where the system tells, and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} processors {names[0]}, {platform.machine()}" if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=75)
    parser.add_argument("--sizes", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--output", type=Path, default=Path("docs/sparsity"))
    options = parser.parse_args()
    rows = [row for size in options.sizes for row in measure(size, options.threads, options.rounds)]
    options.output.mkdir(parents=True, exist_ok=True)
    text = (
        "# Sparse matrices against dense int8\n\n"
        "Speed of a matrix times a vector from memory, and bytes, dense int8 = 1. Made by "
        f"`python benchmarks/sparsity.py --threads {options.threads} --rounds {options.rounds}` "
        f"on {date.today():%d %B %Y}, {processor()}.\n\n"
        "- A bitmap is undone row by row into the L1 cache (`vpexpandb`, `vpshufb` by a table) and multiplied "
        "like a dense row. With AVX-512 VBMI2 the bytes that are not read pay for it from 20 to 40 % zeros; without, "
        "dense rows remain faster, and `expand=True` makes them dense when the model is loaded.\n"
        "- 4 of 8 has the bytes of a bitmap at 50 %, and no row needs an offset. With AVX2 a byte shuffle takes four "
        "of eight activations to the codes, so that only half the products are left.\n"
        "- Blocks that are zero are skipped. One loop goes over the blocks of many rows and writes running sums; a "
        "row's product is a difference of two. A loop for each short row would be mispredicted at its end.\n\n"
    )
    (options.output / "README.md").write_text(f"{text}{table(rows)}\n\n![Speed and bytes](sparsity.png)\n")
    draw(rows, options.output / "sparsity.png")


if __name__ == "__main__":
    main()
