"""quantize_fp8_rows_columns: fp8 codes of x [R, C] along its rows and along its columns, from one reading.

``quantize_rows_columns`` with floats of 8 bits in the place of integers: y, folds, streams and scales per tensor are as
there. With the largest number of the format (e4m3: 448, e5m2: 57344; OCP's, arXiv 2209.05433),

    scale   = max(amax / largest, 2^-100), NaN where amax is not finite
    v       = y * (1 / scale), NaN -> 0
    step    = max(2^floor(log2 |v|), smallest normal) * 2^-mantissa bits
    nearest:     code = half_even(v / step) * step, which keeps the sign of a zero
    stochastic:  f = floor(v / step);  code = min(f + [u < v / step - f], largest / step) * step, by magnitude
    y ~ code * scale

These are the values of ``qtrain.quant`` for e4m3_row, e4m3_tensor, e5m2_row and so on, with the same random bits. To nearest it
is a cast that saturates; no code is NaN or infinite.

R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtrain_kernels import quantize_rows_columns as integers
from qtrain_kernels.op import Workload, define_op
from qtrain_kernels.quantize_rows import MIN_SCALE


class Float8(NamedTuple):
    mantissa: int
    bias: int
    largest: int
    dtype: torch.dtype


FORMATS = {
    "e4m3": Float8(3, 7, 448, torch.float8_e4m3fn),
    "e5m2": Float8(2, 15, 57344, torch.float8_e5m2),
}


def check(
    x: Tensor,
    row_format: str, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_format: str, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    for name, value in (("row_format", row_format), ("column_format", column_format)):
        if value and value not in FORMATS:
            raise ValueError(f'{name}={value!r}: allowed are "" (no such copy), {", ".join(FORMATS)}')
    integers.check(
        x, 1, row_stochastic, row_per_tensor, row_stream, row_fold,
        1, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip


def reference(
    x: Tensor,
    row_format: str, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_format: str, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> row codes [R, C], row scale [R] float32, column codes [C, R], column scale [C] float32.

    ``x`` [R, C] float32, bfloat16 or float16, any strides. ``*_format``: "e4m3", "e5m2", whose codes are torch.float8_e4m3fn and
    torch.float8_e5m2, or "" for no such copy, whose outputs are then [0, 0] (float8_e4m3fn) and [0]. The others as for
    ``quantize_rows_columns``. Raises ValueError, see ``check``.
    """
    check(
        x, row_format, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_format, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    return integers.copies(
        _quantized, x, row_format, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_format, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip


def _quantized(
    y: Tensor, number_format: str, per_tensor: bool, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not number_format:
        return y.new_empty((0, 0), dtype=torch.float8_e4m3fn), y.new_empty((0,))
    mantissa, bias, largest, dtype = FORMATS[number_format]
    amax = y.abs().amax(dim=1) if y.shape[1] else y.new_zeros(y.shape[0])
    if per_tensor and amax.numel():
        amax = amax.amax().expand(amax.shape)
    scale = (amax / torch.full_like(amax, largest)).clamp(min=MIN_SCALE)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    v = y.contiguous() * scale.reciprocal()[:, None]
    v = torch.where(v.isnan(), 0.0, v)
    power = (v.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp(min=2.0 ** (1 - bias)) * 2.0**-mantissa
    w = v / step
    n = w.round() if noise is None else w.floor() + (noise < w - w.floor())
    codes = (n * step).clamp(-largest, largest).to(dtype)  # exact
    return codes, scale.contiguous()


def _fake(
    x: Tensor,
    row_format: str, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_format: str, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(
        x, row_format, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_format, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    row_dtype, column_dtype = (FORMATS[f].dtype if f else None for f in (row_format, column_format))
    return integers.outputs(x, row_dtype, column_dtype, none=torch.float8_e4m3fn)


Inputs = tuple[Any, ...]
_E4M3, _E5M2, _NONE = ("e4m3", False, False), ("e5m2", False, False), ("", False, False)
_E4M3_SR, _E5M2_SR = ("e4m3", True, False), ("e5m2", True, False)
# name -> (rows, columns), each (format, stochastic, per tensor), and whether folds are given
_SETTINGS = {
    "nearest": (_E4M3, _E5M2, False),
    "stochastic": (_E5M2_SR, _E4M3_SR, True),
    "rows_alone": (_E4M3_SR, _NONE, True),
    "columns_alone": (_NONE, _E5M2_SR, False),
    "tensor": (("e5m2", True, True), ("e4m3", False, True), True),
}


def _every_bf16() -> Tensor:
    """All finite bfloat16 up to 448, and the largest number in each row, whose scale is 1 then in e4m3."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    bits = torch.cat([torch.where(bits.abs() <= 448, bits, 0), torch.zeros(254 * 260 - 2**16)]).reshape(
        260, 254
    )
    return torch.cat([torch.full((260, 1), 448.0), bits, bits[:, :1]], dim=1).to(torch.bfloat16)


def _midpoints() -> Tensor:
    """Halfway between neighbours of both formats, and one unit in the last place to each side."""
    ties = torch.cat([torch.arange(1, 32, 2) * 2.0**e for e in range(-19, 4)])
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(9e9))])
    x = x[x <= 448]
    return torch.stack([torch.cat([torch.tensor([448.0]), sign * x]) for sign in (1, -1)])


def _cases() -> dict[str, Callable[[], Inputs]]:
    # Those of quantize_rows_columns, by tensor, with other copies
    tensors = {name.split("/")[0]: make for name, make in integers.quantize_rows_columns.cases.items()}

    def case(tensor: Callable[[], Tensor], setting: str) -> Callable[[], Inputs]:
        rows, columns, folded = _SETTINGS[setting]

        def make() -> Inputs:
            x = tensor()
            folds = (integers._fold(x.shape[1]), integers._fold(x.shape[0])) if folded else (None, None)
            counters = (torch.tensor(v) for v in (-5, 2**33 + 3, 2**31 - 2))
            return (x, *rows, 99, folds[0], *columns, -(2**31), folds[1], *counters)

        return make

    settings = list(_SETTINGS)
    cases = {}
    for i, (name, make) in enumerate(tensors.items()):
        if name not in ("ties", "rounding_edges", "many_short_rows", "looped"):
            setting = settings[i % len(settings)]
            cases[f"{name}/{setting}"] = case(lambda make=make: make()[0], setting)  # type: ignore[misc]
    for setting in settings:
        cases[f"midpoints/{setting}"] = case(_midpoints, setting)
        cases[f"nan_inf/{setting}"] = case(lambda: tensors["nan_inf"]()[0], setting)
    cases["every_bf16/nearest"] = case(_every_bf16, "nearest")
    return cases


def _workloads(device: str) -> Sequence[Workload]:
    def workload(R: int, C: int, setting: str) -> Workload:
        rows, columns = (_E4M3, _E4M3) if setting == "nearest" else (_E5M2_SR, _E5M2_SR)

        def inputs(on: str) -> Inputs:
            x = integers.quantize_rows._normal(R, C, torch.bfloat16).to(on)
            counters = (torch.tensor(v, device=on) for v in (1, 2, 0))
            return (x, *rows, 3, None, *columns, 4, None, *counters)

        return Workload(f"{R}x{C}/bf16/{setting}", inputs, bytes=R * C * (2 + 1 + 1) + (R + C) * 4)

    shapes = [(512, 768)] if device == "cpu" else integers._GPU_SHAPES
    return [workload(*shape, setting) for shape in shapes for setting in ("nearest", "stochastic")]


quantize_fp8_rows_columns = define_op(
    "quantize_fp8_rows_columns",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.quantize_fp8_rows_columns_triton:launch",
)
