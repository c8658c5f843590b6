"""GPT-2 with a key/value cache as one would write it by hand in NumPy: float32, BLAS, nothing clever."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


class GPT2:
    """A Hugging Face folder; `forward` extends the cache that `reset` empties."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        config = json.loads((folder / "config.json").read_text())
        self.n_layer, self.n_head, self.n_embd = (config[name] for name in ("n_layer", "n_head", "n_embd"))
        self.n_positions = config["n_positions"]
        stored = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("transformer."): values for name, values in stored.items()}
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
        shape = (self.n_layer, self.n_head, self.n_positions, self.n_embd // self.n_head)
        self.k, self.v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def forward(self, ids) -> np.ndarray:
        """Return the logits of the last token."""
        w, begin, end = self.weights, self.length, self.length + len(ids)
        x = w["wte.weight"][ids] + w["wpe.weight"][begin:end]  # [n, n_embd]
        hidden = np.arange(end) > np.arange(begin, end)[:, None]
        for i in range(self.n_layer):
            q, k, v = (
                part.reshape(len(ids), self.n_head, -1).swapaxes(0, 1)  # [n_head, n, head_dim]
                for part in np.split(self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
            )
            self.k[i, :, begin:end], self.v[i, :, begin:end] = k, v
            scores = q @ self.k[i, :, :end].swapaxes(1, 2) * np.float32(q.shape[-1] ** -0.5)
            shares = np.exp(np.where(hidden, np.float32(-1e30), scores - scores.max(axis=-1, keepdims=True)))
            mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ self.v[i, :, :end]
            x = x + self.linear(mixed.swapaxes(0, 1).reshape(len(ids), -1), f"h.{i}.attn.c_proj")
            u = self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            gelu = 0.5 * u * (1 + np.tanh(np.float32(0.7978845608) * (u + np.float32(0.044715) * u * u * u)))
            x = x + self.linear(gelu, f"h.{i}.mlp.c_proj")
        self.length = end
        return self.norm(x[-1], "ln_f") @ w["wte.weight"].T

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return x @ weight + bias."""
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return the LayerNorm of each row."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        return (
            centred / np.sqrt(variance + np.float32(1e-5)) * self.weights[f"{name}.weight"]
            + self.weights[f"{name}.bias"]
        )
