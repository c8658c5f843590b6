"""All encodings of matrices: importing the package registers them in `ENCODINGS`."""

from minigpt.encodings import (  # noqa: F401  (each registers itself)
    bitmap,
    block,
    codebook,
    f16,
    f32,
    int4,
    int8,
    lowrank,
    nm,
    screened,
)
from minigpt.encodings.base import ENCODINGS, Encoding, Weight, encode
from minigpt.encodings.grid import Grid, OnGrid

__all__ = ["ENCODINGS", "Encoding", "Grid", "OnGrid", "Weight", "encode"]
