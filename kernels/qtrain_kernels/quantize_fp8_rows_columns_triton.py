"""``quantize_fp8_rows_columns`` on CUDA: the kernels of ``quantize_rows_columns_triton`` with the codes of floats."""

from __future__ import annotations

from torch import Tensor

from qtrain_kernels import quantize_fp8_rows_columns as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.quantize_rows_columns_triton import Outputs, Side, build, quantize
from qtrain_kernels.rounding_triton import E4M3, E5M2
from qtrain_kernels.rows_columns_codes_triton import CODES_TILE, _codes_kernel

NUMBERS = {"e4m3": E4M3.value, "e5m2": E5M2.value}


def launch(
    x: Tensor,
    row_format: str, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_format: str, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> Outputs:  # fmt: skip
    """As ``reference``, on the device of x; nothing synchronizes."""
    arguments = (
        x, row_format, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_format, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    outputs = declaration._fake(*arguments)  # checks them, too
    rows = _side(row_format, row_stochastic, row_per_tensor, row_stream, row_fold)
    columns = _side(column_format, column_stochastic, column_per_tensor, column_stream, column_fold)
    quantize(x, rows, columns, (seed, step, row_offset), outputs)
    return outputs


def _side(number_format: str, stochastic: bool, per_tensor: bool, stream: int, fold: Tensor | None) -> Side:
    if not number_format:
        return Side(0, 0, False, False, 0, None)
    largest = declaration.FORMATS[number_format].largest
    return Side(largest, NUMBERS[number_format], stochastic, per_tensor, stream, fold)


def builds() -> list[Build]:
    """What ``quantize_rows_columns`` has not: its kernel of the codes."""
    stochastic = {"ROWS_STOCHASTIC": True, "COLUMNS_STOCHASTIC": True}
    e4m3, e5m2 = ({"ROW_FORMAT": n.value, "COLUMN_FORMAT": n.value} for n in (E4M3, E5M2))
    return [
        build("codes, e4m3", _codes_kernel, CODES_TILE, **e4m3),
        build("codes, e5m2, stochastic", _codes_kernel, CODES_TILE, **e5m2, **stochastic),
    ]
