"""GPT-2 in PyTorch, read from and written to a Hugging Face folder.

Parameters bear Hugging Face's names; linear weights are kept [n_out, n_in] and transposed on the way in and out.
Nothing here knows of training, pruning or quantization.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored [n_in, n_out] by Hugging Face


class Cache:
    """Keys and values of the tokens already read, for generation."""

    def __init__(self, n_positions: int) -> None:
        self.n_positions, self.length = n_positions, 0
        self.past: Tensor | None = None  # [2, batch, n_head, n_positions, head_dim]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token's ``k`` and ``v`` and return those of all tokens."""
        if self.past is None:
            self.past = k.new_empty(2, *k.shape[:2], self.n_positions, k.shape[3])
        self.past[0, :, :, self.length], self.past[1, :, :, self.length] = k[:, :, 0], v[:, :, 0]
        self.length += 1
        keys, values = self.past[:, :, :, : self.length]
        return keys, values


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.n_head, d = config["n_head"], config["n_embd"]
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Mix ``x`` [batch, n_tokens, n_embd] over its earlier tokens (with a cache: one token at a time)."""
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, 2))
        if cache is not None:
            k, v = cache.extend(k, v)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)  # [batch, n_head, n_tokens, head_dim]
        return self.c_proj(a.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps around tanh-GELU."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        d = config["n_embd"]
        n_inner = config.get("n_inner") or 4 * d
        self.c_fc, self.c_proj = nn.Linear(d, n_inner), nn.Linear(n_inner, d)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [batch, n_tokens, n_embd] token by token."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer, LayerNorm first."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        d, eps = config["n_embd"], config["layer_norm_epsilon"]
        self.ln_1, self.attn = nn.LayerNorm(d, eps), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(d, eps), MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Add attention and MLP to the residual stream ``x`` [batch, n_tokens, n_embd]."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 with a tied head.

    Parameters
    ----------
    config : dict
        The folder's ``config.json``.

    Raises
    ------
    ValueError
        When the configuration asks for anything but plain GPT-2.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        for key, plain in (
            ("activation_function", "gelu_new"),
            ("tie_word_embeddings", True),
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
        ):
            if config.get(key, plain) != plain:
                raise ValueError(f"{key} is {config[key]!r}, only {plain!r} is trained here; export plain GPT-2 first")
        self.config, d = config, config["n_embd"]
        self.wte, self.wpe = nn.Embedding(config["vocab_size"], d), nn.Embedding(config["n_positions"], d)
        self.h = nn.ModuleList(Block(config) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(d, config["layer_norm_epsilon"])

    def forward(self, ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Logits [batch, n_tokens, vocab_size] of ``ids`` [batch, n_tokens]."""
        wte, begin = self.wte.weight, caches[0].length if caches else 0
        x = F.embedding(ids, wte) + self.wpe.weight[begin : begin + ids.shape[1]]  # [batch, n_tokens, n_embd]
        for block, cache in zip(self.h, caches or [None] * len(self.h), strict=True):
            x = block(x, cache)
        # the matrix units want row counts that are multiples of 8, which 50,257 is not
        head = F.pad(wte, (0, 0, 0, -len(wte) % 64))
        return F.linear(self.ln_f(x), head)[..., : len(wte)]

    def matrices(self) -> Iterator[tuple[str, nn.Linear]]:
        """Names and modules of the body's linear maps, the ones that are pruned and adapted."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear))


def load(folder: str | Path) -> GPT2:
    """Read a Hugging Face GPT-2 folder (config.json, model.safetensors) into a float32 model."""
    folder = Path(folder)
    model = GPT2(json.loads((folder / "config.json").read_text()))
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    wanted = model.state_dict()
    # older folders also hold lm_head.weight (tied) and the causal masks
    state = {name: (t.T if name.endswith(CONV1D) else t).float() for name, t in tensors.items() if name in wanted}
    model.load_state_dict(state)
    return model


def save(model: GPT2, folder: str | Path, source: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``model`` as a Hugging Face folder, with the tokenizer files of the folder ``source``."""
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"transformer.{name}": (t.T if name.endswith(CONV1D) else t).detach().to("cpu", dtype).contiguous()
        for name, t in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = model.config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).exists() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
