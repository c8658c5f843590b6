"""The embedded default model: `DEFAULT` is its file, described by the model card beside it."""

from __future__ import annotations

from pathlib import Path

DEFAULT = Path(__file__).with_name("requirements-6x384-pruned40.mgpt")
