"""Other ways of saying a matrix: two thin factors, a few values, or the matrix of another layer.

Each is a pure function of arrays and a step that applies it. What the results weigh is their encodings' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Checkpoint
from minigpt.compress.calibration import LINEARS, Calibration, Statistics, Weights, by_layer, required
from minigpt.compress.step import choice, noted, number, step, switch, text, updated, whole
from minigpt.compress.sweep import damp
from minigpt.compress.walk import Seen, by_linear
from minigpt.encodings import Weight, encode
from minigpt.encodings.codebook import Codebook, Codebook4, Codebook8
from minigpt.errors import OptionError

Floats = NDArray[np.float32]

CODEBOOKS: dict[str, type[Codebook]] = {"codebook4": Codebook4, "codebook8": Codebook8}


def low_rank(w: Floats, rank: int, gram: Floats | None = None) -> tuple[Floats, Floats]:
    """Return factors a [n_out, rank] and b [rank, n_in] of the nearest matrix of a rank.

    Nearest in the weights (Eckart and Young 1936) or, given X^T X / n of the inputs, in the products: with gram = s s^T
    the error of the products is the norm of (w - a b) s, so the singular values of w s are what is cut off
    (SVD-LLM, Wang et al. 2024).

    Parameters
    ----------
    w : ndarray of shape (n_out, n_in), dtype=float32
    rank : int
    gram : ndarray of shape (n_in, n_in), dtype=float32, optional

    Returns
    -------
    a, b : ndarray, dtype=float32
        The rows of b are orthonormal.
    """
    if gram is None:
        u, values, vt = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * values[:rank], vt[:rank]
    s = np.linalg.cholesky(damp(gram))  # [n_in, n_in], lower triangular
    u, values, vt = np.linalg.svd(w @ s, full_matrices=False)
    b = np.linalg.solve(s.T, vt[:rank].T).T  # vt s^-1
    q, r = np.linalg.qr(b.T)  # b = r^T q^T
    return (u[:, :rank] * values[:rank] @ r.T).astype(np.float32), q.T.astype(np.float32)


def shared(matrices: list[Floats], grams: list[Floats]) -> Floats:
    """Return the one matrix whose products are nearest to those of all, each with its own inputs.

    Minimizes the sum of tr (w_i - w) g_i (w_i - w)^T: the mean of the matrices, each weighed by its inputs.
    """
    damped = [damp(gram) for gram in grams]
    target = sum(w @ h for w, h in zip(matrices, damped, strict=True))
    common: Floats = np.linalg.solve(sum(damped), np.transpose(target)).T.astype(np.float32)
    return common


def matching(checkpoint: Checkpoint, i: int, only: str) -> list[str]:
    """Return the names, without ".weight", of a block's matrices that fit a pattern.

    Raises
    ------
    OptionError
        If none in the whole model does.
    """
    every = [f"h.{block}.{linear}" for block in range(checkpoint.config.n_layer) for linear in LINEARS]
    if not any(fnmatchcase(f"{name}.weight", only) for name in every):
        raise OptionError(f"no matrix of a block has a name like {only!r}; names are such as h.0.mlp.c_fc.weight")
    return [name for name in every if name.startswith(f"h.{i}.") and fnmatchcase(f"{name}.weight", only)]


ONLY = text("a pattern of tensor names such as h.*.mlp.*")


@step(share=number(0, 1), whiten=switch(), only=ONLY)
def lowrank(
    checkpoint: Checkpoint, calibration: Calibration | None, *, share: float, whiten: bool = True, only: str = "*"
) -> Checkpoint:
    """Replace the blocks' matrices by two thin ones that have a given share of their weights.

    Two factors of rank r have r (n_out + n_in) weights. Matrices of which not even rank 1 would do are left alone.
    """
    ranks: dict[str, int] = {}

    names = [name for i in range(checkpoint.config.n_layer) for name in matching(checkpoint, i, only)]

    def change(name: str, weights: Weights, seen: Seen | None) -> dict[str, Floats | Weight]:
        w = weights[f"{name}.weight"].decode()
        rank = int(share * w.size / sum(w.shape))
        if name not in names or not rank:
            return {}
        ranks[name] = rank
        a, b = low_rank(seen.target(w), rank, seen.covariance) if seen else low_rank(w, rank)
        weight = encode(a @ b, "lowrank")
        return {f"{name}.weight": weight} | ({f"{name}.bias": seen.bias(weight.decode())} if seen else {})

    if whiten:
        result = by_linear(checkpoint, required(calibration, "whitened low rank"), change)
    else:
        result = checkpoint
        for name in names:
            result = updated(result, change(name, result.weights, None))
    return noted(result, ranks=ranks)


@step(encoding=choice(CODEBOOKS), weighted=switch(), only=ONLY)
def codebook(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    encoding: str = "codebook4",
    weighted: bool = True,
    only: str = "*",
) -> Checkpoint:
    """Let the blocks' matrices have 16 values a row, or 256 a matrix, chosen by k-means (SqueezeLLM, Kim et al. 2023).

    Weighted: the squared error of a weight counts as much as the variance of its input.
    """
    kind = CODEBOOKS[encoding]()
    names = [name for i in range(checkpoint.config.n_layer) for name in matching(checkpoint, i, only)]

    def change(name: str, weights: Weights, seen: Seen | None) -> dict[str, Floats | Weight]:
        if name not in names:
            return {}
        w = weights[f"{name}.weight"].decode()
        if seen is None:
            return {f"{name}.weight": Weight(kind, w.shape, kind.encode(w))}
        weight = Weight(kind, w.shape, kind.encode(seen.target(w), np.diagonal(seen.covariance)))
        return {f"{name}.weight": weight, f"{name}.bias": seen.bias(weight.decode())}

    if weighted:
        return by_linear(checkpoint, required(calibration, "a codebook weighted by sensitivity"), change)
    for name in names:
        checkpoint = updated(checkpoint, change(name, checkpoint.weights, None))
    return checkpoint


@step(layers=whole(2), only=ONLY)
def share(checkpoint: Checkpoint, calibration: Calibration | None, *, layers: int = 2, only: str = "*") -> Checkpoint:
    """Let every so many layers in a row have their matrices in common, as ALBERT does (Lan et al. 2019).

    LayerNorms and biases stay each layer's own. Layers with other shapes than the first of their group keep theirs.
    """
    text_ = required(calibration, "sharing layers")
    group: dict[str, list[tuple[str, Floats, Floats]]] = {}  # by linear map: name, matrix, gram of each layer

    def change(i: int, weights: Weights, statistics: Mapping[str, Statistics]) -> dict[str, Floats | Weight]:
        changes: dict[str, Floats | Weight] = {}
        for name in matching(checkpoint, i, only):
            w = weights[f"{name}.weight"].decode()
            members = group.setdefault(name.removeprefix(f"h.{i}."), [])
            if not members or members[0][1].shape == w.shape:
                members.append((name, w, statistics[name].gram))
        if (i + 1) % layers == 0 or i + 1 == checkpoint.config.n_layer:
            for members in group.values():
                if len(members) > 1:
                    common = encode(shared([w for _, w, _ in members], [g for _, _, g in members]))
                    changes |= {f"{name}.weight": common for name, _, _ in members}
            group.clear()
        return changes

    return by_layer(checkpoint, text_, change)
