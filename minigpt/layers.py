"""GPT-2's forward pass as pure functions over Weights, in the order in which they are called.

Plain NumPy, no state but the key/value cache that `attention` extends. It is the backend without numba, the
documentation of the compiled one (`kernels/forward.py`), and where compression looks at activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from minigpt import reference
from minigpt.cache import F32Store
from minigpt.checkpoint import Config
from minigpt.encodings import Weight

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = Mapping[str, Weight]
Run = tuple[slice, int, int]  # tokens of a batch that stand next to each other | their sequence | first position
ALL = slice(None)


def runs(sequence_of: Ids, positions: Ids) -> list[Run]:
    """Cut a batch of tokens where another sequence begins."""
    starts = [0, *(np.flatnonzero(np.diff(sequence_of)) + 1).tolist(), len(sequence_of)]
    return [(slice(a, b), int(sequence_of[a]), int(positions[a])) for a, b in itertools.pairwise(starts)]


def embed(weights: Weights, ids: Ids, positions: Ids) -> Floats:
    """Look up tokens and positions: [n_tokens] -> [n_tokens, n_embd]."""
    return weights["wte.weight"].rows(ids) + weights["wpe.weight"].rows(positions)


def vector(weights: Weights, name: str) -> Floats:
    """Return a gain or bias, always stored in f32."""
    return weights[name].parts["values"]


def layer_norm(weights: Weights, name: str, x: Floats, epsilon: float) -> Floats:
    """Apply the LayerNorm called `name`: [n_tokens, n_embd] -> [n_tokens, n_embd]."""
    return reference.layer_norm(x, vector(weights, f"{name}.weight"), vector(weights, f"{name}.bias"), epsilon)


def linear(weights: Weights, name: str, x: Floats) -> Floats:
    """Apply the affine map called `name`: [n_tokens, n_in] -> [n_tokens, n_out]."""
    return weights[f"{name}.weight"].matmul(x) + vector(weights, f"{name}.bias")


def attention(
    weights: Weights,
    config: Config,
    i: int,
    x: Floats,
    k: F32Store,
    v: F32Store,
    batch: Iterable[Run],
    keep: Ids | slice = ALL,
) -> Floats:
    """Attend within each sequence and store its keys and values on the way.

    Parameters
    ----------
    x : ndarray of shape (n_tokens, n_embd), dtype=float32
    k, v : F32Store
        The cache of layer `i`, of any kind; the positions of these tokens are overwritten.
    keep : ndarray of int or slice
        The tokens whose output is wanted.

    Returns
    -------
    ndarray of shape (n_keep, n_embd), dtype=float32
    """
    n_head, head_dim = config.n_head[i], config.head_dim
    qkv = linear(weights, f"h.{i}.attn.c_attn", x)  # [n_tokens, 3 * n_head * head_dim]
    heads = qkv.reshape(len(x), 3, n_head, head_dim).transpose(1, 2, 0, 3)  # [3, n_head, n_tokens, head_dim]
    mixed = np.empty((len(x), n_head, head_dim), np.float32)
    for tokens, s, first in batch:
        q, end = heads[0][:, tokens], first + tokens.stop - tokens.start
        for store, rows in ((k, heads[1]), (v, heads[2])):
            store.write(s, slice(first, end), rows[:, tokens])
        seen = reference.attention(q, k.read(s, end), v.read(s, end), config.attn_scale[i])
        mixed[tokens] = seen.transpose(1, 0, 2)
    return linear(weights, f"h.{i}.attn.c_proj", mixed.reshape(len(x), -1)[keep])


def mlp(weights: Weights, config: Config, i: int, x: Floats) -> Floats:
    """Expand, bend, contract: [n_tokens, n_embd] -> [n_tokens, n_inner] -> [n_tokens, n_embd]."""
    act: Callable[[Floats], Floats] = reference.ACTIVATIONS[config.activation_function]
    return linear(weights, f"h.{i}.mlp.c_proj", act(linear(weights, f"h.{i}.mlp.c_fc", x)))


def block(
    weights: Weights,
    config: Config,
    i: int,
    x: Floats,
    k: F32Store,
    v: F32Store,
    batch: Iterable[Run],
    keep: Ids | slice = ALL,
) -> Floats:
    """One transformer block, pre-LayerNorm: [n_tokens, n_embd] -> [n_keep, n_embd]."""
    epsilon = config.layer_norm_epsilon
    x = x[keep] + attention(weights, config, i, layer_norm(weights, f"h.{i}.ln_1", x, epsilon), k, v, batch, keep)
    return x + mlp(weights, config, i, layer_norm(weights, f"h.{i}.ln_2", x, epsilon))


def head(weights: Weights, config: Config, x: Floats) -> Floats:
    """Apply the final LayerNorm and project onto the vocabulary: [n_tokens, n_embd] -> [n_tokens, vocab_size]."""
    return weights["lm_head.weight"].matmul(layer_norm(weights, "ln_f", x, config.layer_norm_epsilon))
