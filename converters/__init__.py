"""Foreign model -> `.mgpt` file. One small file per foreign layout, one row in `READERS`.

A reader module has `recognizes(path)` and `read(path, **options) -> Source`; everything after that is shared.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from minigpt.checkpoint import Checkpoint
from minigpt.converters import huggingface
from minigpt.converters._common import Source, write
from minigpt.errors import ConversionError

__all__ = ["READERS", "Source", "convert", "write"]

READERS = {"huggingface": huggingface}


def convert(
    src: str | PathLike[str],
    out: str | PathLike[str],
    encoding: str = "f32",
    lora: str | PathLike[str] | None = None,
) -> Checkpoint:
    """Convert a foreign model to a `.mgpt` file, verified after writing; return it opened.

    Parameters
    ----------
    src : path
        The foreign model, in a layout that one of `READERS` recognizes.
    out : path
        The `.mgpt` file to make; one that exists is replaced after everything went well.
    encoding : str
        How matrices are stored; a key of `minigpt.encodings.ENCODINGS`.
    lora : path, optional
        A PEFT LoRA folder to merge on the way.

    Raises
    ------
    ConversionError, TokenizerError, EncodingError
        Naming what stands in the way.
    """
    options: dict[str, Any] = {} if lora is None else {"lora": lora}
    for reader in READERS.values():
        if reader.recognizes(Path(src)):
            return write(reader.read(src, **options), out, encoding)
    raise ConversionError(f"{src} is no model that can be converted: give a folder with a config.json")
