"""Steps that leave a smaller dense GPT-2: fewer layers, channels, heads, neurons, tokens or positions.

Every linear map has a bias, so the mean of what goes is put there for free. Making good what is lost beyond
the mean is the business of `heal`. Every result is an ordinary GPT-2, at most with layers of different
sizes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from minigpt import layers, reference
from minigpt.checkpoint import Checkpoint, Vocabulary
from minigpt.compress.calibration import (
    Calibration,
    Ids,
    Statistics,
    collect,
    divergence,
    embed,
    final_hidden,
    last_norm,
    let_go,
    required,
    residuals,
    run_block,
    run_half,
)
from minigpt.compress.heal import RIDGES, Regression, norm_of
from minigpt.compress.step import (
    Floats,
    choice,
    noted,
    number,
    step,
    switch,
    text,
    updated,
    whole,
    wholes,
)
from minigpt.encodings import Weight, encode
from minigpt.errors import OptionError
from minigpt.evaluate import read_documents
from minigpt.sampling import log_softmax
from minigpt.tokenizer import Tokenizer

GREEDY_TOKENS, GREEDY_PARTS, GREEDY_STRIDE = 2048, 4, 4  # of the text that the greedy search judges by
PASSAGE_TOKENS = 512  # longer documents count as several
LOGITS_TOKENS = 64  # whose probabilities are computed together: 13 MB


# ---- depth ---------------------------------------------------------------------------------------------------


def symmetric(checkpoint: Checkpoint, calibration: Calibration | None, n_layer: int) -> list[int]:
    """Take layers out of the centre: the first half stays, rounded up, and the last, rounded down."""
    n = checkpoint.config.n_layer
    return [*range(n_layer - n_layer // 2), *range(n - n_layer // 2, n)]


def angular(checkpoint: Checkpoint, calibration: Calibration | None, n_layer: int) -> list[int]:
    """Keep the layers that turn the stream most: mean 1 - cos(in, out) (ShortGPT, Men et al. 2024)."""
    x = embed(checkpoint, required(calibration, "depth by angle").fitting(checkpoint))
    turns = []
    for half in range(0, 2 * checkpoint.config.n_layer, 2):
        y = run_half(checkpoint.weights, checkpoint.config, half, x)
        y = run_half(checkpoint.weights, checkpoint.config, half + 1, y)
        lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)  # [n_windows, window]
        turns.append(1 - float((np.einsum("swc,swc->sw", x, y) / lengths).mean()))
        x = y
    return sorted(np.argsort(turns, kind="stable")[-n_layer:].tolist())


def greedy(checkpoint: Checkpoint, calibration: Calibration | None, n_layer: int) -> list[int]:
    """Drop one layer after the other, each time the one that moves the KL least (SLEB, Song et al. 2024).

    Two things are approximated. The KL is that of every fourth token, each with its whole context. And the text comes
    in four parts, after each of which the worse half of the candidates is out.
    """
    calibration = required(calibration, "depth by greedy search")
    windows = replace(calibration, n_tokens=GREEDY_TOKENS).fitting(checkpoint)
    groups = np.array_split(windows, min(GREEDY_PARTS, len(windows)))
    wanted = [final_hidden(checkpoint, group) for group in groups]
    head = checkpoint.weights["lm_head.weight"]

    def predicted(hidden: Floats) -> Floats:
        return log_softmax(head.matmul(hidden[::GREEDY_STRIDE]))

    kept = list(range(checkpoint.config.n_layer))
    while len(kept) > n_layer:
        calibration.progress(f"{len(kept)} layers left")
        kl = dict.fromkeys(kept, 0.0)  # of the candidates
        for group, target in zip(groups, wanted, strict=True):
            log_q = predicted(target)
            for gone, hidden in without_each(checkpoint, kept, kl, group):
                kl[gone] += divergence(log_q, predicted(hidden))
            best = sorted(kl, key=lambda gone: kl[gone])
            kl = {gone: kl[gone] for gone in best[: (len(best) + 1) // 2]}
        kept.remove(best[0])
    return kept


def without_each(
    checkpoint: Checkpoint, kept: Sequence[int], candidates: Collection[int], windows: Ids
) -> Iterator[tuple[int, Floats]]:
    """Yield each candidate and what the head multiplies in the model of the kept layers without it.

    The stream before a layer that is left out is that of all candidates after it, so it is computed once.
    """
    weights, config = checkpoint.weights, checkpoint.config
    x = embed(checkpoint, windows)  # [n_windows, window, n_embd]
    for place, layer in enumerate(kept):
        if layer in candidates:
            y = x
            for later in kept[place + 1 :]:
                y = run_block(weights, config, later, y)
            yield layer, last_norm(checkpoint, y)
        x = run_block(weights, config, layer, x)


DEPTH_METHODS: dict[str, Callable[[Checkpoint, Calibration | None, int], list[int]]]
DEPTH_METHODS = {"symmetric": symmetric, "angular": angular, "greedy": greedy}


@step(n_layer=whole(1), layers=wholes(0), method=choice(DEPTH_METHODS), fold=switch())
def depth(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    n_layer: int | None = None,
    layers: Sequence[int] | None = None,
    method: str = "symmetric",
    fold: bool = False,
) -> Checkpoint:
    """Keep n_layer layers chosen by a method, or the listed layers.

    With `fold`, a linear map takes the place of each removed span, folded into the layer before it.
    """
    n = checkpoint.config.n_layer
    if (n_layer is None) == (layers is None):
        raise OptionError("depth takes either n_layer or the layers to keep, not both and not neither")
    if n_layer is not None and n_layer > n:
        raise OptionError(f"n_layer must be in 1..{n}, not {n_layer}")
    kept = DEPTH_METHODS[method](checkpoint, calibration, n_layer) if n_layer else list(layers or ())
    if sorted(set(kept)) != kept or kept[-1] >= n:
        raise OptionError(f"layers must be ascending numbers in 0..{n - 1}, not {'+'.join(map(str, kept))}")
    result = keep_layers(checkpoint, kept)
    if fold:
        result = fold_spans(checkpoint, result, kept, required(calibration, "folding removed layers"))
    return noted(result, layers=kept)


def keep_layers(checkpoint: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """Return a model of the listed layers, in that order."""
    changes: dict[str, NDArray[np.floating] | Weight] = {}
    for new, old in enumerate(kept):
        prefix = f"h.{old}."
        tensors = {name: w for name, w in checkpoint.weights.items() if name.startswith(prefix)}
        changes |= {f"h.{new}.{name.removeprefix(prefix)}": w for name, w in tensors.items()}
    scales = tuple(checkpoint.config.attn_scale[i] for i in kept)
    return updated(checkpoint, changes, n_layer=len(kept), attn_scale=scales)


def fold_spans(checkpoint: Checkpoint, cut: Checkpoint, kept: Sequence[int], calibration: Calibration) -> Checkpoint:
    """Let the MLP before each removed span write, through an affine map, what the span would have written too.

    ReplaceMe (Shopkhoev et al. 2025): out' = T out + t, by least squares, folded into mlp.c_proj. Affine,
    because GPT-2's maps have biases. A span at the very beginning has no layer before it and stays removed.
    """
    windows = calibration.fitting(checkpoint)
    whole_streams = residuals(checkpoint, windows)
    x, passed = embed(cut, windows), -1
    for i, following in enumerate([*kept[1:], checkpoint.config.n_layer]):
        middle = run_half(cut.weights, cut.config, 2 * i, x)
        x = run_half(cut.weights, cut.config, 2 * i + 1, middle)
        if following == kept[i] + 1:
            continue
        while passed < 2 * following:
            target, passed = next(whole_streams), passed + 1
        out, missing = x - middle, target - middle  # [n_windows, window, n_embd]
        n_embd = x.shape[-1]
        regression = Regression(n_embd, n_embd)
        regression.add(out.reshape(-1, n_embd), missing.reshape(-1, n_embd))
        t, shift = regression.solve(np.eye(n_embd, dtype=np.float32), RIDGES[0])
        name = f"h.{i}.mlp.c_proj"
        w, bias = (cut.weights[f"{name}.{part}"].decode() for part in ("weight", "bias"))
        cut = updated(cut, {f"{name}.weight": t @ w, f"{name}.bias": t @ bias + shift})
        x = middle + out @ t.T + shift
    return cut


# ---- width ---------------------------------------------------------------------------------------------------


def keep_energetic(checkpoint: Checkpoint, calibration: Calibration | None, n_embd: int) -> Checkpoint:
    """Keep the channels that embedding and blocks write most into, times the gain of the last LayerNorm."""
    weights = checkpoint.weights
    writers = [name for name in weights if name.endswith("c_proj.weight")]
    energies = [np.square(weights["wte.weight"].decode()).mean(axis=0)]
    energies += [np.square(weights[name].decode()).mean(axis=1) for name in writers]
    energy = sum(e / e.mean() for e in energies) * np.abs(layers.vector(weights, "ln_f.weight"))  # [n_embd]
    kept = np.sort(np.argsort(-energy, kind="stable")[:n_embd])
    changes = {}
    for name, weight in weights.items():
        if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight", "c_attn.weight", "c_fc.weight")):
            changes[name] = weight.decode()[:, kept]
        elif not name.endswith(("c_attn.bias", "c_fc.bias")):
            changes[name] = weight.decode()[kept]
    if checkpoint.tied:
        del changes["lm_head.weight"]
    return updated(checkpoint, changes, n_embd=n_embd)


def rotate(checkpoint: Checkpoint, calibration: Calibration | None, n_embd: int, untie: bool = True) -> Checkpoint:
    """Rotate the residual stream to its principal directions and keep the first n_embd - 1 (SliceGPT's idea).

    SliceGPT (Ashkboos et al. 2024) needs RMSNorm and, between blocks, extra matrices; here the result is a
    plain GPT-2. Every reader of the stream is a LayerNorm, which does not see the stream's mean. So the
    directions are sought among those orthogonal to the ones vector; in the new space, too, the ones
    direction stays empty, and LayerNorm's mean subtraction does nothing, exactly. The stream is scaled by
    sqrt(n_embd / old) so that epsilon keeps its weight; gains go into the maps that read, and what
    LayerNorm's length misses of the dropped directions comes back, on average, as a constant gain. At full
    width all this is exact.

    The head's bias-like part (ln_f.bias through the head) goes through the free ones direction. The gain of
    ln_f makes head and table two matrices (`untie`); a head that stays tied uses the mean gain, an
    approximation.
    """
    weights, old = checkpoint.weights, checkpoint.config.n_embd
    windows = required(calibration, "width by principal directions").fitting(checkpoint)
    places = 2 * checkpoint.config.n_layer + 1
    means, covariance = np.zeros((places, old)), np.zeros((old, old))
    for place, x in enumerate(normalized(checkpoint, windows)):
        means[place] = x.mean(axis=0)
        covariance += (x.T @ x) / len(x) - np.outer(means[place], means[place])
    ones = np.full((old, old), np.trace(covariance) / old)  # puts the ones direction last
    directions = np.linalg.eigh(covariance - ones)[1][:, ::-1][:, : n_embd - 1]  # [old, n_embd - 1]
    angles = np.pi / n_embd * np.outer(np.arange(n_embd) + 0.5, np.arange(1, n_embd))
    even = np.sqrt(2 / n_embd) * np.cos(angles)  # [n_embd, n_embd - 1], orthonormal and orthogonal to ones
    basis = (directions @ even.T).astype(np.float32)  # [old, n_embd]
    scale = np.float32(np.sqrt(n_embd / old))

    shares = np.zeros(places)  # of LayerNorm's length, in the kept directions
    for place, x in enumerate(normalized(checkpoint, windows)):
        shares[place] = np.linalg.norm(x @ directions, axis=1).mean() / np.linalg.norm(x, axis=1).mean()
    lost = (means - means @ directions @ directions.T).astype(np.float32)  # [places, old], constant to readers

    changes: dict[str, NDArray[np.floating] | Weight] = {}  # encoded at once, as all together need much room
    for table in ("wte.weight", "wpe.weight"):
        changes[table] = encode(weights[table].decode() @ (basis * scale))
        weights[table].let_go()
    for place in range(places - 1):
        norm, half = norm_of(place, checkpoint.config.n_layer), f"h.{place // 2}"
        reader, writer = [("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")][place % 2]
        gain, bias = layers.vector(weights, f"{norm}.weight"), layers.vector(weights, f"{norm}.bias")
        w = weights[f"{half}.{reader}.weight"].decode()  # [n_out, old]
        changes[f"{norm}.weight"] = np.full(n_embd, shares[place] / scale)
        changes[f"{norm}.bias"] = np.zeros(n_embd)
        changes[f"{half}.{reader}.weight"] = encode(w @ (gain[:, None] * basis))
        shift = w @ (bias + gain * lost[place])
        changes[f"{half}.{reader}.bias"] = layers.vector(weights, f"{half}.{reader}.bias") + shift
        for part in ("weight", "bias"):
            changes[f"{half}.{writer}.{part}"] = encode(scale * basis.T @ weights[f"{half}.{writer}.{part}"].decode())
        let_go(weights, place)
    gain, bias = layers.vector(weights, "ln_f.weight"), layers.vector(weights, "ln_f.bias")
    constant = bias + gain * lost[-1]
    if untie or not checkpoint.tied:
        head = weights["lm_head.weight"].decode()
        turned = head @ (gain[:, None] * basis)
        turned += (head @ constant / n_embd)[:, None]
        weights["lm_head.weight"].let_go()  # before there is a third matrix of this size
        changes["lm_head.weight"] = encode(turned)
        changes["ln_f.weight"], changes["ln_f.bias"] = np.full(n_embd, shares[-1] / scale), np.ones(n_embd)
    else:
        changes["ln_f.weight"] = np.full(n_embd, gain.mean() * shares[-1] / scale**2)
        changes["ln_f.bias"] = constant @ basis / scale
    return updated(checkpoint, changes, n_embd=n_embd)


def normalized(checkpoint: Checkpoint, windows: Ids) -> Iterator[Floats]:
    """Yield the stream as each LayerNorm sees it, before gain and bias: [n_tokens, n_embd]."""
    one = np.ones(checkpoint.config.n_embd, np.float32)
    for x in residuals(checkpoint, windows):
        tokens = x.reshape(-1, len(one))
        yield reference.layer_norm(tokens, one, 0 * one, checkpoint.config.layer_norm_epsilon)


WIDTH_METHODS: dict[str, Callable[[Checkpoint, Calibration | None, int], Checkpoint]]
WIDTH_METHODS = {"energy": keep_energetic, "pca": rotate, "pca-tied": partial(rotate, untie=False)}


@step(n_embd=whole(2), method=choice(WIDTH_METHODS))
def width(
    checkpoint: Checkpoint, calibration: Calibration | None, *, n_embd: int, method: str = "energy"
) -> Checkpoint:
    """Narrow the residual stream to n_embd channels; heads and neurons stay.

    `pca` needs calibration text and stores the head beside the table: vocab_size * n_embd weights more.
    """
    if n_embd > checkpoint.config.n_embd:
        raise OptionError(f"n_embd must be in 2..{checkpoint.config.n_embd}, not {n_embd}")
    return WIDTH_METHODS[method](checkpoint, calibration, n_embd)


# ---- heads and neurons ---------------------------------------------------------------------------------------


def norm(into: Floats, out: Floats, statistics: Statistics | None) -> Floats:
    """Weight norms: |into a unit| * |out of it|."""
    lengths: Floats = np.linalg.norm(into, axis=(1, 2)) * np.linalg.norm(out, axis=(1, 2))
    return lengths


def wanda(into: Floats, out: Floats, statistics: Statistics | None) -> Floats:
    """Length of what a unit writes, its channels taken as independent (Wanda-sp)."""
    square = seen(statistics).square.reshape(out.shape[:2])  # [n_units, size]
    lengths: Floats = np.sqrt((square * np.square(out).sum(axis=2)).sum(axis=1))
    return lengths


def flap(into: Floats, out: Floats, statistics: Statistics | None) -> Floats:
    """Variance of what a unit writes: what its mean, put into the bias, leaves (FLAP, An et al. 2023)."""
    variance = seen(statistics).variance.reshape(out.shape[:2])  # [n_units, size]
    variances: Floats = (variance * np.square(out).sum(axis=2)).sum(axis=1)
    return variances


def seen(statistics: Statistics | None) -> Statistics:
    """Return the statistics of a unit's outputs, which some scores cannot do without."""
    if statistics is None:
        raise OptionError("this score looks at activations; give calibration text or use score=norm")
    return statistics


# (into and out of units [n_units, size, n_embd], statistics of their channels) -> [n_units]; the lowest go
SCORES: dict[str, Callable[[Floats, Floats, Statistics | None], Floats]]
SCORES = {"norm": norm, "wanda": wanda, "flap": flap}
SCOPES = ("layer", "global")


def counts(scores: Sequence[Floats], remove: float, scope: str, multiple: int) -> list[int]:
    """Return how many units each layer keeps: a multiple of `multiple`, or all of them, and at least one.

    With the scope `global` the layers compete by their scores in standard deviations from the layer's mean.
    """
    sizes = [len(s) for s in scores]
    shares = [(1 - remove) * n for n in sizes]
    if scope == "global":
        standard = [(s - s.mean()) / max(float(s.std()), 1e-30) for s in scores]
        best_first = np.sort(np.concatenate(standard))[::-1]
        threshold = best_first[max(round((1 - remove) * sum(sizes)), 1) - 1]
        shares = [float((s >= threshold).sum()) for s in standard]
    return [min(n, max(multiple * round(k / multiple), multiple)) for k, n in zip(shares, sizes, strict=True)]


@step(remove=number(0, 1), score=choice(SCORES), scope=choice(SCOPES))
def heads(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    remove: float,
    score: str = "flap",
    scope: str = "layer",
) -> Checkpoint:
    """Remove a share of the attention heads, of each layer or where they matter least."""
    head_dim = checkpoint.config.head_dim
    return cut_units(checkpoint, calibration, "attn.c_attn", "attn.c_proj", head_dim, remove, score, scope, 1)


@step(remove=number(0, 1), score=choice(SCORES), scope=choice(SCOPES), multiple=whole(1))
def neurons(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    remove: float,
    score: str = "flap",
    scope: str = "layer",
    multiple: int = 32,
) -> Checkpoint:
    """Remove a share of the MLP neurons, of each layer or where they matter least.

    What a layer keeps is a multiple of `multiple`, which suits vector units.
    """
    return cut_units(checkpoint, calibration, "mlp.c_fc", "mlp.c_proj", 1, remove, score, scope, multiple)


def cut_units(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    reader: str,
    writer: str,
    size: int,
    remove: float,
    score: str,
    scope: str,
    multiple: int,
) -> Checkpoint:
    """Remove units of `size` channels between two linear maps and put their mean into the second one's bias.

    Rows of `reader` come in groups of all units: one group of neurons, or the three of queries, keys and
    values, of which the last decides.
    """
    weights = checkpoint.weights
    statistics = {} if calibration is None else collect(checkpoint, calibration)
    scores = []
    for i in range(checkpoint.config.n_layer):
        out = weights[f"h.{i}.{writer}.weight"].decode().T  # [n_units * size, n_embd]
        into = weights[f"h.{i}.{reader}.weight"].decode()[-len(out) :]  # [n_units * size, n_embd]
        into, out = (w.reshape(-1, size, w.shape[1]) for w in (into, out))  # [n_units, size, n_embd]
        scores.append(SCORES[score](into, out, statistics.get(f"h.{i}.{writer}")))
    changes: dict[str, NDArray[np.floating] | Weight] = {}
    for i, n_kept in enumerate(counts(scores, remove, scope, multiple)):
        into_name, out_name = f"h.{i}.{reader}", f"h.{i}.{writer}"
        kept = np.sort(np.argsort(-scores[i], kind="stable")[:n_kept])
        gone = np.setdiff1d(np.arange(len(scores[i])), kept)
        channels, lost = ((units[:, None] * size + np.arange(size)).ravel() for units in (kept, gone))
        width = len(scores[i]) * size
        rows = np.arange(weights[f"{into_name}.weight"].shape[0]).reshape(-1, width)[:, channels].ravel()
        w = weights[f"{out_name}.weight"].decode()  # [n_embd, n_units * size]
        changes[f"{into_name}.weight"] = weights[f"{into_name}.weight"].decode()[rows]
        changes[f"{into_name}.bias"] = layers.vector(weights, f"{into_name}.bias")[rows]
        changes[f"{out_name}.weight"] = w[:, channels]
        if statistics:
            shift = w[:, lost] @ statistics[out_name].mean[lost]
            changes[f"{out_name}.bias"] = layers.vector(weights, f"{out_name}.bias") + shift
    return updated(checkpoint, changes)


# ---- vocabulary ----------------------------------------------------------------------------------------------


@step(size=whole(256), minimum=whole(1), corpus=text("a file of text"))
def vocabulary(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    size: int | None = None,
    minimum: int = 1,
    corpus: str | None = None,
) -> Checkpoint:
    """Keep the tokens that a corpus, by default the calibration text, uses; other text becomes longer.

    Bytes and special tokens stay. Of the others, the least used go until `size` are left, or without `size`
    those that fewer than `minimum` passages use. Merges are kept with them, so any text still encodes and decodes.
    If there is room for tokens that the corpus does not use, those come first that the model expects most in the
    calibration text; without one, those that were merged first.
    """
    if size is not None and size > checkpoint.config.vocab_size:
        raise OptionError(f"size must be in 256..{checkpoint.config.vocab_size}, not {size}")
    old = checkpoint.vocabulary
    if corpus is None:
        documents = list(required(calibration, "choosing tokens without a corpus").documents)
    else:
        documents = read_documents(corpus)
    uses, n_before = passages_with(Tokenizer(old), documents)
    if not n_before:
        raise OptionError("the corpus has no text; give one that shows what the model is for")
    wanted: NDArray[np.number] = uses
    if size is not None and calibration is not None and np.count_nonzero(uses) < size:
        wanted = uses + expected_tokens(checkpoint, calibration.fitting(checkpoint))
    kept = choose_tokens(checkpoint, wanted, minimum, size)
    result = keep_tokens(checkpoint, kept)
    _, n_after = passages_with(Tokenizer(result.vocabulary), documents)
    n_characters = sum(map(len, documents))
    ratios = {"before": n_before / n_characters, "after": n_after / n_characters}
    return noted(result, tokens=len(kept), tokens_per_character=ratios)


def passages_with(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[Ids, int]:
    """Count in how many passages each token occurs, and all tokens: [vocab_size] and their number.

    A word that one document repeats says less of the next document than one that many documents use.
    """
    passages, n_tokens = np.zeros(tokenizer.n_vocab, np.int64), 0
    for document in documents:
        ids = tokenizer.encode(document)
        n_tokens += len(ids)
        for begin in range(0, len(ids), PASSAGE_TOKENS):
            passages[list(set(ids[begin : begin + PASSAGE_TOKENS]))] += 1
    return passages, n_tokens


def expected_tokens(checkpoint: Checkpoint, windows: Ids) -> NDArray[np.float64]:
    """Return the mean probability that the model gives each token as the next one of a text: [vocab_size].

    It knows more words of its trade than a text uses; docs/compression has what that is worth.
    """
    hidden = final_hidden(checkpoint, windows)
    head, total = checkpoint.weights["lm_head.weight"], np.zeros(checkpoint.config.vocab_size)
    for begin in range(0, len(hidden), LOGITS_TOKENS):
        total += reference.softmax(head.matmul(hidden[begin : begin + LOGITS_TOKENS])).sum(axis=0)
    return total / len(hidden)


def choose_tokens(checkpoint: Checkpoint, uses: NDArray[np.number], minimum: int, size: int | None) -> Ids:
    """Return the ids to keep, ascending: byte-pair encoding run backwards.

    Of the tokens that no other kept token is made of, the least used goes, later merges first. Its uses become uses
    of its two halves, which costs a token each. So what is left can always be merged from bytes.

    Parameters
    ----------
    checkpoint : Checkpoint
    uses : ndarray of shape (vocab_size,)
        How much the corpus uses each token.
    minimum : int
        Without `size`, tokens go until each has so many uses.
    size : int, optional
        How many to keep.

    Raises
    ------
    OptionError
        If `size` is too small for the bytes and special tokens.
    """
    old = checkpoint.vocabulary
    fixed = {id for id, token in enumerate(vocabulary_tokens(old)) if len(token) == 1}
    fixed |= {*old.special_tokens.values(), checkpoint.config.eos_token_id} - {None}  # type: ignore[arg-type]
    if size is not None and size < len(fixed):
        raise OptionError(f"size must be at least {len(fixed)}, the bytes and special tokens, not {size}")
    halves: dict[int, list[int]] = {}  # two, or more where several merges make one token
    for token, pair in zip(merge_results(old).tolist(), old.merges.tolist(), strict=True):
        halves.setdefault(token, []).extend(pair)
    rank = {token: order for order, token in enumerate(halves)}
    needed = Counter(half for pair in halves.values() for half in pair)  # to make how many others
    count, kept = uses.tolist(), set(range(len(uses)))
    leaves = [(count[id], -rank.get(id, 0), id) for id in kept - fixed if not needed[id]]
    heapq.heapify(leaves)
    while leaves and (leaves[0][0] < minimum if size is None else len(kept) > size):
        *_, token = heapq.heappop(leaves)
        kept.remove(token)
        for half in halves.get(token, []):
            count[half] += count[token]
            needed[half] -= 1
            if not needed[half] and half not in fixed:
                heapq.heappush(leaves, (count[half], -rank.get(half, 0), half))
    return np.array(sorted(kept), np.int64)


def keep_tokens(checkpoint: Checkpoint, kept: Ids) -> Checkpoint:
    """Return a model of the listed tokens, renumbered: the same logits for them after the same text.

    Merges stay where both halves and the result do, so text whose tokens were all kept is encoded as before.
    """
    old, config = checkpoint.vocabulary, checkpoint.config
    new_ids = np.full(len(old), -1, np.int64)
    new_ids[kept] = np.arange(len(kept))
    merges = new_ids[old.merges.astype(np.int64)]  # [n_merges, 2]
    whole_merges = (merges >= 0).all(axis=1) & (new_ids[merge_results(old)] >= 0)
    all_tokens = vocabulary_tokens(old)
    tokens = [all_tokens[id] for id in kept]
    new = Vocabulary(
        token_bytes=np.frombuffer(b"".join(tokens), np.uint8),
        token_ends=np.cumsum([len(token) for token in tokens], dtype=np.uint32),
        merges=merges[whole_merges].astype(np.uint32),
        special_tokens={text: int(new_ids[id]) for text, id in old.special_tokens.items()},
    )
    tables = ("wte.weight",) if checkpoint.tied else ("wte.weight", "lm_head.weight")
    changes = {name: checkpoint.weights[name].rows(kept) for name in tables}
    eos = None if config.eos_token_id is None else int(new_ids[config.eos_token_id])
    return updated(checkpoint, changes, vocabulary=new, vocab_size=len(kept), eos_token_id=eos)


def vocabulary_tokens(vocabulary: Vocabulary) -> list[bytes]:
    """Return the bytes of each token."""
    bounds, blob = [0, *vocabulary.token_ends.tolist()], vocabulary.token_bytes.tobytes()
    return [blob[begin:end] for begin, end in pairwise(bounds)]


def merge_results(vocabulary: Vocabulary) -> Ids:
    """Return the id that each merge makes: [n_merges]."""
    tokens, special = vocabulary_tokens(vocabulary), set(vocabulary.special_tokens.values())
    ids = {token: id for id, token in enumerate(tokens) if id not in special}
    return np.array([ids[tokens[left] + tokens[right]] for left, right in vocabulary.merges.tolist()], np.int64)


# ---- context -------------------------------------------------------------------------------------------------


@step(n_positions=whole(1))
def context(checkpoint: Checkpoint, calibration: Calibration | None, *, n_positions: int) -> Checkpoint:
    """Keep the first n_positions positions: the longest text that the model can see."""
    if n_positions > checkpoint.config.n_positions:
        raise OptionError(f"n_positions must be in 1..{checkpoint.config.n_positions}, not {n_positions}")
    positions = checkpoint.weights["wpe.weight"].rows(slice(n_positions))
    return updated(checkpoint, {"wpe.weight": positions}, n_positions=n_positions)
