"""A model at rest: `Checkpoint` = configuration, vocabulary, named weights and history; a `.mgpt` file and back.

Compression and converters make Checkpoints from Checkpoints; `model.py` runs them. Nothing here computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt import format as mgpt
from minigpt.encodings import ENCODINGS, Weight
from minigpt.errors import ConfigError, FormatError
from minigpt.reference import ACTIVATIONS

TABLES = ("wte.weight", "lm_head.weight")  # one row per token of the vocabulary
POSITIONS = "wpe.weight"
LIMIT = 1 << 20  # of every size in a configuration: far above any GPT-2, far below trouble


@dataclass(frozen=True)
class Config:
    """The shape of a GPT-2, per layer where trimming may make layers differ.

    Attributes
    ----------
    vocab_size, n_positions, n_embd, n_layer, head_dim : int
        As in GPT-2; `head_dim` is the width of a head, 64 in every released model.
    n_head, n_inner : tuple of int
        Attention heads and MLP neurons of each layer.
    attn_scale : tuple of float
        What q.k is multiplied by in each layer, usually head_dim ** -0.5.
    layer_norm_epsilon : float
        Added to the variance.
    activation_function : str
        A key of `reference.ACTIVATIONS`.
    eos_token_id : int or None
        The token that ends a text.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    head_dim: int
    n_head: tuple[int, ...]
    n_inner: tuple[int, ...]
    attn_scale: tuple[float, ...]
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises
        ------
        ConfigError
            Naming the field, its value and what is allowed.
        """
        for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "head_dim"):
            _check_size(field, getattr(self, field))
        for field in ("n_head", "n_inner", "attn_scale"):
            if len(values := getattr(self, field)) != self.n_layer:
                raise ConfigError(f"{field} must give one value for each of {self.n_layer} layers, not {len(values)}")
        for field in ("n_head", "n_inner"):
            for value in getattr(self, field):
                _check_size(field, value)
        for field, value in (("attn_scale", s) for s in self.attn_scale):
            _check_number(field, value, value != 0, "a finite number other than 0")
        epsilon = self.layer_norm_epsilon
        _check_number("layer_norm_epsilon", epsilon, epsilon > 0, "a finite number above 0")
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}, not {self.activation_function!r}"
            )
        if self.eos_token_id is not None and not 0 <= self.eos_token_id < self.vocab_size:
            raise ConfigError(f"eos_token_id must be in 0..{self.vocab_size - 1}, not {self.eos_token_id}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Config:
        """Build a Config from what `to_json` returned.

        Raises
        ------
        ConfigError
            If a field is missing, unknown or of the wrong kind.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(f"unknown configuration field {unknown[0]!r}; upgrade minigpt or convert the model again")
        required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(fields)):
            raise ConfigError(f"the configuration lacks {missing[0]!r}; convert the model again")
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        try:
            return cls(**values)
        except TypeError as error:  # a string where a number is due, and the like
            raise ConfigError(f"a configuration field has the wrong type: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the canonical name and shape of every tensor, lm_head.weight included."""
        d = self.n_embd
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, d),
            "wpe.weight": (self.n_positions, d),
        }
        for i, (n_head, n_inner) in enumerate(zip(self.n_head, self.n_inner, strict=True)):
            width = n_head * self.head_dim
            shapes |= {
                f"h.{i}.ln_1.weight": (d,),
                f"h.{i}.ln_1.bias": (d,),
                f"h.{i}.attn.c_attn.weight": (3 * width, d),
                f"h.{i}.attn.c_attn.bias": (3 * width,),
                f"h.{i}.attn.c_proj.weight": (d, width),
                f"h.{i}.attn.c_proj.bias": (d,),
                f"h.{i}.ln_2.weight": (d,),
                f"h.{i}.ln_2.bias": (d,),
                f"h.{i}.mlp.c_fc.weight": (n_inner, d),
                f"h.{i}.mlp.c_fc.bias": (n_inner,),
                f"h.{i}.mlp.c_proj.weight": (d, n_inner),
                f"h.{i}.mlp.c_proj.bias": (d,),
            }
        return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,), "lm_head.weight": (self.vocab_size, d)}


def _check_size(field: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= LIMIT:
        raise ConfigError(f"{field} must be a whole number in 1..{LIMIT}, not {value!r}")


def _check_number(field: str, value: object, allowed: bool, meaning: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not allowed:  # type: ignore[arg-type]
        raise ConfigError(f"{field} must be {meaning}, not {value!r}")


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary as arrays; `tokenizer.py` gives it a voice.

    Attributes
    ----------
    token_bytes : ndarray of shape (n_bytes,), dtype=uint8
        The bytes of all tokens, one after the other.
    token_ends : ndarray of shape (vocab_size,), dtype=uint32
        Where each token ends in `token_bytes`.
    merges : ndarray of shape (n_merges, 2), dtype=uint32
        Ids of the left and right half of each merge, the first merge first.
    special_tokens : dict of str to int
        Texts that stand for one id only where special tokens are asked for.
    """

    token_bytes: NDArray[np.uint8]
    token_ends: NDArray[np.uint32]
    merges: NDArray[np.uint32]
    special_tokens: dict[str, int]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ends)


@dataclass(frozen=True)
class Checkpoint:
    """A whole model. Compression steps are functions from one Checkpoint to another.

    Attributes
    ----------
    config : Config
    vocabulary : Vocabulary
    weights : mapping of str to Weight
        Every name of `config.shapes()`; with a tied head, lm_head.weight is the same object as wte.weight.
    history : tuple of dict
        What was done to the model, oldest first: {"step": ..., parameters, measured effect}.
    """

    config: Config
    vocabulary: Vocabulary
    weights: Mapping[str, Weight]
    history: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Check that weights, configuration and vocabulary belong together.

        Raises
        ------
        ConfigError
            Naming the first tensor that is missing, superfluous or of another shape.
        """
        shapes = self.config.shapes()
        if missing := [name for name in shapes if name not in self.weights]:
            raise ConfigError(f"tensor {missing[0]} is missing; the configuration needs {len(shapes)} tensors")
        for name, weight in self.weights.items():
            if name not in shapes:
                raise ConfigError(f"tensor {name} has no place in a model of {self.config.n_layer} layers")
            if weight.shape != shapes[name]:
                raise ConfigError(f"tensor {name} must have the shape {shapes[name]}, not {weight.shape}")
            if len(weight.shape) == 1 and weight.encoding.name != "f32":
                raise ConfigError(f"the vector {name} must be f32, not {weight.encoding.name}")
        if len(self.vocabulary) != self.config.vocab_size:
            raise ConfigError(f"{len(self.vocabulary)} tokens do not fit a vocab_size of {self.config.vocab_size}")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding table itself."""
        return self.weights["lm_head.weight"] is self.weights["wte.weight"]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, a tied head counted once."""
        return sum(weight.nbytes for weight in {id(w): w for w in self.weights.values()}.values())


def encoding_for(name: str, encoding: str) -> str:
    """Return the encoding of tensor `name` in a model whose matrices are stored in `encoding`.

    Vectors stay f32; embedding tables and positions follow the encoding's own advice (`Encoding.tables`,
    `Encoding.positions`).
    """
    if ".ln_" in name or name.startswith("ln_f.") or name.endswith(".bias"):
        return "f32"
    if name in TABLES:
        return ENCODINGS[encoding].tables
    return ENCODINGS[encoding].positions if name == POSITIONS else encoding


def save(checkpoint: Checkpoint, path: str | PathLike[str]) -> None:
    """Write a checkpoint to a `.mgpt` file, atomically; a Weight with several names, as a tied head, is written once.

    Raises
    ------
    FormatError
        If the file cannot be written; the file that was there before is kept.
    """
    vocabulary, weights = checkpoint.vocabulary, dict(checkpoint.weights)
    first = {id(weight): name for name, weight in reversed(weights.items())}  # the name of each distinct Weight
    aliases = {name: first[id(weight)] for name, weight in weights.items() if first[id(weight)] != name}
    contents = mgpt.Contents(
        meta={
            "config": checkpoint.config.to_json(),
            "vocabulary": {"special_tokens": vocabulary.special_tokens},
            "history": list(checkpoint.history),
        },
        tensors={n: mgpt.Tensor(w.encoding.name, w.shape, w.parts) for n, w in weights.items() if n not in aliases},
        aliases=aliases,
        blobs={
            "vocabulary.token_bytes": vocabulary.token_bytes,
            "vocabulary.token_ends": vocabulary.token_ends,
            **({"vocabulary.merges": vocabulary.merges} if len(vocabulary.merges) else {}),
        },
    )
    mgpt.write(path, contents)


def load(path: str | PathLike[str]) -> Checkpoint:
    """Open a `.mgpt` file; its arrays stay mapped and read-only.

    Raises
    ------
    FormatError
        If the file is missing, damaged, or holds something that this version does not know.
    ConfigError, EncodingError
        If it is intact but contradicts itself.
    """
    contents = mgpt.read(path)
    try:
        config = Config.from_json(contents.meta["config"])
        vocabulary = Vocabulary(
            contents.blobs["vocabulary.token_bytes"],
            contents.blobs["vocabulary.token_ends"],
            contents.blobs.get("vocabulary.merges", np.empty((0, 2), np.uint32)),
            dict(contents.meta["vocabulary"]["special_tokens"]),
        )
        history = tuple(dict(entry) for entry in contents.meta["history"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path} is a container without a complete model ({error}); convert it again") from None
    weights = {name: _weight(name, tensor) for name, tensor in contents.tensors.items()}
    weights |= {alias: weights[name] for alias, name in contents.aliases.items()}
    return Checkpoint(config, vocabulary, weights, history)


def _weight(name: str, tensor: mgpt.Tensor) -> Weight:
    if tensor.encoding not in ENCODINGS:
        raise FormatError(f"tensor {name} has the unknown encoding {tensor.encoding!r}; upgrade minigpt")
    encoding = ENCODINGS[tensor.encoding]
    # the file keeps parts in any order, kernels take them in the encoding's own
    parts = {part: tensor.parts[part] for part in encoding.part_dtypes if part in tensor.parts}
    return Weight(encoding, tensor.shape, parts if len(parts) == len(tensor.parts) else tensor.parts)
