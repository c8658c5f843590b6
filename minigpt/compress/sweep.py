"""The column sweep of optimal brain surgeon: change one column, let the columns after it make up for the error.

Removing (SparseGPT, Frantar and Alistarh 2023) and rounding (GPTQ, Frantar et al. 2022) are the same sweep, alone or
together. Arrays in, arrays out: which matrices, which grid and which zeros is said in `prune.py` and `quantize.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings import Grid, OnGrid, Weight

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

BLOCK = 128  # columns whose effect on the rest is applied at once, by one matrix product
PANEL = 16  # the same, on the rest of their block
DAMPING = 0.01  # of the mean of the gram's diagonal, added to it


@dataclass(frozen=True)
class Choice:
    """How a sweep finds out which weights to keep.

    Attributes
    ----------
    width : int
        Columns that are decided on together, a divisor of BLOCK.
    keep : callable
        Saliency [n_out, width] -> which to keep.
    """

    width: int
    keep: Callable[[Floats], Mask]


@dataclass(frozen=True)
class Swept:
    """The result of a sweep: values w [n_out, n_in], which are kept, and their codes on a grid if there is one."""

    w: Floats
    kept: Mask
    codes: NDArray[np.int16]
    grid: Grid

    def encoded(self, encoding: OnGrid) -> Weight:
        """Return the codes in the encoding that the sweep rounded to."""
        return Weight(encoding, self.w.shape, encoding.pack(self.codes, self.grid, self.kept))


def damp(gram: Floats, damping: float = DAMPING) -> Floats:
    """Add a share of the mean of a gram's diagonal to the diagonal, so that it can be inverted."""
    h: Floats = gram.astype(np.float32)
    h[np.diag_indices_from(h)] += np.float32(damping * (float(np.diagonal(h).mean()) or 1.0))
    return h


def inverse_factor(gram: Floats, damping: float = DAMPING) -> Floats:
    """Return the upper triangular u with u^T u = (gram + damping)^-1.

    Row j of u, over its diagonal, is how the columns after j make up for a change of column j once those before j are
    fixed. It is found by halves in float32, so that nearly all the work is matrix products.
    """
    u = damp(gram, damping)
    _factorize_inverse(u)
    return u


def _factorize_inverse(h: Floats) -> None:
    """Put the upper triangular u with u^T u = h^-1 in the place of h.

    With h = [[a, b], [b^T, d]] it is [[u_a, -u_a x u_d], [0, u_d]]: u_d that of d, x = b u_d^T, u_a that of a - x x^T.
    """
    half = len(h) // 2
    if half < 32:  # with h = r r^T, r upper triangular (Cholesky from the last column on), u is r^-1
        h[:] = np.triu(np.linalg.inv(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]))
        return
    a, b, d = h[:half, :half], h[:half, half:], h[half:, half:]
    _factorize_inverse(d)
    b[:] = b @ d.T
    a -= b @ b.T
    _factorize_inverse(a)
    b[:] = a @ b @ -d
    h[half:, :half] = 0


def sweep(
    w: Floats,
    gram: Floats,
    *,
    kept: Mask | None = None,
    choice: Choice | None = None,
    encoding: OnGrid | None = None,
    grid: Grid | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = DAMPING,
) -> Swept:
    """Prune, round, or both, and keep the products with inputs of this gram as they were, as far as that goes.

    Parameters
    ----------
    w : ndarray of shape (n_out, n_in), dtype=float32
    gram : ndarray of shape (n_in, n_in), dtype=float32
        X^T X / n of the inputs, or their covariance if the bias takes care of the mean.
    kept : ndarray of shape (n_out, n_in), dtype=bool, optional
        Weights that may be other than zero.
    choice : Choice, optional
        Decides, on the way, which of these stay.
    encoding : OnGrid, optional
        Whose codes to round to; None: do not round.
    grid : Grid, optional
        Its scales and minimums; by default each group's are chosen when the sweep reaches it.
    symmetric : bool
        Whether zero is on that grid.
    act_order : bool
        Take the columns with the largest inputs first, while the others can still make up for them. The grid is
        then chosen before the sweep.
    damping : float
        See `inverse_factor`.
    """
    n_out, n_in = w.shape
    width = (encoding.group if encoding else 0) or n_in
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(n_in)
    back = np.argsort(order)
    u = inverse_factor(gram[np.ix_(order, order)] if act_order else gram, damping)
    t = np.ascontiguousarray(w.T[order])  # [n_in, n_out]: a column of w is contiguous
    keep = np.ones_like(t, np.bool_) if kept is None else np.ascontiguousarray(kept.T[order])
    codes = np.zeros(t.shape if encoding else (0, 0), np.int16)
    scales, minimums = np.zeros((2, -(-n_in // width), n_out), np.float32)
    late = encoding is not None and grid is None and not act_order and width <= BLOCK
    if encoding is not None and not late:
        scales[:], minimums[:] = (a.T for a in grid or encoding.grid(np.where(keep[back].T, w, 0), symmetric))

    for begin in range(0, n_in, BLOCK):
        end = min(begin + BLOCK, n_in)
        errors = np.empty((end - begin, n_out), np.float32)
        for first in range(begin, end, PANEL):
            last = min(first + PANEL, end)
            for j in range(first, last):
                if choice is not None and (j - begin) % choice.width == 0:
                    span = slice(j, min(j + choice.width, end))
                    saliency = np.where(keep[span], np.square(t[span] / np.diagonal(u)[span, None]), -1)
                    keep[span] &= choice.keep(saliency.T).T
                group = order[j] // width
                if late and j % width == 0:
                    span = slice(j, min(j + width, end))
                    fitted = np.where(keep[span], t[span], 0).T
                    scales[group], minimums[group] = encoding.fit(fitted, symmetric)  # type: ignore[union-attr]
                value = np.where(keep[j], t[j], np.float32(0))
                if encoding is not None:
                    code = encoding.round(value, scales[group], minimums[group])
                    codes[j], value = code, code * scales[group] + minimums[group]
                    if encoding.sparse:
                        value *= keep[j]
                errors[j - begin] = error = (t[j] - value) / u[j, j]
                t[j + 1 : last] -= u[j, j + 1 : last, None] * error
                t[j] = value
            t[last:end] -= u[first:last, last:end].T @ errors[first - begin : last - begin]
        t[end:] -= u[begin:end, end:].T @ errors

    rounded = codes[back].T if encoding else codes
    return Swept(np.ascontiguousarray(t[back].T), keep[back].T, rounded, Grid(scales.T, minimums.T))
