"""How often what the requirements model writes has the wrong form, by temperature and top-p: the model card's table.

    python benchmarks/form.py [FILE]

Form alone, which a program can judge; whether a requirement makes sense takes a reader.
"""

from __future__ import annotations

import argparse
import re

import minigpt

PRODUCTS = """Loan portal: Loan renewal
Hospital bed planner: Bed assignment
Elevator controller: Door closing
Online bookstore: Shopping cart
Farm irrigation app: Soil moisture alert
Payroll system: Overtime calculation
Museum ticket kiosk: Group booking
Parking garage: Licence plate recognition
Blood bank: Donor registration
Railway signalling: Track occupancy"""
FEATURES = ["Product: {}\nFeature: {}\n".format(*line.split(": ")) for line in PRODUCTS.splitlines()]
BARE = ("The system shall", "When the user logs in, the system shall", "If the sensor fails,", "The operator", "Each")
SETTINGS = ((0.5, 1.0), (0.6, 0.9), (0.7, 0.9), (0.7, 0.95), (0.8, 0.9), (0.8, 0.95), (0.9, 0.9), (1.0, 1.0))
LINES = ("Type", "Requirement", "Rationale", "Verification", "Priority")
RECORD = re.compile(
    "".join(rf"{line}: \S[^\n]*\n" for line in LINES[:-1]) + r"Priority: (Essential|Conditional|Optional)"
)
ENDS = (".", "!", "?", ":", ")", "Essential", "Conditional", "Optional")
LOOP = re.compile(r"(\b\w[^.]{1,40})\1\1\1", re.DOTALL)  # the same again, four times in a row
MAX_TOKENS = 256


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a .mgpt file; the embedded model if left out")
    parser.add_argument("--seeds", type=int, default=10, help="texts for each prompt")
    options = parser.parse_args()
    model = minigpt.load(options.file) if options.file else minigpt.load()
    print(
        "| temperature | top-p | records without the right form | bare: no end | bare: loops, or ends amid a sentence |"
    )
    print("|---|---|---|---|---|")
    for temperature, top_p in SETTINGS:
        records, bare = (
            [
                model.complete(prompt, max_tokens=MAX_TOKENS, seed=seed, temperature=temperature, top_p=top_p)[0]
                for prompt in prompts
                for seed in range(options.seeds)
            ]
            for prompts in (FEATURES, BARE)
        )
        malformed = sum(not RECORD.fullmatch(done.text.strip()) for done in records)
        endless = sum(done.finish_reason == "length" for done in bare)
        broken = sum(
            bool(LOOP.search(done.text)) or not done.text.rstrip().endswith(ENDS)
            for done in bare
            if done.finish_reason != "length"
        )
        print(f"| {temperature} | {top_p} | {malformed} of {len(records)} | {endless} of {len(bare)} | {broken} |")


if __name__ == "__main__":
    main()
