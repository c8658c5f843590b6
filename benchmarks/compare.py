#!/usr/bin/env python
"""Other engines beside minigpt on this machine, in interleaved rounds: a Markdown table of speeds and ratios.

Protocol. All engines run the same random weights, each from a file in its own format. A round measures the memory
bandwidth and then every engine once, in a fresh process, beginning with another engine each round. An engine reads a
16-token prompt and generates 128 tokens greedily: decode = 127 / (time of token 128 - time of token 1); prefill =
512 / time to the first token after 512. Ratios are taken within rounds, because a shared machine changes its speed
from minute to minute; figures and ratios are medians over rounds. A run beside which other processes used the
processors is repeated, and counts as noisy if it never was quiet.

    pip install -e '.[bench,convert]' onnxruntime onnx onnx-ir     # and any of: llama-cpp-python gguf, ctranslate2
    python benchmarks/compare.py --rounds 5 --output results.jsonl  # transformers torch, openvino nncf
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import models
from engines import ENGINES, KINDS, OURS

from minigpt import measure

WORKER = Path(__file__).parent / "worker.py"
NOISE = 0.15  # processors' worth of other work beside a measurement that still counts as quiet
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Record = dict[str, object]


def main() -> None:
    options = parse()
    if options.table:
        print_tables([json.loads(line) for line in Path(options.table).read_text().splitlines()])
        return
    records = []
    output = open(options.output, "a") if options.output else None  # noqa: SIM115
    for record in compare(options):
        records.append(record)
        if output:
            print(json.dumps(record), file=output, flush=True)
    print_tables(records)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+", "metavar": "X"}
    parser.add_argument("--sizes", **several, choices=models.SIZES, default=["m1", "m2"], help="default: m1 m2")
    parser.add_argument("--threads", **several, type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--kinds", **several, choices=KINDS, default=KINDS, help=f"default: {' '.join(KINDS)}")
    parser.add_argument("--engines", **several, choices=ENGINES, default=ENGINES, help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--runs", type=int, default=2, metavar="N", help="within a process; default: 2")
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="fresh processes to first token; default: 3")
    parser.add_argument("--prompt", type=int, default=16, metavar="N", help="tokens before decoding; default: 16")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="decoded tokens; default: 128")
    parser.add_argument("--long-prompt", type=int, default=512, metavar="N", help="tokens of the prefill; default: 512")
    parser.add_argument("--patience", type=float, default=10, metavar="S", help="seconds to wait for a quiet machine")
    parser.add_argument("--output", metavar="FILE", help="append every measurement to this .jsonl")
    parser.add_argument("--table", metavar="FILE", help="measure nothing: print the tables of such a file")
    return parser.parse_args()


# ---- measuring ---------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> Iterator[Record]:
    """Yield a record for the machine, each engine's preparation, and each measurement."""
    wanted = [name for name in options.engines if ENGINES[name].kind in options.kinds]
    distributions = importlib.metadata.packages_distributions()
    needed = {name for engine in wanted for module in ENGINES[engine].needs for name in distributions.get(module, [])}
    packages = {name: importlib.metadata.version(name) for name in sorted(needed)}
    date = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    yield {"what": "machine", "date": date, **measure.machine(max(options.threads)), "packages": packages}
    fixed = {name: getattr(options, name) for name in ("prompt", "tokens", "long_prompt", "runs")}
    for size in options.sizes:
        ready = {}
        for name in wanted:
            record = prepare(name, size)
            yield record
            if "skipped" in record:
                note(f"{size}: {name} skipped: {record['skipped']}")
            else:
                ready[name] = record["path"]
        jobs = [{"engine": name, "size": size, "path": path, **fixed} for name, path in ready.items()]
        for threads in options.threads:
            for number in range(options.rounds):
                yield probe(size, threads, number)
                yield from one_round("speed", jobs, threads, number, options.patience)
        for number in range(options.starts):
            yield from one_round("start", jobs, max(options.threads), number, options.patience)


def prepare(name: str, size: str) -> Record:
    job = {"what": "prepare", "engine": name, "size": size}
    missing = [module for module in ENGINES[name].needs if importlib.util.find_spec(module) is None]
    if missing:
        return job | {"skipped": f"{missing[0]} is not installed"}
    try:
        return job | work(job, os.cpu_count() or 1)
    except RuntimeError as error:
        return job | {"skipped": str(error)}


def probe(size: str, threads: int, number: int) -> Record:
    """Measure the bandwidth of reading what caches do not hold."""
    speed = measure.bandwidth(measure.BEYOND_CACHES, threads)
    return {"what": "probe", "size": size, "threads": threads, "round": number, "bandwidth_gb_s": speed}


def one_round(what: str, jobs: Sequence[Record], threads: int, number: int, patience: float) -> Iterator[Record]:
    """Measure every engine once, beginning with another one each round."""
    shift = number % max(1, len(jobs))
    for job in (*jobs[shift:], *jobs[:shift]):
        job = job | {"what": what, "threads": threads, "round": number}
        try:
            record = job | quietly(job, threads, patience)
        except RuntimeError as error:
            record = job | {"failed": str(error)}
        note(f"{job['size']} {threads} threads, {what} {number + 1}: {summary(record)}")
        yield record


def quietly(job: Record, threads: int, patience: float) -> Record:
    """Run a job, and again while other processes disturb it and patience lasts; tell how much they did."""
    end = time.monotonic() + patience
    while True:
        while Meter().after(0.3) > NOISE and time.monotonic() < end:
            pass
        meter, began = Meter(), time.monotonic()
        result = work(job, threads)
        if "at" in result:
            result["ttft_s"] = result.pop("at") - began
        result["others"] = meter.read()
        if result["others"] <= NOISE or time.monotonic() >= end:
            return result


def work(job: Record, threads: int) -> Record:
    """Run the worker and return its line."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(WORKER), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(reason[0][:200])
    return json.loads(lines[-1])


class Meter:
    """How many processors other processes have used since the meter was made (nothing is known without /proc)."""

    def __init__(self) -> None:
        self.then = self.now()

    def now(self) -> tuple[float, float, float]:
        """Return the time, and the processor seconds of everybody (stolen ones too) and of us and our children."""
        try:
            fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        except OSError:
            return time.monotonic(), 0.0, 0.0
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), everybody, sum(os.times()[:4])

    def read(self) -> float:
        """Return the average so far."""
        (t0, all0, own0), (t1, all1, own1) = self.then, self.now()
        return max(0.0, (all1 - all0) - (own1 - own0)) / max(t1 - t0, 1e-9)

    def after(self, seconds: float) -> float:
        """Return it after a while."""
        time.sleep(seconds)
        return self.read()


def summary(record: Record) -> str:
    figures = [f"{name} {statistics.median(record[name]):.1f}" for name in ("decode", "prefill") if name in record]
    figures += [f"{name} {record[name]:.2f}" for name in ("ttft_s", "others") if name in record]
    return f"{record['engine']} {', '.join(figures) or record.get('failed')}"


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---- tables ------------------------------------------------------------------------------------------------


def print_tables(records: Sequence[Record]) -> None:
    machine = next(record for record in reversed(records) if record["what"] == "machine")
    versions = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    print(
        f"{machine['date']}, {machine['cpu']} ({', '.join(machine['features'])}), {machine['processors']} processors,"
    )
    print(f"L3 {machine['l3_cache']}, Python {machine['python']}, NumPy {machine['numpy']}, numba {machine['numba']};")
    print(f"{versions}.")
    cases = {(r["size"], r["threads"]): None for r in records if r["what"] == "speed"}
    best: list[tuple[str, ...]] = []
    for size, threads in cases:
        rows, ratios = case(records, size, threads)
        n_layer, n_embd = models.SIZES[size].n_layer, models.SIZES[size].n_embd
        reading = [r["bandwidth_gb_s"] for r in records if is_of(r, "probe", size, threads)]
        words = f"{threads} thread{'s' * (threads > 1)}"
        print(f"\n### {size} ({n_layer} x {n_embd}), {words}; memory {spread(reading, 1)} GB/s\n")
        print_table(
            (
                "engine",
                "decode tokens/s",
                "CPU ms/token",
                "prefill tokens/s",
                "peak MB",
                "file MB",
                "decode, ours / its",
                "prefill",
            ),
            rows,
        )
        best += ratios
    if best:
        print("\n### Against the best of each kind\n")
        print_table(("model", "threads", "kind", "decode", "best other", "prefill", "best other"), best)
    starts = list(start_rows(records))
    if starts:
        print("\n### From starting a process to its first token\n")
        print_table(("model", "engine", "s", "peak MB"), starts)
    skipped = {(r["engine"], r["skipped"]) for r in records if "skipped" in r}
    failed = {(r["engine"], r["failed"]) for r in records if "failed" in r}
    for engine, reason in sorted(skipped | failed):
        print(f"\nNot measured: {engine} ({reason}).")
    noisy = [r for r in records if r.get("others", 0.0) > NOISE]
    measured = [r for r in records if "others" in r]
    if noisy:
        print(f"\n{len(noisy)} of {len(measured)} measurements had more than {NOISE} processors' worth of other work.")


def case(records: Sequence[Record], size: str, threads: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return a row for each engine, and one for each kind with our ratio to the best other engine."""
    runs: dict[str, dict[int, Record]] = defaultdict(dict)  # engine -> round -> record
    for record in records:
        if is_of(record, "speed", size, threads) and "decode" in record:
            runs[record["engine"]][record["round"]] = record
    files = {r["engine"]: r["file_mb"] for r in records if r["what"] == "prepare" and r["size"] == size and "path" in r}
    rows, best = [], []
    for kind in KINDS:
        engines = [name for name in ENGINES if name in runs and ENGINES[name].kind == kind]
        ours = OURS[kind]
        our_runs = runs.get(ours, {})
        ratios = {name: [ratio(our_runs, runs[name], what) for what in ("decode", "prefill")] for name in engines}
        for name in engines:
            decode, cpu, prefill = (
                [statistics.median(r[what]) for r in runs[name].values()] for what in ("decode", "cpu_ms", "prefill")
            )
            peak = statistics.median(r["peak_mb"] for r in runs[name].values())
            times = ["" if name == ours or value is None else f"{value:.2f}" for value in ratios[name]]
            bold = "**" if name == ours else ""
            cells = (
                spread(decode),
                f"{statistics.median(cpu):.2f}",
                spread(prefill),
                f"{peak:.0f}",
                f"{files.get(name, 0):.0f}",
            )
            rows.append((bold + name + bold, *cells, *times))
        others = [name for name in engines if not name.startswith("minigpt")]
        if our_runs and others:
            cells = []
            for i in range(2):
                rival = min(others, key=lambda name: ratios[name][i] or float("inf"))
                cells += [f"{ratios[rival][i] or 0:.2f}", rival]
            best.append((size, str(threads), kind, *cells))
    return rows, best


def ratio(ours: dict[int, Record], theirs: dict[int, Record], what: str) -> float | None:
    """Return the median over common rounds of our speed over theirs."""
    values = [
        statistics.median(ours[number][what]) / statistics.median(theirs[number][what])
        for number in ours.keys() & theirs.keys()
    ]
    return statistics.median(values) if values else None


def start_rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record["what"] == "start" and "ttft_s" in record:
            runs[record["size"], record["engine"]].append(record)
    for (size, engine), starts in sorted(runs.items(), key=lambda run: (run[0][0], fastest(run[1]))):
        yield size, engine, spread([r["ttft_s"] for r in starts], 2), f"{max(r['peak_mb'] for r in starts):.0f}"


def fastest(starts: Iterable[Record]) -> float:
    return statistics.median(r["ttft_s"] for r in starts)


def is_of(record: Record, what: str, size: str, threads: int) -> bool:
    return record["what"] == what and record["size"] == size and record["threads"] == threads


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median and, behind it, the range."""
    if not values:
        return "-"
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def print_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    for row in (head, ("---",) * len(head), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
