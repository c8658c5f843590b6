"""Puts the pieces of a golden variant together as the folder that Hugging Face's tools would have written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent
HOMES: dict[str, str] = json.loads((GOLDEN / "variants.json").read_text())  # variant -> folder with its weights
DTYPES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "|i1": "I8", "|b1": "BOOL"}


def assemble(variant: str, folder: Path) -> tuple[Path, Path | None]:
    """Fill `folder` with the model of a variant; return it and the LoRA folder to merge, if there is one."""
    folder.mkdir(parents=True)
    lora = GOLDEN / variant if (GOLDEN / variant / "adapter_config.json").is_file() else None
    home = GOLDEN / HOMES[variant]
    for file in (
        *(GOLDEN / "tokenizer").iterdir(),
        home / "model.safetensors",
        (home if lora else GOLDEN / variant) / "config.json",
    ):
        shutil.copyfile(file, folder / file.name)
    return folder, lora


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays as a safetensors file; uint16 stands for BF16."""
    header, data = {}, b""
    for name, array in tensors.items():
        begin, data = len(data), data + np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": DTYPES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
