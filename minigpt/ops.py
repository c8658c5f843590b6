"""Chooses what computes, on first use: kernels compiled by numba, or plain NumPy where numba is missing.

A backend is a way from a kernel's name to a C function (its address and a ctypes callable). This module computes
nothing and imports nothing heavy before it is asked. `MINIGPT_BACKEND` = auto, numba or numpy overrides the choice.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
        The same through ctypes: releases the GIL while it runs.
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
    try:
        from minigpt import kernels  # noqa: F401
    except Exception as error:  # not only ImportError: numba also refuses versions of NumPy and Python
        if wanted == "numba":
            raise BackendError(f"numba cannot be loaded ({error}); install numba or unset MINIGPT_BACKEND") from error
        return "numpy"
    return "numba"


@functools.cache
def kernel(name: str) -> Kernel | None:
    """Return a kernel, compiled or from numba's cache; None on the NumPy backend.

    Raises
    ------
    BackendError
        If there is none of this name, or it cannot be compiled here.
    """
    if backend() == "numpy":
        return None
    from minigpt import kernels

    if name not in kernels.ENTRIES:
        raise BackendError(f"there is no compiled kernel {name}; set MINIGPT_BACKEND=numpy")
    try:
        with _announced():
            function = kernels.compile_entry(name)
    except Exception as error:
        raise BackendError(f"kernel {name} cannot be compiled ({error}); set MINIGPT_BACKEND=numpy") from error
    return Kernel(name, function.address, function.ctypes)


def has_kernel(name: str) -> bool:
    """Tell whether the chosen backend knows a kernel, without compiling it."""
    if backend() == "numpy":
        return False
    from minigpt import kernels

    return name in kernels.ENTRIES


def warmup(names: Iterable[str]) -> None:
    """Make kernels ready, so that no later call or process has to compile them."""
    for name in names:
        kernel(name)


def _announced() -> Any:
    """Return a context in which the first run of a compiler pass is told to the callbacks in `COMPILING`."""
    from numba.core import event

    class Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            while COMPILING:
                COMPILING.pop()()

        def on_end(self, event: Any) -> None:
            """Nothing to do, but numba requires it."""

    return event.install_listener("numba:run_pass", Listener())
