"""Compression: a pure function from checkpoint to checkpoint, made of steps, without gradients."""

from __future__ import annotations
