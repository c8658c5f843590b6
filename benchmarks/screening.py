"""How sure the rough part of a head is on real text, how many logits must be made exact, and what the rest do.

    python benchmarks/screening.py MODEL.mgpt TEXT [--tokens 2048]

For every token of the text: by how much a rough logit is off, as a share of the width that is allowed for it (1 would
be a mistake; a standard deviation is 1/7); how many logits a greedy step and sampled ones compute in full; which share
of the probability is elsewhere because the others are rough, and which is out of a cutting sampler's reach; and whether
the likeliest token is the same. `MODEL` must have a screened head.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from minigpt import checkpoint as mgpt
from minigpt import reference
from minigpt.compress.calibration import Calibration, final_hidden
from minigpt.sampling import MARGIN, REACH

TOGETHER = 64  # tokens: 13 MB of logits
TEMPERATURES = (0.0, 0.7, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()

    checkpoint = mgpt.load(options.model)
    head = checkpoint.weights["lm_head.weight"]
    hidden = final_hidden(checkpoint, Calibration.read(options.text, n_tokens=options.tokens).fitting(checkpoint))
    codes, steps = head.encoding.rough(head.parts, head.shape[1])
    off, wrong = [], 0
    counts, moved, beyond = ({t: [] for t in TEMPERATURES} for _ in range(3))
    for begin in range(0, len(hidden), TOGETHER):
        x = hidden[begin : begin + TOGETHER]
        exact = x @ head.decode().T  # [n, vocab_size]
        rough, widths = reference.screen(codes, steps, head.encoding.middle, x)
        off.append(np.abs(exact - rough) / widths)
        for t in TEMPERATURES:
            some = reference.refine(rough, widths, np.full_like(exact, np.inf), t * MARGIN)
            counts[t] += np.isinf(some).sum(axis=1).tolist()
            some = np.where(np.isinf(some), exact, some)
            if t:
                p, q = reference.softmax(exact / t), reference.softmax(some / t)
                moved[t] += (np.abs(p - q).sum(axis=1) / 2).tolist()
                far = exact < exact.max(axis=1, keepdims=True) - t * REACH
                beyond[t] += (p * far).sum(axis=1).tolist()
            else:
                wrong += int((some.argmax(axis=1) != exact.argmax(axis=1)).sum())
    error = np.concatenate(off)
    print(f"{options.model.name}, {len(hidden)} tokens, {head.shape[0]} logits each, head {head.encoding.name}")
    print(f"off by a share of their width: rms {np.sqrt(np.square(error).mean()):.3f}, most {error.max():.3f}")
    for t in TEMPERATURES:
        print(
            f"temperature {t:g}: made exact, median {np.median(counts[t]):.0f}, mean {np.mean(counts[t]):.0f}", end=""
        )
        moves = [
            f"; probability {name}, mean {100 * np.mean(v):.3f} %, most {100 * max(v):.2f} %"
            for name, v in (("moved", moved[t]), ("out of reach", beyond[t]))
            if v
        ]
        print(*moves, sep="")
    print(f"likeliest tokens that differ: {wrong}")


if __name__ == "__main__":
    main()
