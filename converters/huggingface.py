"""Reads a GPT-2 in Hugging Face's layout: config.json, safetensors (whole or in shards), tokenizer files.

Neither torch nor transformers is needed. What cannot be represented exactly is refused by name: other model
types, cross-attention, heads of classifiers, quantized tensors, activations that the engine does not have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import LIMIT, Config, Vocabulary
from minigpt.converters._common import Source
from minigpt.converters._peft import Adapter, read_adapter
from minigpt.converters._safetensors import Stored, open_safetensors, strip
from minigpt.errors import ConversionError
from minigpt.tokenizer import from_gpt2, from_tokenizer_json, read_merges

Floats = NDArray[np.float32]
T = TypeVar("T")

DEFAULTS: dict[str, Any] = {  # of transformers' GPT2Config: files may leave them out
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
    "add_cross_attention": False,
    "quantization_config": None,
}
ONLY = {"model_type": "gpt2", "add_cross_attention": False, "quantization_config": None}  # others are refused
ACTIVATIONS = {  # Hugging Face's names -> ours; the first two are one function
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
WRAPPERS = {"_orig_mod", "module", "transformer"}  # of torch.compile, DataParallel and models with heads
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old versions saved
CONV1D = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")  # stored [n_in, n_out], the transpose of ours
HEAD, TABLE = "lm_head.weight", "wte.weight"


def recognizes(path: Path) -> bool:
    """Whether the path looks like a model in this layout."""
    return (path / "config.json").is_file()


def read(path: str | PathLike[str], lora: str | PathLike[str] | None = None) -> Source:
    """Describe the model in a folder, with a PEFT LoRA folder merged into it if one is given.

    A table with more rows than the tokenizer has tokens (padded to a round size) loses those at its end.

    Parameters
    ----------
    path : path
        A folder with config.json, model.safetensors or model.safetensors.index.json, and tokenizer.json or
        vocab.json and merges.txt.
    lora : path, optional
        A folder with adapter_config.json and adapter_model.safetensors.

    Raises
    ------
    ConversionError
        Naming what is missing, damaged or not representable.
    TokenizerError
        If the tokenizer is no byte-level BPE.
    """
    folder = Path(path)
    fields = DEFAULTS | _read_json(folder / "config.json")
    for field, allowed in ONLY.items():
        if fields.get(field) != allowed:
            raise ConversionError(f"{field} is {fields.get(field)!r}; only {allowed!r} can be converted")
    stored = _by_canonical_name(_open(folder), fields)
    vocabulary = _vocabulary(folder)
    config = _config(fields, stored, len(vocabulary))
    history: dict[str, Any] = {
        "format": "huggingface",
        "source": folder.resolve().name,
        "dtypes": sorted({tensor.dtype for tensor in stored.values()}),
    }
    if trimmed := int(fields["vocab_size"]) - config.vocab_size:
        history["padding_rows_dropped"] = trimmed
    adapter = None
    if lora is not None:
        adapter_fields = _read_json(Path(lora) / "adapter_config.json")
        adapter = read_adapter(Path(lora), adapter_fields, stored)
        history["lora"] = {
            "source": Path(lora).resolve().name,
            **{key: v for key, v in adapter_fields.items() if key in ("r", "lora_alpha", "use_rslora")},
            "maps": len(adapter.modules),
        }
    rows = config.vocab_size if trimmed else None
    tensors = {name: partial(_load, name, tensor, rows, adapter) for name, tensor in stored.items()}
    return Source(config, vocabulary, tensors, history)


def _load(name: str, stored: Stored, rows: int | None, adapter: Adapter | None) -> Floats:
    w = stored.read(transpose=CONV1D.fullmatch(name) is not None)
    if name in (HEAD, TABLE):
        w = w[:rows]
    return adapter.merge(name, w) if adapter else w


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}; give the folder that holds it") from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON file ({error}); copy or download it again") from None
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} must hold a JSON object, not a {type(fields).__name__}")
    return fields


def _open(folder: Path) -> dict[str, Stored]:
    """Map the one file, or all shards that the index names, and return the tensors by their stored names."""
    if (folder / "model.safetensors").is_file():
        return open_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(f.name for f in folder.glob("pytorch_model*.bin"))
        found = f"only {pickled[0]}, a pickle that can run code when it is read" if pickled else "no weights"
        raise ConversionError(
            f"{folder} has {found}; save it with model.save_pretrained(folder, safe_serialization=True)"
        )
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ConversionError(f"{index} has no weight_map; copy or download it again")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard or "\\" in shard:
            raise ConversionError(f"{index.name} names the shard {shard!r}; only files of the same folder are read")
        for name, tensor in open_safetensors(folder / shard).items():
            if places.get(name) != shard:
                raise ConversionError(f"tensor {name} lies in {shard}, but {index.name} says {places.get(name)}")
            tensors[name] = tensor
    if lost := sorted(set(places) - set(tensors)):
        raise ConversionError(f"tensor {lost[0]} is not in {places[lost[0]]}, where {index.name} says; copy it again")
    return tensors


def _by_canonical_name(stored: Mapping[str, Stored], fields: Mapping[str, Any]) -> dict[str, Stored]:
    """Strip prefixes, drop causal masks, and drop a head that is only a copy of the table."""
    tensors: dict[str, Stored] = {}
    for stored_name, tensor in stored.items():
        name = strip(stored_name, WRAPPERS)
        if BUFFERS.fullmatch(name):
            continue
        if name in tensors:
            raise ConversionError(f"tensors {tensors[name].name} and {stored_name} are the same; remove one")
        tensors[name] = tensor
    tied = _typed(fields, "tie_word_embeddings", bool)
    if tied and HEAD in tensors and TABLE not in tensors:
        tensors[TABLE] = tensors.pop(HEAD)
    if HEAD in tensors and TABLE in tensors and tensors[HEAD].same_values(tensors[TABLE]):
        del tensors[HEAD]
    elif tied and HEAD in tensors:
        raise ConversionError(
            "lm_head.weight differs from wte.weight although tie_word_embeddings is true; "
            "set it to false in config.json to keep both, or remove lm_head.weight"
        )
    elif not tied and HEAD not in tensors:
        raise ConversionError(
            "lm_head.weight is missing although tie_word_embeddings is false; "
            "set it to true in config.json if the head is the embedding table"
        )
    return tensors


def _vocabulary(folder: Path) -> Vocabulary:
    """Read tokenizer.json or, without it, the older vocab.json, merges.txt and added_tokens.json."""
    try:
        if (folder / "tokenizer.json").is_file():
            return from_tokenizer_json(_read_json(folder / "tokenizer.json"))
        vocab, added = _read_json(folder / "vocab.json"), folder / "added_tokens.json"
        special = {"<|endoftext|>": vocab["<|endoftext|>"]} if "<|endoftext|>" in vocab else {}
        special |= _read_json(added) if added.is_file() else {}
        return from_gpt2(vocab, read_merges((folder / "merges.txt").read_text("utf-8")), special)
    except OSError as error:
        raise ConversionError(f"cannot read {error.filename}: {error.strerror}; copy the tokenizer") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"the tokenizer in {folder} is damaged ({error!r})") from None


def _config(fields: Mapping[str, Any], stored: Mapping[str, Stored], n_tokens: int) -> Config:
    """Translate config.json, checked against the tensors and the number of tokens in the vocabulary."""
    if (activation := _typed(fields, "activation_function", str)) not in ACTIVATIONS:
        raise ConversionError(f"activation_function is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    vocab_size, n_positions, n_embd, n_layer, n_head = (_size(fields, field) for field in list(DEFAULTS)[:5])
    n_inner = 4 * n_embd if fields["n_inner"] is None else _size(fields, "n_inner")
    if n_embd % n_head:
        raise ConversionError(f"n_embd {n_embd} is no multiple of n_head {n_head}; correct config.json")
    if n_layer != (found := len({name.split(".")[1] for name in stored if name.startswith("h.")})):
        raise ConversionError(f"n_layer is {n_layer}, but the weights have {found} layers")
    if n_tokens > vocab_size:
        raise ConversionError(f"the tokenizer has {n_tokens} tokens, but the table only {vocab_size} rows")
    head_dim = n_embd // n_head
    scale = head_dim**-0.5 if _typed(fields, "scale_attn_weights", bool) else 1.0
    by_layer = _typed(fields, "scale_attn_by_inverse_layer_idx", bool)
    config = Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        head_dim=head_dim,
        n_head=(n_head,) * n_layer,
        n_inner=(n_inner,) * n_layer,
        attn_scale=tuple(scale / (i + 1) if by_layer else scale for i in range(n_layer)),
        layer_norm_epsilon=_typed(fields, "layer_norm_epsilon", float),
        activation_function=ACTIVATIONS[activation],
        eos_token_id=_eos(fields["eos_token_id"], n_tokens),
    )
    shapes = config.shapes()
    for name, tensor in stored.items():
        if (shape := shapes.get(name)) is None:
            raise ConversionError(
                f"tensor {tensor.name} has no place in a GPT-2 language model; cross-attention and heads of "
                "classifiers cannot be converted, a GPT2LMHeadModel or GPT2Model can"
            )
        expected = shape[::-1] if CONV1D.fullmatch(name) else shape
        if tensor.shape != expected:
            raise ConversionError(f"tensor {tensor.name} is {tensor.shape}; config.json asks for {expected}")
    return replace(config, vocab_size=n_tokens)


def _size(fields: Mapping[str, Any], field: str) -> int:
    value = _typed(fields, field, int)
    if not 1 <= value <= LIMIT:
        raise ConversionError(f"{field} is {value}; it must be in 1..{LIMIT}")
    return value


def _typed(fields: Mapping[str, Any], field: str, kind: type[T]) -> T:
    if type(value := fields[field]) is not kind:
        raise ConversionError(f"{field} is {value!r}; config.json must give a {kind.__name__}")
    return value


def _eos(given: object, n_tokens: int) -> int | None:
    """Return the id that ends a text; None where no token has it, as GPT-2's default in a small vocabulary."""
    ids = given if isinstance(given, list) else [given]
    if len(ids) > 1:
        raise ConversionError(f"eos_token_id is {given}; one id can be kept, choose it in config.json")
    in_vocabulary = [i for i in ids if type(i) is int and 0 <= i < n_tokens]
    return in_vocabulary[0] if in_vocabulary else None
