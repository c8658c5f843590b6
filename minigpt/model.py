"""`GPT2`: token ids and a `KVCache` in, logits out. It knows nothing of text, sampling or how a matrix is stored."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minigpt import layers
from minigpt.cache import KVCache, checked_kind
from minigpt.checkpoint import Checkpoint
from minigpt.errors import BackendError, ContextError, OptionError
from minigpt.program import Program, can_run
from minigpt.sampling import check_finite
from minigpt.team import checked_threads

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

__all__ = ["GPT2", "KVCache"]

CHUNK = 512  # tokens that go through the network at once: bounds every intermediate, long prompts too
AHEAD, MOST_AHEAD = 0.05, 64  # seconds and tokens that may be computed before they are asked for
SHOWN = 128  # tokens whose logits are handed out at once: 26 MB for a vocabulary of 50,257


class GPT2:
    """A checkpoint ready to run, on the compiled backend where there is one and in NumPy elsewhere.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its arrays are used in place, never copied.
    n_threads : int, optional
        Threads of the compiled backend; by default the physical cores that this process may use.
    kv_cache : {"f32", "int8"}
        How the caches that it makes keep keys and values; `forward` takes those of any kind.
    expand : bool
        Whether sparse matrices become dense in memory, which runs faster where their zeros cost more than they save.
        No matter on the NumPy backend.
    """

    def __init__(
        self, checkpoint: Checkpoint, n_threads: int | None = None, kv_cache: str = "f32", expand: bool = False
    ) -> None:
        self.config = checkpoint.config
        self.kv_cache = checked_kind(kv_cache)
        if n_threads is not None:
            checked_threads(n_threads, "n_threads")  # whichever backend: NumPy's threads are its own affair
        self._program = Program(checkpoint, n_threads, expand) if can_run(checkpoint) else None
        self.weights = checkpoint.weights if self._program is None else self._program.weights

    def forward(
        self,
        ids: ArrayLike,
        cache: KVCache,
        sequences: ArrayLike | None = None,
        keep: ArrayLike | None = None,
        margin: float | None = None,
    ) -> Floats:
        """Run tokens through the network and extend the cache by them.

        Parameters
        ----------
        ids : array-like of int, shape (n_tokens,)
            Tokens, those of one sequence next to each other.
        cache : KVCache
            What came before; the lengths of its sequences grow.
        sequences : array-like of int, shape (n_tokens,), optional
            Which sequence of the cache each token continues; by default all continue sequence 0.
        keep : array-like of int, optional
            Indices of the tokens whose logits are wanted, ascending; by default the last of each sequence.
        margin : float, optional
            How far below a token's highest logit the others still matter. A head that can (`int8_split`) then reads
            half of itself and gives a rough value for those further below. By default all are exact; 0 is enough
            for the likeliest token.

        Returns
        -------
        ndarray of shape (n_keep, vocab_size), dtype=float32

        Raises
        ------
        OptionError
            If an id, a sequence or an index to keep is out of range, these do not ascend, or there is no token at all.
        ContextError
            If a sequence would become longer than `n_positions`; the cache is left as it was.
        """
        if sequences is keep is None and (logits := self._run_one(ids, cache, margin)) is not None:
            return logits
        tokens = as_ids(ids)
        if tokens.ndim != 1 or not len(tokens):
            raise OptionError("forward needs at least one id, in one dimension")
        if int(tokens.view(np.uint64).max()) >= self.config.vocab_size:  # one pass: a negative id is huge
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise OptionError(f"token id {bad} is outside 0..{self.config.vocab_size - 1}")
        sequence_of = np.zeros(len(tokens), np.int64) if sequences is None else np.asarray(sequences, np.int64)
        runs = self._runs(len(tokens), None if sequences is None else sequence_of, cache)
        spans = [np.arange(first, first + run.stop - run.start) for run, _, first in runs]
        positions = np.concatenate(spans) if len(spans) > 1 else spans[0]
        wanted = np.asarray([run.stop - 1 for run, *_ in runs] if keep is None else keep, np.int64)
        if keep is not None and (np.diff(wanted, prepend=-1, append=len(tokens)) <= 0).any():
            raise OptionError(f"tokens to keep must ascend within 0..{len(tokens) - 1}, not {wanted.tolist()[:9]}")
        compute = self._run_numpy if self._program is None else self._program.run
        parts = []
        for begin in range(0, len(tokens), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            here = wanted[(wanted >= begin) & (wanted < begin + CHUNK)] - begin if len(tokens) > CHUNK else wanted
            parts.append(compute(tokens[chunk], positions[chunk], sequence_of[chunk], cache, here, margin))
        for run, s, _ in runs:
            cache.lengths[s] += run.stop - run.start
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def likeliest(self, ids: ArrayLike, cache: KVCache) -> int:
        """Run tokens of one sequence as `forward` does, and return the likeliest next one.

        Raises
        ------
        MinigptError
            If logits are not finite.
        """
        logits = self.forward(ids, cache, margin=0.0)
        check_finite(logits)
        return int(logits.argmax())

    def follow(self, ids: ArrayLike, cache: KVCache, n_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int]:
        """Yield the likeliest next token, then the likeliest after that, and so on: what `likeliest` does, sooner.

        As many as take 50 ms are computed at once, without Python in between; `cache` never shows more than what was
        taken.

        Parameters
        ----------
        ids : array-like of int, shape (n_tokens,)
            Tokens of sequence 0 of the cache.
        cache : KVCache
            What came before. Before each token that is yielded, it is extended by those that it follows.
        n_tokens : int
            How many at most.
        stop_ids : collection of int
            Tokens after which to end.

        Raises
        ------
        OptionError, ContextError
            As `forward`, for the tokens given; it ends where the context is full.
        MinigptError
            If logits are not finite.
        """
        stops, ahead = np.array(sorted(stop_ids), np.int64), 1
        found, position = [self.likeliest(ids, cache)], int(cache.lengths[0]) - 1
        while n_tokens > 0:
            for id in found:
                position += 1
                cache.lengths[0] = position
                yield id
            n_tokens -= len(found)
            room = min(n_tokens, self.config.n_positions - position)
            if room < 1 or id in stop_ids:
                return
            began, found = time.perf_counter(), []
            if self._program is not None:
                found = self._program.run_greedily(id, position, cache, min(room, ahead), stops)
            found = found or [self.likeliest([id], cache)]
            ahead = max(1, min(int(AHEAD * len(found) / (time.perf_counter() - began)), MOST_AHEAD))

    def new_cache(self, n_sequences: int = 1) -> KVCache:
        """Return an empty cache of this model's kind."""
        return KVCache(self.config, n_sequences, self.kv_cache)

    def laps(self) -> AbstractContextManager[Ids]:
        """Let the compiled network note for what its time goes: see `Program.laps`.

        Raises
        ------
        BackendError
            On the NumPy backend.
        """
        if self._program is None:
            raise BackendError("the NumPy backend does not time its parts; unset MINIGPT_BACKEND, or install numba")
        return self._program.laps()

    def logits(self, ids: ArrayLike) -> Iterator[Floats]:
        """Yield the logits of every token of one text, [n, vocab_size] for up to SHOWN tokens at a time."""
        tokens = np.atleast_1d(as_ids(ids))
        cache = self.new_cache()
        for begin in range(0, len(tokens), SHOWN):
            chunk = tokens[begin : begin + SHOWN]
            yield self.forward(chunk, cache, keep=np.arange(len(chunk)))

    def _run_one(self, ids: ArrayLike, cache: KVCache, margin: float | None) -> Floats | None:
        """Do what `forward` does for [id], what it is given most of the time; None if it is anything else."""
        if self._program is None or not isinstance(ids, list) or len(ids) != 1:
            return None
        id, position = ids[0], int(cache.lengths[0])
        if type(id) is not int or not 0 <= id < self.config.vocab_size or position >= self.config.n_positions:
            return None
        logits = self._program.run_one(id, position, cache, margin)
        cache.lengths[0] = position + 1
        return logits

    def _runs(self, n_tokens: int, sequence_of: Ids | None, cache: KVCache) -> list[layers.Run]:
        """Cut the tokens where another sequence begins, and check that each sequence has room for its run."""
        if sequence_of is None:
            runs = [(slice(0, n_tokens), 0, int(cache.lengths[0]))]
        elif sequence_of.shape != (n_tokens,):
            raise OptionError(f"forward needs one sequence per id, {n_tokens}, not {sequence_of.shape}")
        elif sequence_of.min() < 0 or sequence_of.max() >= cache.n_sequences:
            raise OptionError(f"the cache has the sequences 0..{cache.n_sequences - 1}, not {sequence_of.tolist()}")
        else:
            runs = layers.runs(sequence_of, cache.lengths[sequence_of])
            if len({s for _, s, _ in runs}) < len(runs):
                raise OptionError("the tokens of one sequence must stand next to each other")
        n_positions = self.config.n_positions
        if (longest := max(first + run.stop - run.start for run, _, first in runs)) > n_positions:
            raise ContextError(f"{longest} tokens are more than the model's {n_positions} positions; shorten it")
        return runs

    def _run_numpy(
        self, ids: Ids, positions: Ids, sequence_of: Ids, cache: KVCache, keep: Ids, margin: float | None
    ) -> Floats:
        batch = layers.runs(sequence_of, positions)
        x = layers.embed(self.weights, ids, positions)  # [n_tokens, n_embd]
        last = self.config.n_layer - 1
        for i in range(self.config.n_layer):
            wanted = keep if i == last else layers.ALL
            x = layers.block(self.weights, self.config, i, x, cache.k[i], cache.v[i], batch, wanted)
        return layers.head(self.weights, self.config, x)  # [n_keep, vocab_size]


def as_ids(ids: ArrayLike) -> Ids:
    """Return token ids as an array; text and fractions are none."""
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        array = np.array(ids, object)
    if array.size and array.dtype.kind not in "iu":
        raise OptionError(f"token ids must be integers, not {str(ids)[:40]!r}; tokenize text first")
    return array.astype(np.int64, copy=False)
