"""Chooses what computes, on first use: kernels compiled by numba, or plain NumPy where numba is missing.

A backend is a way from a kernel's name to a C function (its address and a ctypes callable). This module computes
nothing and imports nothing heavy before it is asked. `MINIGPT_BACKEND` = auto, numba or numpy overrides the choice.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from ctypes import CFUNCTYPE, c_int64
from dataclasses import dataclass
from typing import Any

from minigpt import objects
from minigpt.errors import BackendError

BACKENDS = ("auto", "numba", "numpy")
COMPILING: list[Callable[[], None]] = []  # called, once each, when kernels must be compiled: that takes seconds


@dataclass(frozen=True)
class Kernel:
    """A compiled C function that takes int64 arguments.

    Attributes
    ----------
    name : str
        As in `kernels.ENTRIES`.
    address : int
        Where it is, for other kernels to call it.
    call : callable
        The same through ctypes: releases the GIL while it runs. Most return nothing of meaning.
    """

    name: str
    address: int
    call: Callable[..., Any]


@functools.cache
def backend() -> str:
    """Return "numba" or "numpy".

    Raises
    ------
    BackendError
        If `MINIGPT_BACKEND` is unknown, or demands numba where it cannot be imported.
    """
    wanted = os.environ.get("MINIGPT_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise BackendError(f"MINIGPT_BACKEND must be one of {', '.join(BACKENDS)}, not {wanted!r}")
    if wanted == "numpy":
        return "numpy"
    if _is_stored("forward"):
        return "numba"
    try:
        from minigpt import kernels  # noqa: F401
    except Exception as error:  # not only ImportError: numba also refuses versions of NumPy and Python
        if wanted == "numba":
            raise BackendError(f"numba cannot be loaded ({error}); install numba or unset MINIGPT_BACKEND") from error
        return "numpy"
    return "numba"


@functools.cache
def kernel(name: str) -> Kernel | None:
    """Return a kernel, from an earlier process or compiled now; None on the NumPy backend.

    Raises
    ------
    BackendError
        If there is none of this name, or it cannot be compiled here.
    """
    if backend() == "numpy":
        return None
    address, n_arguments = (_is_stored(name) and objects.load(name)) or _compile(name)
    return Kernel(name, address, CFUNCTYPE(c_int64, *[c_int64] * n_arguments)(address))


def _compile(name: str) -> tuple[int, int]:
    from minigpt import kernels

    if name not in kernels.ENTRIES:
        raise BackendError(f"there is no compiled kernel {name}; set MINIGPT_BACKEND=numpy")
    while COMPILING:
        COMPILING.pop()()
    try:
        return objects.store(name, *kernels.compile_entry(name))
    except Exception as error:
        raise BackendError(f"kernel {name} cannot be compiled ({error}); set MINIGPT_BACKEND=numpy") from error


def _is_stored(name: str) -> bool:
    """Tell whether the numba that is installed here has compiled a kernel before."""
    try:
        return objects.is_stored(name)
    except ImportError:  # no numba, no llvmlite
        return False


def has_kernel(name: str) -> bool:
    """Tell whether the chosen backend knows a kernel, without compiling it."""
    if backend() == "numpy":
        return False
    if _is_stored(name):
        return True
    from minigpt import kernels

    return name in kernels.ENTRIES


def warmup(names: Iterable[str]) -> None:
    """Make kernels ready, so that no later call or process has to compile them."""
    for name in names:
        kernel(name)
