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
from minigpt.compress.calibration import Calibration, Weights, embed, let_go, linears, parts, run_half, written_from
from minigpt.compress.heal import masked_solve, norm_of
from minigpt.compress.step import Changes, updated
from minigpt.compress.sweep import damp, inverse_factor

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

    def through(self, w: Floats, bias: Floats) -> None:
        """Let the outputs be w y + bias: sums follow without any output."""
        if self._xx is not None:
            self._yx = w @ self._yx + np.outer(bias, self._x).astype(np.float32)
        self._y = w @ self._y + self.n * bias

    @property
    def gram(self) -> Floats:
        """X^T X / n: [n_in, n_in]."""
        mean = (self._x / self.n).astype(np.float32)
        gram: Floats = self.covariance + np.outer(mean, mean)
        return gram

    @cached_property
    def covariance(self) -> Floats:
        """What is left of the gram if the bias takes care of the means: [n_in, n_in].

        The published sweeps use the gram. Every linear map of GPT-2 has a bias, which `bias` sets so that the
        outputs are right at the mean of the inputs; then no weight has to see to that.
        """
        assert self._xx is not None, "collected without grams"
        mean = (self._x / self.n).astype(np.float32)
        covariance, self._xx = self._xx, None  # in the room of the sums
        covariance /= np.float32(self.n)
        covariance -= np.outer(mean, mean)
        return covariance

    def target(self, w: Floats) -> Floats:
        """Return the matrix [n_out, n_in] that gives the reference's outputs best, zeros of a pruned w kept.

        It is drawn to w as if n_in inputs had spoken for that: the less was seen, the less it is trusted.
        """
        covariance = self.covariance
        means = [(v / self.n).astype(np.float32) for v in (self._y, self._x)]
        gradient: Floats = self._yx / np.float32(self.n) - np.outer(*means) - w @ covariance
        damping = len(covariance) / self.n
        if is_pruned(w):
            change = masked_solve(damp(covariance, damping), gradient, w != 0)
        else:
            u = inverse_factor(covariance, damping)
            change = gradient @ u.T @ u
        target: Floats = w + change
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
        reader, writer = linears(half)

        def normed(weights: Weights, x: Floats, name: str = norm_of(half, config.n_layer)) -> Floats:
            return layers.layer_norm(weights, name, x.reshape(-1, config.n_embd), config.layer_norm_epsilon)

        seen = Seen((config.n_embd, config.n_embd), grams)
        for part in parts(x):
            seen.add(normed(checkpoint.weights, x[part]), normed(reference, wanted[part]))
        seen.through(reference[f"{reader}.weight"].decode(), layers.vector(reference, f"{reader}.bias"))
        checkpoint = updated(checkpoint, change(reader, checkpoint.weights, seen))

        seen = Seen(reference[f"{writer}.weight"].shape, grams)
        mixed: list[Floats] = []  # what attention mixes is as wide as the stream, but an MLP's neurons are too many
        for part in parts(x):
            inputs = written_from(checkpoint.weights, config, half, x[part])
            after = run_half(reference, config, half, wanted[part])
            seen.add(inputs, (after - wanted[part]).reshape(-1, config.n_embd))
            wanted[part] = after
            mixed += [] if half % 2 else [inputs]
        checkpoint = updated(checkpoint, change(writer, checkpoint.weights, seen))
        del seen
        for number, part in enumerate(parts(x)):
            if mixed:
                x[part] += layers.linear(checkpoint.weights, writer, mixed[number]).reshape(x[part].shape)
            else:
                x[part] = run_half(checkpoint.weights, config, half, x[part])
        let_go(reference, half)
    return checkpoint
