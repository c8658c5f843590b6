"""How well a model predicts a text: perplexity, bits per byte, and the distance to a reference model.

The protocol. Documents are encoded one by one, each followed by the end-of-text token, and joined. Windows of
`context` inputs and as many targets (each input's next token) start every `stride` tokens; an incomplete last
window is dropped, unless it is the only one. A window scores its last `stride` targets (the first window: all),
so each target counts once. Perplexity is exp of the mean negative log-likelihood of the targets, in float32. Low and
high are the bounds of a 95 % confidence interval: the percentile bootstrap over windows, always the same resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Vocabulary
from minigpt.errors import MinigptError, OptionError
from minigpt.model import GPT2
from minigpt.sampling import log_softmax
from minigpt.tokenizer import Tokenizer

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

RESAMPLES = 1000  # of the bootstrap
LARGEST_NLL = 700.0  # nats, whose exp is still a number


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes
    ----------
    perplexity : float
        exp(nll).
    nll : float
        Mean negative log-likelihood of a target, nats.
    bits_per_byte : float or None
        Bits for all targets over the bytes of text that they stand for (end-of-text stands for none):
        comparable between models of different vocabularies. None if there are no such bytes.
    tokens : int
        Number of targets.
    context, stride : int
        Of the windows, in tokens.
    kl : float or None
        Mean Kullback-Leibler divergence KL(reference || model) of the next token, nats.
    top1 : float or None
        Share of targets for which both models find the same token the likeliest.
    perplexity_low, perplexity_high, bits_per_byte_low, bits_per_byte_high : float or None
        Bounds of the confidence intervals. None if there are less than two windows.
    windows : ndarray of shape (n_windows, 3), dtype=float64
        Negative log-likelihood (nats), targets and bytes of each window.
    """

    perplexity: float
    nll: float
    bits_per_byte: float | None
    tokens: int
    context: int
    stride: int
    kl: float | None = None
    top1: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    bits_per_byte_low: float | None = None
    bits_per_byte_high: float | None = None
    windows: Doubles = field(default_factory=lambda: np.empty((0, 3)), repr=False, compare=False)


def read_documents(path: str | PathLike[str]) -> list[str]:
    """Read a plain text file as one document, or `.jsonl` with one {"text": ...} a line.

    Raises
    ------
    MinigptError
        If the file cannot be read, is not UTF-8, or a line is not such an object.
    """
    name = repr(str(path))
    try:
        text = Path(path).read_bytes().decode("utf-8")  # as it is: line ends count as bytes, too
    except OSError as error:
        raise MinigptError(f"cannot read the text {name}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise MinigptError(f"{name} is not UTF-8 (byte {error.start}); convert it to UTF-8 first") from None
    if Path(path).suffix not in (".jsonl", ".ndjson"):
        return [text]
    documents = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # JSON may hold other line ends
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            document = None
        if not isinstance(document, str):
            raise MinigptError(f'line {number} of {name} is not of the form {{"text": "..."}}; correct it')
        documents.append(document)
    return documents


def encode_documents(tokenizer: Tokenizer, documents: list[str], eos_token_id: int | None) -> Ids:
    """Encode documents, each followed by the end-of-text token where the model has one: [n_tokens]."""
    end = [] if eos_token_id is None else [eos_token_id]
    return np.array([i for text in documents for i in [*tokenizer.encode(text), *end]], np.int64)


def evaluate(
    model: GPT2,
    ids: Ids,
    vocabulary: Vocabulary,
    *,
    context: int | None = None,
    stride: int | None = None,
    reference: GPT2 | None = None,
    max_tokens: int | None = None,
) -> Evaluation:
    """Measure a model on encoded text.

    Parameters
    ----------
    model : GPT2
    ids : ndarray of shape (n_tokens,), dtype=int64
        From `encode_documents`.
    vocabulary : Vocabulary
        Of the model; gives the bytes of each token.
    context : int, optional
        Inputs per window; by default the model's positions.
    stride : int, optional
        Tokens between the starts of two windows; by default `context`, so that windows do not overlap.
    reference : GPT2, optional
        A model with the same vocabulary to compare the predictions with.
    max_tokens : int, optional
        Use only so many tokens from the beginning.

    Raises
    ------
    OptionError
        If context or stride is out of range, the text is shorter than two tokens, or the vocabularies differ.
    """
    ids = ids if max_tokens is None else ids[: max_tokens + 1]
    return evaluate_together([model], ids, vocabulary, context=context, stride=stride, reference=reference)[0]


def evaluate_together(
    models: Sequence[GPT2],
    ids: Ids,
    vocabulary: Vocabulary,
    *,
    context: int | None = None,
    stride: int | None = None,
    reference: GPT2 | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Evaluation]:
    """Measure models of one vocabulary side by side, the reference computing its part once for all of them.

    Parameters
    ----------
    models : sequence of GPT2
        The reference may be among them.
    progress : callable
        Is told which window is at hand.
    ids, vocabulary, context, stride, reference
        As in `evaluate`; the context by default the positions that all models have.

    Raises
    ------
    OptionError
        As `evaluate`.
    """
    others = [] if reference is None or any(reference is model for model in models) else [reference]
    limit = min(model.config.n_positions for model in [*models, *others])
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise OptionError(f"context must be in 1..{limit}, not {context}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise OptionError(f"stride must be in 1..{context} (the context), not {stride}")
    for model in models:
        if reference is not None and reference.config.vocab_size != model.config.vocab_size:
            raise OptionError(
                f"the reference has {reference.config.vocab_size} tokens, the model {model.config.vocab_size}; "
                "KL needs one vocabulary"
            )
    if len(ids) < 2:
        raise OptionError(f"a text of {len(ids)} tokens has nothing to predict; give at least two tokens")

    lengths = np.diff(vocabulary.token_ends, prepend=0)  # [vocab_size], bytes of each token
    lengths[list(vocabulary.special_tokens.values())] = 0
    everyone = [*models, *others]
    compared = next((i for i, model in enumerate(everyone) if model is reference), None)
    windows = list(_windows(ids, context, stride))
    sums = np.zeros((len(models), len(windows), 3))  # nll, targets and bytes of each window
    kl, agreed = np.zeros(len(models)), np.zeros(len(models))
    for number, (inputs, targets, first_scored) in enumerate(windows):
        progress(f"window {number + 1} of {len(windows)}")
        done = 0
        for streams in zip(*(model.logits(inputs) for model in everyone), strict=True):
            scored = slice(max(first_scored - done, 0), len(streams[0]))
            wanted = targets[done : done + len(streams[0])][scored]  # [n]
            for i, logits in enumerate(streams[: len(models)]):
                sums[i, number] += _nll(logits[scored], wanted), len(wanted), lengths[wanted].sum()
            if compared is not None:
                log_q = log_softmax(streams[compared][scored])  # [n, vocab_size]
                q, best = np.exp(log_q), log_q.argmax(axis=1)
                for i, logits in enumerate(streams[: len(models)]):
                    log_p = log_softmax(logits[scored])
                    kl[i] += float((q * (log_q - log_p)).sum(dtype=np.float64))
                    agreed[i] += int((best == log_p.argmax(axis=1)).sum())
            done += len(streams[0])
    protocol = min(context, len(ids) - 1), min(stride, len(ids) - 1)
    distances = [(None, None) if reference is None else pair for pair in zip(kl, agreed, strict=True)]
    return [_evaluation(windows, *protocol, *pair) for windows, pair in zip(sums, distances, strict=True)]


def _evaluation(windows: Doubles, context: int, stride: int, kl: float | None, agreed: float | None) -> Evaluation:
    """Sum up the windows [n_windows, 3] of a model."""
    nll, n_tokens, n_bytes = windows.sum(axis=0)
    low, high, bits_low, bits_high = None, None, None, None
    if len(windows) > 1:
        drawn = resampled(windows)  # [RESAMPLES, 3]
        low, high = (math.exp(min(bound, LARGEST_NLL)) for bound in interval(drawn[:, 0] / drawn[:, 1]))
        if drawn[:, 2].all():
            bits_low, bits_high = interval(drawn[:, 0] / np.log(2) / drawn[:, 2])
    return Evaluation(
        perplexity=math.exp(min(nll / n_tokens, LARGEST_NLL)),
        nll=nll / n_tokens,
        bits_per_byte=nll / math.log(2) / n_bytes if n_bytes else None,
        tokens=int(n_tokens),
        context=context,
        stride=stride,
        kl=None if kl is None else float(kl / n_tokens),
        top1=None if agreed is None else float(agreed / n_tokens),
        perplexity_low=low,
        perplexity_high=high,
        bits_per_byte_low=bits_low,
        bits_per_byte_high=bits_high,
        windows=windows,
    )


def resampled(windows: Doubles) -> Doubles:
    """Return sums [RESAMPLES, ...] over as many windows [n_windows, ...], drawn with replacement, always the same."""
    n = len(windows)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # [RESAMPLES, n_windows]
    sums: Doubles = np.tensordot(times.astype(np.float64), windows, 1)
    return sums


def interval(values: Doubles) -> tuple[float, float]:
    """Return the bounds between which 95 % of the values lie."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _windows(ids: Ids, context: int, stride: int) -> Iterator[tuple[Ids, Ids, int]]:
    """Yield inputs, targets and the index of the first target that counts."""
    context = min(context, len(ids) - 1)
    for begin in range(0, len(ids) - context, stride):
        window = ids[begin : begin + context + 1]
        yield window[:-1], window[1:], 0 if begin == 0 else context - min(stride, context)


def _nll(logits: Floats, targets: Ids) -> float:
    """Sum -log softmax over the targets, with one pass of exp over [n, vocab_size]."""
    peaks = logits.max(axis=1)
    sums = np.exp(logits - peaks[:, None]).sum(axis=1)
    return float((np.log(sums) + peaks - logits[np.arange(len(targets)), targets]).sum(dtype=np.float64))
