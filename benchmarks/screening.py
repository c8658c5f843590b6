"""How sure the rough part of a head is on real text, and how many logits must be made exact.

    python benchmarks/screening.py MODEL.mgpt TEXT [--tokens 2048]

For every token of the text: by how much a rough logit is off, as a share of the width that is allowed for it (1 would
be a mistake; a standard deviation is 1/7); how many logits a greedy step and a sampled one at temperature 0.7
compute in full; and whether the likeliest token is the same. `MODEL` must have a screened head.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from minigpt import checkpoint as mgpt
from minigpt import reference
from minigpt.compress.calibration import Calibration, final_hidden
from minigpt.sampling import MARGIN

TOGETHER = 64  # tokens: 13 MB of logits


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
    off, wrong, chosen = [], 0, {margin: [] for margin in (0.0, 0.7 * MARGIN)}
    for begin in range(0, len(hidden), TOGETHER):
        x = hidden[begin : begin + TOGETHER]
        exact = x @ head.decode().T  # [n, vocab_size]
        rough, widths = reference.screen(codes, steps, head.encoding.middle, x)
        off.append(np.abs(exact - rough) / widths)
        for margin, counts in chosen.items():
            some = reference.refine(rough, widths, np.full_like(exact, np.inf), margin)
            counts += np.isinf(some).sum(axis=1).tolist()
        wrong += int((reference.refine(rough, widths, exact, 0.0).argmax(axis=1) != exact.argmax(axis=1)).sum())
    error = np.concatenate(off)
    print(f"{options.model.name}, {len(hidden)} tokens, {head.shape[0]} logits each, head {head.encoding.name}")
    print(
        f"rough logits off by a share of their width: rms {np.sqrt(np.square(error).mean()):.3f}, "
        f"most {error.max():.3f}"
    )
    for (margin, counts), name in zip(chosen.items(), ("greedy", "sampled at 0.7"), strict=True):
        print(f"made exact, {name} (margin {margin:g}): median {np.median(counts):.0f}, mean {np.mean(counts):.0f}")
    print(f"likeliest tokens that differ: {wrong}")


if __name__ == "__main__":
    main()
