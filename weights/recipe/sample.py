"""Let a model write documents: fresh text in its own domain, for a student to be taught on."""

from __future__ import annotations

import numpy as np
import torch

from .model import GPT2, Cache


@torch.no_grad()
def sample(model: GPT2, prompts: torch.Tensor, n_tokens: int, temperature: float = 1.0) -> list[np.ndarray]:
    """Continue every prompt.

    Parameters
    ----------
    model : GPT2
    prompts : Tensor
        Token ids [n_prompts, length]; the first is <|endoftext|>, as before any document in training.
    n_tokens : int
        Tokens to write at most after the prompt.
    temperature : float
        Divides the logits; 1 samples from the model itself.

    Returns
    -------
    list of array of uint16
        Documents that came to their end, each with its <|endoftext|> last and without the first.
    """
    end, n_prompt = model.config["eos_token_id"], prompts.shape[1]
    ids = torch.full((len(prompts), n_prompt + n_tokens), end, device=prompts.device)
    ids[:, :n_prompt] = prompts
    caches = [Cache(ids.shape[1]) for _ in model.h]
    done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    for i in range(ids.shape[1] - 1):
        logits = model(ids[:, i : i + 1], caches)[:, 0].float() / temperature  # [n_prompts, vocab_size]
        if i + 1 >= n_prompt:
            # the largest of p / Exponential(1) is a draw from p
            drawn = (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)
            ids[:, i + 1] = torch.where(done, end, drawn)
            done |= drawn == end
            if i % 16 == 0 and done.all():
                break
    rows = ids[done, 1:].cpu().numpy().astype(np.uint16)
    return [row[: int(np.argmax(row == end)) + 1] for row in rows]
