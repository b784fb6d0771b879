"""quantize_rows_columns: int8 codes of x [R, C] along its rows and along its columns, from one reading.

    rows       y = x * row_fold[None, :]         codes [R, C], scale [R]
    columns    y = (x * column_fold[:, None])^T  codes [C, R], scale [C]

each quantized as ``quantize_rows`` does, to the same bits: both copies are K-major, for the two GEMMs that read x along
its two axes (g in dgrad and in wgrad, x in fprop and in wgrad). A fold is the scale of the GEMM's other operand where that
lies on the contraction (DESIGN: reuse of the forward's codes); None folds nothing.

Random bits of element (r, c) are those of row ``row_offset + r`` and column c in both copies, each with its own stream: x
as it is stored names them, not the copy. ``per_tensor``: one scale for all rows (columns), given R (C) times.

R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain_kernels import quantize_rows
from qtrain_kernels.counter_hash import random_bits, uniform
from qtrain_kernels.op import Workload, define_op
from qtrain_kernels.quantize_rows import MIN_SCALE


def check(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    for qmax, stream in ((row_qmax, row_stream), (column_qmax, column_stream)):
        quantize_rows.check(x, qmax or 1, False, seed, step, stream, row_offset)
    for name, fold, size in (("row_fold", row_fold, x.shape[1]), ("column_fold", column_fold, x.shape[0])):
        if fold is not None and (fold.shape != (size,) or fold.dtype != torch.float32):
            raise ValueError(f"{name} must be [{size}] float32, not {list(fold.shape)} {fold.dtype}")


def reference(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> row codes [R, C] int8, row scale [R] float32, column codes [C, R] int8, column scale [C] float32.

    ``x`` [R, C] float32, bfloat16 or float16, any strides. ``*_qmax``: 1 ... 127, or 0 for no such copy, whose outputs are then
    [0, 0] and [0]. ``*_fold``: [C] and [R] float32. ``seed``, ``step``, ``row_offset``, ``*_stream``: as for
    ``quantize_rows``. Raises ValueError, see ``check``.
    """
    check(
        x, row_qmax, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_qmax, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    return copies(
        _quantized, x, row_qmax, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_qmax, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip


def copies(
    quantized: Callable[[Tensor, Any, bool, Tensor | None], tuple[Tensor, Tensor]], x: Tensor,
    row_kind: Any, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_kind: Any, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Both copies, each as ``quantized(y, kind, per_tensor, noise)`` makes it; a kind that is false is no copy."""
    rows = x.to(torch.float32)
    columns = rows if column_fold is None else rows * column_fold[:, None]
    rows = rows if row_fold is None else rows * row_fold
    noise = (seed, step, row_offset)
    row_noise = _noise(x.shape, row_stream, *noise) if row_stochastic and row_kind else None
    column_noise = _noise(x.shape, column_stream, *noise).t() if column_stochastic and column_kind else None
    return (
        *quantized(rows, row_kind, row_per_tensor, row_noise),
        *quantized(columns.t(), column_kind, column_per_tensor, column_noise),
    )


def _noise(shape: torch.Size, stream: int, seed: Tensor, step: Tensor, row_offset: Tensor) -> Tensor:
    return uniform(random_bits(seed, step, stream, shape[0], shape[1], row_offset))


def _quantized(y: Tensor, qmax: int, per_tensor: bool, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    if not qmax:
        return y.new_empty((0, 0), dtype=torch.int8), y.new_empty((0,))
    amax = y.abs().amax(dim=1) if y.shape[1] else y.new_zeros(y.shape[0])
    scale = scale_of(amax, qmax, per_tensor)
    codes = codes_of(y * scale.reciprocal()[:, None], qmax, noise)
    return codes.to(torch.int8, memory_format=torch.contiguous_format), scale


def scale_of(amax: Tensor, qmax: int, per_tensor: bool) -> Tensor:
    """Of the largest magnitudes of rows."""
    if per_tensor and amax.numel():
        amax = amax.amax().expand(amax.shape)
    return (amax / torch.full_like(amax, qmax)).clamp(min=MIN_SCALE).contiguous()


def codes_of(v: Tensor, qmax: int, noise: Tensor | None) -> Tensor:
    """Whole numbers of v = y / scale, which is overwritten."""
    v.masked_fill_(v.isnan(), 0.0)
    if noise is None:
        v.round_()
    else:
        floor = v.floor()
        v = floor.add_(noise < v.sub_(floor))
    return v.clamp_(-qmax - 1, qmax)


def _fake(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(
        x, row_qmax, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_qmax, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    return int8_outputs(x, row_qmax, column_qmax)


def int8_outputs(x: Tensor, row_qmax: int, column_qmax: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where both copies will be; no such copy where its qmax is 0."""
    return outputs(x, torch.int8 if row_qmax else None, torch.int8 if column_qmax else None)


def outputs(
    x: Tensor, row_dtype: torch.dtype | None, column_dtype: torch.dtype | None, none: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where both copies will be; a dtype of None, no such copy, gives codes [0, 0] of dtype ``none`` and scales [0]."""
    R, C = x.shape
    rows, columns = ((0, 0) if row_dtype is None else (R, C)), ((0, 0) if column_dtype is None else (C, R))
    return (
        x.new_empty(rows, dtype=row_dtype or none), x.new_empty(rows[:1], dtype=torch.float32),
        x.new_empty(columns, dtype=column_dtype or none), x.new_empty(columns[:1], dtype=torch.float32),
    )  # fmt: skip


Inputs = tuple[Any, ...]
_NEAREST, _STOCHASTIC, _TENSOR = (127, False, False), (127, True, False), (127, False, True)
_INT4, _INT4_TENSOR, _NONE = (7, True, False), (7, True, True), (0, False, False)
# name -> (rows, columns), each (qmax, stochastic, per tensor), and whether folds are given
_SETTINGS = {
    "nearest": (_NEAREST, _NEAREST, False),
    "stochastic": (_STOCHASTIC, _STOCHASTIC, True),
    "rows_alone": (_STOCHASTIC, _NONE, True),
    "columns_alone": (_NONE, _INT4, True),
    "tensor": (_TENSOR, _INT4_TENSOR, False),
    "tensor_rows_alone": (_TENSOR, _NONE, False),
    "mixed": (_INT4, _TENSOR, True),
}


def _fold(size: int) -> Tensor:
    return torch.linspace(0.25, 3.0, size)


def _cases() -> dict[str, Callable[[], Inputs]]:
    tensors = {name: make for name, make in quantize_rows._TENSORS.items() if "looped" not in name} | {
        "tile": lambda: quantize_rows._normal(64, 64, torch.bfloat16),
        "beyond_a_tile": lambda: quantize_rows._normal(131, 81),
        "many_tiles": lambda: quantize_rows._normal(193, 200, torch.bfloat16),
    }

    def case(tensor: str, setting: str) -> Callable[[], Inputs]:
        rows, columns, folded = _SETTINGS[setting]

        def make() -> Inputs:
            x = tensors[tensor]()
            row_fold, column_fold = (_fold(x.shape[1]), _fold(x.shape[0])) if folded else (None, None)
            counters = (quantize_rows._scalar(v) for v in (-5, 2**33 + 3, 2**31 - 2))
            return (x, *rows, 99, row_fold, *columns, -(2**31), column_fold, *counters)

        return make

    settings = list(_SETTINGS)
    cases = {}
    for i, tensor in enumerate(tensors):
        for setting in (settings[i % len(settings)], settings[(i + 1 + i // len(settings)) % len(settings)]):
            cases[f"{tensor}/{setting}"] = case(tensor, setting)
    tensors["looped"] = quantize_rows._TENSORS["looped"]
    cases["looped/rows_alone"] = case("looped", "rows_alone")
    for setting in settings:
        cases[f"beyond_a_tile/{setting}"] = case("beyond_a_tile", setting)
        cases[f"nan_inf/{setting}"] = case("nan_inf", setting)
        cases[f"no_columns/{setting}"] = case("no_columns", setting)
    return cases


# x and g of the layer shapes that TransformerEngine is measured on (T = 15872), and GPT-2's
_GPU_SHAPES = [(15872, 4096), (15872, 12288), (15872, 16384), (16384, 768), (16384, 3072)]


def _workloads(device: str) -> Sequence[Workload]:
    def workload(R: int, C: int, setting: str) -> Workload:
        rows, columns, _ = _SETTINGS[setting]

        def inputs(on: str) -> Inputs:
            x = quantize_rows._normal(R, C, torch.bfloat16).to(on)
            counters = (quantize_rows._scalar(v, on) for v in (1, 2, 0))
            return (x, *rows, 3, None, *columns, 4, None, *counters)

        return Workload(f"{R}x{C}/bf16/{setting}", inputs, bytes=R * C * (2 + 1 + 1) + (R + C) * 4)

    shapes = [(4096, 768), (4096, 3072)] if device == "cpu" else _GPU_SHAPES
    return [workload(*shape, setting) for shape in shapes for setting in ("nearest", "stochastic")]


quantize_rows_columns = define_op(
    "quantize_rows_columns",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.quantize_rows_columns_triton:launch",
    cpu="qtrain_kernels.quantize_rows_columns_cpu:launch",
)
