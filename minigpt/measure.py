"""What a model costs on this machine: tokens a second, start-up, memory, and how far memory bandwidth is used.

The protocol. Every figure is the median of several runs, given with the lowest and the highest, after a run that
does not count. Decoding: a short prompt, then greedy tokens one by one, timed from the first to the last. Prefill:
a long prompt up to the logits of its last token. Start-up, memory, energy, and the time of single tokens: a fresh
process, whose files are in the page cache already. Bandwidth is measured in the same rounds as decoding, because a
shared machine changes its speed. Nothing here prints, and nothing compares with other engines (`benchmarks/compare.py`
does).
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt import ops
from minigpt.checkpoint import POSITIONS, load
from minigpt.encodings import Weight
from minigpt.errors import MinigptError, OptionError
from minigpt.model import GPT2
from minigpt.program import product
from minigpt.team import default_threads

RUNS = 5
DECODE_PROMPT, DECODE_TOKENS, PREFILL_TOKENS = 16, 128, 512
BEYOND_CACHES = 1 << 28  # bytes: what no cache of a small machine holds
READING_SECONDS = 0.1  # of one bandwidth reading
TEXT = "The system shall remind every borrower of a loan by e-mail three days before its end."  # 17 tokens


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: the median, and how far they lie apart."""

    median: float
    minimum: float
    maximum: float
    runs: int


def spread(values: Iterable[float]) -> Spread:
    """Summarize measurements."""
    figures = list(values)
    return Spread(statistics.median(figures), min(figures), max(figures), len(figures))


def repeat(job: Callable[[], float], runs: int = RUNS) -> Spread:
    """Run a job that returns its figure once for warming up and `runs` times more."""
    job()
    return spread(job() for _ in range(runs))


# ---- the whole ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """Everything about one file.

    Attributes
    ----------
    decode_tokens_per_s, prefill_tokens_per_s : Spread
    load_s : Spread
        From the path to a model ready to run, in a process that has its kernels.
    start : Start
        Of a fresh process.
    bytes_per_token : dict of str to int
        See `bytes_per_token`.
    bandwidth_gb_s : Spread
        Of reading as many bytes as a token needs, again and again: caches count if they hold them.
    memory_gb_s : Spread
        Of reading more than caches hold.
    bandwidth_share : Spread
        Bytes of a token times tokens a second over `bandwidth_gb_s`, by rounds.
    cpu_ms_per_token : Spread
        Processor time of all threads while decoding.
    n_prompt, n_tokens : int
        Length of the prefill's prompt, number of decoded tokens.
    file_bytes : int
    machine : dict
        See `machine`.
    """

    decode_tokens_per_s: Spread
    prefill_tokens_per_s: Spread
    load_s: Spread
    start: Start
    bytes_per_token: dict[str, int]
    bandwidth_gb_s: Spread
    memory_gb_s: Spread
    bandwidth_share: Spread
    cpu_ms_per_token: Spread
    n_prompt: int
    n_tokens: int
    file_bytes: int
    machine: dict[str, Any]


def benchmark(
    path: str | PathLike[str],
    *,
    n_threads: int | None = None,
    expand: bool = False,
    n_prompt: int | None = None,
    n_tokens: int | None = None,
    runs: int = RUNS,
    kv_cache: str = "f32",
) -> Benchmark:
    """Measure a `.mgpt` file in interleaved rounds of bandwidth, decoding and prefill.

    Parameters
    ----------
    path : path
    n_threads : int, optional
        By default the physical cores that this process may use.
    expand : bool
        Whether sparse matrices become dense in memory, see `GPT2`.
    n_prompt, n_tokens : int, optional
        By default 512 and 128, or what the model's positions allow.
    runs : int
        Rounds.
    kv_cache : str
        See `GPT2`.

    Raises
    ------
    FormatError
        If the file is not a readable model.
    OptionError
        If a number is out of range.
    """
    checkpoint = load(path)
    limit = checkpoint.config.n_positions
    n_prompt = min(PREFILL_TOKENS, limit) if n_prompt is None else n_prompt
    n_tokens = min(DECODE_TOKENS, limit - first_prompt(limit) + 1) if n_tokens is None else n_tokens
    check("runs", runs, 1, 1000)
    check("the prompt's length", n_prompt, 1, limit)
    check("the number of tokens", n_tokens, 2, limit - first_prompt(limit) + 1)
    model = GPT2(checkpoint, n_threads, kv_cache, expand)
    threads = default_threads() if n_threads is None else n_threads
    parts = bytes_per_token(model.weights)
    size = sum(parts.values())

    def one_round() -> tuple[float, ...]:
        near, far = bandwidth(size, threads), bandwidth(BEYOND_CACHES, threads)
        speed, cpu = decode(model, n_tokens)
        return near, far, speed, prefill(model, n_prompt), speed * size / 1e9 / near, 1e3 * cpu

    one_round()
    near, far, speed, prefill_speed, share, cpu = map(spread, zip(*[one_round() for _ in range(runs)], strict=True))
    return Benchmark(
        decode_tokens_per_s=speed,
        prefill_tokens_per_s=prefill_speed,
        load_s=repeat(lambda: load_time(path, n_threads, expand), runs),
        start=start(path, n_threads=n_threads, expand=expand, n_tokens=n_tokens, runs=runs, kv_cache=kv_cache),
        bytes_per_token=parts,
        bandwidth_gb_s=near,
        memory_gb_s=far,
        bandwidth_share=share,
        cpu_ms_per_token=cpu,
        n_prompt=n_prompt,
        n_tokens=n_tokens,
        file_bytes=os.path.getsize(path),
        machine=machine(threads),
    )


# ---- speed -------------------------------------------------------------------------------------------------


def decode(model: GPT2, n_tokens: int = DECODE_TOKENS) -> tuple[float, float]:
    """Return tokens a second of greedy decoding after a short prompt, and processor seconds per token."""
    cache = model.new_cache()
    tokens = model.follow(some_ids(first_prompt(model.config.n_positions), model.config.vocab_size), cache, n_tokens)
    next(tokens)
    began, cpu = time.perf_counter(), time.process_time()
    for _ in tokens:
        pass
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu
    return (n_tokens - 1) / spent, cpu / (n_tokens - 1)


def prefill(model: GPT2, n_tokens: int = PREFILL_TOKENS) -> float:
    """Return tokens a second of reading a prompt, up to the choice of the first new token."""
    ids, cache = some_ids(n_tokens, model.config.vocab_size), model.new_cache()
    began = time.perf_counter()
    model.likeliest(ids, cache)
    return n_tokens / (time.perf_counter() - began)


def load_time(path: str | PathLike[str], n_threads: int | None = None, expand: bool = False) -> float:
    """Return the seconds from a path to a model that is ready to run."""
    began = time.perf_counter()
    GPT2(load(path), n_threads, expand=expand)
    return time.perf_counter() - began


def relative_speed(weight: Weight, other: Weight, rounds: int = 50) -> float:
    """Return how many times as fast as another matrix one is multiplied by a vector: one thread, from caches.

    Both take turns; the median of the rounds' ratios.
    """
    both = [product(weight), product(other)]

    def seconds(multiply: Callable[[], None]) -> float:
        began = time.perf_counter()
        for _ in range(4):
            multiply()
        return time.perf_counter() - began

    times = [[seconds(multiply) for multiply in both] for _ in range(rounds + 1)][1:]
    return statistics.median(theirs / ours for ours, theirs in times)


def some_ids(n: int, vocab_size: int) -> NDArray[np.int64]:
    """Return n ids spread over the vocabulary, always the same (Knuth's multiplicative hash)."""
    return np.arange(1, n + 1, dtype=np.int64) * 2654435761 % vocab_size


def bytes_per_token(weights: Mapping[str, Weight]) -> dict[str, int]:
    """Return the bytes of weights that decoding one token reads, by part of the network.

    The head counts with what finding the likeliest token reads, other tables with the one row that is looked up. Keys
    and values come on top: 8 * n_layer * n_head * head_dim bytes for every token so far, a quarter of that in an int8
    cache.
    """
    parts = {"attention": 0, "mlp": 0, "head": 0, "other": 0}
    for name, weight in weights.items():
        part = next((p for p in ("attn", "mlp", "lm_head") if f"{p}." in name), "other")
        one_row = name in ("wte.weight", POSITIONS)
        n_bytes = weight.nbytes_first if name == "lm_head.weight" else weight.nbytes
        parts[_PARTS[part]] += math.ceil(n_bytes / weight.shape[0]) if one_row else n_bytes
    return parts


_PARTS = {"attn": "attention", "mlp": "mlp", "lm_head": "head", "other": "other"}


def bandwidth(n_bytes: int, n_threads: int, seconds: float = READING_SECONDS) -> float:
    """Return the GB/s at which threads read memory, each its share of n_bytes over and over.

    NumPy's bitwise-or of 64-bit integers needs no more than a load and a cheap operation for each vector, runs without
    the GIL, and reaches what a C loop with eight accumulators does.
    """
    buffers = [np.ones(max(1, n_bytes // n_threads // 8), np.int64) for _ in range(n_threads)]
    rates = [0.0] * n_threads
    together = threading.Barrier(n_threads)

    def read(thread: int) -> None:
        together.wait()
        began, n_passes, spent = time.perf_counter(), 0, 0.0
        while spent < seconds:
            np.bitwise_or.reduce(buffers[thread])
            n_passes, spent = n_passes + 1, time.perf_counter() - began
        rates[thread] = n_passes * buffers[thread].nbytes / spent / 1e9

    threads = [threading.Thread(target=read, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


# ---- a fresh process ---------------------------------------------------------------------------------------

STAGES = {  # what a process does up to its first token and on; the first is the interpreter itself
    "python": "",
    "numpy": "import numpy",
    "minigpt": "import minigpt; minigpt.load; from minigpt import model as m, ops, tokenizer",
    "file": "checkpoint = minigpt.checkpoint.load(path)",
    "backend": "ops.backend()",
    "kernels": "model = m.GPT2(checkpoint, n_threads, kv_cache, expand)",
    "tokenizer": "ids = tokenizer.Tokenizer(checkpoint.vocabulary).encode(text)[:16]",
    "first token": "cache = model.new_cache(); token = model.likeliest(ids, cache)",
    "generation": """for _ in range(n_tokens - 1):
    began = time.perf_counter()
    token = model.likeliest([token], cache)
    tokens.append(time.perf_counter() - began)""",
}

_CHILD = """
import sys, time
path, n_threads, kv_cache, expand, text, n_tokens, stages = eval(sys.stdin.readline())
tokens = []
for stage in stages:
    exec(stage)
    print(time.process_time(), *tokens, flush=True)
    sys.stdin.readline()
"""


@dataclass(frozen=True)
class Stage:
    """What one of `STAGES` cost.

    Attributes
    ----------
    seconds, cpu_s : Spread
        By the clock, and of all its threads on processors.
    megabytes : Spread
        By how much it raised the peak of resident memory, 10^6 bytes.
    """

    seconds: Spread
    cpu_s: Spread
    megabytes: Spread


@dataclass(frozen=True)
class Start:
    """A fresh process from its start to its first token and through a generation.

    Attributes
    ----------
    ttft_s : Spread
        From starting the process to the first token, imports and all; the prompt has at most 16 tokens.
    peak_rss_mb : Spread
        Largest resident memory at the end of the generation, pages of the mapped file included; 10^6 bytes.
    cpu_s : Spread
        Processor seconds of the whole process.
    stages : dict of str to Stage
    token_ms_p50, token_ms_p95 : Spread
        Of the generation's tokens after the first, the median and the 95th percentile of each run.
    token_cpu_ms : Spread
        Processor time of all threads for one of them.
    utilisation : Spread
        Processors that were busy on average while they were generated.
    joules_per_token : Spread or None
        What the machine's processors, whoever used them, took meanwhile; None where `energy_counters` has none.
    pss_mb, mapped_mb : Spread or None
        Proportional set size at the end: pages that several processes share count as their share. And the part of it
        that is the mapped model file. None where the system does not tell (it is /proc/PID/smaps of Linux).
    """

    ttft_s: Spread
    peak_rss_mb: Spread
    cpu_s: Spread
    stages: dict[str, Stage]
    token_ms_p50: Spread
    token_ms_p95: Spread
    token_cpu_ms: Spread
    utilisation: Spread
    joules_per_token: Spread | None
    pss_mb: Spread | None
    mapped_mb: Spread | None


def start(
    path: str | PathLike[str],
    *,
    n_threads: int | None = None,
    expand: bool = False,
    n_tokens: int = DECODE_TOKENS,
    runs: int = RUNS,
    kv_cache: str = "f32",
) -> Start:
    """Start fresh processes that open the model and generate, and watch them.

    Raises
    ------
    MinigptError
        If such a process fails, or nothing here tells its memory.
    """
    job = (os.fspath(Path(path).resolve()), n_threads, kv_cache, expand, TEXT, n_tokens, list(STAGES.values()))
    _watch(job)
    watched = [_watch(job) for _ in range(runs)]
    first_token = list(STAGES).index("first token")
    stages = {}
    for i, name in enumerate(STAGES):
        before = [run[i - 1] if i else Mark(0.0, 0, 0.0, [], {}, {}, None) for run in watched]
        now = [run[i] for run in watched]
        stages[name] = Stage(
            seconds=spread(mark.seconds for mark in now),
            cpu_s=spread(b.cpu_s - a.cpu_s for a, b in zip(before, now, strict=True)),
            megabytes=spread((b.peak_rss - a.peak_rss) / 1e6 for a, b in zip(before, now, strict=True)),
        )
    ends = [(run[-2], run[-1]) for run in watched]  # of the first token and of the generation
    joules = [spent(a.energy_after, b.energy) for a, b in ends]
    memory = [b.memory for _, b in ends if b.memory is not None]
    return Start(
        ttft_s=spread(sum(mark.seconds for mark in run[: first_token + 1]) for run in watched),
        peak_rss_mb=spread(run[-1].peak_rss / 1e6 for run in watched),
        cpu_s=spread(run[-1].cpu_s for run in watched),
        stages=stages,
        token_ms_p50=spread(1e3 * float(np.quantile(b.tokens, 0.5)) for _, b in ends),
        token_ms_p95=spread(1e3 * float(np.quantile(b.tokens, 0.95)) for _, b in ends),
        token_cpu_ms=spread(1e3 * (b.cpu_s - a.cpu_s) / len(b.tokens) for a, b in ends),
        utilisation=spread((b.cpu_s - a.cpu_s) / sum(b.tokens) for a, b in ends),
        joules_per_token=spread(j / (n_tokens - 1) for j in joules if j is not None) if None not in joules else None,
        pss_mb=spread(total / 1e6 for total, _ in memory) if memory else None,
        mapped_mb=spread(mapped / 1e6 for _, mapped in memory) if memory else None,
    )


class Mark(NamedTuple):
    """Where a fresh process stood after a stage.

    Attributes
    ----------
    seconds, cpu_s : float
        Since the stage before by the clock; processor time since the start.
    peak_rss : int
        Bytes.
    tokens : list of float
        Seconds of each token of the generation.
    energy, energy_after : dict of str to int
        `energy_counters` when the stage ended and when the next began.
    memory : tuple of int or None
        See `proportional`; after the last stage only.
    """

    seconds: float
    peak_rss: int
    cpu_s: float
    tokens: list[float]
    energy: dict[str, int]
    energy_after: dict[str, int]
    memory: tuple[int, int] | None


def _watch(job: tuple[Any, ...]) -> list[Mark]:
    """Run a child that stops after each stage until its memory has been read."""
    marks = []
    began = time.perf_counter()
    command = [sys.executable, "-c", _CHILD]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        child.stdin.write(f"{job!r}\n")
        child.stdin.flush()
        for line in child.stdout:
            seconds, energy = time.perf_counter() - began, energy_counters()
            cpu, *tokens = map(float, line.split())
            memory = proportional(child.pid, job[0]) if tokens else None
            marks.append(Mark(seconds, peak_rss(child.pid), cpu, tokens, energy, energy_counters(), memory))
            began = time.perf_counter()
            child.stdin.write("\n")
            child.stdin.flush()
        reason = child.stderr.read().strip().splitlines()
    if len(marks) < len(STAGES):
        stage = list(STAGES)[len(marks)]
        raise MinigptError(f"a fresh process failed at {stage!r}: {reason[-1] if reason else child.returncode}")
    return marks


def peak_rss(pid: int) -> int:
    """Return the bytes of the largest resident memory that a running process had.

    From /proc on Linux (`ru_maxrss` would inherit the parent's), elsewhere from psutil.

    Raises
    ------
    MinigptError
        Where there is neither.
    """
    fields = _fields(f"/proc/{pid}/status")
    if "VmHWM" in fields:
        return 1024 * int(fields["VmHWM"].split()[0])
    try:
        import psutil
    except ImportError:
        raise MinigptError(
            f"{platform.system()} tells no process's memory without psutil; pip install psutil"
        ) from None
    memory = psutil.Process(pid).memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def proportional(pid: int, path: str) -> tuple[int, int] | None:
    """Return a running process's proportional set size and the part of it that maps a file, bytes; None if unknown."""
    total, mapped, name = 0, 0, ""
    for line in _read(f"/proc/{pid}/smaps").splitlines():
        field, _, value = line.partition(":")
        if "-" in field.split(" ")[0]:  # the head of a mapping: addresses, rights, offset, device, inode, name
            name = " ".join(line.split(maxsplit=5)[5:])
        elif field == "Pss":
            total += (size := 1024 * int(value.split()[0]))
            mapped += size if name == path else 0
    return (total, mapped) if total else None


POWERCAP = "/sys/class/powercap"


def energy_counters() -> dict[str, int]:
    """Return the microjoules that each processor package has taken, by its folder; empty where nothing tells.

    Linux shows RAPL's counters there, on most systems to root alone; a virtual machine has none.
    """
    packages = sorted(Path(POWERCAP).glob("intel-rapl:*"))
    texts = {str(p): _read(str(p / "energy_uj")) for p in packages if p.name.count(":") == 1}
    return {package: int(text) for package, text in texts.items() if text}


def spent(before: Mapping[str, int], after: Mapping[str, int]) -> float | None:
    """Return the joules between two readings of `energy_counters`, which begin anew at their end; None without any."""
    joules = 0.0
    for package, count in after.items():
        wrapped = int(_read(f"{package}/max_energy_range_uj") or 0) if count < before[package] else 0
        joules += (count - before[package] + wrapped) / 1e6
    return joules if after else None


# ---- where ------------------------------------------------------------------------------------------------------


def machine(n_threads: int) -> dict[str, Any]:
    """Describe what figures depend on: processor, memory, versions, threads."""
    cpu = _fields("/proc/cpuinfo")
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    memory = _fields("/proc/meminfo").get("MemTotal", "").split()
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "features": [f for f in ("avx2", "avx512bw", "avx_vnni", "avx512_vnni", "asimddp", "i8mm") if f in flags],
        "processors": os.cpu_count(),
        "l3_cache": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_gb": round(int(memory[0]) * 1024 / 1e9, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": _version("numba"),
        "minigpt": _version("minigpt"),
        "backend": ops.backend(),
        "threads": n_threads,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "blas_threads": {
            k: os.environ[k] for k in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS") if k in os.environ
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fields(path: str) -> Mapping[str, str]:
    """Return the `name: value` lines of a file of the kernel's, the first of each name; empty without such a file."""
    fields: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def first_prompt(n_positions: int) -> int:
    """Return the length of the prompt before decoding."""
    return min(DECODE_PROMPT, max(1, n_positions // 2))


def check(name: str, value: int, low: int, high: int) -> None:
    """Raise an OptionError unless low <= value <= high."""
    if not low <= value <= high:
        raise OptionError(f"{name} must be in {low}..{high}, not {value}")
