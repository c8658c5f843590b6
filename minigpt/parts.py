"""Where each microsecond of a token goes: the parts of the compiled network, timed by itself while it decodes.

The protocol. After a prompt, greedy tokens one by one; at the end of each part the calling thread looks at the clock
(25 ns, some 20 times a layer), so that its parts add up to the whole. What it does while others finish theirs is
waiting; what lies between two tokens is Python, the choice of the token included. Bytes are those of the weights as
they are read, and of keys and values in the middle of the run; over the time they are the bandwidth of all threads
together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt import layout
from minigpt.measure import DECODE_TOKENS, RUNS, Spread, check, first_prompt, some_ids, spread
from minigpt.model import GPT2

Floats = NDArray[np.float64]

PARTS: dict[str, tuple[int, tuple[str, ...]]] = {  # label: (account, endings of the names of the weights that it reads)
    "embedding": (layout.LAP_EMBEDDING, ()),
    "layer norms, rounding": (layout.LAP_INPUT, ()),
    "c_attn": (layout.LAP_C_ATTN, ("attn.c_attn.weight",)),
    "attention": (layout.LAP_ATTENTION, ()),
    "attn.c_proj": (layout.LAP_ATTN_C_PROJ, ("attn.c_proj.weight",)),
    "c_fc, activation": (layout.LAP_C_FC, ("mlp.c_fc.weight",)),
    "mlp.c_proj": (layout.LAP_MLP_C_PROJ, ("mlp.c_proj.weight",)),
    "logits": (layout.LAP_LM_HEAD, ("lm_head.weight",)),
    "waiting": (layout.LAP_WAITING, ()),
    "between tokens": (layout.LAP_BETWEEN, ()),
}


@dataclass(frozen=True)
class Part:
    """What a part of the network costs a token.

    Attributes
    ----------
    microseconds : Spread
        Of the calling thread.
    n_bytes : int
        What all threads read for it: weights, or keys and values.
    """

    microseconds: Spread
    n_bytes: int


def time_parts(
    model: GPT2, *, n_prompt: int | None = None, n_tokens: int | None = None, runs: int = RUNS
) -> dict[str, Part]:
    """Decode tokens and return what each part cost one of them; the first run does not count.

    Parameters
    ----------
    model : GPT2
    n_prompt, n_tokens : int, optional
        Tokens before, and tokens timed; by default those of `measure.decode`.
    runs : int

    Raises
    ------
    OptionError
        If the prompt and the tokens do not fit the context, or a number is below 1.
    BackendError
        On the NumPy backend.
    """
    limit = model.config.n_positions - 1  # a token in between does not count
    n_prompt = first_prompt(limit) if n_prompt is None else n_prompt
    check("runs", runs, 1, 1000)
    check("the prompt's length", n_prompt, 1, limit - 1)
    n_tokens = min(DECODE_TOKENS, limit - n_prompt) if n_tokens is None else n_tokens
    check("the number of tokens", n_tokens, 1, limit - n_prompt)
    rows = [_one_run(model, n_prompt, n_tokens) for _ in range(1 + runs)][1:]
    sizes = {label: _bytes(model, endings) for label, (_, endings) in PARTS.items()}
    sizes["attention"] = model.new_cache().nbytes * (n_prompt + n_tokens // 2) // model.config.n_positions
    return {label: Part(spread(row[account] for row in rows), sizes[label]) for label, (account, _) in PARTS.items()}


def _one_run(model: GPT2, n_prompt: int, n_tokens: int) -> Floats:
    """Return the microseconds of a token, by account."""
    cache = model.new_cache()
    token = model.likeliest(some_ids(n_prompt, model.config.vocab_size), cache)
    with model.laps() as laps:
        for i, _ in enumerate(model.follow([token], cache, 1 + n_tokens)):
            if i == 0:  # it set the clock
                laps[:, : layout.LAP_LAST] = 0
        return laps[0, : layout.LAP_LAST] / n_tokens / 1e3


def _bytes(model: GPT2, endings: tuple[str, ...]) -> int:
    return sum(weight.nbytes_first for name, weight in model.weights.items() if name.endswith(endings))
