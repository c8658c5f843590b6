"""One engine in one process, started by `compare.py`: `worker.py JOB`, a JSON object; one JSON line comes back.

`prepare` makes the engine's model file. `start` loads and generates one token. `speed` measures decoding, then peak
memory, then prefill; each after a run that does not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import engines
import models


def peak_mb() -> float:
    """Return the largest resident memory so far, in 10^6 bytes."""
    if Path("/proc/self/status").exists():  # a child's ru_maxrss would start with its parent's
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def prompt(n_tokens: int, vocab_size: int) -> list[int]:
    return [i * 2654435761 % vocab_size for i in range(1, n_tokens + 1)]


def prepare(job: dict) -> dict:
    path = engines.ENGINES[job["engine"]].prepare(job["size"])
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"path": str(path), "file_mb": sum(file.stat().st_size for file in files) / 1e6}


def load(job: dict) -> engines.Engine:
    return engines.ENGINES[job["engine"]](Path(job["path"]), models.SIZES[job["size"]], job["threads"])


def start(job: dict) -> dict:
    engine, size = load(job), models.SIZES[job["size"]]
    engine.generate(prompt(job["prompt"], size.vocab_size), 1)
    return {"at": time.monotonic(), "peak_mb": peak_mb()}


def speed(job: dict) -> dict:
    engine, size = load(job), models.SIZES[job["size"]]
    short, long = (prompt(job[name], size.vocab_size) for name in ("prompt", "long_prompt"))
    engine.generate(short, 8)
    decode, cpu_ms = [], []
    for _ in range(job["runs"]):
        cpu = time.process_time()
        times, tokens = engine.generate(short, job["tokens"])
        cpu_ms.append(1e3 * (time.process_time() - cpu) / job["tokens"])
        assert len(tokens) == len(times) - 1 == job["tokens"], f"{len(tokens)} tokens at {len(times) - 1} times"
        decode.append((job["tokens"] - 1) / (times[-1] - times[1]))
    result = {
        "decode": decode,
        "cpu_ms": cpu_ms,
        "peak_mb": peak_mb(),
        "first_tokens": [int(token) for token in tokens[:8]],
    }
    prefill = []
    for _ in range(job["runs"] + 1):
        (begin, end), _ = engine.generate(long, 1)
        prefill.append(len(long) / (end - begin))
    return result | {"prefill": prefill[1:]}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    result = {"prepare": prepare, "start": start, "speed": speed}[job["what"]](job)
    print(json.dumps(result), flush=True)
    os._exit(0)  # some engines crash while they tear down their threads
