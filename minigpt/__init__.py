"""GPT-2 inference and compression for small CPUs, in NumPy and Numba, without PyTorch.

>>> import minigpt
>>> model = minigpt.load()
>>> print(model.generate("The system shall", max_tokens=40))

Importing the package loads nothing heavy: what a name needs is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from minigpt.errors import MinigptError

if TYPE_CHECKING:
    from minigpt.api import MiniGPT, load
    from minigpt.checkpoint import Checkpoint
    from minigpt.compress import compress

_HOMES = {"load": "api", "MiniGPT": "api", "Checkpoint": "checkpoint", "compress": "compress"}

__all__ = ["Checkpoint", "MiniGPT", "MinigptError", "compress", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minigpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
