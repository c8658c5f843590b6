"""Calibration text, and what it shows in a model: `Statistics` of the inputs of every linear map.

One half of the text is for fitting, the other, held out, for `Judge`, which says how far a model is from a
reference. Windows run together through the NumPy layers, one block after the other, so BLAS has work and only
one block's intermediates exist. Everything is deterministic. No step is here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt import layers
from minigpt.cache import F32Store
from minigpt.checkpoint import Checkpoint, Config, Vocabulary
from minigpt.compress.step import Changes, updated
from minigpt.encodings import Weight
from minigpt.errors import OptionError
from minigpt.evaluate import encode_documents, read_documents
from minigpt.sampling import log_softmax
from minigpt.tokenizer import Tokenizer

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = Mapping[str, Weight]

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block, in running order
BLOCK_TOKENS = 1024  # through a block at once: bounds the intermediates
HEAD_TOKENS = 64  # through the head at once: 13 MB of logits at a vocabulary of 50,257


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate on; every other window of it is held out.

    Attributes
    ----------
    documents : sequence of str
        Each is followed by end-of-text, and all are joined.
    n_tokens, n_held_out : int
        How many tokens of each half are used at most, in whole windows spread evenly over the text.
    window : int
        Tokens that see each other; a model with fewer positions gets windows of that length.
    progress : callable
        Is told in a few words what is being done.
    """

    documents: tuple[str, ...]
    n_tokens: int = 16384
    n_held_out: int = 4096
    window: int = 512
    progress: Callable[[str], None] = lambda message: None
    _encoded: list[tuple[Vocabulary, Ids]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises
        ------
        OptionError
            Naming the first that is out of range.
        """
        for name in ("n_tokens", "n_held_out", "window"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} of the calibration must be at least 1, not {value}")

    @classmethod
    def read(cls, path: str | PathLike[str], **options: Any) -> Calibration:
        """Read plain text or `.jsonl` of {"text": ...}; options are the attributes."""
        return cls(tuple(read_documents(path)), **options)

    def fitting(self, checkpoint: Checkpoint) -> Ids:
        """Return the tokens to fit on: [n_windows, window].

        Raises
        ------
        OptionError
            If the text is too short for one window of each half.
        """
        return self._half(checkpoint, 0, self.n_tokens)[:, :-1]

    def held_out(self, checkpoint: Checkpoint) -> Ids:
        """Return the tokens to judge by, each window with its last target: [n_windows, window + 1].

        Raises
        ------
        OptionError
            If the text is too short for one window of each half.
        """
        return self._half(checkpoint, 1, self.n_held_out)

    def _half(self, checkpoint: Checkpoint, half: int, n_tokens: int) -> Ids:
        ids, length = self._ids(checkpoint), min(self.window, checkpoint.config.n_positions) + 1
        n = len(ids) // length
        if n < 2:
            found = f"the calibration text has {len(ids)} tokens"
            raise OptionError(f"{found}, too few for two windows of {length}; give more text")
        windows = ids[: n * length].reshape(n, length)[half::2]
        wanted = min(len(windows), -(-n_tokens // (length - 1)))
        chosen: Ids = windows[np.linspace(0, len(windows) - 1, wanted).round().astype(np.int64)]
        return chosen

    def _ids(self, checkpoint: Checkpoint) -> Ids:
        """Encode the text, or remember it from the last time with this vocabulary."""
        for vocabulary, ids in self._encoded:
            if vocabulary is checkpoint.vocabulary:
                return ids
        ids = encode_documents(Tokenizer(checkpoint.vocabulary), list(self.documents), checkpoint.config.eos_token_id)
        self._encoded[:] = [(checkpoint.vocabulary, ids)]
        return ids


def required(calibration: Calibration | None, purpose: str) -> Calibration:
    """Return the calibration.

    Raises
    ------
    OptionError
        If there is none; `purpose` says what for.
    """
    if calibration is None:
        raise OptionError(f"{purpose} looks at activations; give calibration text")
    return calibration


class Statistics:
    """Sums over the inputs of one linear map.

    Parameters
    ----------
    n_in : int
        Width of an input.
    grams : bool
        Whether to sum products of all pairs, which takes most of the time.

    Attributes
    ----------
    n : int
        Inputs seen.
    absmax : ndarray of shape (n_in,), dtype=float32
        Largest magnitude of each channel.
    """

    def __init__(self, n_in: int, grams: bool = True) -> None:
        self.n = 0
        self.absmax = np.zeros(n_in, np.float32)
        self._sum = np.zeros(n_in, np.float64)
        self._square = np.zeros(n_in, np.float64)
        self._gram = np.zeros((n_in, n_in), np.float32) if grams else None

    def add(self, x: Floats) -> None:
        """Count inputs [n, n_in]."""
        self.n += len(x)
        self.absmax = np.maximum(self.absmax, np.abs(x).max(axis=0))
        self._sum += x.sum(axis=0, dtype=np.float64)
        self._square += np.einsum("ni,ni->i", x, x)
        if self._gram is not None:
            self._gram += x.T @ x

    @property
    def mean(self) -> Floats:
        """Mean of each channel: [n_in]."""
        return (self._sum / self.n).astype(np.float32)

    @property
    def square(self) -> Floats:
        """Mean square of each channel, the diagonal of `gram`: [n_in]."""
        return (self._square / self.n).astype(np.float32)

    @property
    def variance(self) -> Floats:
        """Variance of each channel: [n_in]."""
        return np.maximum(self._square / self.n - np.square(self._sum / self.n), 0).astype(np.float32)

    @property
    def gram(self) -> Floats:
        """X^T X / n, a new array: [n_in, n_in].

        Raises
        ------
        ValueError
            If grams were not asked for.
        """
        if self._gram is None:
            raise ValueError("these statistics were collected without grams")
        gram: Floats = self._gram / np.float32(self.n)
        return gram


@dataclass(frozen=True)
class Tap(Weight):
    """A Weight that shows the inputs of its multiplications to `see`."""

    see: Callable[[Floats], object] = lambda x: None
    multiplies: bool = True

    def matmul(self, x: Floats) -> Floats:
        """Show x [n_tokens, n_in], then multiply, or give zeros where nobody needs the product."""
        self.see(x)
        return super().matmul(x) if self.multiplies else np.zeros((len(x), self.shape[0]), np.float32)


def tapped(weights: Weights, see: Mapping[str, Callable[[Floats], object]]) -> Weights:
    """Return weights of which the linear maps named in `see` show their inputs."""
    taps = dict(weights)
    for name, listener in see.items():
        weight = weights[f"{name}.weight"]
        taps[f"{name}.weight"] = Tap(weight.encoding, weight.shape, weight.parts, listener)
    return taps


def embed(checkpoint: Checkpoint, windows: Ids) -> Floats:
    """Look up tokens and positions: [n_windows, window] -> [n_windows, window, n_embd]."""
    positions = np.broadcast_to(np.arange(windows.shape[1]), windows.shape)
    x = layers.embed(checkpoint.weights, windows.ravel(), positions.ravel()).reshape(*windows.shape, -1)
    checkpoint.weights["wte.weight"].let_go()
    return x


def linears(half: int) -> tuple[str, str]:
    """Return the names of the linear maps with which a half of a block reads and writes."""
    reader, writer = LINEARS[2 * (half % 2) :][:2]
    return f"h.{half // 2}.{reader}", f"h.{half // 2}.{writer}"


def run_half(weights: Weights, config: Config, half: int, x: Floats) -> Floats:
    """Add to the residual stream what attention (half 2i) or MLP (half 2i + 1) of block i write.

    Parameters
    ----------
    x : ndarray of shape (n_windows, window, n_embd), dtype=float32

    Returns
    -------
    ndarray of shape (n_windows, window, n_embd), dtype=float32
    """
    i, is_mlp = divmod(half, 2)
    y = np.empty_like(x)
    for part in parts(x):
        n_windows, window, n_embd = x[part].shape
        tokens = x[part].reshape(-1, n_embd)  # [n_tokens, n_embd]
        normed = layers.layer_norm(weights, f"h.{i}.ln_{1 + is_mlp}", tokens, config.layer_norm_epsilon)
        if is_mlp:
            out = layers.mlp(weights, config, i, normed)
        else:
            k, v = (F32Store((n_windows, config.n_head[i], window, config.head_dim)) for _ in range(2))
            batch = [(slice(s * window, (s + 1) * window), s, 0) for s in range(n_windows)]
            out = layers.attention(weights, config, i, normed, k, v, batch)
        y[part] = (tokens + out).reshape(x[part].shape)
    let_go(weights, half)
    return y


def written_from(weights: Weights, config: Config, half: int, x: Floats) -> Floats:
    """Return what the map multiplies with which a half of a block writes: [n_windows, window, n_embd] -> [n, n_in]."""
    name, found = f"{linears(half)[1]}.weight", []  # type: str, list[Floats]
    weight = weights[name]
    run_half({**weights, name: Tap(weight.encoding, weight.shape, weight.parts, found.append, False)}, config, half, x)
    return np.concatenate(found)


def let_go(weights: Weights, half: int) -> None:
    """Let the matrices of half a block leave memory as far as a file holds them."""
    for linear in linears(half):
        weights[f"{linear}.weight"].let_go()


def run_block(weights: Weights, config: Config, i: int, x: Floats) -> Floats:
    """Run block `i` on windows: [n_windows, window, n_embd] -> the same."""
    return run_half(weights, config, 2 * i + 1, run_half(weights, config, 2 * i, x))


def parts(x: Floats) -> Iterator[slice]:
    """Yield the windows in groups that go through a block together."""
    step = max(1, BLOCK_TOKENS // x.shape[1])
    for begin in range(0, len(x), step):
        yield slice(begin, begin + step)


def residuals(checkpoint: Checkpoint, windows: Ids) -> Iterator[Floats]:
    """Yield the residual stream before each half of each block and after the last: 2 n_layer + 1 times."""
    x = embed(checkpoint, windows)
    for half in range(2 * checkpoint.config.n_layer):
        yield x
        x = run_half(checkpoint.weights, checkpoint.config, half, x)
    yield x


def by_layer(
    checkpoint: Checkpoint,
    calibration: Calibration,
    change: Callable[[int, Weights, Mapping[str, Statistics]], Changes],
    grams: bool = True,
) -> Checkpoint:
    """Change a model block by block, each seeing what the blocks before it have become.

    Parameters
    ----------
    checkpoint : Checkpoint
    calibration : Calibration
        Its fitting half runs through the model.
    change : callable
        `change(i, weights, statistics)` gets all tensors as they are now and the statistics of the inputs of
        block i's linear maps, by names such as h.0.mlp.c_fc. It returns what changes, by full name.
    grams : bool
        Whether the statistics have `gram`.
    """
    x = embed(checkpoint, calibration.fitting(checkpoint))
    for i in range(checkpoint.config.n_layer):
        calibration.progress(f"layer {i + 1} of {checkpoint.config.n_layer}")
        weights = checkpoint.weights
        names = [f"h.{i}.{linear}" for linear in LINEARS]
        statistics = {name: Statistics(weights[f"{name}.weight"].shape[1], grams) for name in names}
        y = run_block(tapped(weights, {n: s.add for n, s in statistics.items()}), checkpoint.config, i, x)
        if changes := change(i, weights, statistics):
            checkpoint = updated(checkpoint, changes)
            y = run_block(checkpoint.weights, checkpoint.config, i, x)
        x = y
    return checkpoint


def collect(checkpoint: Checkpoint, calibration: Calibration, grams: bool = False) -> dict[str, Statistics]:
    """Return the statistics of all linear maps of all blocks, the model left as it is."""
    found: dict[str, Statistics] = {}

    def remember(i: int, weights: Weights, statistics: Mapping[str, Statistics]) -> Changes:
        found.update(statistics)
        return {}

    by_layer(checkpoint, calibration, remember, grams)
    return found


def final_hidden(checkpoint: Checkpoint, windows: Ids) -> Floats:
    """Return what the head multiplies: [n_windows, window] -> [n_windows * window, n_embd]."""
    (x,) = deque(residuals(checkpoint, windows), maxlen=1)  # none of the earlier streams is kept
    return last_norm(checkpoint, x)


def last_norm(checkpoint: Checkpoint, x: Floats) -> Floats:
    """Apply the LayerNorm before the head to a stream: [n_windows, window, n_embd] -> [n_windows * window, n_embd]."""
    x = x.reshape(-1, x.shape[-1])
    return layers.layer_norm(checkpoint.weights, "ln_f", x, checkpoint.config.layer_norm_epsilon)


class Judge:
    """Says how well a model predicts some windows, and how far it is from a reference that it has seen once.

    Parameters
    ----------
    reference : Checkpoint
        Only its last hidden states and its head are kept.
    windows : ndarray of shape (n_windows, window + 1), dtype=int64
        Inputs and, one later, targets.
    """

    def __init__(self, reference: Checkpoint, windows: Ids) -> None:
        self.windows = windows
        self._hidden = final_hidden(reference, windows[:, :-1])
        self._head = reference.weights["lm_head.weight"]

    def measure(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Return perplexity, bits_per_byte, kl (reference || model, nats a token) and top1 (agreement)."""
        hidden, targets = final_hidden(checkpoint, self.windows[:, :-1]), self.windows[:, 1:].ravel()
        head = checkpoint.weights["lm_head.weight"]
        nll = kl = agreed = 0.0
        for part in self.parts():
            log_p = log_softmax(head.matmul(hidden[part]))  # [n, vocab_size]
            log_q = self.expected(part)
            nll -= float(log_p[np.arange(len(log_p)), targets[part]].sum(dtype=np.float64))
            agreed += float((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
            kl += divergence(log_q, log_p)
        for weight in (head, self._head):
            weight.let_go()
        n = len(targets)
        return {
            "perplexity": math.exp(min(nll / n, 700.0)),
            "bits_per_byte": nll / math.log(2) / max(n_bytes(checkpoint.vocabulary, targets), 1),
            "kl": kl / n,
            "top1": agreed / n,
        }

    def parts(self) -> Iterator[slice]:
        """Yield the tokens in groups that go through the head together."""
        for begin in range(0, len(self._hidden), HEAD_TOKENS):
            yield slice(begin, begin + HEAD_TOKENS)

    def expected(self, part: slice) -> Floats:
        """Return the reference's log-probabilities: [n, vocab_size]."""
        return log_softmax(self._head.matmul(self._hidden[part]))


def divergence(log_q: Floats, log_p: Floats) -> float:
    """Return the KL of p from q, nats summed over tokens, of log-probabilities [n, vocab_size]."""
    return float(np.einsum("nv,nv->n", np.exp(log_q), log_q - log_p).sum(dtype=np.float64))


def n_bytes(vocabulary: Vocabulary, ids: Ids) -> int:
    """Return how many bytes of text the tokens stand for; special tokens stand for none."""
    lengths = np.diff(vocabulary.token_ends.astype(np.int64), prepend=0)  # [vocab_size]
    lengths[list(vocabulary.special_tokens.values())] = 0
    return int(lengths[ids].sum())
