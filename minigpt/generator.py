"""Ids in, ids out: sampling from a model, beam search, and the probabilities of a given text.

Nothing here knows text, except `StopStrings`, which watches the text that ids became. All work happens in the
caller's thread, when it asks for the next step; whoever stops asking leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minigpt.errors import ContextError, OptionError
from minigpt.model import GPT2
from minigpt.sampling import (
    SamplingOptions,
    check_finite,
    largest,
    log_probability,
    log_softmax,
    make_sampler,
)

Floats = NDArray[np.float32]

MAX_SEQUENCES = 64  # in one batch; each may need a cache of the whole context


# ---- sampling ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes
    ----------
    sequence : int
        Which of the samples it continues.
    id : int
        The token; with the finish reason "stop" it is the stop id itself.
    logprob : float or None
        Its log-probability by the model, before any filter, where asked for.
    finish_reason : {"stop", "length"} or None
        Why the sequence ends with this token; "length" for max_tokens or a full context.
    """

    sequence: int
    id: int
    logprob: float | None = None
    finish_reason: str | None = None


def generate(
    model: GPT2,
    prompt_ids: ArrayLike,
    *,
    options: SamplingOptions | None = None,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    n: int = 1,
    logprobs: bool = False,
    context_shift: bool = False,
    keep_head: int | None = None,
) -> Iterator[Step]:
    """Continue a prompt, token by token.

    Parameters
    ----------
    model : GPT2
    prompt_ids : array-like of int, shape (n_tokens,)
        At least one token.
    options : SamplingOptions, optional
    max_tokens : int, optional
        Tokens per sequence; by default until a stop id or the end of the context.
    stop_ids : collection of int
        Tokens that end a sequence.
    n : int
        How many samples; they share the evaluation of the prompt and run as one batch.
    logprobs : bool
        Whether steps carry log-probabilities (50 us each).
    context_shift : bool
        What to do when the context is full. By default the sequence ends, and a longer prompt is an error.
        With True, the first `keep_head` tokens stay, and the latest tokens, half a context of them, are
        evaluated anew behind: learned positions do not allow to move what is cached.
    keep_head : int, optional
        By default the prompt, but at most a quarter of the context.

    Returns
    -------
    iterator of Step
        One per token and sequence, the sequences in turn.

    Raises
    ------
    OptionError
        If an argument is out of range.
    ContextError
        If the prompt is longer than the context.
    """
    n_positions = model.config.n_positions
    prompt = _checked_ids(model, prompt_ids)
    tail = max(n_positions // 2, 1)
    if keep_head is None:
        keep_head = min(len(prompt), n_positions // 4)
    _check_whole("keep_head", keep_head, 0, max(n_positions - tail - 1, 0))
    _check_whole("n", n, 1, MAX_SEQUENCES)
    if max_tokens is not None:
        _check_whole("max_tokens", max_tokens, 1)
    if len(prompt) > n_positions and not context_shift:
        raise ContextError(
            f"the prompt's {len(prompt)} tokens exceed the model's {n_positions} positions; "
            "shorten it or turn on the context shift"
        )
    options = options or SamplingOptions()
    samplers = [make_sampler(options, sequence) for sequence in range(n)]
    margin = None if logprobs else options.margin
    texts = [list(prompt) for _ in range(n)]
    cache = model.new_cache(n)

    def read_on(active: Sequence[int]) -> Floats:
        """Return the logits [n_active, vocab] after the last tokens of the active, equally long sequences."""
        if cache.lengths[active[0]] < n_positions:
            sequences = None if n == 1 else active  # the only one goes without saying, which is quicker
            return model.forward([texts[s][-1] for s in active], cache, sequences, margin=margin)
        for s in active:
            cache.truncate(keep_head, s)
        ids = [id for s in active for id in texts[s][-tail:]]
        return model.forward(ids, cache, np.repeat(active, tail), margin=margin)

    fits = len(prompt) <= n_positions
    first = prompt if fits else prompt[:keep_head] + prompt[-tail:]

    def reason_to_end(id: int, length: int, s: int) -> str | None:
        full = cache.lengths[s] == n_positions and not context_shift
        return "stop" if id in stop_ids else "length" if full or length == max_tokens else None

    def likeliest_steps() -> Iterator[Step]:
        ids, length, limit = first, 0, math.inf if max_tokens is None else max_tokens
        while True:
            for id in model.follow(ids, cache, int(min(limit - length, n_positions)), stop_ids):
                length += 1
                texts[0].append(id)
                reason = reason_to_end(id, length, 0)
                yield Step(0, id, None, reason)
                if reason is not None:
                    return
            cache.truncate(keep_head)
            ids = texts[0][-tail:]

    def steps() -> Iterator[Step]:
        logits = model.forward(first, cache, margin=margin)  # [1, vocab]
        cache.reorder([0] * n)
        logits, active, length = np.repeat(logits, n, axis=0), list(range(n)), 0  # [n_active, vocab]
        while active:
            length += 1
            running = []
            for s, row in zip(active, logits, strict=True):
                id = samplers[s](row, texts[s])
                texts[s].append(id)
                reason = reason_to_end(id, length, s)
                yield Step(s, id, log_probability(row, id) if logprobs else None, reason)
                if reason is None:
                    running.append(s)
            active = running
            if active:
                logits = read_on(active)

    return likeliest_steps() if n == 1 and margin == 0 else steps()


# ---- beam search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that beam search found.

    Attributes
    ----------
    ids : tuple of int
        Without the prompt, with the stop id if it ends in one.
    score : float
        Sum of the log-probabilities divided by length ** length_penalty.
    finish_reason : {"stop", "length"}
    """

    ids: tuple[int, ...]
    score: float
    finish_reason: str


def beam_search(
    model: GPT2,
    prompt_ids: ArrayLike,
    *,
    n_beams: int = 4,
    length_penalty: float = 1.0,
    n_hypotheses: int = 1,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """Find likely continuations of a prompt as wholes.

    Parameters
    ----------
    model : GPT2
    prompt_ids : array-like of int, shape (n_tokens,)
    n_beams : int
        How many unfinished continuations are kept at each length.
    length_penalty : float
        Above 0 favours long continuations, below 0 short ones.
    n_hypotheses : int
        How many to return, at most `n_beams`.
    max_tokens : int, optional
        By default what the context holds.
    stop_ids : collection of int
        Tokens that end a continuation.

    Returns
    -------
    list of Hypothesis
        The best first; fewer than asked for only if there are not so many.

    Raises
    ------
    OptionError, ContextError
        If an argument is out of range, or the prompt longer than the context.

    Notes
    -----
    Scores are those of Hugging Face transformers, sum / length ** length_penalty, a stop id counted in the
    length (not ((5 + length) / 6) ** alpha of Wu et al. 2016). So is the search, with early_stopping="never":
    a stop counts if it is among the n_beams best candidates, and the search ends when no unfinished
    continuation can still beat the n_beams finished ones.
    """
    prompt = _checked_ids(model, prompt_ids)
    room = model.config.n_positions - len(prompt) + 1  # the last token needs no position
    if room < 1:
        raise ContextError(
            f"the prompt's {len(prompt)} tokens exceed the {model.config.n_positions} positions; shorten it"
        )
    _check_whole("n_beams", n_beams, 1, MAX_SEQUENCES)
    _check_whole("n_hypotheses", n_hypotheses, 1, n_beams)
    if max_tokens is not None:
        _check_whole("max_tokens", max_tokens, 1)
    if not isinstance(length_penalty, int | float) or not -10 <= length_penalty <= 10:
        raise OptionError(f"length_penalty = {length_penalty!r} is not allowed; give a number in -10..10")
    limit = room if max_tokens is None else min(max_tokens, room)
    cache = model.new_cache(n_beams)
    logits = model.forward(prompt, cache)  # [n_running, vocab], one at first
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Hypothesis] = []
    for length in range(1, limit + 1):
        parents, running = [], []
        for rank, (total, parent, id) in enumerate(_continuations(beams, logits, n_beams, len(stop_ids))):
            ids = (*beams[parent][1], id)
            reason = "stop" if id in stop_ids else "length" if length == limit else None
            if reason is None:
                parents.append(parent)
                running.append((total, ids))
            elif rank < n_beams:
                finished.append(Hypothesis(ids, total / length**length_penalty, reason))
        beams = running[:n_beams]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:n_beams]
        if not beams:
            break
        best_length = limit if length_penalty > 0 else length
        if len(finished) == n_beams and finished[-1].score >= beams[0][0] / best_length**length_penalty:
            break
        cache.reorder(parents[:n_beams])
        logits = model.forward([ids[-1] for _, ids in beams], cache, range(len(beams)))
    return finished[:n_hypotheses]


def _continuations(
    beams: Sequence[tuple[float, tuple[int, ...]]], logits: Floats, n_beams: int, n_stops: int
) -> list[tuple[float, int, int]]:
    """Return the best (sum, beam, id), best first, so many that n_beams go on when every stop ends one."""
    check_finite(logits)
    wanted = n_beams + len(beams) * n_stops
    found = [
        (total + float(row[id]), parent, int(id))
        for parent, ((total, _), row) in enumerate(zip(beams, log_softmax(logits), strict=True))
        for id in largest(row, wanted)
    ]
    return sorted(found, key=lambda candidate: -candidate[0])[:wanted]


# ---- scoring -----------------------------------------------------------------------------------------------


def score(model: GPT2, ids: ArrayLike) -> Floats:
    """Return the log-probability of every token of a text but the first, given those before it.

    Parameters
    ----------
    model : GPT2
    ids : array-like of int, shape (n_tokens,)

    Returns
    -------
    ndarray of shape (n_tokens - 1,), dtype=float32

    Raises
    ------
    ContextError
        If the text has more tokens than positions, by more than the one that is only predicted.
    """
    tokens, n_positions = _checked_ids(model, ids), model.config.n_positions
    if len(tokens) > n_positions + 1:
        raise ContextError(
            f"{len(tokens)} tokens are more than {n_positions} positions can predict; score parts of the text"
        )
    rows = (row for logits in model.logits(tokens[:-1]) for row in logits)
    return np.array([log_probability(row, id) for row, id in zip(rows, tokens[1:], strict=True)], np.float32)


# ---- stop strings ------------------------------------------------------------------------------------------


class StopStrings:
    """Pass text through until a stop string is complete, holding back what may become one.

    Where pieces of text are cut makes no difference: the stop string that is complete first ends the text,
    the longest of those that end together.

    Parameters
    ----------
    stops : collection of str

    Attributes
    ----------
    stopped : bool
        Whether a stop string was seen.

    Raises
    ------
    OptionError
        If a stop string is empty.
    """

    def __init__(self, stops: Collection[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise OptionError(f"stop = {stops!r} is not allowed; give a list of strings that are not empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take a piece of text and return what can be shown: never the stop string, nor what follows it."""
        if self.stopped:
            return ""
        text = self._held + text
        begins = [(begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if begins:
            self.stopped, self._held = True, ""
            return text[: min(begins)[1]]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """Return what was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next(k for k in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:k]))


# ---- checks ------------------------------------------------------------------------------------------------


def _checked_ids(model: GPT2, ids: ArrayLike) -> list[int]:
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise OptionError("give at least one token id; an empty text begins with the end-of-text token")
    bad = tokens[(tokens < 0) | (tokens >= model.config.vocab_size)]
    if len(bad):
        raise OptionError(f"token id {bad[0]} is outside 0..{model.config.vocab_size - 1}")
    return [int(id) for id in tokens]


def _check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int | np.integer) or not low <= value <= (value if high is None else high):
        allowed = f"from {low} up" if high is None else f"in {low}..{high}"
        raise OptionError(f"{name} = {value!r} is not allowed; give a whole number {allowed}")
