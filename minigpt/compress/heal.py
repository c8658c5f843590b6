"""Healing without training: closed-form refits that bring a cut model's residual stream back.

Both models run side by side over the fitting half of the calibration text, half block by half block, the
cut one as refitted so far. A refit is a function and a row of `REFITS`; `heal` keeps it only if the held-
out KL falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minigpt import layers, reference
from minigpt.checkpoint import Checkpoint
from minigpt.compress.calibration import Ids, Judge, embed, linears, parts, residuals, run_half, written_from
from minigpt.compress.step import Changes, Floats, updated

RIDGES = (0.01, 0.1, 1.0)  # pulls towards the weights as they are, relative to an input's mean variance
SAMPLE = 8  # every 8th output decides on the ridge of all
GAIN_PULL = 0.01  # the same for gains, of which there are few
SWEEPS = 12  # of conjugate gradients, at most
TOLERANCE = 1e-5  # of the square of the residual, after which they end
TINY = np.float32(1e-30)
F = TypeVar("F", np.float32, np.float64)
Affine = tuple[Floats, Floats]  # a matrix and what is added
WRITERS = ("attn.c_proj", "mlp.c_proj")  # with which the halves of a block write into the stream


# ---- least squares -------------------------------------------------------------------------------------------


class Regression:
    """Sums for the affine map y = w x + b that fits best in the least-squares sense.

    Parameters
    ----------
    n_in, n_out : int
        Widths of x and y.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        self.n = 0
        self._x, self._y = np.zeros(n_in, np.float32), np.zeros(n_out, np.float32)
        self._xx, self._yx = np.zeros((n_in, n_in), np.float32), np.zeros((n_out, n_in), np.float32)

    def add(self, x: Floats, y: Floats) -> None:
        """Count inputs [n, n_in] and outputs [n, n_out]."""
        self._count(len(x), x.sum(axis=0), y.sum(axis=0), x.T @ x, y.T @ x)

    def merge(self, other: Regression) -> None:
        """Count all that another one has counted."""
        self._count(other.n, other._x, other._y, other._xx, other._yx)

    def sample(self) -> Regression:
        """Return the sums for every SAMPLE-th output."""
        some = copy(self)
        some._y, some._yx = self._y[::SAMPLE], self._yx[::SAMPLE]
        return some

    def _count(self, n: int, x: Floats, y: Floats, xx: Floats, yx: Floats) -> None:
        self.n += n
        for total, part in ((self._x, x), (self._y, y), (self._xx, xx), (self._yx, yx)):
            total += part

    def solve(self, w: Floats, ridge: float) -> tuple[Floats, Floats]:
        """Return the map of least error plus ridge * variance * |w' - w|^2; zeros of w stay zeros.

        Parameters
        ----------
        w : ndarray of shape (n_out, n_in), dtype=float32
            The map as it is.
        ridge : float
            Pull towards it, relative to the mean variance of an input.

        Returns
        -------
        w' : ndarray of shape (n_out, n_in), dtype=float32
        b' : ndarray of shape (n_out,), dtype=float32
        """
        x, y = self._x / np.float32(self.n), self._y / np.float32(self.n)
        covariance = self._xx / np.float32(self.n) - np.outer(x, x)  # [n_in, n_in]
        gradient = self._yx / np.float32(self.n) - np.outer(y, x) - w @ covariance  # [n_out, n_in]
        pull = max(ridge * float(np.trace(covariance)) / len(x), 1e-12)
        covariance[np.diag_indices_from(covariance)] += np.float32(pull)
        if np.count_nonzero(w) > 0.99 * w.size:
            change = np.linalg.solve(covariance, gradient.T).T
        else:
            change = masked_solve(covariance, gradient, w != 0)
        fitted = w + change
        return fitted, y - fitted @ x

    def error(self, w: Floats, b: Floats) -> float:
        """Return the mean of |y - w x - b|^2 less that of |y|^2, which is the same for all maps."""
        off = b @ (w @ self._x - self._y)
        return float(np.einsum("oi,oi->", w, w @ self._xx - 2 * self._yx) + 2 * off) / self.n + float(b @ b)


def masked_solve(a: NDArray[F], b: NDArray[F], mask: NDArray[np.bool_], sweeps: int = SWEEPS) -> NDArray[F]:
    """Solve x a = b for x [n_out, n_in] inside `mask`, zero outside, in the least-squares sense.

    Conjugate gradients per row, preconditioned by the diagonal (Shewchuk 1994); `a` [n_in, n_in] is
    symmetric and positive definite.
    """
    diagonal = np.diag(a)
    x = np.zeros_like(b)
    residual = b * mask
    direction = residual / diagonal
    size = first = np.einsum("oi,oi->o", residual, direction)  # [n_out]
    for _ in range(sweeps):
        step = (direction @ a) * mask
        length = size / np.maximum(np.einsum("oi,oi->o", direction, step), TINY)
        x += length[:, None] * direction
        residual -= length[:, None] * step
        conditioned = residual / diagonal
        previous, size = size, np.einsum("oi,oi->o", residual, conditioned)
        if (size <= TOLERANCE * first).all():
            break
        direction = conditioned + (size / np.maximum(previous, TINY))[:, None] * direction
    return x


# ---- two models side by side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What a cut model is to be compared with.

    Attributes
    ----------
    reference : Checkpoint
        Has the vocabulary of the cut model.
    layers : sequence of int
        For each layer of the cut model, which layer of the reference it was.
    windows : ndarray of shape (n_windows, window), dtype=int64
        Tokens to fit on.
    """

    reference: Checkpoint
    layers: Sequence[int]
    windows: Ids

    def targets(self, checkpoint: Checkpoint) -> Iterator[tuple[Floats, Callable[[slice], Floats | None]]]:
        """Yield, before each half of the cut model and at the end, the stream that the reference has there.

        What a layer finds is to be what it found in the reference, the work of removed layers included.
        With each comes a function that gives some windows of its LayerNorm, or None where that is unknown. Both are
        in the cut model's coordinates: [n_windows, window, n_embd].
        """
        basis = common_basis(self.reference, checkpoint)
        config = self.reference.config

        def normed(x: Floats, place: int, reading: Callable[[], Affine | None], part: slice) -> Floats | None:
            name = norm_of(place, config.n_layer)
            y = layers.layer_norm(self.reference.weights, name, x[part], config.layer_norm_epsilon)
            if basis is None:
                return y
            return None if (found := reading()) is None else y @ found[0] + found[1]

        places = [*(2 * i + half for i in self.layers for half in (0, 1)), 2 * config.n_layer]
        for place, x in enumerate(self.streams()):
            if place in places:
                reading = cache(partial(common_reading, self.reference, place, checkpoint, places.index(place)))
                yield (x if basis is None else x @ basis), partial(normed, x, place, reading)

    def streams(self) -> Iterator[Floats]:
        """Yield the reference's residual stream before each half of each of its blocks, and after the last."""
        return residuals(self.reference, self.windows)


def common_basis(wide: Checkpoint, narrow: Checkpoint) -> Floats | None:
    """Return the linear map between two residual streams, as the tables tell it, or None where widths agree."""
    if wide.config.n_embd == narrow.config.n_embd:
        return None
    xx, xy = 0.0, 0.0
    for table in ("wte.weight", "wpe.weight"):
        y = narrow.weights[table].decode()
        x = wide.weights[table].decode()[: len(y)]
        xx, xy = xx + x.T @ x, xy + x.T @ y
    basis: Floats = np.linalg.lstsq(xx, xy, rcond=1e-6)[0].astype(np.float32)  # [n_embd, n_embd']
    return basis


def common_reading(wide: Checkpoint, there: int, narrow: Checkpoint, here: int) -> Affine | None:
    """Return the map between what LayerNorms give before two halves, as the linear maps tell it that read them.

    A LayerNorm's gain may have gone into the map that reads it, and what a stream has lost into the bias: a narrow
    LayerNorm is right where its reader gives what the wide one's does. None where readers have not the same outputs.
    """
    (w, b), (v, c) = reader(wide, there), reader(narrow, here)
    if len(w) != len(v):
        return None
    products = np.column_stack([v.T @ w, v.T @ (b - c)])
    solved = np.linalg.lstsq(v.T @ v, products, rcond=1e-6)[0].astype(np.float32)  # [n_embd', n_embd + 1]
    return solved[:, :-1].T, solved[:, -1]


def reader(checkpoint: Checkpoint, half: int) -> Affine:
    """Return matrix and bias of the linear map that reads before a half, or of the head after the last."""
    weights = checkpoint.weights
    if half == 2 * checkpoint.config.n_layer:
        w = weights["lm_head.weight"].decode()
        return w, np.zeros(len(w), np.float32)
    name, _ = linears(half)
    return weights[f"{name}.weight"].decode(), layers.vector(weights, f"{name}.bias")


def norm_of(half: int, n_layer: int) -> str:
    """Return the name of the LayerNorm that reads the stream before a half, or after the last."""
    return "ln_f" if half == 2 * n_layer else f"h.{half // 2}.ln_{1 + half % 2}"


# ---- refits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a refit is at work: before `half`, or after the last.

    Attributes
    ----------
    checkpoint : Checkpoint
        The cut model, refitted up to here.
    half : int
        2 i for the attention and 2 i + 1 for the MLP of block i; 2 n_layer at the end.
    x : ndarray of shape (n_windows, window, n_embd), dtype=float32
        Its residual stream before the half.
    normed : callable
        Gives for some windows what the LayerNorm that reads x should give, or None.
    target : ndarray of the same shape, or None at the end
        What the stream should be after the half.
    """

    checkpoint: Checkpoint
    half: int
    x: Floats
    normed: Callable[[slice], Floats | None]
    target: Floats | None

    @property
    def writer(self) -> str:
        """The linear map with which this half writes."""
        return f"h.{self.half // 2}.{WRITERS[self.half % 2]}"


def outputs(place: Place) -> Changes:
    """Refit the map that writes into the stream by ridge least squares; one not in f32, or shared, by its bias only."""
    if place.target is None:
        return {}
    weights = place.checkpoint.weights
    weight = weights[f"{place.writer}.weight"]
    if weight.encoding.name != "f32" or sum(other is weight for other in weights.values()) > 1:
        return biases(place)
    fitting, testing = (Regression(weight.shape[1], weight.shape[0]) for _ in range(2))
    for part in parts(place.x):
        inputs = written_from(weights, place.checkpoint.config, place.half, place.x[part])
        error = place.target[part] - place.x[part]  # [n_windows, window, n_embd]
        tests = np.arange(part.start, part.start + len(error)) % 4 == 3  # [n_windows]
        x = inputs.reshape(*error.shape[:2], -1)  # [n_windows, window, n_in]
        for sums, chosen in ((testing, tests), (fitting, ~tests)):
            sums.add(x[chosen].reshape(-1, x.shape[-1]), error[chosen].reshape(-1, error.shape[-1]))
    w = weight.decode()
    ridge = RIDGES[-1]
    if testing.n:
        trial, test = fitting.sample(), testing.sample()
        ridge = min(RIDGES, key=lambda r: test.error(*trial.solve(w[::SAMPLE], r)))
    fitting.merge(testing)
    w, b = fitting.solve(w, ridge)
    return {f"{place.writer}.weight": w, f"{place.writer}.bias": b}


def gains(place: Place) -> Changes:
    """Refit gain and bias of the LayerNorm that reads the stream, channel by channel."""
    config = place.checkpoint.config
    name = norm_of(place.half, config.n_layer)
    gain = layers.vector(place.checkpoint.weights, f"{name}.weight")
    one, sums, n = np.ones_like(gain), np.zeros((4, len(gain))), place.x[..., 0].size
    for part in parts(place.x):
        x = reference.layer_norm(place.x[part], one, 0 * one, config.layer_norm_epsilon)
        if (y := place.normed(part)) is None:
            return {}
        sums += [v.sum(axis=(0, 1), dtype=np.float64) for v in (x, y, x * x, x * y)]
    x_mean, y_mean, xx_mean, xy_mean = sums / n  # [n_embd] each
    variance = np.maximum(xx_mean - x_mean**2, 0)
    pull = GAIN_PULL * variance.mean()
    fitted = (xy_mean - x_mean * y_mean + pull * gain) / (variance + pull)
    return {f"{name}.weight": fitted, f"{name}.bias": y_mean - fitted * x_mean}


def biases(place: Place) -> Changes:
    """Add to the bias of the map that writes into the stream the mean of what is missing."""
    if place.target is None:
        return {}
    config, weights = place.checkpoint.config, place.checkpoint.weights
    missing = np.zeros(config.n_embd)
    for part in parts(place.x):
        y = run_half(weights, config, place.half, place.x[part])
        missing += (place.target[part] - y).sum(axis=(0, 1), dtype=np.float64)
    name = f"{place.writer}.bias"
    return {name: layers.vector(weights, name) + missing / place.x[..., 0].size}


REFITS: dict[str, Callable[[Place], Changes]] = {"outputs": outputs, "gains": gains, "biases": biases}
TOGETHER = ("gains", "outputs")  # in one walk; outputs set the biases, too


def refit(checkpoint: Checkpoint, pair: Pair, names: Sequence[str]) -> Checkpoint:
    """Walk through the model from the embedding to the end and take these refits at each place."""
    targets = pair.targets(checkpoint)
    x = embed(checkpoint, pair.windows)
    _, normed = next(targets)
    for half in range(2 * checkpoint.config.n_layer):
        target, next_normed = next(targets)
        for name in names:
            checkpoint = updated(checkpoint, REFITS[name](Place(checkpoint, half, x, normed, target)))
        x, normed = run_half(checkpoint.weights, checkpoint.config, half, x), next_normed
    for name in names:
        end = Place(checkpoint, 2 * checkpoint.config.n_layer, x, normed, None)
        checkpoint = updated(checkpoint, REFITS[name](end))
    return checkpoint


def heal(
    checkpoint: Checkpoint,
    pair: Pair,
    judge: Judge,
    measured: dict[str, float],
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Checkpoint, dict[str, float], list[str]]:
    """Try the refits together or else each by itself, and keep the first that brings the held-out KL down.

    Parameters
    ----------
    checkpoint : Checkpoint
    pair : Pair
        What to bring it back to.
    judge : Judge
        Of the same reference.
    measured : dict of str to float
        What the judge says of the checkpoint.
    progress : callable
        Is told what is being done.

    Returns
    -------
    checkpoint : Checkpoint
    measured : dict of str to float
        What the judge says of it now.
    kept : list of str
        Names in `REFITS`.
    """
    for names in (TOGETHER, *([name] for name in REFITS)):
        if not measured["kl"]:  # nothing to mend, as after a step that the reference takes too
            break
        progress(f"healing, {' and '.join(names)}")
        candidate = refit(checkpoint, pair, names)
        result = judge.measure(candidate)
        if result["kl"] < measured["kl"]:
            return candidate, result, list(names)
    return checkpoint, measured, []
