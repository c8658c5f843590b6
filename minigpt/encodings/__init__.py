"""All encodings of matrices: importing the package registers them in `ENCODINGS`."""

from minigpt.encodings import f16, f32, int4, int8  # noqa: F401  (each registers itself)
from minigpt.encodings.base import ENCODINGS, Encoding, Weight, encode

__all__ = ["ENCODINGS", "Encoding", "Weight", "encode"]
