"""`codebook4`, `codebook8`: every weight is one of 16 values of its row, or of 256 of its matrix, chosen by k-means.

`codebook4` packs its codes like `int4`: byte j of 32 columns holds column j in its low and column j + 16 in its high
nibble, rows padded to whole groups of 32. The table is in f16.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import Encoding, Floats, Parts, Rows
from minigpt.encodings.grid import half, pack_nibbles, pad_columns, unpack_nibbles

ROUNDS = 20  # of Lloyd's algorithm; the error falls by less than 1 % after
APART = 4.0  # rows, each mapped to 0..1, stand this far apart on one sorted line


def kmeans(w: Floats, k: int, sensitivity: Floats | None = None, rounds: int = ROUNDS) -> Floats:
    """Return k values for each row of w that minimise the weighted squared distance (Lloyd 1982), ascending.

    In one dimension a cluster is an interval, so a round is one binary search in sorted rows and two sums.

    Parameters
    ----------
    w : ndarray of shape (n_rows, n), dtype=float32
    k : int
        Values per row.
    sensitivity : ndarray of shape (n_rows, n) or (n,), optional
        Weight of each squared distance; by default all are equal.

    Returns
    -------
    ndarray of shape (n_rows, k), dtype=float32
        A row of w with at most k different values gets exactly these.
    """
    n_rows, n = w.shape
    order = np.argsort(w, axis=1)
    x = np.take_along_axis(w, order, axis=1).astype(np.float64)  # [n_rows, n]
    mass = np.broadcast_to(1.0 if sensitivity is None else sensitivity, w.shape)
    mass = np.take_along_axis(mass, order, axis=1).astype(np.float64)
    before = np.zeros((2, n_rows, n + 1))  # sums of mass and of mass * x over the smaller weights
    np.cumsum(mass, axis=1, out=before[0, :, 1:])
    np.cumsum(mass * x, axis=1, out=before[1, :, 1:])
    low, span = x[:, :1], np.maximum(x[:, -1:] - x[:, :1], 1e-30)
    row = APART * np.arange(n_rows)[:, None]
    line = ((x - low) / span + row).reshape(-1)

    # half way between equal steps, which find the outliers, and equal shares, which find the crowd
    steps = (np.arange(k) + 0.5) / k
    centres = (low + span * steps + x[:, (steps * n).astype(int)]) / 2  # [n_rows, k]
    for _ in range(rounds):
        borders = (centres[:, 1:] + centres[:, :-1]) / 2
        places = np.searchsorted(line, (borders - low) / span + row) - n * np.arange(n_rows)[:, None]
        edges = np.pad(places, ((0, 0), (1, 1)), constant_values=((0, 0), (0, n)))  # [n_rows, k + 1]
        weight, total = np.diff(np.take_along_axis(before, edges[None], axis=2), axis=2)
        centres = np.where(weight > 0, total / np.where(weight > 0, weight, 1), centres)

    rank = np.pad(np.cumsum(np.diff(x, axis=1) != 0, axis=1), ((0, 0), (1, 0)))  # [n_rows, n]
    few = rank[:, -1] < k
    exact = np.repeat(x[few, -1:], k, axis=1)
    np.put_along_axis(exact, rank[few], x[few], axis=1)
    centres[few] = exact
    return centres.astype(np.float32)


def nearest(w: Floats, table: Floats) -> NDArray[np.uint8]:
    """Return for each weight of w [n_rows, n] the index of the nearest value of its row of table [n_rows, k]."""
    borders = (table[:, 1:] + table[:, :-1]) / 2
    return np.stack([np.searchsorted(b, v) for b, v in zip(borders, w, strict=True)]).astype(np.uint8)


class Codebook(Encoding):
    """What both share: they encode with regard to how much a column matters."""

    @abstractmethod
    def encode(self, w: Floats, sensitivity: Floats | None = None) -> Parts:
        """Cluster; a column's sensitivity [n_in] weighs its squared errors."""


class Codebook4(Codebook):
    """16 values for each row: 4 bits a weight and 32 bytes a row."""

    name = "codebook4"
    part_dtypes = {"codes": "|u1", "table": "<f2"}
    tables = "int8_split"
    positions = "f16"
    twin = "f16"
    max_error = 2.001  # k-means bounds the sum of squares; one weight may be as far as its row is wide

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Half a byte for each weight, 16 values for each row."""
        n_out, n_in = shape
        return {"codes": (n_out, -(-n_in // 32) * 16), "table": (n_out, 16)}

    def encode(self, w: Floats, sensitivity: Floats | None = None) -> Parts:
        """Cluster each row; a column's sensitivity [n_in] weighs its squared errors."""
        table = half(kmeans(w, 16, sensitivity))
        return {"codes": pack_nibbles(pad_columns(nearest(w, table), 32)), "table": table.astype("<f2")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Look every code up in its row's table."""
        codes = unpack_nibbles(parts["codes"][rows])[:, :n_in].astype(np.intp)
        return np.take_along_axis(parts["table"][rows].astype(np.float32), codes, axis=1)


class Codebook8(Codebook):
    """256 values for the matrix: 8 bits a weight."""

    name = "codebook8"
    part_dtypes = {"codes": "|u1", "table": "<f2"}
    tables = "int8_split"
    positions = "f16"
    twin = "f16"
    max_error = math.inf  # relative to the matrix it would be 2; a row much smaller than the others may get no value

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return those of a byte a weight and one table."""
        return {"codes": shape, "table": (256,)}

    def encode(self, w: Floats, sensitivity: Floats | None = None) -> Parts:
        """Cluster the matrix; a column's sensitivity [n_in] weighs its squared errors."""
        mass = None if sensitivity is None else np.broadcast_to(sensitivity, w.shape).reshape(1, -1)
        table = half(kmeans(w.reshape(1, -1), 256, mass))
        return {"codes": nearest(w.reshape(1, -1), table).reshape(w.shape), "table": table[0].astype("<f2")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Look every code up in the table."""
        w: Floats = parts["table"].astype(np.float32)[parts["codes"][rows]]
        return w
