"""Storing matrices in fewer bits: which grid, how to round to it, which matrix in which encoding.

Rounding is a row of `METHODS`, moving the difficulty out of a matrix beforehand one of `FOLDS`; both combine. Both
take arrays. Which zeros there are is none of this module's business (`prune.py`); it only keeps them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import POSITIONS, TABLES, Checkpoint
from minigpt.compress.calibration import (
    Calibration,
    Judge,
    Statistics,
    Weights,
    by_layer,
    collect,
    required,
)
from minigpt.compress.step import choice, noted, number, step, switch, text, updated
from minigpt.compress.sweep import sweep
from minigpt.compress.walk import Seen, by_linear, is_pruned
from minigpt.encodings import ENCODINGS, Encoding, Grid, OnGrid, Weight, encode
from minigpt.errors import OptionError

Floats = NDArray[np.float32]

LOSSLESS = ("bitmap_int8", "nm_int8", "block_int8")  # other ways of storing the codes of int8

# ---------------------------------------------------------------------------------------------------------------------
# Rounding: (w [n_out, n_in], gram or covariance of the inputs [n_in, n_in], encoding, symmetric) -> Weight
# ---------------------------------------------------------------------------------------------------------------------


def store(w: Floats, grid: Grid, encoding: OnGrid) -> Weight:
    """Round w [n_out, n_in] to the nearest points of a grid."""
    return Weight(encoding, w.shape, encoding.encode_on(grid, w))


def rtn(w: Floats, gram: Floats | None, encoding: OnGrid, symmetric: bool = False) -> Weight:
    """Round to nearest on the grid that spans each group."""
    return store(w, encoding.grid(w, symmetric), encoding)


def gptq(w: Floats, gram: Floats, encoding: OnGrid, symmetric: bool = False, act_order: bool = False) -> Weight:
    """Round column after column, the later ones making up for the errors of the earlier ones (Frantar et al. 2022)."""
    return sweep(
        w, gram, kept=w != 0 if is_pruned(w) else None, encoding=encoding, symmetric=symmetric, act_order=act_order
    ).encoded(encoding)


def hqq(
    w: Floats,
    gram: Floats | None,
    encoding: OnGrid,
    symmetric: bool = False,
    rounds: int = 20,
    p: float = 0.7,
) -> Weight:
    """Shift the grid so that outliers pull less: half-quadratic quantization (Badri and Shaji 2023), without data.

    Minimizes sum |w - round(w)|^p over the minimum of each group by splitting off sparse errors e: e is the
    generalized soft threshold of w - round(w), the minimum the mean of what is left. Where zero must stay on the grid
    there is nothing to shift, and this is `rtn`.
    """
    grid = encoding.grid(w, symmetric)
    if symmetric or not grid.minimums.any():
        return store(w, grid, encoding)
    n_in, width = w.shape[1], encoding.group or w.shape[1]
    groups = np.pad(w, ((0, 0), (0, -n_in % width)), mode="edge").reshape(len(w), -1, width)
    scales = grid.scales[..., None]
    minimums = best = grid.minimums[..., None]  # [n_out, n_groups, 1]
    smallest = np.full_like(minimums, np.inf)
    beta = np.float32(10) / np.maximum(np.square(groups).mean(), np.float32(1e-12))
    for _ in range(rounds):
        rounded = encoding.round(groups, scales, minimums) * scales
        residual = groups - rounded - minimums
        norm = (np.abs(residual) ** p).sum(axis=2, keepdims=True)
        best, smallest = np.where(norm < smallest, minimums, best), np.minimum(norm, smallest)
        size = np.abs(residual)
        threshold = np.maximum(size, np.float32(1e-8)) ** (p - 1) / beta
        sparse = np.sign(residual) * np.maximum(size - threshold, 0)
        minimums = (groups - sparse - rounded).mean(axis=2, keepdims=True)
        minimums = minimums.astype(np.float16).astype(np.float32)
        beta *= np.float32(1.01)
    return store(w, Grid(grid.scales, best[..., 0]), encoding)


METHODS: dict[str, Callable[..., Weight]] = {
    "rtn": rtn,
    "gptq": gptq,
    "gptq-act-order": partial(gptq, act_order=True),
    "hqq": hqq,
}

# ---------------------------------------------------------------------------------------------------------------------
# Folding: (w, gram, absmax, encoding, symmetric) -> s [n_in]: the inputs are divided, the columns multiplied
# ---------------------------------------------------------------------------------------------------------------------

STRENGTHS = np.linspace(0, 1, 21)[:-1]


def awq(w: Floats, gram: Floats, absmax: Floats, encoding: OnGrid, symmetric: bool = False) -> Floats:
    """Give columns with large inputs a finer grid, as much as pays (AWQ, Lin et al. 2023).

    The scale is the root mean square of the input to a power that is searched for, by the error of the product. (The
    paper has the mean magnitude in place of the root mean square.)
    """
    size = np.sqrt(np.maximum(np.diagonal(gram), 1e-12))
    tried = []
    for strength in STRENGTHS:
        s = _centred(size**strength)
        error = rtn(w * s, None, encoding, symmetric).decode() / s - w
        tried.append((float(np.einsum("oi,oi->", error @ gram, error)), strength))
    return _centred(size ** min(tried)[1])


def smoothquant(
    w: Floats, gram: Floats, absmax: Floats, encoding: OnGrid, symmetric: bool = False, strength: float = 0.5
) -> Floats:
    """Balance the largest inputs with the largest weights of each column (SmoothQuant, Xiao et al. 2022)."""
    largest = np.maximum(np.abs(w).max(axis=0), np.float32(1e-5))
    return _centred(np.maximum(absmax, 1e-5) ** strength / largest ** (1 - strength))


def _centred(s: Floats) -> Floats:
    """Let the smallest and the largest scale be each other's inverse."""
    return np.asarray(s / np.sqrt(s.max() * s.min()), np.float32)


FOLDS: dict[str, Callable[..., Floats]] = {"awq": awq, "smoothquant": smoothquant}


def fold(weights: Mapping[str, Floats], i: int, linear: str, s: Floats) -> dict[str, Floats]:
    """Divide the inputs of a linear map by s [n_in] and multiply its columns: the model stays the same function.

    The inputs of c_attn and c_fc come from a LayerNorm, whose gain and bias are divided; those of attn.c_proj are
    weighted sums of values, whose rows of c_attn are. Those of mlp.c_proj come from GELU: no factor passes there.

    Parameters
    ----------
    weights : mapping of str to ndarray
        Decoded tensors, of block `i` at least.
    """
    name = f"h.{i}.{linear}.weight"
    changed = {name: weights[name] * s}
    if linear == "attn.c_proj":
        for source in (f"h.{i}.attn.c_attn.weight", f"h.{i}.attn.c_attn.bias"):
            rows = weights[source].copy()
            rows[-len(s) :] /= s[:, None] if rows.ndim == 2 else s
            changed[source] = rows
    else:
        norm = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}[linear]
        changed |= {f"h.{i}.{norm}.{part}": weights[f"h.{i}.{norm}.{part}"] / s for part in ("weight", "bias")}
    return changed


FOLDED = ("attn.c_proj", "attn.c_attn", "mlp.c_fc")  # the values first: that changes rows of c_attn

# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


def rounded(
    w: Floats, gram: Floats | None, encoding: str, method: str = "rtn", symmetric: bool | None = None
) -> tuple[Weight, str]:
    """Store a matrix in an encoding, or plainly where that is smaller, and say why if it is not the one asked for.

    Parameters
    ----------
    w : ndarray of shape (n_out, n_in), dtype=float32
    gram : ndarray of shape (n_in, n_in), dtype=float32, optional
        For the methods that need one.
    encoding : str
        A key of `ENCODINGS`, or "sparse": the smallest form of the codes of int8.
    method : str
        A key of `METHODS`; encodings without a grid have one way to encode.
    symmetric : bool, optional
        Whether zero is on the grid; by default for pruned matrices, so that their zeros stay zeros.
    """
    kind = ENCODINGS["int8" if encoding == "sparse" else encoding]
    if isinstance(kind, OnGrid):
        weight = METHODS[method](w, gram, kind, symmetric=is_pruned(w) if symmetric is None else symmetric)
    else:
        weight = encode(w, kind.name)
    return compact(weight, encoding)


def dense(w: Floats | Weight) -> Floats:
    """Return a matrix in float32, however it is given."""
    return w.decode() if isinstance(w, Weight) else w


def compact(weight: Weight, encoding: str) -> tuple[Weight, str]:
    """Return a weight in the form that was asked for, or plainly if that is smaller, and the bytes in words."""
    if encoding == "sparse":
        return smallest(weight)
    if is_sparse(weight.encoding):
        dense = weight.expand()
        if dense.nbytes <= weight.nbytes:
            return dense, f"{dense.encoding.name}: {dense.nbytes} bytes, {encoding} {weight.nbytes}"
    return weight, ""


def is_sparse(encoding: Encoding) -> bool:
    """Tell whether an encoding leaves zeros out."""
    return encoding.name == "bitmap_f16" or getattr(encoding, "sparse", False)


def smallest(weight: Weight) -> tuple[Weight, str]:
    """Return the codes of an int8 matrix in the smallest of all forms, and the bytes of each in words."""
    codes = weight.parts["codes"]
    grid = Grid(weight.parts["scales"][:, None], np.zeros((len(codes), 1), np.float32))
    forms = [weight]
    for name in LOSSLESS:
        kind = ENCODINGS[name]
        assert isinstance(kind, OnGrid)
        if name != "nm_int8" or _fits_nm(codes):
            forms.append(Weight(kind, weight.shape, kind.pack(codes, grid, codes != 0)))
    best = min(forms, key=lambda form: form.nbytes)
    return best, f"{best.encoding.name}: " + ", ".join(f"{f.encoding.name} {f.nbytes} bytes" for f in forms)


def _fits_nm(codes: NDArray[np.generic]) -> bool:
    groups = np.pad(codes != 0, ((0, 0), (0, -codes.shape[1] % 8))).reshape(len(codes), -1, 8)
    return int(groups.sum(axis=2).max()) <= 4


def requantize(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    encodings: Mapping[str, str],
    method: str = "rtn",
    folding: str = "none",
    symmetric: bool | None = None,
) -> Checkpoint:
    """Store tensors in the encodings that are given by name."""
    if folding != "none":
        checkpoint = folded(checkpoint, required(calibration, folding), encodings, folding, bool(symmetric))
    choices: dict[str, str] = {}
    done: dict[int, Weight] = {}  # by the identity of what was stored before: shared matrices stay shared

    def stored(name: str, old: Weight, seen: Seen | None = None) -> Weight:
        if id(old) not in done:
            w = old.decode()
            if seen is None or not isinstance(ENCODINGS.get(encodings[name]), OnGrid):
                done[id(old)], why = rounded(w, None, encodings[name], "hqq" if method == "hqq" else "rtn", symmetric)
            else:
                done[id(old)], why = rounded(seen.target(w), seen.covariance, encodings[name], method, symmetric)
            choices.update({name: why} if why else {})
            old.let_go()
        return done[id(old)]

    def change(linear: str, weights: Weights, seen: Seen) -> dict[str, Floats | Weight]:
        if (name := f"{linear}.weight") not in encodings:
            return {}
        weight = stored(name, weights[name], seen)
        return {name: weight, f"{linear}.bias": seen.bias(weight.decode())}

    rest = list(encodings)
    if _needs_gram(method):
        checkpoint = by_linear(checkpoint, required(calibration, method), change)
        rest = [name for name in rest if not name.startswith("h.")]
    checkpoint = updated(checkpoint, {name: stored(name, checkpoint.weights[name]) for name in rest})
    counts = Counter(checkpoint.weights[name].encoding.name for name in encodings)
    return noted(checkpoint, stored=dict(counts), **({"chosen": choices} if choices else {}))


def folded(
    checkpoint: Checkpoint, calibration: Calibration, encodings: Mapping[str, str], folding: str, symmetric: bool
) -> Checkpoint:
    """Return the same model with the inputs of matrices scaled that are going to be stored on a grid."""

    def change(i: int, weights: Weights, statistics: Mapping[str, Statistics]) -> dict[str, Floats | Weight]:
        tensors = {n: w.decode() for n, w in weights.items() if n.startswith(f"h.{i}.")}
        changes: dict[str, Floats | Weight] = {}
        for linear in FOLDED:
            name, seen = f"h.{i}.{linear}.weight", statistics[f"h.{i}.{linear}"]
            if isinstance(kind := ENCODINGS.get(encodings.get(name, "")), OnGrid):
                changed = fold(
                    tensors, i, linear, FOLDS[folding](tensors[name], seen.gram, seen.absmax, kind, symmetric)
                )
                tensors |= changed
                changes |= {
                    n: encode(w, weights[n].encoding.name) if n not in encodings else w for n, w in changed.items()
                }
        return changes

    return by_layer(checkpoint, calibration, change)


def _needs_gram(method: str) -> bool:
    return method.startswith("gptq")


def assigned(checkpoint: Checkpoint, encoding: str, tables: str | None = None, only: str = "*") -> dict[str, str]:
    """Return the encoding of each matrix whose name matches; tables and positions as the encoding advises."""
    advice = ENCODINGS["int8" if encoding == "sparse" else encoding]
    found = {}
    for name, weight in checkpoint.weights.items():
        if len(weight.shape) == 2 and fnmatchcase(name, only):
            found[name] = (tables or advice.tables) if name in TABLES else encoding
    if POSITIONS in found:
        found[POSITIONS] = advice.positions
    if checkpoint.tied:
        found.pop("lm_head.weight", None)  # follows wte
    if not found:
        raise OptionError(f"no matrix has a name like {only!r}; names are such as h.0.mlp.c_fc.weight")
    return found


@step(
    encoding=choice((*ENCODINGS, "sparse")),
    method=choice(METHODS),
    fold=choice(("none", *FOLDS)),
    only=text("a pattern of tensor names such as h.*.mlp.*"),
    tables=choice(ENCODINGS),
    symmetric=switch(),
)
def quantize(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    encoding: str = "int8",
    method: str = "rtn",
    fold: str = "none",
    only: str = "*",
    tables: str | None = None,
    symmetric: bool | None = None,
) -> Checkpoint:
    """Store matrices in an encoding, rounded to nearest, by GPTQ or HQQ, after AWQ's or SmoothQuant's folding."""
    encodings = assigned(checkpoint, encoding, tables, only)
    for table in set(encodings) & set(TABLES):
        sample = encode(checkpoint.weights[table].rows(slice(0, 64)), encodings[table])
        if sample.nbytes * 8 < 8 * np.prod(sample.shape):
            warnings.warn(
                f"{table} in {encodings[table]} has less than 8 bits a weight, which GPT-2 does not bear",
                stacklevel=4,
            )
    return requantize(checkpoint, calibration, encodings, method, fold, symmetric)


@step(
    size=number(0),
    kl=number(0),
    encodings=text("two or more encodings, as int4+int8"),
    method=choice(METHODS),
)
def mix(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    size: float | None = None,
    kl: float | None = None,
    encodings: str = "int4_g64+int8",
    method: str = "rtn",
) -> Checkpoint:
    """Choose each matrix's encoding by its sensitivity, within a size in megabytes or a KL in nats a token.

    Every matrix begins in the smallest encoding; then the step that saves most KL for its bytes is taken, until the
    budget is used up or kept. The KL of a matrix in its smallest encoding is measured with all others as they are; in
    a larger one it is that times the ratio of the errors of the product.
    """
    kinds = encodings.split("+")
    if unknown := [k for k in kinds if k not in ENCODINGS]:
        raise OptionError(f"unknown encoding {unknown[0]!r} in {encodings!r}; known: {', '.join(ENCODINGS)}")
    if (size is None) == (kl is None):
        raise OptionError("mix needs a budget: either size (megabytes) or kl (nats a token), not both")
    text_ = required(calibration, "mixed precision")
    judge = Judge(checkpoint, text_.held_out(checkpoint))
    smallest_first = sorted(kinds, key=lambda k: encode(np.eye(128, dtype=np.float32), k).nbytes)
    plan = assigned(checkpoint, smallest_first[0])
    upgrades = _upgrades(checkpoint, text_, judge, smallest_first)

    least = requantize(checkpoint, None, plan).nbytes
    sizes = least + np.cumsum([0, *(extra for _, _, extra in upgrades)])

    def mixed(n: int) -> dict[str, str]:
        return plan | {name: kind for name, kind, _ in upgrades[:n]}

    def divergence(n: int) -> float:
        return judge.measure(requantize(checkpoint, None, mixed(n)))["kl"]

    if size is not None:
        if least > size * 1e6:
            raise OptionError(
                f"size must be at least {least / 1e6:.3g} megabytes for {smallest_first[0]}, not {size:g}"
            )
        low = int(np.searchsorted(sizes, size * 1e6, side="right")) - 1  # the most upgrades within the size
    else:
        low, high = 0, len(upgrades)
        assert kl is not None
        if (best := divergence(high)) > kl:
            raise OptionError(f"kl must be at least {best:.3g} nats with {smallest_first[-1]} everywhere, not {kl:g}")
        while low < high:  # the fewest upgrades within the KL
            middle = (low + high) // 2
            low, high = (low, middle) if divergence(middle) <= kl else (middle + 1, high)
    result = requantize(checkpoint, text_, mixed(low), method)
    by_encoding = {k: [n for n, e in mixed(low).items() if e == k] for k in smallest_first}
    return noted(result, mixed=by_encoding, kl=judge.measure(result)["kl"])


def _upgrades(
    checkpoint: Checkpoint, calibration: Calibration, judge: Judge, kinds: list[str]
) -> list[tuple[str, str, int]]:
    """Return (name, encoding, bytes more) in the order in which larger encodings are worth their bytes."""
    squares = {f"{n}.weight": s.square for n, s in collect(checkpoint, calibration).items()}
    gains: list[tuple[float, tuple[str, str, int]]] = []
    for done, (name, square) in enumerate(squares.items()):
        calibration.progress(f"sensitivity of matrix {done + 1} of {len(squares)}")
        w = checkpoint.weights[name].decode()
        stored = [rounded(w, None, kind)[0] for kind in kinds]
        errors = [float((np.square(s.decode() - w) @ square).sum()) for s in stored]
        measured = max(judge.measure(updated(checkpoint, {name: stored[0]}))["kl"], 0.0)
        limit = np.inf  # a matrix's larger encodings come after its smaller ones
        for k in range(1, len(kinds)):
            saved = measured * (errors[k - 1] - errors[k]) / max(errors[0], 1e-30)
            extra = stored[k].nbytes - stored[k - 1].nbytes
            limit = min(limit, saved / max(extra, 1))
            gains.append((limit, (name, kinds[k], extra)))
    return [upgrade for _, upgrade in sorted(gains, key=lambda gain: -gain[0])]
