"""``quantize_rows_columns`` on CUDA: the maxima in one read, the codes of both copies in a second.

Codes along rows wait for the maxima of whole rows and codes along columns for those of whole columns, so that x, unless it
fits L2, is read twice: 2 + 2 bytes an element of bfloat16, and 1 + 1 written. Rows alone wait for nothing else: then the
one-read kernel of ``quantize_rows`` runs.

    maxima, scales    ``rows_columns_maxima_triton``
    codes             ``rows_columns_codes_triton``

Between them lies one ``scratch`` of int32, so that a launch has few arguments and one allocation:

    1 / scale of rows [R] | of columns [C] | keys r0, r1 of the rows' codes [2, R] | of the columns' [2, R]
    | maxima of rows [tiles across, R] | of columns [chunks down, C]

``quantize_fp8_rows_columns`` runs the same kernels with other codes, ``activation_quantize`` on f(x) in the place of x.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import quantize_rows_columns as declaration
from qtrain_kernels import quantize_rows_triton
from qtrain_kernels.aot import Build
from qtrain_kernels.rounding_triton import FORBIDDEN_PTX, INT8, MIN_SCALE, OPTIONS
from qtrain_kernels.rows_columns_codes_triton import CODES_TILE, _codes_kernel
from qtrain_kernels.rows_columns_maxima_triton import (
    EACH,
    MAXIMA_TILE,
    NONE,
    SCALES_TILE,
    TENSOR,
    _gather_kernel,
    _maxima_kernel,
)


class Side(NamedTuple):
    """One copy. ``qmax``: the largest code's value, 0 for no copy. ``number_format``: INT8, E4M3, E5M2 of ``rounding_triton``.
    ``fold``: [C] for rows, [R] for columns, float32, or None."""

    qmax: int
    number_format: int
    stochastic: bool
    per_tensor: bool
    stream: int
    fold: Tensor | None

    @property
    def kind(self) -> int:
        return NONE.value if not self.qmax else TENSOR.value if self.per_tensor else EACH.value


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def launch(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
    maxima_tile: dict[str, int] = MAXIMA_TILE, codes_tile: dict[str, int] = CODES_TILE,
) -> Outputs:  # fmt: skip
    """As ``reference``, on the device of x; nothing synchronizes. The tiles change the speed alone."""
    arguments = (
        x, row_qmax, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_qmax, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    outputs = declaration._fake(*arguments)  # checks them, too
    rows = Side(row_qmax, INT8.value, row_stochastic, row_per_tensor, row_stream, row_fold)
    columns = Side(column_qmax, INT8.value, column_stochastic, column_per_tensor, column_stream, column_fold)
    quantize(x, rows, columns, (seed, step, row_offset), outputs, maxima_tile, codes_tile)
    return outputs


def quantize(
    x: Tensor, rows: Side, columns: Side, counters: tuple[Tensor, Tensor, Tensor], outputs: Outputs,
    maxima_tile: dict[str, int] = MAXIMA_TILE, codes_tile: dict[str, int] = CODES_TILE,
    activation: str = "", up: Tensor | None = None,
) -> None:  # fmt: skip
    """Write both copies into ``outputs``, whose codes are of any dtype of one byte. The arguments are not checked.

    activation: of f, where f(x), or f(x) * up, is quantized in the place of x, rows alone excepted; up has x's strides."""
    row_codes, row_scale, column_codes, column_scale = (
        t.view(torch.int8) if t.element_size() == 1 else t for t in outputs
    )
    R, C = x.shape
    row_fold, column_fold = (None if f is None else f.contiguous() for f in (rows.fold, columns.fold))
    if not R or not C:
        row_scale.fill_(MIN_SCALE.value)
        column_scale.fill_(MIN_SCALE.value)
        return
    if not columns.kind and rows.kind != TENSOR.value:
        if rows.kind:
            assert not activation
            quantize_rows_triton.quantize(
                x, row_fold, row_codes, row_scale, rows.qmax, rows.number_format, rows.stochastic,
                *counters[:2], rows.stream, counters[2],
            )  # fmt: skip
        return
    sides = {"ROWS": rows.kind, "COLUMNS": columns.kind}
    codes = {"ROW_FORMAT": rows.number_format, "COLUMN_FORMAT": columns.number_format}
    codes |= {"ROWS_STOCHASTIC": rows.stochastic, "COLUMNS_STOCHASTIC": columns.stochastic}
    read = {
        "ROWS_FOLDED": row_fold is not None,
        "COLUMNS_FOLDED": column_fold is not None,
        "ACTIVATION": activation,
    }
    chunk_r, chunk_c = maxima_tile["BLOCK_R"] * maxima_tile["STEPS"], maxima_tile["BLOCK_C"]
    chunks, tiles = triton.cdiv(R, chunk_r), triton.cdiv(C, chunk_c)
    scratch = torch.empty(5 * R + C + tiles * R + chunks * C, dtype=torch.int32, device=x.device)
    per_tensor = TENSOR.value in sides.values()
    tensor_amax = torch.zeros(2, dtype=torch.int32, device=x.device) if per_tensor else None
    shape = (R, C, x.stride(0), x.stride(1))
    _maxima_kernel[(chunks * tiles,)](
        x, up, row_fold, column_fold, scratch, tensor_amax, *shape,
        **sides, **read, INDEX=_index(x, maxima_tile), **maxima_tile, **OPTIONS,
    )  # fmt: skip
    _gather_kernel[(triton.cdiv(max(R, C), SCALES_TILE["BLOCK"]),)](
        scratch, tensor_amax, row_scale, column_scale, *counters, R, C, rows.qmax, columns.qmax, rows.stream, columns.stream,
        **sides, **codes, CHUNK_R=chunk_r, CHUNK_C=chunk_c, **SCALES_TILE, **OPTIONS,
    )  # fmt: skip
    words = bool(columns.kind) and R % 4 == 0
    BLOCK_R, BLOCK_C = codes_tile["BLOCK_R"], codes_tile["BLOCK_C"]
    _codes_kernel[(triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)](
        x, up, row_fold, column_fold, scratch, row_codes, column_codes.view(torch.int32) if words else column_codes,
        *shape, R // 4 if words else R, rows.qmax, columns.qmax, WORDS=words,
        WHOLE=R % BLOCK_R == 0 and C % BLOCK_C == 0, **sides, **codes, **read, INDEX=_index(x, codes_tile), **codes_tile,
        **OPTIONS,
    )  # fmt: skip


def _index(x: Tensor, tile: dict[str, int]) -> Any:
    """The integers that offsets within a tile fit, in x and in both copies."""
    extent = max(
        tile["BLOCK_R"] * abs(x.stride(0)) + tile["BLOCK_C"] * abs(x.stride(1)),
        (tile["BLOCK_R"] + 1) * x.shape[1],
        (tile["BLOCK_C"] + 1) * x.shape[0],
    )
    return tl.int32 if extent < 2**31 else tl.int64


def build(
    name: str, kernel: Any, tile: dict[str, int], contiguous: bool = True, folded: bool = False, gated: bool = False,
    **constants: Any,
) -> Build:  # fmt: skip
    """A specialisation: bfloat16 x, both copies nearest to int8 unless ``constants`` say otherwise."""
    types = {
        "x_ptr": "*bf16",
        "up_ptr": "*bf16",
        "row_codes_ptr": "*i8",
        "column_codes_ptr": "*i32" if contiguous else "*i8",
    }
    for pointer in ("fold", "scale"):
        types |= {f"row_{pointer}_ptr": "*fp32", f"column_{pointer}_ptr": "*fp32"}
    types["scratch_ptr"] = "*i32"
    types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
    sizes = ("R", "C", "stride_xr", "stride_xc", "column_stride")
    types |= dict.fromkeys((*sizes, "row_qmax", "column_qmax", "row_stream", "column_stream"), "i32")
    aligned = (
        "x_ptr",
        *(("up_ptr",) if gated else ()),
        "row_codes_ptr",
        "column_codes_ptr",
        "R",
        "C",
        "stride_xr",
        "column_stride",
    )
    both = {"ROWS": 1, "COLUMNS": 1, "ROW_FORMAT": INT8.value, "COLUMN_FORMAT": INT8.value}
    both |= {"ROWS_STOCHASTIC": False, "COLUMNS_STOCHASTIC": False}
    both |= {"ROWS_FOLDED": folded, "COLUMNS_FOLDED": folded, "WORDS": contiguous, "WHOLE": contiguous}
    both |= {"ACTIVATION": ""} | ({} if gated else {"up_ptr": None})
    constants = {**both, "INDEX": tl.int32 if contiguous else tl.int64, **tile, **constants}
    constants |= {"tensor_ptr": None, "CHUNK_R": 256, "CHUNK_C": 256}
    constants |= {} if folded else {"row_fold_ptr": None, "column_fold_ptr": None}
    constants |= {"stride_xc": 1} if contiguous else {}
    return Build(
        name,
        kernel,
        types,
        {n: v for n, v in constants.items() if n in kernel.arg_names},
        divisible_by_16=tuple(n for n in aligned if contiguous and n in kernel.arg_names),
        options={"num_warps": tile["num_warps"], **OPTIONS},
        forbidden_ptx=FORBIDDEN_PTX,
        max_registers=128 if contiguous else 254,  # 64-bit addresses element by element
    )


def activation_builds(activation: str, gated: bool, **constants: Any) -> list[Build]:
    """The two kernels that read, with f(x) or f(x) * up in the place of x. f may use fma and fast division."""
    form = f"{activation}{', gated' if gated else ''}"
    form += ", stochastic" if constants.get("ROWS_STOCHASTIC") else ""
    return [
        replace(
            build(f"{name}, {form}", kernel, tile, gated=gated, ACTIVATION=activation, **constants),
            forbidden_ptx=(),
        )
        for name, kernel, tile in (
            ("maxima", _maxima_kernel, MAXIMA_TILE),
            ("codes", _codes_kernel, CODES_TILE),
        )
    ]


def builds() -> list[Build]:
    """The kernels as training launches them, and with any strides."""
    stochastic = {"ROWS_STOCHASTIC": True, "COLUMNS_STOCHASTIC": True}
    return [
        build("maxima", _maxima_kernel, MAXIMA_TILE),
        build("maxima, folds, any strides", _maxima_kernel, MAXIMA_TILE, contiguous=False, folded=True),
        build("scales", _gather_kernel, SCALES_TILE, **stochastic),
        build("codes, nearest", _codes_kernel, CODES_TILE),
        build("codes, stochastic, folds", _codes_kernel, CODES_TILE, folded=True, **stochastic),
        build("codes, columns", _codes_kernel, CODES_TILE, ROWS=0),
        build("codes, any strides", _codes_kernel, CODES_TILE, contiguous=False, **stochastic),
    ]
