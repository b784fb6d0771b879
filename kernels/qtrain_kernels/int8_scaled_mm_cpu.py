"""int8_scaled_mm on a CPU: the C++ kernels (``cpp/*/int8_scaled_mm.cpp``), or ``torch._int_mm`` and an epilogue, built or
eager, where the tier has no GEMM of its own."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from qtrain_kernels import int8_scaled_mm as declaration
from qtrain_kernels.cpu_tier import Tier, tier


def launch(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    on: Tier | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference``; ``on``: this tier instead of the process's."""
    declaration.check(a, b, a_scale, b_scale, bias, out_dtype)
    chosen = on or tier()
    if 0 in (*a.shape, b.shape[0]):
        sums = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
        return declaration.epilogue(sums, a_scale, b_scale, bias, out_dtype)
    launcher = _launch_built if chosen.multiplies else _launch_torch
    return launcher(chosen, a, b, a_scale, b_scale, bias, out_dtype)


SUMS_BYTES = 64 << 20
"""Of int32 sums at a time, in memory that each thread keeps: fresh pages for every product cost as much as its epilogue.
As much as 4096 tokens of 4096 features."""
_scratch = threading.local()


def _sums(rows: int, columns: int) -> Tensor:
    held: Tensor | None = getattr(_scratch, "sums", None)
    if held is None or held.numel() < rows * columns:
        with torch.inference_mode(False):  # a tensor of inference could not be written to outside of it
            held = _scratch.sums = torch.empty(rows * columns, dtype=torch.int32, device="cpu")
    return held[: rows * columns].view(rows, columns)


def _launch_torch(
    chosen: Tier, a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    a, b = _dense(a), b if _is_dense(b.t()) else _dense(b)
    M, N = a.shape[0], b.shape[0]
    a_scale, b_scale = _vector(a_scale, M), _vector(b_scale, N)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    y = a.new_empty((M, N), dtype=out_dtype)
    rows = max(1, SUMS_BYTES // (4 * N))
    for first in range(0, M, rows):
        part = a[first : first + rows]
        sums = torch._int_mm(part, b.t(), out=_sums(len(part), N))
        scale, out = a_scale[first : first + rows], y[first : first + rows]
        if chosen.library is None:
            out.copy_(declaration.epilogue(sums.to(torch.float32), scale, b_scale, bias, out_dtype))
            continue
        chosen.library.qtrain_dequantize_int32(
            *(ctypes.c_void_p(t.data_ptr()) for t in (sums, scale, b_scale)),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            int(out_dtype == torch.bfloat16),
            ctypes.c_long(len(part)),
            ctypes.c_long(N),
            torch.get_num_threads(),
        )
    return y


def _launch_built(
    chosen: Tier, a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    assert chosen.library is not None
    if a.stride(1) != 1:
        a = a.contiguous()
    b_is_k_major = b.stride(1) == 1
    if not b_is_k_major and b.stride(0) != 1:
        b, b_is_k_major = b.contiguous(), True
    (M, K), N = a.shape, b.shape[0]
    a_scale, b_scale = _vector(a_scale, M), _vector(b_scale, N)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    y = a.new_empty((M, N), dtype=out_dtype)
    status = chosen.library.qtrain_int8_scaled_mm(
        ctypes.c_void_p(a.data_ptr()),
        ctypes.c_long(a.stride(0)),
        ctypes.c_void_p(b.data_ptr()),
        ctypes.c_long(b.stride(0) if b_is_k_major else b.stride(1)),
        int(b_is_k_major),
        ctypes.c_void_p(a_scale.data_ptr()),
        ctypes.c_void_p(b_scale.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        int(out_dtype == torch.bfloat16),
        *(ctypes.c_long(n) for n in (M, N, K)),
        int(chosen.name == "amx"),
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError(f"no memory to multiply {tuple(a.shape)} by {tuple(b.shape)}")
    return y


def products_alone(on: Tier) -> tuple[Callable[[], float], float] | None:
    """(a function, the operations of its call): about a millisecond of the products of int8_scaled_mm on registers alone, by
    torch's number of threads, which no GEMM of the tier can outrun. None for a tier whose products are not its own."""
    products = getattr(on.library, "qtrain_int8_products", None)
    if products is None:
        return None
    amx, threads, steps = (
        int(on.name == "amx"),
        torch.get_num_threads(),
        40_000 if on.name == "amx" else 500_000,
    )
    products.restype = ctypes.c_double

    def run() -> float:
        operations: float = products(amx, threads, ctypes.c_long(steps))
        return operations

    return run, run()


def _is_dense(x: Tensor) -> bool:
    """``_int_mm`` of torch 2.13 reads rows that are expanded (stride 0) from beyond them."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _dense(x: Tensor) -> Tensor:
    return x if _is_dense(x) else x.contiguous()


_ones = functools.lru_cache(maxsize=64)(functools.partial(torch.ones, device="cpu"))


def _vector(scale: Tensor | None, size: int) -> Tensor:
    """[size] float32, contiguous; a factor of one, which changes nothing, for none."""
    if scale is None:
        return _ones(size)  # type: ignore[no-any-return]
    if scale.shape[0] == size and scale.is_contiguous():
        return scale
    return scale.expand(size).contiguous()
