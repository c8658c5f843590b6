"""A Hugging Face folder of a GPT-2 as a GGUF file for llama.cpp, and the file quantized by llama.cpp."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

NAMES = {  # in a block: Hugging Face's name -> GGUF's
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write(folder: Path, path: Path) -> None:
    """Write all weights in float32."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    stored = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): values for name, values in stored.items()}
    out = gguf.GGUFWriter(path, "gpt2")
    out.add_block_count(config["n_layer"])
    out.add_context_length(config["n_positions"])
    out.add_embedding_length(config["n_embd"])
    out.add_feed_forward_length(4 * config["n_embd"])
    out.add_head_count(config["n_head"])
    out.add_layer_norm_eps(config["layer_norm_epsilon"])
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += ["<|endoftext|>"] * (config["vocab_size"] - len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    out.add_bos_token_id(config["eos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_tensor("token_embd.weight", weights["wte.weight"])
    out.add_tensor("position_embd.weight", weights["wpe.weight"])
    for i in range(config["n_layer"]):
        for theirs, name in NAMES.items():
            matrix = weights[f"h.{i}.{theirs}.weight"]
            out.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(matrix.T))  # [n_out, n_in]; vectors stay
            out.add_tensor(f"blk.{i}.{name}.bias", weights[f"h.{i}.{theirs}.bias"])
    out.add_tensor("output_norm.weight", weights["ln_f.weight"])
    out.add_tensor("output_norm.bias", weights["ln_f.bias"])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def quantize(source: Path, path: Path, file_type: str) -> None:
    """Let llama.cpp store the weights as LLAMA_FTYPE_<file_type>; it chooses more bits for some tables itself."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{file_type}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {file_type}")
