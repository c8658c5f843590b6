"""`load(path) -> MiniGPT`: text in, text out. What scripts import and what the command line is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minigpt import checkpoint as mgpt
from minigpt import generator
from minigpt.checkpoint import Checkpoint
from minigpt.errors import MinigptError, OptionError
from minigpt.generator import StopStrings
from minigpt.model import GPT2
from minigpt.sampling import SamplingOptions
from minigpt.tokenizer import Tokenizer, TokenStream

Floats = NDArray[np.float32]

MAX_TOKENS = 256


def load(
    path: str | PathLike[str] | None = None,
    n_threads: int | None = None,
    kv_cache: str = "f32",
    expand: bool = False,
) -> MiniGPT:
    """Open a model.

    Parameters
    ----------
    path : path, optional
        A `.mgpt` file; by default the embedded model, which writes software requirements.
    n_threads : int, optional
        By default the physical cores that this process may use, or `MINIGPT_NUM_THREADS`.
    kv_cache : {"f32", "int8"}
        How keys and values of past tokens are kept: int8 takes 27 % of the memory and is faster in long texts.
    expand : bool
        Whether sparse matrices become dense in memory, see `GPT2`.

    Raises
    ------
    FormatError
        If the file is missing, foreign or damaged.
    OptionError
        If `n_threads` or `kv_cache` is out of range.
    """
    return MiniGPT(open_checkpoint(path), n_threads, kv_cache, expand)


def open_checkpoint(path: str | PathLike[str] | None) -> Checkpoint:
    """Open a `.mgpt` file, or the embedded default."""
    return mgpt.load(default_path() if path is None else path)


def default_path() -> PathLike[str]:
    """Return the file of the embedded model."""
    from minigpt.weights import DEFAULT

    default: PathLike[str] = DEFAULT
    return default


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to one of the samples.

    Attributes
    ----------
    sequence : int
        Which sample.
    text : str
        Whole characters only, often empty; never a stop string.
    id : int
        The token.
    logprob : float or None
        Its log-probability, where asked for.
    finish_reason : {"stop", "length"} or None
        Set on the last piece of a sample.
    """

    sequence: int
    text: str
    id: int
    logprob: float | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """One whole continuation of a prompt.

    Attributes
    ----------
    text : str
    ids : tuple of int
        Its tokens, a final stop id included.
    finish_reason : {"stop", "length"}
    logprobs : tuple of float or None
        One per id, where asked for.
    score : float or None
        Of a beam search: the sum of the log-probabilities over length ** length_penalty.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Score:
    """How likely a text is to a model.

    Attributes
    ----------
    ids : tuple of int
        The tokens of the text; all but the first, if the model has no end-of-text token to begin with.
    logprobs : ndarray of shape (n_tokens,), dtype=float32
        Of each token given those before it.
    """

    ids: tuple[int, ...]
    logprobs: Floats

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-probability."""
        return float(np.exp(-self.logprobs.mean(dtype=np.float64)))


class MiniGPT:
    """A model with its tokenizer. Threads may share it: their tokens are computed in turn.

    Parameters
    ----------
    checkpoint : Checkpoint
    n_threads : int, optional
    kv_cache : {"f32", "int8"}
    expand : bool

    Raises
    ------
    MinigptError
        By everything but `close`, once the model is closed.
    """

    def __init__(
        self, checkpoint: Checkpoint, n_threads: int | None = None, kv_cache: str = "f32", expand: bool = False
    ) -> None:
        self._parts: tuple[Checkpoint, GPT2, Tokenizer] | None = (
            checkpoint,
            GPT2(checkpoint, n_threads, kv_cache, expand),
            Tokenizer(checkpoint.vocabulary),
        )

    # ---- text ----------------------------------------------------------------------------------------------

    def generate(self, prompt: str = "", **options: Any) -> str:
        """Return the continuation of a prompt.

        Parameters
        ----------
        prompt : str
            An empty one lets the model begin a text of its own.
        **options
            Those of `complete`, but for `n`.
        """
        return self.complete(prompt, **_for_one(options))[0].text

    def stream(self, prompt: str = "", **options: Any) -> Iterator[str]:
        """Yield the continuation piece by piece, in whole characters; options as in `pieces`, but for `n`."""
        return (piece.text for piece in self.pieces(prompt, **_for_one(options)) if piece.text)

    def complete(
        self,
        prompt: str = "",
        *,
        n: int = 1,
        n_beams: int | None = None,
        length_penalty: float | None = None,
        max_tokens: int = MAX_TOKENS,
        stop: Collection[str] = (),
        logprobs: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Return `n` continuations, sampled, or the best of a beam search.

        Parameters
        ----------
        prompt : str
        n : int
            How many.
        n_beams : int, optional
            Search with so many beams instead of sampling; no other option but `max_tokens` and `stop` applies.
        length_penalty : float, optional
            Of the beam search, 1 by default: above 0 favours long continuations.
        max_tokens : int
            Tokens in each.
        stop : collection of str
            Texts that end a continuation and are not part of it.
        logprobs : bool
            Whether completions carry log-probabilities.
        **options
            The others of `pieces`.
        """
        if n_beams is not None:
            if options or logprobs:
                raise OptionError(f"a beam search takes no {[*options, 'logprobs'][0]}; omit it or n_beams")
            penalty = 1.0 if length_penalty is None else length_penalty
            return self._search(prompt, n, n_beams, penalty, max_tokens, stop)
        if length_penalty is not None:
            raise OptionError(f"length_penalty = {length_penalty!r} is of a beam search; give n_beams, too")
        pieces = self.pieces(prompt, n=n, max_tokens=max_tokens, stop=stop, logprobs=logprobs, **options)
        samples: list[list[Piece]] = [[] for _ in range(n)]
        for piece in pieces:
            samples[piece.sequence].append(piece)
        return [
            Completion(
                "".join(piece.text for piece in sample),
                tuple(piece.id for piece in sample),
                sample[-1].finish_reason or "stop",
                tuple(piece.logprob for piece in sample if piece.logprob is not None) if logprobs else None,
            )
            for sample in samples
        ]

    def pieces(
        self,
        prompt: str = "",
        *,
        n: int = 1,
        max_tokens: int = MAX_TOKENS,
        stop: Collection[str] = (),
        logprobs: bool = False,
        context_shift: bool = False,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Generate, token by token.

        Parameters
        ----------
        prompt : str
        n : int
            How many samples; they run as one batch.
        max_tokens : int
            Tokens in each.
        stop : collection of str
            Texts that end a sample and are not part of it.
        logprobs : bool
            Whether pieces carry log-probabilities.
        context_shift : bool
            Go on when the context is full, by forgetting what lies behind the prompt's beginning. Without it a
            full context ends the sample, and a longer prompt is an error.
        **sampling
            Fields of `SamplingOptions`: temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
            presence_penalty, frequency_penalty, no_repeat_ngram, logit_bias, banned, seed.

        Raises
        ------
        OptionError
            If an option is unknown or out of its range.
        ContextError
            If the prompt is longer than the context.
        """
        known = SamplingOptions.__dataclass_fields__
        if unknown := [name for name in sampling if name not in known]:
            raise OptionError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
        steps = generator.generate(
            self.model,
            self._encode(prompt),
            options=SamplingOptions(**sampling),
            max_tokens=max_tokens,
            stop_ids=self._stop_ids,
            n=n,
            logprobs=logprobs,
            context_shift=context_shift,
        )
        return _to_text(steps, [(self.tokenizer.stream(), StopStrings(stop)) for _ in range(n)])

    def _search(
        self, prompt: str, n: int, n_beams: int, length_penalty: float, max_tokens: int, stop: Collection[str]
    ) -> list[Completion]:
        found = generator.beam_search(
            self.model,
            self._encode(prompt),
            n_beams=n_beams,
            length_penalty=length_penalty,
            n_hypotheses=n,
            max_tokens=max_tokens,
            stop_ids=self._stop_ids,
        )
        completions = []
        for hypothesis in found:
            ends = hypothesis.finish_reason == "stop"
            watch = StopStrings(stop)
            text = watch.push(self.tokenizer.decode(hypothesis.ids[: -1 if ends else None])) + watch.flush()
            reason = "stop" if watch.stopped else hypothesis.finish_reason
            completions.append(Completion(text, hypothesis.ids, reason, score=hypothesis.score))
        return completions

    # ---- numbers -------------------------------------------------------------------------------------------

    def score(self, text: str) -> Score:
        """Return the log-probability of every token of a text.

        Raises
        ------
        OptionError
            If the text is empty; a model without an end-of-text token needs two tokens.
        ContextError
            If it is longer than the context.
        """
        ids = [*self._stop_ids, *self.tokenizer.encode(text)]
        if len(ids) < 2:
            raise OptionError(f"the text {text!r} is too short for a score; give at least one character more")
        return Score(tuple(ids[1:]), generator.score(self.model, ids))

    def logits(self, ids: ArrayLike) -> Floats:
        """Return the logits [n_tokens, vocab_size] of every position of a text given as ids.

        Raises
        ------
        OptionError
            If there is no id, or one outside the vocabulary.
        ContextError
            If there are more than the context holds.
        """
        if not np.size(ids):
            raise OptionError("ids is empty; give at least one token id")
        return np.concatenate(list(self.model.logits(ids)))

    # ---- life ----------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        """What the file holds."""
        return self._opened[0]

    @property
    def model(self) -> GPT2:
        """The network."""
        return self._opened[1]

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary's voice."""
        return self._opened[2]

    @property
    def _opened(self) -> tuple[Checkpoint, GPT2, Tokenizer]:
        if self._parts is None:
            raise MinigptError("this model is closed; open it again with minigpt.load")
        return self._parts

    def close(self) -> None:
        """Let go of the file: it is unmapped as soon as nobody else holds its arrays."""
        self._parts = None

    def __enter__(self) -> MiniGPT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        end = self.checkpoint.config.eos_token_id
        return () if end is None else (end,)

    def _encode(self, prompt: str) -> list[int]:
        """Encode a prompt; an empty one becomes the end-of-text token, after which texts begin."""
        ids = self.tokenizer.encode(prompt)
        return ids or list(self._stop_ids)


def _for_one(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a method that gives one text."""
    if "n" in options:
        raise OptionError(f"n = {options['n']!r} is not allowed here; `complete` returns several texts")
    return options


def _to_text(steps: Iterator[generator.Step], texts: Sequence[tuple[TokenStream, StopStrings]]) -> Iterator[Piece]:
    """Turn the ids of each sample into text, and end it where a stop string does."""
    running = len(texts)
    for step in steps:
        decoder, watch = texts[step.sequence]
        if watch.stopped:  # the batch goes on for the others
            continue
        reason = step.finish_reason
        text = "" if reason == "stop" else watch.push(decoder.push(step.id))
        if reason and not watch.stopped:
            text += watch.push(decoder.flush()) + watch.flush()
        reason = "stop" if watch.stopped else reason
        running -= reason is not None
        yield Piece(step.sequence, text, step.id, step.logprob, reason)
        if not running:
            return
