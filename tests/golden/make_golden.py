"""Makes the golden vectors in this folder: what transformers computes in float32, for minigpt to reproduce.

Needs torch, transformers and peft (made with 2.13, 5.24 and 0.21); the tests need none of them. Without
arguments it remakes the tiny random checkpoints, one per configuration that changes the result:

    python tests/golden/make_golden.py

With a folder that holds the trained models tech-gpt2-124m, requirements-lora and requirements-6x384, it
remakes `real/` instead: sampled logits and greedy continuations, not the weights.

    python tests/golden/make_golden.py MODELS

Layout: NAME/config.json and NAME/golden.npz; `variants.json` says which folder holds the weights of NAME.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
TEXT = (
    "The system shall store every message for at least thirty days. When a user signs in, the portal "
    "shall show\nthe latest orders within two seconds. The controller must not restart the pump while the "
    "valve is open. Rationale:\noperators need the history of the session. Verification: Test; measure the "
    "response time with 100 users."
)
N_TOKENS, N_IDS, N_GREEDY = 300, 16, 200
BASE: dict[str, Any] = {"vocab_size": N_TOKENS, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
BASE |= {"bos_token_id": N_TOKENS - 1, "eos_token_id": N_TOKENS - 1}

VARIANTS: dict[str, dict[str, Any]] = {  # what differs from BASE; the first has all defaults
    "base": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "unscaled": {"scale_attn_weights": False},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled_by_layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "reordered": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "one_head": {"n_head": 1},
    "n_inner": {"n_inner": 40, "n_positions": 64},
    "untied": {"tie_word_embeddings": False, "n_layer": 1, "n_positions": 64},
    "padded": {"vocab_size": 320, "n_layer": 1, "n_positions": 64},
    "bf16": {"n_layer": 1, "n_positions": 64, "dtype": "bfloat16"},
    "f16": {"n_layer": 1, "n_positions": 64, "dtype": "float16"},
    "everything": {
        **{"n_embd": 48, "n_head": 3, "n_inner": 56, "n_layer": 3, "n_positions": 40, "dtype": "bfloat16"},
        **{"activation_function": "gelu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
        **{"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    },
}
ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {  # LoRA settings, on the weights of "base"
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "lora_patterns": {
        **{"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["c_attn", "mlp.c_proj"]},
        "rank_pattern": {r"h\.1\.attn\.c_attn": 6},
        "alpha_pattern": {r"^transformer\.h\.0\.mlp\.c_proj": 12},
    },
    "lora_bias_all": {"r": 2, "lora_alpha": 4, "target_modules": ["c_fc"], "bias": "all"},
    "lora_bias_only": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "bias": "lora_only"},
    "lora_bias_of_b": {"r": 2, "lora_alpha": 4, "target_modules": ["attn.c_proj"], "lora_bias": True},
}
RECORD = "Product: Loan portal\nFeature: Loan renewal\nType: Functional\nRequirement:"

Logits = np.ndarray[Any, Any]


def main() -> None:
    """Remake the tiny checkpoints, or the vectors of the trained models in the folder that is given."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if len(sys.argv) > 1:
        make_real(Path(sys.argv[1]))
    else:
        make_tiny()


def make_tiny() -> None:
    """Write every variant and adapter with its logits."""
    ids = make_tokenizer(HERE / "tokenizer")
    weights_of: dict[tuple[Any, ...], str] = {}
    homes: dict[str, str] = {}
    for name, changes in VARIANTS.items():
        fields = BASE | changes
        dtype = getattr(torch, fields.pop("dtype", "float32"))
        config = GPT2Config(**fields)
        shapes = (config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_inner)
        homes[name] = weights_of.setdefault((*shapes, config.tie_word_embeddings, dtype), name)
        folder = fresh(HERE / name)
        if homes[name] == name:
            random_model(config).to(dtype).save_pretrained(folder)
        else:
            config.architectures = ["GPT2LMHeadModel"]
            config.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = GPT2LMHeadModel.from_pretrained(
            HERE / homes[name], config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        golden = {"ids": ids[:N_IDS], "logits": logits(model, ids[:N_IDS])[:, :N_TOKENS]}
        if name == "base":
            golden["greedy"], margin = greedy(model, ids[:N_IDS])
            print(f"greedy: smallest lead {margin:.4f}, {len(np.unique(golden['greedy']))} different tokens")
        np.savez_compressed(folder / "golden.npz", **golden)
    for name, settings in ADAPTERS.items():
        homes[name] = "base"
        make_adapter(fresh(HERE / name), settings, ids[:N_IDS])
    (HERE / "variants.json").write_text(json.dumps(homes, indent=1) + "\n")


def make_tokenizer(folder: Path) -> Logits:
    """Train a byte-level BPE of N_TOKENS tokens in GPT-2's layout and return the ids of TEXT."""
    fresh(folder)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=N_TOKENS - 1, min_frequency=1, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    assert trained.get_vocab_size() == N_TOKENS
    trained.save_model(str(folder))
    trained.save(str(folder / "tokenizer.json"))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["<|endoftext|>"] = N_TOKENS - 1
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    return np.array(trained.encode(TEXT).ids, np.int32)


def random_model(config: GPT2Config) -> GPT2LMHeadModel:
    """Return a model whose every tensor matters: biases and gains are random too, matrices large."""
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(config)
    for name, tensor in model.named_parameters():
        gain = name.endswith("weight") and ".ln_" in name
        tensor.copy_(torch.randn_like(tensor) * (0.2 if tensor.ndim > 1 else 0.1) + gain)
    return model


def make_adapter(folder: Path, settings: dict[str, Any], ids: Logits) -> None:
    """Write an adapter with random factors, and the logits of the base with it merged by peft."""
    base = GPT2LMHeadModel.from_pretrained(HERE / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings))
    for name, tensor in adapted.named_parameters():
        if "lora_" in name:
            tensor.copy_(torch.randn_like(tensor) * 0.2)
        elif name.endswith("bias") and settings.get("bias", "none") != "none" and tensor.requires_grad:
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields |= {"base_model_name_or_path": "base", "target_modules": sorted(settings["target_modules"])}
    config.write_text(json.dumps(fields, indent=1) + "\n")
    merged = merge(HERE / "base", folder)
    np.savez_compressed(folder / "golden.npz", ids=ids, logits=logits(merged, ids))


def make_real(models: Path) -> None:
    """Write sampled logits and the greedy continuation of the trained models."""
    raw, adapter = models / "tech-gpt2-124m", models / "requirements-lora"
    cases: dict[str, tuple[Callable[[], Any], str]] = {  # prompts whose continuations have clear leads
        "tech-gpt2-124m": (lambda: load(raw), RECORD),
        "tech-gpt2-124m+requirements-lora": (lambda: merge(raw, adapter), "The system shall"),
        "requirements-6x384": (lambda: load(models / "requirements-6x384"), RECORD),
    }
    tokenizer = ByteLevelBPETokenizer.from_file(str(raw / "vocab.json"), str(raw / "merges.txt"))
    text = np.array(tokenizer.encode(TEXT).ids, np.int32)
    folder = fresh(HERE / "real")
    for name, (loader, prompt_text) in cases.items():
        model, prompt = loader(), np.array(tokenizer.encode(prompt_text).ids, np.int32)
        positions = np.arange(3, 64, 6)
        rows = logits(model, text[:64])[positions]  # [n, vocab_size]
        top = np.argsort(-rows, axis=1)[:, :16]
        others = np.random.default_rng(0).integers(0, rows.shape[1], (len(rows), 48))
        kept = np.concatenate([top, others], axis=1).astype(np.int32)  # [n, 64], the 16 largest first
        continuation, margin = greedy(model, prompt)
        print(f"{name}: smallest lead {margin:.4f}\n{tokenizer.decode(continuation.tolist())[:300]!r}")
        np.savez_compressed(
            folder / f"{name}.npz",
            **{
                "ids": text[:64],
                "positions": positions,
                "kept": kept,
                "prompt": prompt,
                "greedy": continuation,
            },
            logits=np.take_along_axis(rows, kept, axis=1),
        )


def load(folder: Path) -> Any:
    """Return the model in float32, with the attention that honours all settings."""
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def merge(base: Path, adapter: Path) -> Any:
    """Return the base in float32 with the adapter merged by peft."""
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().eval()


def logits(model: Any, ids: Logits) -> Logits:
    """Return [n_tokens, vocab_size] of one text."""
    return model(torch.tensor(ids[None], dtype=torch.int64)).logits[0].numpy()  # type: ignore[no-any-return]


def greedy(model: Any, ids: Logits) -> tuple[Logits, float]:
    """Return the N_GREEDY likeliest next tokens, each fed back, and the smallest lead over the second."""
    step, cache, chosen, margin = torch.tensor(ids[None], dtype=torch.int64), None, [], np.inf
    for _ in range(N_GREEDY):
        output = model(step, past_key_values=cache, use_cache=True)
        best, second = output.logits[0, -1, :].topk(2).values.tolist()
        step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        margin = min(margin, best - second)
        chosen.append(int(step))
    return np.array(chosen, np.int32), margin


def fresh(folder: Path) -> Path:
    """Return the folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


SEED = 20  # of the random models: gives a varied greedy continuation with clear leads

if __name__ == "__main__":
    main()
