"""quantize_rows_columns on a CPU: the C++ kernel (``cpp/*/quantize_int8.cpp``), or where torch is the tier the reference's
operations, a few rows at a time: each of them then finds its operand in the cache, and in memory that is not fresh."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qtrain_kernels import quantize_rows_columns as declaration
from qtrain_kernels.cpu_tier import Tier, tier


class _Side(ctypes.Structure):
    """``qtrain::Side`` in cpp/shared.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("fold", ctypes.c_void_p),
        ("qmax", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("per_tensor", ctypes.c_int32),
        ("stream", ctypes.c_int32),
    )


def launch(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
    on: Tier | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``reference``; ``on``: this tier instead of the process's."""
    arguments = (
        x, row_qmax, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_qmax, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    library = (on or tier()).library
    if library is None and 0 in x.shape:
        return declaration.reference(*arguments)
    declaration.check(*arguments)
    if library is None:
        return _by_torch(*arguments)
    if x.dtype == torch.float16:
        x = x.to(torch.float32)
    if x.stride(1) != 1 or x.stride(0) < 0:
        x = x.contiguous()
    row_fold, column_fold = (None if f is None else f.contiguous() for f in (row_fold, column_fold))
    draws = (row_stochastic and row_qmax) or (column_stochastic and column_qmax)
    counters = [int(counter) for counter in (seed, step, row_offset)] if draws else [0, 0, 0]
    outputs = declaration.int8_outputs(x, row_qmax, column_qmax)
    if not row_qmax and not column_qmax:
        return outputs
    row_codes, row_scale, column_codes, column_scale = outputs
    status = library.qtrain_quantize_int8(
        ctypes.c_void_p(x.data_ptr()),
        int(x.dtype == torch.bfloat16),
        *(ctypes.c_long(n) for n in (x.shape[0], x.shape[1], x.stride(0))),
        ctypes.byref(
            _side(row_codes, row_scale, row_fold, row_qmax, row_stochastic, row_per_tensor, row_stream)
        ),
        ctypes.byref(
            _side(column_codes, column_scale, column_fold, column_qmax, column_stochastic, column_per_tensor, column_stream)
        ),
        *map(ctypes.c_int64, counters),
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError(f"no memory to quantize a tensor of shape {tuple(x.shape)}")
    return outputs


CHUNK = 1 << 17
"""Elements at a time by torch: half a megabyte of float32, within L2, and microseconds of Python to milliseconds of work."""


def _by_torch(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``reference``; x is not empty."""
    R, C = x.shape
    chunk = max(1, CHUNK // C)
    parts = [slice(first, min(first + chunk, R)) for first in range(0, R, chunk)]
    row_codes, row_scale, column_codes, column_scale = declaration.int8_outputs(x, row_qmax, column_qmax)

    def rows(part: slice) -> Tensor:
        v = x[part].to(torch.float32)
        return v if row_fold is None else v * row_fold

    def columns(part: slice) -> Tensor:
        v = x[part].to(torch.float32)
        return v if column_fold is None else v * column_fold[part, None]

    def noise(part: slice, stream: int, *, wanted: bool) -> Tensor | None:
        offset = row_offset + part.start
        return declaration._noise(x[part].shape, stream, seed, step, offset) if wanted else None

    if row_qmax:
        largest = torch.cat([rows(part).abs().amax(1) for part in parts])
        row_scale.copy_(declaration.scale_of(largest, row_qmax, row_per_tensor))
        inverse = row_scale.reciprocal()[:, None]
        for part in parts:
            drawn = noise(part, row_stream, wanted=row_stochastic)
            row_codes[part] = declaration.codes_of(rows(part) * inverse[part], row_qmax, drawn)
    if column_qmax:
        largest = torch.stack([columns(part).abs().amax(0) for part in parts]).amax(0)
        column_scale.copy_(declaration.scale_of(largest, column_qmax, column_per_tensor))
        inverse = column_scale.reciprocal()
        for part in parts:
            drawn = noise(part, column_stream, wanted=column_stochastic)
            codes = declaration.codes_of(columns(part) * inverse, column_qmax, drawn)
            column_codes[:, part] = codes.to(torch.int8).t()
    return row_codes, row_scale, column_codes, column_scale


def _side(
    codes: Tensor, scale: Tensor, fold: Tensor | None, qmax: int, stochastic: bool, per_tensor: bool, stream: int
) -> _Side:  # fmt: skip
    """Without codes there is no such copy (qmax = 0). A copy of an empty tensor has scales still, and its codes an
    address that is never written."""
    address = codes.data_ptr() or scale.data_ptr()
    return _Side(
        address if qmax else None,
        scale.data_ptr(),
        None if fold is None else fold.data_ptr(),
        qmax,
        stochastic,
        per_tensor,
        stream,
    )
