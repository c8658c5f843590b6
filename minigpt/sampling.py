"""Logits -> logits, and logits -> id: pure filters, one row of `FILTERS` each; `make_sampler` chains them.

Nothing here knows a model or text, and nothing sorts the whole vocabulary. To add a sampler, write a function
under `@register` (they apply in the order of this file) and add the field of that name to `SamplingOptions`.
"""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import MinigptError, OptionError

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Sampler = Callable[[Floats, Sequence[int]], int]
F = TypeVar("F", bound=Callable[..., Floats])

_NEVER = np.float32(-np.inf)


@dataclass(frozen=True)
class Filter:
    """A row of `FILTERS`: what to call, the value that changes nothing, and which values are allowed."""

    function: Callable[..., Floats]
    off: Any
    valid: Callable[[Any], bool]
    allowed: str
    uses_context: bool

    def apply(self, logits: Floats, value: Any, context: Sequence[int]) -> Floats:
        """Call the function, with the context if it looks at that."""
        return self.function(logits, value, context) if self.uses_context else self.function(logits, value)


FILTERS: dict[str, Filter] = {}


def register(off: Any, valid: Callable[[Any], bool], allowed: str, uses_context: bool = False) -> Callable[[F], F]:
    """Add a function to `FILTERS` under its name, and let it check its value when it is called by itself."""

    def wrap(function: F) -> F:
        name = function.__name__
        FILTERS[name] = Filter(function, off, valid, allowed, uses_context)

        @functools.wraps(function)
        def checked(logits: Floats, value: Any, *context: Sequence[int]) -> Floats:
            _check(name, value)
            return function(logits, value, *context)

        return cast(F, checked)

    return wrap


def _check(name: str, value: Any) -> None:
    row = FILTERS[name]
    try:
        valid = row.valid(value)
    except (TypeError, ValueError, AttributeError, OverflowError):  # a string where a number is due...
        valid = False
    if not valid:
        raise OptionError(f"{name} = {reprlib.repr(value)} is not allowed; give {row.allowed}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and bool(value >= 0)


# ---- filters, in the order in which they apply -------------------------------------------------------------


@register(1.0, lambda v: 0.01 <= v <= 100, "a number in 0.01..100, 1 for none", uses_context=True)
def repetition_penalty(logits: Floats, penalty: float, context: Sequence[int]) -> Floats:
    """Divide positive and multiply negative logits of tokens in the context.

    Notes
    -----
    Keskar et al. 2019 (CTRL), section 4.1, with the sign rule of Hugging Face transformers.
    """
    out, ids = np.array(logits), np.asarray(context, np.int64)
    seen = logits[ids]
    out[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    return out


@register(0.0, lambda v: -100 <= v <= 100, "a number in -100..100, 0 for none", uses_context=True)
def presence_penalty(logits: Floats, penalty: float, context: Sequence[int]) -> Floats:
    """Subtract `penalty` from the logit of every token in the context, once."""
    out, ids = np.array(logits), np.asarray(context, np.int64)
    out[ids] = logits[ids] - penalty
    return out


@register(0.0, lambda v: -100 <= v <= 100, "a number in -100..100, 0 for none", uses_context=True)
def frequency_penalty(logits: Floats, penalty: float, context: Sequence[int]) -> Floats:
    """Subtract `penalty` from the logit of a token for each time that it is in the context."""
    out = np.array(logits)
    np.subtract.at(out, np.asarray(context, np.int64), penalty)
    return out


@register(0, lambda v: _is_whole(v) and v <= 1024, "a whole number in 0..1024, 0 for none", uses_context=True)
def no_repeat_ngram(logits: Floats, n: int, context: Sequence[int]) -> Floats:
    """Rule out every token that would complete an n-gram which is already in the context."""
    out, ids = np.array(logits), np.asarray(context, np.int64)
    if len(ids) >= n:
        ngrams = np.lib.stride_tricks.sliding_window_view(ids, n)  # [n_ngrams, n]
        repeats = (ngrams[:, :-1] == ids[len(ids) - n + 1 :]).all(axis=1)
        out[ngrams[repeats, -1]] = _NEVER
    return out


@register(
    {},
    lambda v: all(_is_whole(id) and math.isfinite(bias) for id, bias in v.items()),
    "a mapping of token ids to finite numbers",
)
def logit_bias(logits: Floats, bias: Mapping[int, float]) -> Floats:
    """Add a number to the logits of some tokens."""
    out, ids = np.array(logits), _ids(bias, logits)
    out[ids] += np.array(list(bias.values()), np.float32)
    return out


@register((), lambda v: not isinstance(v, str) and all(map(_is_whole, v)), "a collection of token ids")
def banned(logits: Floats, ids: Sequence[int]) -> Floats:
    """Rule out some tokens."""
    out = np.array(logits)
    out[_ids(ids, logits)] = _NEVER
    return out


@register(1.0, lambda v: v == 0 or 0.01 <= v <= 100, "0 (always the likeliest token) or a number in 0.01..100")
def temperature(logits: Floats, value: float) -> Floats:
    """Divide logits by the temperature; 0 leaves only the highest."""
    return logits / value if value else _keep(logits, largest(logits, 1))


@register(0, lambda v: _is_whole(v), "a whole number, 0 for all tokens")
def top_k(logits: Floats, k: int) -> Floats:
    """Keep the k likeliest tokens."""
    return _keep(logits, largest(logits, k))


@register(1.0, lambda v: 0 < v <= 1, "a number above 0 and up to 1, 1 for all tokens")
def top_p(logits: Floats, p: float) -> Floats:
    """Keep the smallest set of likeliest tokens whose probabilities reach `p`.

    Notes
    -----
    Holtzman et al. 2019, The Curious Case of Neural Text Degeneration.
    """
    weights = np.exp(logits - logits.max())  # [vocab]
    return _keep(logits, _reaching(p, weights, weights))


@register(1.0, lambda v: 0 < v <= 1, "a number above 0 and up to 1, 1 for all tokens")
def typical_p(logits: Floats, p: float) -> Floats:
    """Keep the smallest set of tokens whose probabilities reach `p`, the least surprisingly (un)likely first.

    Notes
    -----
    Meister et al. 2022, Locally Typical Sampling: closest to the entropy comes first.
    """
    log_p = log_softmax(logits)  # [vocab]
    weights = np.exp(log_p)
    possible = weights > 0
    entropy = -np.sum(weights[possible] * log_p[possible])
    return _keep(logits, _reaching(p, weights, -np.abs(log_p + entropy)))


@register(0.0, lambda v: 0 <= v <= 1, "a number in 0..1, 0 for all tokens")
def min_p(logits: Floats, p: float) -> Floats:
    """Keep the tokens at least `p` times as likely as the likeliest.

    Notes
    -----
    Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling.
    """
    if p == 0:
        return np.array(logits)
    return _keep(logits, np.flatnonzero(logits >= logits.max() + math.log(p)))


_names = list(FILTERS)
ADJUSTING = _names[: _names.index("temperature")]  # filters that may raise or remove any token
NARROWING = _names[_names.index("temperature") :]  # never the likeliest
CUTTING = NARROWING[1:]  # others have no place for what is far from the likeliest
MARGIN, REACH = 8.0, 12.0  # below the highest logit, in nats at temperature 1: exact, worth a look


# ---- the sampler -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; every field but `seed` is a filter of this module.

    Penalties and n-grams look at the whole context, prompt included. The default temperature and top_p were chosen
    by reading what the embedded model writes; its card says what was seen. Options that cut (top_k, top_p, typical_p,
    min_p) choose among tokens at least e^-12 times as likely as the likeliest, which is quicker.

    Raises
    ------
    OptionError
        Naming the option, its value and what is allowed.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned: Sequence[int] = ()
    seed: int | None = None

    @property
    def margin(self) -> float | None:
        """How far below the highest logit others matter, for `GPT2.forward`; None where all do.

        The likeliest token alone, or those e^-8 = 3e-4 times as likely and more: what the rest are worth is known to
        some percent, which moves 0.04 % of the probability (124M at temperature 1; `benchmarks/screening.py`).
        Options that may raise or remove tokens want all logits.
        """
        return None if _steps(self, ADJUSTING) else MARGIN * self.temperature

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.name in FILTERS:
                _check(option.name, getattr(self, option.name))
        if self.seed is not None and not _is_whole(self.seed):
            raise OptionError(f"seed = {self.seed!r} is not allowed; give a whole number from 0 up, or None")


def make_sampler(options: SamplingOptions, sequence: int = 0) -> Sampler:
    """Chain the filters that `options` asks for and a draw.

    Parameters
    ----------
    options : SamplingOptions
    sequence : int
        Number of the sample among several of one prompt; each draws its own random numbers from the one seed.

    Returns
    -------
    callable
        (logits [vocab] float32, ids of the context) -> id. It raises MinigptError for logits that hold NaN or
        infinity, OptionError if the filters leave no token.
    """
    adjust, narrow = _steps(options, ADJUSTING), _steps(options, NARROWING)  # the latter keep the likeliest token
    cuts = bool(_steps(options, CUTTING))
    rng = np.random.default_rng(None if options.seed is None else (options.seed, sequence))

    def sample(logits: Floats, context: Sequence[int]) -> int:
        check_finite(logits)
        for row, value in adjust:
            logits = row.apply(logits, value, context)
        if adjust and logits.max() == _NEVER:
            raise OptionError("no token is left to choose from; ban fewer tokens or allow repeated n-grams")
        if options.temperature == 0:
            return int(logits.argmax())
        ids = np.flatnonzero(logits >= logits.max() - REACH * options.temperature) if cuts else None
        logits = logits if ids is None else logits[ids]
        for row, value in narrow:
            logits = row.apply(logits, value, context)
        drawn = draw(logits, rng)
        return drawn if ids is None else int(ids[drawn])

    return sample


def _steps(options: SamplingOptions, names: Sequence[str]) -> list[tuple[Filter, Any]]:
    values = ((FILTERS[name], getattr(options, name)) for name in names)
    return [(row, value) for row, value in values if (value if row.off in ({}, ()) else value != row.off)]


def draw(logits: Floats, rng: np.random.Generator) -> int:
    """Draw an id with the probabilities that `logits` [vocab] stand for, using one random number."""
    sums = np.cumsum(np.exp(logits - logits.max()), dtype=np.float64)
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


# ---- on the way --------------------------------------------------------------------------------------------


def check_finite(logits: Floats) -> None:
    """Raise MinigptError if logits of any shape hold NaN or infinity."""
    if not np.isfinite(logits.max()):
        raise MinigptError("the model's logits are not finite; check its file with `minigpt verify`")


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities along the last axis, in float32."""
    shifted: Floats = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def log_probability(logits: Floats, id: int) -> float:
    """Return the log-probability of one token of `logits` [vocab]."""
    top = logits.max()
    return float(logits[id] - top - np.log(np.exp(logits - top).sum()))


def largest(values: Floats, k: int) -> Ids:
    """Return the ids of the k largest values, in descending order, equal ones by id.

    The k-th largest of the maxima of blocks cannot exceed the k-th largest value, so comparing with it leaves
    few candidates: 20 us where np.partition of 50,257 floats takes 290.
    """
    if k >= len(values):
        return np.argsort(-values, kind="stable")
    n_blocks = max(4 * k, 512)
    whole = len(values) - len(values) % n_blocks
    maxima = values[:whole].reshape(-1, n_blocks).max(axis=0) if whole else values
    bound = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    ids = np.flatnonzero(values > bound)
    if len(ids) < k:  # then the bound is the k-th largest value itself
        ids = np.concatenate((ids, np.flatnonzero(values == bound)[: k - len(ids)]))
    return ids[np.argsort(-values[ids], kind="stable")[:k]]


def _reaching(p: float, weights: Floats, order: Floats) -> Ids:
    """Return the ids with the largest `order` whose `weights` just reach the share p of all weights."""
    wanted, k = p * float(weights.sum()), 128
    while True:
        ids = largest(order, k)
        sums = np.cumsum(weights[ids], dtype=np.float64)
        if sums[-1] >= wanted or len(ids) == len(order):
            return ids[: np.searchsorted(sums, wanted) + 1]
        k *= 4


def _keep(logits: Floats, ids: Ids) -> Floats:
    out = np.full_like(logits, _NEVER)
    out[ids] = logits[ids]
    return out


def _ids(ids: Sequence[int] | Mapping[int, float], logits: Floats) -> Ids:
    out = np.fromiter(ids, np.int64)
    if out.size and out.max() >= len(logits):
        raise OptionError(f"token id {out.max()} is outside 0..{len(logits) - 1} of this model's vocabulary")
    return out
