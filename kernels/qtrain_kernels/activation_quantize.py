"""activation_quantize: int8 codes of y = f(h), or of the gated y = f(h) * up, along rows and columns.

    f    gelu (with erf), gelu_tanh, relu, relu2 = relu(h)^2, silu
    y    rounded to the dtype of h after f and after the product, as eager PyTorch rounds it

then quantized as ``quantize_rows_columns`` does, without folds: row codes [T, C], and column codes [C, T] where asked for.
y never reaches memory: the layer after an MLP's activation reads its codes alone.

Tolerance: implementations of erf and exp differ in the last bits. That moves y by one unit in the last place of its dtype
at most, next to a tie of its rounding, and so a code by one, in at most CODE_FLIPS of the codes; a scale by one unit of the
dtype of h (2^-7 of its value in bfloat16). relu and relu2 are bit-equal.

T tokens, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain_kernels import quantize_rows, quantize_rows_columns
from qtrain_kernels.op import Workload, define_op


def _gelu(h: Tensor) -> Tensor:
    """F.gelu, but inf at inf everywhere: torch's kernels for CPUs give NaN there, those for GPUs inf."""
    x = h.to(torch.float32)
    return (0.5 * x * (1 + torch.erf(x * 0.5**0.5))).to(h.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
}
CODE_FLIPS = 1e-4
"""Measured: 1e-6 (2 M normal elements, f in float32 against f in float64). A row whose largest |y| moves by a unit moves
many codes, with probability 2^-14 in bfloat16: hence the room."""


def check(
    h: Tensor, up: Tensor | None, activation: str,
    row_qmax: int, row_stochastic: bool, row_stream: int,
    column_qmax: int, column_stochastic: bool, column_stream: int,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    for qmax, stream in ((row_qmax, row_stream), (column_qmax, column_stream)):
        quantize_rows.check(h, qmax or 1, False, seed, step, stream, row_offset)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
    if up is not None and (up.shape != h.shape or up.dtype != h.dtype or up.device != h.device):
        raise ValueError(
            f"up must be like h, {list(h.shape)} {h.dtype} on {h.device}, not {list(up.shape)} {up.dtype} on {up.device}"
        )


def reference(
    h: Tensor, up: Tensor | None, activation: str,
    row_qmax: int, row_stochastic: bool, row_stream: int,
    column_qmax: int, column_stochastic: bool, column_stream: int,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> row codes [T, C] int8, row scale [T] float32, column codes [C, T] int8, column scale [C] float32.

    ``h``, ``up`` [T, C] float32, bfloat16 or float16, any strides. ``activation``: a key of ACTIVATIONS. ``*_qmax``: 1 ... 127, or
    0 for no such copy, whose outputs are then [0, 0] and [0]. ``seed``, ``step``, ``row_offset``, ``*_stream``: as for
    ``quantize_rows``. Raises ValueError, see ``check``.
    """
    check(
        h, up, activation, row_qmax, row_stochastic, row_stream, column_qmax, column_stochastic, column_stream,
        seed, step, row_offset,
    )  # fmt: skip
    return quantize_rows_columns.reference(
        activate(h, up, activation),
        row_qmax, row_stochastic, False, row_stream, None,
        column_qmax, column_stochastic, False, column_stream, None,
        seed, step, row_offset,
    )  # fmt: skip


def activate(h: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """y in the dtype of h."""
    y = ACTIVATIONS[activation](h)
    return y if up is None else y * up


def _fake(
    h: Tensor, up: Tensor | None, activation: str,
    row_qmax: int, row_stochastic: bool, row_stream: int,
    column_qmax: int, column_stochastic: bool, column_stream: int,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(
        h, up, activation, row_qmax, row_stochastic, row_stream, column_qmax, column_stochastic, column_stream,
        seed, step, row_offset,
    )  # fmt: skip
    return quantize_rows_columns.int8_outputs(h, row_qmax, column_qmax)


Inputs = tuple[Any, ...]
# (row qmax, stochastic), (column qmax, stochastic)
_SETTINGS = {
    "rows": ((127, False), (0, False)),
    "rows_stochastic": ((127, True), (0, False)),
    "both": ((127, False), (127, False)),
    "both_stochastic": ((127, True), (7, True)),
    "columns": ((0, False), (127, True)),
}
_TENSORS = (
    "fp32", "bf16", "fp16", "one_element", "one_column", "many_short_rows", "transposed", "strided", "storage_offset",
    "expanded_rows", "zero_rows", "subnormal_beside_normal", "nan_inf", "no_rows", "no_columns",
)  # fmt: skip


def _tensors() -> dict[str, Callable[[], Tensor]]:
    normal, changed = quantize_rows._normal, quantize_rows._set
    return {name: quantize_rows._TENSORS[name] for name in _TENSORS} | {
        "wide": lambda: 3 * normal(9, 300, torch.bfloat16),
        "beyond_a_tile": lambda: 2 * normal(131, 81, torch.bfloat16),
        "looped": lambda: changed(normal(2, 16400, torch.bfloat16), (0, 16399, 9.0), (1, 0, 9.0)),
        "outliers": lambda: changed(normal(7, 40), (0, 0, 1e15), (1, 39, -1e15), (2, 3, -80.0), (3, 1, 80.0)),
    }


def _up(h: Tensor) -> Tensor:
    """Another tensor like h, strides included."""
    generator = torch.Generator().manual_seed(h.numel())
    up = (
        torch.empty_strided(h.shape, h.stride(), dtype=h.dtype)
        if 0 not in h.stride()
        else torch.empty_like(h)
    )
    return up.copy_(torch.randn(h.shape, generator=generator))


def _cases() -> dict[str, Callable[[], Inputs]]:
    tensors = _tensors()

    def case(tensor: str, activation: str, gated: bool, setting: str) -> Callable[[], Inputs]:
        (row_qmax, row_stochastic), (column_qmax, column_stochastic) = _SETTINGS[setting]

        def make() -> Inputs:
            h = tensors[tensor]()
            counters = (quantize_rows._scalar(v) for v in (-5, 2**33 + 3, 2**31 - 2))
            sides = (row_qmax, row_stochastic, 99, column_qmax, column_stochastic, -(2**31))
            return (h, _up(h) if gated else None, activation, *sides, *counters)

        return make

    names, settings, cases = list(ACTIVATIONS), list(_SETTINGS), {}

    def add(tensor: str, activation: str, gated: bool, setting: str) -> None:
        name = f"{tensor}/{activation}{'_gated' if gated else ''}/{setting}"
        cases[name] = case(tensor, activation, gated, setting)

    for i, tensor in enumerate(tensors):
        allowed = settings[:2] if tensor == "looped" else settings  # tiles have no loop over a row
        for j in (0, 1):
            add(tensor, names[(i + 2 * j) % len(names)], (i + j) % 3 == 2, allowed[(i + j) % len(allowed)])
    for i, activation in enumerate(names):
        for gated in (False, True):
            for tensor in ("wide", "nan_inf"):
                add(tensor, activation, gated, settings[(i + gated) % len(settings)])
    return cases


def _workloads(device: str) -> Sequence[Workload]:
    def unfused(inputs: Inputs) -> Callable[[], Any]:
        """torch.compile of the activation, then the op that quantizes."""
        h, up, name, row_qmax, row_stochastic, row_stream, *column, seed, step, row_offset = inputs
        compiled = torch.compile(activate, dynamic=False)
        if not column[0]:
            return lambda: quantize_rows.quantize_rows(
                compiled(h, up, name), row_qmax, row_stochastic, seed, step, row_stream, row_offset
            )
        return lambda: quantize_rows_columns.quantize_rows_columns(
            compiled(h, up, name),
            row_qmax, row_stochastic, False, row_stream, None,
            column[0], column[1], False, column[2], None,
            seed, step, row_offset,
        )  # fmt: skip

    def workload(T: int, C: int, activation: str, gated: bool, setting: str) -> Workload:
        (row_qmax, row_stochastic), (column_qmax, column_stochastic) = _SETTINGS[setting]

        def inputs(on: str) -> Inputs:
            h = quantize_rows._normal(T, C, torch.bfloat16).to(on)
            counters = (quantize_rows._scalar(v, on) for v in (1, 2, 0))
            sides = (row_qmax, row_stochastic, 3, column_qmax, column_stochastic, 4)
            return (h, h.flip(0) if gated else None, activation, *sides, *counters)

        copies = (row_qmax > 0) + (column_qmax > 0)
        return Workload(
            f"{T}x{C}/bf16/{activation}{'_gated' if gated else ''}/{setting}",
            inputs,
            bytes=T * C * (2 * (1 + gated) + copies) + 4 * (T + C * (column_qmax > 0)),
            rivals={"unfused": unfused},
        )

    kinds = (("gelu", False), ("silu", True))
    if device == "cpu":
        return [workload(1024, 768, *kind, "rows") for kind in kinds]
    return [
        workload(*shape, *kind, setting)
        for shape in ((15872, 16384), (16384, 3072))
        for kind in kinds
        for setting in ("rows", "rows_stochastic", "both")
    ]


activation_quantize = define_op(
    "activation_quantize",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.activation_quantize_triton:launch",
    rtol=2.0**-7,
    code_flips=CODE_FLIPS,
)
