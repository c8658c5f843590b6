"""How Python becomes machine code: entry points, their helpers, and functions made of LLVM's own instructions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba import cfunc, types
from numba.extending import intrinsic

from minigpt.kernels.target import CPU, FEATURES, TRIPLE

# Reductions may be reordered and multiply-adds fused; NaN and infinity keep their meaning. Division by zero gives
# infinity: numba's default would raise, and its check keeps loops from being vectorized.
FAST: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
HELP: dict[str, Any] = {**FAST, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
INLINE: dict[str, Any] = {**HELP, "forceinline": True}  # what fills a frame: a call for each row would be felt
EXACT: dict[str, Any] = {**HELP, "fastmath": {"contract", "nsz"}}

int64, float32, int32, void = types.int64, types.float32, types.int32, types.void

# Entry points are compiled one by one when asked for, because a process pays for each
ENTRIES: dict[str, tuple[Any, Callable[..., Any]]] = {}


def entry(n_arguments: int, result: Any = void, name: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of int64 arguments as an entry point, under its own name by default."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ENTRIES[name or function.__name__] = (result(*[int64] * n_arguments), function)
        return function

    return register


def add_encoding(name: str, matmul: Callable[..., Any], rows: Callable[..., Any]) -> None:
    """Register the two entry points of an encoding.

    matmul(w, x, y, y_stride, n_tokens, row_begin, row_end): y[token * y_stride + row] = sum of W[row, i] * x[token, i];
    rows(w, row, y): y[i] = W[row, i], both float32. w and x are records of `layout.py`.
    """
    entry(7, name=f"matmul_{name}")(matmul)
    entry(3, name=f"rows_{name}")(rows)


def compile_entry(name: str) -> tuple[int, str, str, str, str, str]:
    """Compile an entry point: number of arguments, LLVM module, symbol; triple, processor, features it is meant for."""
    signature, function = ENTRIES[name]
    compiled = cfunc(signature, **FAST)(function)
    return len(signature.args), compiled.inspect_llvm(), compiled.native_name, TRIPLE, CPU, FEATURES


def instruction(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Let kernels call `build(b, *values)`, which writes instructions with the LLVM builder b and returns a value."""

    def decorate(build: Callable[..., Any]) -> Any:
        def declare(typing_context: Any, *_: Any) -> Any:
            def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
                value = build(b, *values)
                return context.get_dummy_value() if value is None else value

            return result(*arguments), generate

        declare.__name__, declare.__doc__ = build.__name__, build.__doc__
        declare.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # numba counts its arguments
        return intrinsic(declare)

    return decorate
