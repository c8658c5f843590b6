"""What a weight must obey while it trains: zeros that stay, the int8 grid, a low-rank change.

Each is a parametrization (torch.nn.utils.parametrize) of plain nn.Linear and nn.Embedding weights, so the model does
not know of them; ``bake`` turns them into ordinary weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .model import GPT2

PEFT_PREFIX = "base_model.model.transformer."


class Masked(nn.Module):
    """Keep the zeros of a pruned matrix."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w: Tensor) -> Tensor:
        """Zero what was pruned in ``w`` [n_out, n_in]."""
        return w * self.mask


class Int8Grid(nn.Module):
    """Round to what symmetric int8 with one scale a row can hold; the gradient passes straight through.

    Source: Bengio et al. 2013 (straight-through estimator); Jacob et al. 2018 (quantization-aware training).
    """

    def forward(self, w: Tensor) -> Tensor:
        """Round ``w`` [n_out, n_in] to codes -127..127 times max|row| / 127."""
        scale = w.detach().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127  # [n_out, 1]
        return (w / scale).round().mul(scale).detach() + (w - w.detach())


class LoRA(nn.Module):
    """Add a trainable product of two thin matrices. Source: Hu et al. 2021."""

    def __init__(self, n_out: int, n_in: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, n_in) / math.sqrt(n_in))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, w: Tensor) -> Tensor:
        """Return ``w`` [n_out, n_in] with the change added."""
        return w + self.scale * (self.lora_B @ self.lora_A)


def keep_zeros(model: GPT2) -> None:
    """Make the zeros that the body's matrices have now permanent."""
    for _, module in model.matrices():
        parametrize.register_parametrization(module, "weight", Masked(module.weight != 0))


def quantize(model: GPT2) -> None:
    """Train every matrix and both embedding tables as int8 will hold them."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            parametrize.register_parametrization(module, "weight", Int8Grid())


def add_lora(model: GPT2, rank: int, alpha: float) -> None:
    """Freeze ``model`` and add a trainable adapter to each linear map of its body."""
    model.requires_grad_(False)
    for _, module in model.matrices():
        n_out, n_in = module.weight.shape
        parametrize.register_parametrization(module, "weight", LoRA(n_out, n_in, rank, alpha))


def bake(model: GPT2) -> GPT2:
    """Replace each constrained weight by its value."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


def save_adapter(model: GPT2, folder: str | Path) -> None:
    """Write the adapter in the PEFT layout."""
    loras = {name: module.parametrizations.weight[0] for name, module in model.matrices()}
    tensors = {
        f"{PEFT_PREFIX}{name}.{leaf}.weight": getattr(lora, leaf).detach().to("cpu", torch.bfloat16).contiguous()
        for name, lora in loras.items()
        for leaf in ("lora_A", "lora_B")
    }
    rank = len(next(iter(loras.values())).lora_A)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": next(iter(loras.values())).scale * rank,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": True, "inference_mode": True,
        "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    }  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def merge(model: GPT2, folder: str | Path) -> GPT2:
    """Add the PEFT adapter of ``folder`` to the weights of ``model``."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    for name, module in model.matrices():
        a, b = (tensors[f"{PEFT_PREFIX}{name}.{leaf}.weight"].float() for leaf in ("lora_A", "lora_B"))
        module.weight.data += config["lora_alpha"] / config["r"] * (b @ a)
    return model
