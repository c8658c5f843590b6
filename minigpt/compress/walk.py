"""Changing a model one linear map after the other, each told what the model as it was does at the same place.

Both models run side by side. What earlier changes did to the inputs of a map, the map can make up for: its target are
the outputs of the reference, its inputs those that the changed model has. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from minigpt import layers
from minigpt.checkpoint import Checkpoint
from minigpt.compress.calibration import LINEARS, Calibration, Weights, embed, let_go, parts, run_half, tapped
from minigpt.compress.heal import masked_solve, norm_of
from minigpt.compress.step import Changes, updated
from minigpt.compress.sweep import damp

Floats = NDArray[np.float32]

SPARSE = 1 / 16  # share of zeros from which a matrix counts as pruned: dense ones have next to none


def is_pruned(w: Floats) -> bool:
    """Return whether the zeros of a matrix are there on purpose."""
    return bool((w == 0).mean() > SPARSE)


class Seen:
    """Sums over the inputs x of a linear map in the changed model and its outputs y in the reference.

    Parameters
    ----------
    shape : tuple of int
        n_out and n_in of the map.
    grams : bool
        Whether to sum products of pairs, which takes most of the time.
    """

    def __init__(self, shape: tuple[int, ...], grams: bool = True) -> None:
        n_out, n_in = shape
        self.n = 0
        self._x, self._y, self._square = np.zeros(n_in), np.zeros(n_out), np.zeros(n_in)
        self._xx = np.zeros((n_in, n_in), np.float32) if grams else None
        self._yx = np.zeros((n_out, n_in), np.float32)

    def add(self, x: Floats, y: Floats) -> None:
        """Count inputs [n, n_in] and outputs [n, n_out]."""
        self.n += len(x)
        self._x += x.sum(axis=0, dtype=np.float64)
        self._y += y.sum(axis=0, dtype=np.float64)
        self._square += np.einsum("ni,ni->i", x, x)
        if self._xx is not None:
            self._xx += x.T @ x
            self._yx += y.T @ x

    @property
    def square(self) -> Floats:
        """Mean square of each input: [n_in]."""
        return (self._square / self.n).astype(np.float32)

    @property
    def gram(self) -> Floats:
        """X^T X / n: [n_in, n_in]."""
        assert self._xx is not None, "collected without grams"
        gram: Floats = self._xx / np.float32(self.n)
        return gram

    @cached_property
    def covariance(self) -> Floats:
        """What is left of the gram if the bias takes care of the means: [n_in, n_in].

        The published sweeps use the gram. Every linear map of GPT-2 has a bias, which `bias` sets so that the
        outputs are right at the mean of the inputs; then no weight has to see to that.
        """
        mean = (self._x / self.n).astype(np.float32)
        covariance = self.gram
        covariance -= np.outer(mean, mean)
        return covariance

    def target(self, w: Floats) -> Floats:
        """Return the matrix [n_out, n_in] that gives the reference's outputs best, zeros of a pruned w kept.

        It is drawn to w as if n_in inputs had spoken for that: the less was seen, the less it is trusted.
        """
        covariance = self.covariance
        means = [(v / self.n).astype(np.float32) for v in (self._y, self._x)]
        gradient: Floats = self._yx / np.float32(self.n) - np.outer(*means) - w @ covariance
        h = damp(covariance, len(covariance) / self.n)
        kept = w != 0
        change = masked_solve(h, gradient, kept) if is_pruned(w) else np.linalg.solve(h, gradient.T).T
        target: Floats = (w + change).astype(np.float32)
        return target

    def bias(self, w: Floats) -> Floats:
        """Return the bias [n_out] with which a matrix gives the reference's mean output."""
        return ((self._y - w @ self._x) / self.n).astype(np.float32)


def by_linear(
    checkpoint: Checkpoint,
    calibration: Calibration,
    change: Callable[[str, Weights, Seen], Changes],
    grams: bool = True,
) -> Checkpoint:
    """Change a model map by map: `change(name, weights, seen)` returns what becomes other, by full name.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model, and the reference.
    calibration : Calibration
        Its fitting half runs through both.
    change : callable
        Gets a name such as h.0.mlp.c_fc, all tensors as they are now, and what was seen. It may change the
        matrix and the bias of that map.
    grams : bool
        Whether there are grams, covariances and targets.
    """
    reference, config = checkpoint.weights, checkpoint.config
    x = embed(checkpoint, calibration.fitting(checkpoint))  # [n_windows, window, n_embd]
    wanted = x.copy()  # the reference's
    for half in range(2 * config.n_layer):
        calibration.progress(f"layer {half // 2 + 1} of {config.n_layer}")
        reader, writer = (f"h.{half // 2}.{linear}" for linear in LINEARS[2 * (half % 2) :][:2])

        def normed(weights: Weights, x: Floats, name: str = norm_of(half, config.n_layer)) -> Floats:
            return layers.layer_norm(weights, name, x.reshape(-1, config.n_embd), config.layer_norm_epsilon)

        seen = Seen(reference[f"{reader}.weight"].shape, grams)
        for part in parts(x):
            y = layers.linear(reference, reader, normed(reference, wanted[part]))
            seen.add(normed(checkpoint.weights, x[part]), y)
        checkpoint = updated(checkpoint, change(reader, checkpoint.weights, seen))

        seen = Seen(reference[f"{writer}.weight"].shape, grams)
        for part in parts(x):
            found: list[Floats] = []
            run_half(tapped(checkpoint.weights, {writer: found.append}), config, half, x[part])
            after = run_half(reference, config, half, wanted[part])
            seen.add(found[0], (after - wanted[part]).reshape(-1, config.n_embd))
            wanted[part] = after
        checkpoint = updated(checkpoint, change(writer, checkpoint.weights, seen))
        x = run_half(checkpoint.weights, config, half, x)
        let_go(reference, half)
    return checkpoint
