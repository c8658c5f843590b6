"""Setting weights to zero: by which criterion, in which pattern, how many of each matrix, and what makes up for it.

Zeros save nothing by themselves; encodings that leave them out do (`quantize.py` chooses one). A weight that is zero
before stays zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Checkpoint
from minigpt.compress.calibration import LINEARS, Calibration, Judge, Statistics, Weights, collect, required
from minigpt.compress.heal import SWEEPS, masked_solve
from minigpt.compress.quantize import compact, dense, rounded
from minigpt.compress.step import choice, noted, number, step, switch, text, updated
from minigpt.compress.sweep import BLOCK, Choice, damp, inverse_factor, sweep
from minigpt.compress.walk import Seen, by_linear
from minigpt.encodings import ENCODINGS, OnGrid, Weight
from minigpt.errors import OptionError

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Inputs(Protocol):
    """What criteria look at: `Statistics` of a matrix's inputs."""

    @property
    def square(self) -> Floats:
        """Mean square of each input: [n_in]."""

    @property
    def gram(self) -> Floats:
        """X^T X / n: [n_in, n_in]."""


# ---------------------------------------------------------------------------------------------------------------------
# Criteria: (w [n_out, n_in], statistics of the inputs) -> scores [n_out, n_in], the lowest to be removed
# ---------------------------------------------------------------------------------------------------------------------


def magnitude(w: Floats, inputs: Inputs | None) -> Floats:
    """Return the size of the weight (Han et al. 2015)."""
    return np.abs(w)


def random(w: Floats, inputs: Inputs | None) -> Floats:
    """Return any numbers, the same ones for the same matrix: the baseline that shows what a criterion knows."""
    return np.random.default_rng(crc32(w.tobytes())).random(w.shape, np.float32)


def wanda(w: Floats, inputs: Inputs) -> Floats:
    """Return the size of the weight times the norm of its input (Sun et al. 2023)."""
    return np.abs(w) * np.sqrt(inputs.square)


def obs(w: Floats, inputs: Inputs) -> Floats:
    """Return the error that is left when all other weights make up for the loss (Hassibi and Stork 1993)."""
    u = inverse_factor(inputs.gram)
    scores: Floats = np.square(w) / np.square(u).sum(axis=0)  # the diagonal of u^T u, the inverse
    return scores


CRITERIA: dict[str, Callable[[Floats, Inputs], Floats]] = {
    "magnitude": magnitude,
    "random": random,
    "wanda": wanda,
    "sparsegpt": obs,
    "alps": wanda,  # from where `alternate` begins
}
SOLVING = ("sparsegpt", "alps")  # decide while the other weights make up for those that go


def imported(path: str | Path) -> dict[str, Floats]:
    """Read scores from outside, such as those of movement pruning: a .npz or .safetensors file.

    Returns
    -------
    dict of str to ndarray of shape (n_out, n_in)
        By full name, such as h.0.mlp.c_fc.weight.

    Raises
    ------
    OptionError
        If there is no such file or it is neither.
    """
    try:
        if Path(path).suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: np.asarray(file[name], np.float32) for name in file.files}
        from safetensors.numpy import load_file

        return {name: np.asarray(scores, np.float32) for name, scores in load_file(path).items()}
    except Exception as error:  # of three libraries, each with errors of its own
        raise OptionError(f"cannot read scores from {path} ({error}); give a .npz or .safetensors file") from None


# ---------------------------------------------------------------------------------------------------------------------
# Patterns: scores [n_out, n_in], share to remove -> which to keep
# ---------------------------------------------------------------------------------------------------------------------


def lowest(scores: Floats, sparsity: float, by_row: bool) -> Mask:
    """Keep all but the given share with the lowest scores, counted in each row or in the whole matrix."""
    rows = scores if by_row else scores.reshape(1, -1)
    removed = round(sparsity * rows.shape[1])
    if not removed:
        return np.ones(scores.shape, np.bool_)
    kept = rows > np.partition(rows, removed - 1, axis=1)[:, removed - 1, None]
    if np.count_nonzero(kept) < kept.size - removed * len(kept):  # where equal scores meet the border, any will do
        kept[:] = True
        np.put_along_axis(kept, np.argpartition(rows, removed - 1, axis=1)[:, :removed], False, axis=1)
    return kept.reshape(scores.shape)


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be.

    Attributes
    ----------
    n, m : int
        Keep n of every m columns of a row; 0: no such rule.
    width : int
        Columns that are removed together.
    """

    n: int = 0
    m: int = 0
    width: int = 1

    @classmethod
    def parse(cls, name: str) -> Pattern:
        """Read "unstructured", "2:4" (keep 2 of 4), or "1x32" (blocks of 32 columns of a row).

        Raises
        ------
        OptionError
            If it is none of them, or a size does not divide the 128 columns that a sweep takes at once.
        """
        if name == "unstructured":
            return cls()
        if found := re.fullmatch(r"(\d+):(\d+)", name):
            n, m = map(int, found.groups())
            if 0 < n < m and BLOCK % m == 0:
                return cls(n, m)
        if (found := re.fullmatch(r"1x(\d+)", name)) and int(found[1]) and BLOCK % int(found[1]) == 0:
            return cls(width=int(found[1]))
        raise OptionError(
            f"pattern must be unstructured, n:m with n < m or 1xWIDTH, m and WIDTH dividing {BLOCK}, not {name!r}"
        )

    def keep(self, scores: Floats, sparsity: float, by_row: bool = False) -> Mask:
        """Return which weights to keep: [n_out, n_in]. With n:m the share is the pattern's own."""
        n_out, n_in = scores.shape
        if self.m:
            groups = np.pad(scores, ((0, 0), (0, -n_in % self.m)), constant_values=-np.inf).reshape(-1, self.m)
            return lowest(groups, 1 - self.n / self.m, True).reshape(n_out, -1)[:, :n_in]
        kept = lowest(self.tiles(scores), sparsity, by_row)
        return kept if self.width == 1 else np.repeat(kept, self.width, axis=1)[:, :n_in]

    def tiles(self, scores: Floats) -> Floats:
        """Sum the scores of what is removed together: [n_out, n_in] -> [n_out, n_in / width]."""
        if self.width == 1:
            return scores
        padded = np.pad(scores, ((0, 0), (0, -scores.shape[1] % self.width)))
        sums: Floats = padded.reshape(len(scores), -1, self.width).sum(axis=2)
        return sums

    def choice(self, sparsity: float) -> Choice:
        """Return the same rule for a sweep, which decides on BLOCK columns of all rows, or on m, at once."""
        return Choice(self.m or BLOCK, lambda scores: self.keep(scores, sparsity))


PENALTIES = (0.1, 0.3, 1.0)  # of a difference between the two solutions, relative to an input's variance
ROUNDS = 10  # with each
FEW = 3  # sweeps that polish what has come out, near the best already


def alternate(w: Floats, covariance: Floats, keep: Callable[[Floats], Mask]) -> tuple[Floats, Mask]:
    """Find out which weights to keep, and their values, by alternating directions (ADMM; ALPS, Meng et al. 2024).

    One solution is dense and gives the products of w, the other has the pattern. They are drawn together, at first so
    loosely that weights still change sides: a sweep decides on a column once and for all.

    Parameters
    ----------
    w : ndarray of shape (n_out, n_in), dtype=float32
        Its zeros stay.
    covariance : ndarray of shape (n_in, n_in), dtype=float32
        Of the inputs.
    keep : callable
        Scores [n_out, n_in] -> which to keep.

    Returns
    -------
    values : ndarray of shape (n_out, n_in), dtype=float32
    kept : ndarray of shape (n_out, n_in), dtype=bool
    """
    h = damp(covariance)
    size = np.sqrt(np.diagonal(h))  # [n_in]
    h /= size
    h /= size[:, None]
    alive, w = w != 0, w * size
    goal, force = w @ h, np.zeros_like(w)
    kept = alive & keep(np.square(w))
    sparse = w * kept
    for penalty in map(np.float32, PENALTIES):
        u = inverse_factor(h, penalty)
        inverse = u.T @ u
        del u
        force /= penalty
        for _ in range(ROUNDS):
            drawn = sparse - force
            drawn *= penalty
            drawn += goal
            force += drawn @ inverse
            kept = alive & keep(np.square(force))
            sparse = force * kept
            force -= sparse
        force *= penalty
    return sparse / size, kept


def polish(w: Floats, pruned: Floats, covariance: Floats, kept: Mask, sweeps: int = SWEEPS) -> Floats:
    """Return the best values of the weights that are kept: those whose products are nearest to those of w.

    A sweep lets every column make up for the columns before it only, and `alternate` ends near the best. From there,
    conjugate gradients find the least-squares solution inside the mask.
    """
    h = damp(covariance)
    change: Floats = masked_solve(h, np.asarray((w - pruned) @ h, np.float32), kept, sweeps)
    return pruned + change


# ---------------------------------------------------------------------------------------------------------------------
# One matrix
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How every matrix is pruned.

    Attributes
    ----------
    criterion : str
        A key of `CRITERIA`, or a file for `imported`.
    pattern : Pattern
    by_row : bool
        Whether every row loses the same share, or only the matrix as a whole.
    update : bool
        Whether the remaining weights make up for the loss, by a sweep, which with the criterion "sparsegpt" also
        decides what to remove as it goes, or with "alps" by `alternate`.
    polish : bool
        Whether the remaining weights are then brought to their best values, see `polish`.
    encoding : str or None
        Round at once to this encoding, by a second sweep; None: leave float32.
    """

    criterion: str
    pattern: Pattern
    by_row: bool = False
    update: bool = False
    polish: bool = True
    encoding: str | None = None

    def scores(self, name: str, w: Floats, inputs: Inputs | None) -> Floats:
        """Return the scores of a matrix, those of zeros no higher than any other.

        Raises
        ------
        OptionError
            If imported scores lack this matrix or have another shape.
        """
        if self.criterion in CRITERIA:
            scores = CRITERIA[self.criterion](w, inputs)  # type: ignore[arg-type]
        else:
            scores = imported(self.criterion).get(name, np.empty(0, np.float32))
            if scores.shape != w.shape:
                raise OptionError(f"{self.criterion} must hold scores {w.shape} for {name}, not {scores.shape}")
        return np.where(w != 0, scores, min(0.0, float(scores.min()))).astype(np.float32)

    def apply(self, name: str, w: Floats, inputs: Inputs | None, sparsity: float) -> tuple[Floats | Weight, str]:
        """Return the pruned matrix, in the encoding if there is one, and why in another."""
        kind = ENCODINGS["int8" if self.encoding == "sparse" else self.encoding] if self.encoding else None
        on_grid = kind if isinstance(kind, OnGrid) else None
        if not self.update:
            result = np.where(self.pattern.keep(self.scores(name, w, inputs), sparsity, self.by_row), w, 0)
            return rounded(result, None, self.encoding) if self.encoding else (result, "")
        assert isinstance(inputs, Seen)
        kept = w != 0
        if self.criterion not in SOLVING:
            kept &= self.pattern.keep(self.scores(name, w, inputs), sparsity, self.by_row)
        covariance, w = inputs.covariance, inputs.target(w)
        if self.criterion == "alps":
            result, kept = alternate(w, covariance, lambda scores: self.pattern.keep(scores, sparsity, self.by_row))
        else:
            choice = self.pattern.choice(sparsity) if self.criterion == "sparsegpt" else None
            swept = sweep(w, covariance, kept=kept, choice=choice)
            result, kept = swept.w, swept.kept
        if self.polish:
            result = polish(w, result, covariance, kept, FEW if self.criterion == "alps" else SWEEPS)
        if on_grid is not None:
            again = sweep(result, covariance, kept=kept, encoding=on_grid, symmetric=True)
            return compact(again.encoded(on_grid), str(self.encoding))
        return rounded(result, None, self.encoding) if self.encoding else (result, "")


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------

LEVELS = np.linspace(0, 1, 1001)
SPREAD = 0.2  # how far a matrix's sparsity may be from the mean when it follows sensitivity


def allocate(
    levels: Mapping[str, Floats], sizes: Mapping[str, int], sparsity: float, spread: float = 1.0
) -> dict[str, float]:
    """Return each matrix's sparsity such that all lose what lies below one threshold, the share of all being given.

    Parameters
    ----------
    levels : mapping of str to ndarray of shape (1001,)
        Quantiles of each matrix's scores, on a common scale.
    sizes : mapping of str to int
        Weights of each.
    sparsity, spread : float
        Of all together, and how far each may be from it.
    """
    names = list(levels)
    share = np.array([sizes[name] for name in names]) / sum(sizes.values())
    low, high = max(sparsity - spread, 0.0), min(sparsity + spread, 1.0)

    def at(threshold: float) -> NDArray[np.float64]:
        each = [LEVELS[max(np.searchsorted(levels[name], threshold) - 1, 0)] for name in names]
        clipped: NDArray[np.float64] = np.clip(each, low, high)
        return clipped

    thresholds = np.sort(np.concatenate([levels[name] for name in names]))
    first, last = 0, len(thresholds) - 1
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if at(thresholds[middle]) @ share >= sparsity else (middle + 1, last)
    chosen = at(thresholds[first])
    room = np.where(chosen @ share > sparsity, chosen - low, high - chosen)  # the rest, by how far each may still go
    chosen += (sparsity - chosen @ share) * room / max(float(room @ share), 1e-12)
    return dict(zip(names, chosen.tolist(), strict=True))


def uneven(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    rule: Rule,
    names: list[str],
    sparsity: float,
    measured: bool,
) -> dict[str, float]:
    """Return each matrix's sparsity by one threshold for the model.

    Scores are compared as they are or, measured, as shares of a matrix's KL: the squared scores of what it would lose
    add up to the KL (nats a token) that pruning this matrix alone costs.
    """
    if rule.criterion in SOLVING:  # whose scores need grams of all matrices at once
        rule = Rule("wanda", rule.pattern, rule.by_row)
    statistics: dict[str, Statistics] = {}
    if rule.criterion == "wanda" or measured:
        statistics = collect(checkpoint, required(calibration, "sparsity by sensitivity"))
    if measured:
        assert calibration is not None
        judge = Judge(checkpoint, calibration.held_out(checkpoint))
    levels, sizes = {}, {}
    for name in names:
        w = checkpoint.weights[name].decode()
        inputs = statistics.get(name.removesuffix(".weight"))
        tiles = rule.pattern.tiles(rule.scores(name, w, inputs)).reshape(-1)
        if measured:
            cut, _ = rule.apply(name, w, inputs, sparsity)
            kl = max(judge.measure(updated(checkpoint, {name: cut}))["kl"], 1e-9)
            tiles = np.square(tiles, dtype=np.float64)
            lost = np.sort(tiles)[: round(sparsity * len(tiles))].sum()
            tiles *= kl / max(lost, 1e-30)
        levels[name], sizes[name] = np.quantile(tiles, LEVELS), w.size
    return allocate(levels, sizes, sparsity, SPREAD if measured else 1.0)


@step(
    sparsity=number(0, 1),
    criterion=text(f"one of {', '.join(CRITERIA)}, or a .npz or .safetensors file of scores"),
    pattern=text("unstructured, 2:4, 4:8 or 1x32"),
    scope=choice(("row", "matrix", "model", "sensitivity")),
    update=switch(),
    polish=switch(),
    encoding=choice((*ENCODINGS, "sparse")),
    only=text("a pattern of tensor names such as h.*.mlp.*"),
)
def prune(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    sparsity: float | None = None,
    criterion: str = "alps",
    pattern: str = "unstructured",
    scope: str | None = None,
    update: bool | None = None,
    polish: bool = True,
    encoding: str | None = None,
    only: str = "*",
) -> Checkpoint:
    """Set the weights of the blocks' matrices to zero that matter least, singly, 2 of 4, or in blocks of a row."""
    where = Pattern.parse(pattern)
    if where.m:
        given, sparsity = sparsity, 1 - where.n / where.m
        if given not in (None, sparsity) or scope in ("model", "sensitivity"):
            raise OptionError(f"pattern {pattern} removes {sparsity:g} of every matrix; leave sparsity and scope out")
    if sparsity is None:
        raise OptionError("prune needs sparsity: a number from 0 on, below 1")
    names = [
        name
        for i in range(checkpoint.config.n_layer)
        for linear in LINEARS
        if fnmatchcase(name := f"h.{i}.{linear}.weight", only)
    ]
    if not names:
        raise OptionError(f"no matrix of a block has a name like {only!r}; names are such as h.0.mlp.c_fc.weight")
    by_row = scope == "row" or (scope is None and criterion == "wanda")
    update = criterion in SOLVING if update is None else update
    rule = Rule(criterion, where, by_row, update, polish, encoding)
    shares = dict.fromkeys(names, sparsity)
    if scope in ("model", "sensitivity"):
        shares = uneven(checkpoint, calibration, rule, names, sparsity, scope == "sensitivity")
    chosen: dict[str, str] = {}

    def change(linear: str, weights: Weights, inputs: Seen | None) -> dict[str, Floats | Weight]:
        if (name := f"{linear}.weight") not in shares:
            return {}
        changed, why = rule.apply(name, weights[name].decode(), inputs, shares[name])
        chosen.update({name: why} if why else {})
        return {name: changed} | ({f"{linear}.bias": inputs.bias(dense(changed))} if update and inputs else {})

    if update or criterion in ("wanda", *SOLVING):
        grams = update or criterion == "sparsegpt"
        result = by_linear(checkpoint, required(calibration, f"the criterion {criterion}"), change, grams)
    else:
        result = checkpoint
        for name in names:
            result = updated(result, change(name.removesuffix(".weight"), result.weights, None))
            checkpoint.weights[name].let_go()
    zeros = {name: float((result.weights[name].decode() == 0).mean()) for name in names}
    facts = {"sparsities": {n: round(z, 4) for n, z in zeros.items()}} if len(set(shares.values())) > 1 else {}
    total = sum(zeros[n] * checkpoint.weights[n].shape[0] * checkpoint.weights[n].shape[1] for n in names)
    size = sum(checkpoint.weights[n].shape[0] * checkpoint.weights[n].shape[1] for n in names)
    return noted(result, zeros=round(total / size, 4), **facts, **({"chosen": chosen} if chosen else {}))
