"""Make a model smaller before it is healed: the talk's cut of layers and width, and pruning by a criterion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .model import GPT2


def cut(model: GPT2, n_layer: int, n_embd: int) -> GPT2:
    """Keep the outer layers and the most important channels, heads and neurons.

    Layers go symmetrically from the centre. A channel's importance is the energy that the embedding and the kept blocks
    write into it, times the gain of the last LayerNorm; a head's is the norm of its values times that of its output; a
    neuron's is the norm of its input times that of its output.

    Parameters
    ----------
    model : GPT2
    n_layer : int
        Layers to keep.
    n_embd : int
        Channels to keep, a multiple of the head size; heads and neurons shrink in proportion.

    Raises
    ------
    ValueError
        When the sizes do not fit the model.
    """
    config = model.config
    head_dim, n_inner = config["n_embd"] // config["n_head"], len(model.h[0].mlp.c_fc.weight)
    if not 1 <= n_layer <= config["n_layer"] or n_embd % head_dim or not head_dim <= n_embd <= config["n_embd"]:
        raise ValueError(
            f"cannot keep {n_layer} layers and {n_embd} channels: allowed are 1 to {config['n_layer']} "
            f"and multiples of {head_dim} up to {config['n_embd']}"
        )
    layers = [*range((n_layer + 1) // 2), *range(config["n_layer"] - n_layer // 2, config["n_layer"])]
    n_head, n_neurons = n_embd // head_dim, n_inner * n_embd // config["n_embd"]

    def relative(energy: Tensor) -> Tensor:
        return energy / energy.mean()

    def top(importance: Tensor, n: int) -> Tensor:
        return importance.topk(n).indices.sort().values

    importance = relative(model.wte.weight.square().mean(0))  # [n_embd]
    for i in layers:
        for writer in (model.h[i].attn.c_proj, model.h[i].mlp.c_proj):
            importance = importance + relative(writer.weight.square().mean(1))
    channels = top(importance * model.ln_f.weight.abs(), n_embd)

    small = GPT2(config | {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_inner": n_neurons})

    def copy(target: nn.Module, source: nn.Module, rows: Tensor, columns: Tensor | None = None) -> None:
        target.weight.data = source.weight[rows] if columns is None else source.weight[rows][:, columns]
        if getattr(source, "bias", None) is not None:
            target.bias.data = source.bias[rows]

    every = torch.arange(max(config["vocab_size"], config["n_positions"]))
    copy(small.wte, model.wte, every[: config["vocab_size"]], channels)
    copy(small.wpe, model.wpe, every[: config["n_positions"]], channels)
    copy(small.ln_f, model.ln_f, channels)
    for new, old in zip(small.h, (model.h[i] for i in layers), strict=True):
        values = old.attn.c_attn.weight[2 * config["n_embd"] :].unflatten(0, (-1, head_dim))
        outputs = old.attn.c_proj.weight.unflatten(1, (-1, head_dim))
        heads = top(values.norm(dim=(1, 2)) * outputs.norm(dim=(0, 2)), n_head)
        inside = (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()  # [n_head * head_dim]
        neurons = top(old.mlp.c_fc.weight.norm(dim=1) * old.mlp.c_proj.weight.norm(dim=0), n_neurons)
        copy(new.ln_1, old.ln_1, channels)
        copy(new.attn.c_attn, old.attn.c_attn, torch.cat([inside + j * config["n_embd"] for j in range(3)]), channels)
        copy(new.attn.c_proj, old.attn.c_proj, channels, inside)
        copy(new.ln_2, old.ln_2, channels)
        copy(new.mlp.c_fc, old.mlp.c_fc, neurons, channels)
        copy(new.mlp.c_proj, old.mlp.c_proj, channels, neurons)
    return small


def magnitude(w: Tensor, x_norm: Tensor) -> Tensor:
    """Rank the weights of a whole matrix by size."""
    return w.abs().flatten()[None]


def wanda(w: Tensor, x_norm: Tensor) -> Tensor:
    """Rank the weights of each row by size times the norm of their input. Source: Sun et al. 2023."""
    return w.abs() * x_norm


# (w [n_out, n_in], norms of the inputs [n_in]) -> scores [n_groups, group size]; the lowest of each group go
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"magnitude": magnitude, "wanda": wanda}


@torch.no_grad()
def prune(model: GPT2, sparsity: float, criterion: str, windows: Tensor) -> GPT2:
    """Set a share of each of the body's matrices to zero.

    Parameters
    ----------
    model : GPT2
    sparsity : float
        Share of the weights that goes, 0 <= sparsity < 1.
    criterion : str
        A key of ``CRITERIA``.
    windows : Tensor
        Calibration tokens [n_windows, n_tokens], taken from training text.

    Raises
    ------
    ValueError
        When ``sparsity`` is out of range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside 0 <= sparsity < 1")
    energy: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor]) -> None:
        energy[module] = energy.get(module, 0) + inputs[0].square().sum((0, 1))  # [n_in]

    hooks = [module.register_forward_pre_hook(watch) for _, module in model.matrices()]
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    for _, module in model.matrices():
        scores = CRITERIA[criterion](module.weight, energy[module].sqrt())
        lowest = scores.argsort(1)[:, : round(sparsity * scores.shape[1])]
        module.weight.copy_(module.weight.flatten().view_as(scores).scatter(1, lowest, 0).view_as(module.weight))
    return model
