"""Writes a Checkpoint as a Hugging Face GPT-2 folder: the way back from `.mgpt` to the tools that train.

The layout holds one number of heads and neurons for all layers and float weights: what does not fit is refused by
name, never padded or rounded. Pruned zeros stay zeros; trimmed depth, width, context and vocabulary fit as they are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Checkpoint, Config
from minigpt.converters._safetensors import write_safetensors
from minigpt.converters.huggingface import CONV1D, HEAD
from minigpt.errors import ConversionError
from minigpt.tokenizer import Tokenizer

DTYPES = {"f32": np.float32, "f16": np.float16}


def export(checkpoint: Checkpoint, folder: str | PathLike[str], dtype: str = "f32") -> None:
    """Write config.json, model.safetensors and tokenizer.json into a new folder.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its matrices are decoded: a quantized model comes back as the floats that it computes with.
    folder : path
        Must not exist yet, or be empty; it appears complete or not at all.
    dtype : {"f32", "f16"}
        Of the weights.

    Raises
    ------
    ConversionError
        If the layout cannot hold the model, or the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    folder = Path(folder)
    fields = huggingface_config(checkpoint.config, checkpoint.tied, dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} exists and is not an empty folder; choose another name")
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".minigpt-") as scratch:
            made = Path(scratch, "model")
            made.mkdir()
            (made / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            (made / "generation_config.json").write_text(
                json.dumps({"bos_token_id": fields["bos_token_id"], "eos_token_id": fields["eos_token_id"]}) + "\n"
            )
            Tokenizer(checkpoint.vocabulary).save(made / "tokenizer.json")
            _save_weights(checkpoint, made / "model.safetensors", dtype)
            made.replace(folder)
    except OSError as error:
        raise ConversionError(f"cannot write {folder}: {error.strerror}; choose another folder") from None


def huggingface_config(config: Config, tied: bool, dtype: str) -> dict[str, Any]:
    """Return the fields of config.json.

    Raises
    ------
    ConversionError
        Naming what GPT2Config has no field for.
    """
    for field in ("n_head", "n_inner"):
        if len(counts := set(getattr(config, field))) > 1:
            raise ConversionError(f"{field} differs between layers ({sorted(counts)}); the layout has one for all")
    if config.n_head[0] * config.head_dim != config.n_embd:
        raise ConversionError(
            f"{config.n_head[0]} heads of {config.head_dim} are not n_embd {config.n_embd}; the layout needs them equal"
        )
    for scaled in (True, False):
        for by_layer in (False, True):
            scale = config.head_dim**-0.5 if scaled else 1.0
            expected = [scale / (i + 1) if by_layer else scale for i in range(config.n_layer)]
            if np.allclose(config.attn_scale, expected, rtol=1e-6, atol=0):
                return {
                    "architectures": ["GPT2LMHeadModel"],
                    "model_type": "gpt2",
                    "vocab_size": config.vocab_size,
                    "n_positions": config.n_positions,
                    "n_ctx": config.n_positions,
                    "n_embd": config.n_embd,
                    "n_layer": config.n_layer,
                    "n_head": config.n_head[0],
                    "n_inner": config.n_inner[0],
                    "activation_function": config.activation_function,
                    "layer_norm_epsilon": config.layer_norm_epsilon,
                    "scale_attn_weights": scaled,
                    "scale_attn_by_inverse_layer_idx": by_layer,
                    "tie_word_embeddings": tied,
                    "bos_token_id": config.eos_token_id,
                    "eos_token_id": config.eos_token_id,
                    "torch_dtype": {"f32": "float32", "f16": "float16"}[dtype],
                }
    raise ConversionError(f"attn_scale {config.attn_scale} is none that the layout can state; keep all layers in order")


def _save_weights(checkpoint: Checkpoint, path: Path, dtype: str) -> None:
    weights = {
        name if name == HEAD else f"transformer.{name}": weight
        for name, weight in checkpoint.weights.items()
        if name != HEAD or not checkpoint.tied
    }
    turned = {name for name in weights if CONV1D.fullmatch(name.removeprefix("transformer."))}

    def values() -> Iterator[NDArray[np.floating]]:
        for name, weight in weights.items():
            w = weight.decode()
            if np.abs(w).max(initial=0) > np.finfo(DTYPES[dtype]).max:
                raise ConversionError(f"tensor {name} holds values beyond {dtype}; export it as f32")
            yield w.T if name in turned else w

    shapes = {name: weight.shape[::-1] if name in turned else weight.shape for name, weight in weights.items()}
    write_safetensors(path, dtype.upper(), shapes, values())
