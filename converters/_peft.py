"""Reads a PEFT LoRA folder and merges it into the tensors of its base model, in float32.

Merging is W + scaling * B A, with scaling = lora_alpha / r (Hu et al. 2021) or, with use_rslora,
lora_alpha / sqrt(r) (Kalajdzievski 2023). What that sum cannot express, and adapters of the embedding tables,
are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.converters._safetensors import Stored, open_safetensors, strip
from minigpt.errors import ConversionError

Floats = NDArray[np.float32]

REFUSED = (  # settings with which the result is not W + scaling * B A
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    "alora_invocation_tokens",
)
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that keep W
WRAPPERS = {"base_model", "model", "transformer", "base_layer", "_orig_mod", "module"}  # no part of ours
MAPS = r"h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
FACTOR = re.compile(rf"({MAPS})\.lora_[AB]\.(?:weight|bias)")


class Adapter:
    """A LoRA adapter, ready to be merged.

    Parameters
    ----------
    fields : mapping
        The content of adapter_config.json. `fan_in_fan_out` needs no care: GPT-2's maps are all Conv1D, for
        which PEFT forces it to true, and B A is [n_out, n_in] either way.
    stored : mapping of str to Stored
        The content of adapter_model.safetensors.
    names : iterable of str
        Canonical names of the base model's tensors.

    Raises
    ------
    ConversionError
        If the adapter uses what merging cannot express, or a tensor of it has no counterpart in the base.
    """

    def __init__(self, fields: Mapping[str, Any], stored: Mapping[str, Stored], names: Iterable[str]) -> None:
        if fields.get("peft_type") != "LORA":
            raise ConversionError(f"peft_type is {fields.get('peft_type')!r}; only 'LORA' can be merged")
        if used := [field for field in REFUSED if fields.get(field)]:
            raise ConversionError(f"the adapter uses {used[0]}; use peft's merge_and_unload() first")
        if fields.get("init_lora_weights", True) not in INITS:
            raise ConversionError(
                f"init_lora_weights is {fields['init_lora_weights']!r}, which changes the base model; "
                "merge it with peft's merge_and_unload() first"
            )
        self.fields = fields
        self.tensors = {strip(name, WRAPPERS): tensor for name, tensor in stored.items()}
        known = set(names)
        for name in self.tensors:
            factor = FACTOR.fullmatch(name)
            target = f"{factor[1]}.weight" if factor else name
            if target not in known or not (factor or name.endswith(".bias")):
                raise ConversionError(
                    f"adapter tensor {name} fits no linear map or bias of the base model; "
                    "check that base and adapter belong together, or merge with peft's merge_and_unload()"
                )
        self.modules = sorted({match[1] for name in self.tensors if (match := FACTOR.fullmatch(name))})
        for name in (f"{module}.lora_{f}.weight" for module in self.modules for f in "AB"):
            if name not in self.tensors:
                raise ConversionError(f"adapter tensor {name} is missing; copy the adapter again")

    def merge(self, name: str, w: Floats) -> Floats:
        """Return tensor `name` of the base, float32 and [n_out, n_in], with the adapter merged in.

        Raises
        ------
        ConversionError
            If shapes or ranks of the adapter do not fit.
        """
        module, _, kind = name.rpartition(".")
        if name in self.tensors:  # a bias that was trained as a whole (PEFT's bias = "all" or "lora_only")
            w = self.tensors[name].read()
        if module not in self.modules:
            return w
        a = self.tensors[f"{module}.lora_A.weight"].read()  # [r, n_in]
        b = self.tensors[f"{module}.lora_B.weight"].read()  # [n_out, r]
        scaling = np.float32(self._scaling(module, len(a)))
        if kind == "weight":
            if (b.shape[0], a.shape[1]) != w.shape or b.shape[1] != len(a):
                raise ConversionError(f"adapter of {module}: {b.shape} by {a.shape} does not fit {w.shape}")
            w += scaling * (b @ a)
        elif bias := self.tensors.get(f"{module}.lora_B.bias"):
            if bias.shape != w.shape:
                raise ConversionError(f"adapter of {module}: a bias {bias.shape} does not fit {w.shape}")
            w += scaling * bias.read()
        return w

    def _scaling(self, module: str, rank: int) -> float:
        try:
            r = self._field(module, "rank_pattern", "r")
            alpha = self._field(module, "alpha_pattern", "lora_alpha")
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ConversionError(f"rank or alpha in adapter_config.json is unusable ({error})") from None
        if r != rank or r < 1:
            raise ConversionError(f"adapter of {module} has rank {rank}, but adapter_config.json says {r:g}")
        return alpha / (math.sqrt(r) if self.fields.get("use_rslora") else r)

    def _field(self, module: str, patterns: str, field: str) -> float:
        """Return the value of the first pattern that matches the end of the module's name, or the default."""
        stored = self.tensors[f"{module}.lora_A.weight"].name.removeprefix("base_model.model.")
        full_name = stored.partition(".lora_A")[0]
        for pattern, value in (self.fields.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", full_name):
                return float(value)
        return float(self.fields.get(field, 8))  # 8 is PEFT's default of both


def read_adapter(folder: Path, fields: Mapping[str, Any], names: Iterable[str]) -> Adapter:
    """Open the adapter in a folder; see `Adapter` for `fields` and `names`."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConversionError(
            f"{folder} holds no adapter_model.safetensors; save the adapter with safe_serialization=True"
        )
    return Adapter(fields, open_safetensors(folder / "adapter_model.safetensors"), names)
