"""What C has and Python lacks: pointers, the bits of a float, calls by address.

`i64(address)[i]` reads and `f32(address)[i] = v` writes, as in C: no bounds, no negative index.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from minigpt.kernels.entry import float32, instruction, int32, int64, void
from minigpt.kernels.vectors import F32, I8, I16, I32, I64, widen_half


def _pointer(dtype: Any, element: Any) -> Any:
    """Return a function that views an int64 address as a pointer."""

    @instruction(types.CPointer(dtype), int64)
    def view(b: Any, address: Any) -> Any:
        return b.inttoptr(address, element.as_pointer())

    return view


i8, i16, i32, i64 = (_pointer(types.int8, I8), _pointer(types.int16, I16), _pointer(int32, I32), _pointer(int64, I64))
u8, u16, u32 = _pointer(types.uint8, I8), _pointer(types.uint16, I16), _pointer(types.uint32, I32)
f32 = _pointer(float32, F32)


@instruction(float32, int32)
def float_of_bits(b: Any, bits: Any) -> Any:
    """Reinterpret an int32 as the float32 with the same bits."""
    return b.bitcast(bits, F32)


@instruction(int32, float32)
def bits_of_float(b: Any, value: Any) -> Any:
    """Reinterpret a float32 as the int32 with the same bits."""
    return b.bitcast(value, I32)


@instruction(float32, types.uint16)
def half(b: Any, bits: Any) -> Any:
    """Convert the bits of a float16 to float32."""
    return widen_half(b, bits)


@instruction(float32, float32)
def square_root(b: Any, value: Any) -> Any:
    """Return the square root by the processor's instruction, where `np.sqrt` calls a library."""
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(F32, [F32]), "llvm.sqrt.f32"), [value])


@instruction(void)
def never_inline(b: Any) -> None:
    """Keep the function that calls this a function: one copy to optimize instead of one per caller (compile time)."""
    b.function.attributes.add("noinline")


def _call(n_arguments: int) -> Any:
    """Return a function that calls the C function of int64 arguments at an address: `call(address, (a, b))`."""

    @instruction(void, int64, types.UniTuple(int64, n_arguments))
    def call(b: Any, address: Any, arguments: Any) -> None:
        function = ir.FunctionType(ir.VoidType(), [I64] * n_arguments)
        b.call(b.inttoptr(address, function.as_pointer()), cgutils.unpack_tuple(b, arguments))

    return call


call_screen, call_matmul, call_attend, call_rows, call_entry = _call(9), _call(7), _call(5), _call(3), _call(2)


@instruction(void, int64, types.UniTuple(int64, 2))
def call_clock(b: Any, address: Any, arguments: Any) -> None:
    """Call the C function `int timespec_get(struct timespec *, int)` at an address."""
    time, base = cgutils.unpack_tuple(b, arguments)
    function = ir.FunctionType(I32, [I64, I32])
    b.call(b.inttoptr(address, function.as_pointer()), [time, b.trunc(base, I32)])


@instruction(void, int64)
def call_yield(b: Any, address: Any) -> None:
    """Call the C function `int f(void)` at an address."""
    b.call(b.inttoptr(address, ir.FunctionType(I32, []).as_pointer()), [])
