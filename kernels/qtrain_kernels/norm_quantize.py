"""norm_quantize: int8 row codes of a normalized x, with what the norm's backward needs.

    RMSNorm     d = x                    y = d * rstd * weight + bias      rstd = 1 / sqrt(mean_c(d^2) + eps)
    LayerNorm   d = x - mean_c(x)

in float32, y rounded once to the dtype of x (as PyTorch's norms round), then quantized as ``quantize_rows`` does. y never
reaches memory. RMSNorm: Zhang and Sennrich, 1910.07467; LayerNorm: Ba et al., 1607.06450, with its variance taken of d.

Tolerance: sums over c have another order in each implementation. That moves y by one unit in the last place of its dtype at
most, next to a tie of its rounding, and so a code by one, in at most CODE_FLIPS of the codes; a scale by one unit of the
dtype of x (2^-7 of its value in bfloat16).

A NaN or an infinity in x poisons its row, as in ``quantize_rows``. Where x^2 overflows float32 (|x| > 1.8e19), rstd is 0 and so
is the row, as in PyTorch.

R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain_kernels import quantize_rows
from qtrain_kernels.op import Workload, define_op

CODE_FLIPS = 1e-4
"""Measured: 1e-6 (2 M normal elements, sums in float32 against float64). A row whose largest |y| moves by a unit moves many
codes, with probability 2^-14 in bfloat16: hence the room."""


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    quantize_rows.check(x, qmax, stochastic, seed, step, stream, row_offset)
    C = x.shape[1]
    if C == 0:
        raise ValueError("x has no columns, and a norm over none is not defined")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != (C,) or vector.dtype not in quantize_rows.DTYPES or vector.device != x.device:
            raise ValueError(
                f"{name} must be [{C}] of {quantize_rows.DTYPES} on {x.device}, not {list(vector.shape)} {vector.dtype} "
                f"on {vector.device}"
            )
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be at least 0")


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> codes [R, C] int8, scale [R], rstd [R] and mean [R] ([0] for RMSNorm), float32.

    ``x`` [R, C] float32, bfloat16 or float16, any strides; ``weight``, ``bias`` [C] of such a dtype. The rest as for
    ``quantize_rows``. Raises ValueError, see ``check``.
    """
    check(x, weight, bias, eps, layer_norm, qmax, stochastic, seed, step, stream, row_offset)
    y, rstd, mean = normalize(x, weight, bias, eps, layer_norm)
    return *quantize_rows.reference(y, qmax, stochastic, seed, step, stream, row_offset), rstd, mean


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y [R, C] in the dtype of x, rstd [R], mean [R] or [0], float32."""
    d = x.to(torch.float32)
    mean = d.new_empty(0)
    if layer_norm:
        mean = d.mean(dim=1)
        d = d - mean[:, None]
    rstd = (d.square().mean(dim=1) + eps).rsqrt()
    y = d * rstd[:, None] * weight.to(torch.float32)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype), rstd, mean


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check(x, weight, bias, eps, layer_norm, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    codes = x.new_empty((R, C), dtype=torch.int8)
    scale, rstd, mean = (x.new_empty((n,), dtype=torch.float32) for n in (R, R, R if layer_norm else 0))
    return codes, scale, rstd, mean


Inputs = tuple[
    Tensor, Tensor, Tensor | None, float, bool, int, bool, Tensor, Tensor, int, Tensor
]  # of ``reference``
_TENSORS = (
    "fp32", "bf16", "fp16", "one_element", "one_column", "many_short_rows", "transposed", "strided", "storage_offset",
    "expanded_rows", "zero_rows", "subnormal_beside_normal", "nan_inf", "no_rows",
)  # fmt: skip


def _tensors() -> dict[str, Callable[[], Tensor]]:
    normal, changed = quantize_rows._normal, quantize_rows._set
    return {name: quantize_rows._TENSORS[name] for name in _TENSORS} | {
        "wide": lambda: 3 * normal(9, 300, torch.bfloat16),
        "far_from_zero": lambda: 30 + normal(6, 500),
        "outliers": lambda: changed(normal(7, 40), (0, 0, 1e15), (1, 39, -1e15), (2, 3, -80.0)),
        "looped": lambda: changed(normal(2, 16400, torch.bfloat16), (0, 16399, 90.0), (1, 0, -90.0)),
        "looped_fp32": lambda: normal(1, 24600),
    }


def _affine(C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.linspace(1.5, 0.5, C).to(dtype), torch.linspace(-0.5, 0.25, C).to(dtype)


def _cases() -> dict[str, Callable[[], Inputs]]:
    tensors = _tensors()

    def case(
        tensor: str, layer_norm: bool, biased: bool, stochastic: bool, own: bool
    ) -> Callable[[], Inputs]:
        def make() -> Inputs:
            x = tensors[tensor]()
            weight, bias = _affine(x.shape[1], x.dtype if own else torch.float32)
            seed, step, offset = (quantize_rows._scalar(v) for v in (-5, 2**33 + 3, 2**31 - 2))
            eps = 1e-5 if layer_norm else 1e-6
            return (
                x, weight, bias if biased else None, eps, layer_norm, 127, stochastic, seed, step, -(2**31), offset
            )  # fmt: skip

        return make

    return {
        f"{tensor}/{'layernorm' if layer_norm else 'rmsnorm'}{'_bias' if biased else ''}/"
        f"{'stochastic' if stochastic else 'nearest'}": case(
            tensor, layer_norm, biased, stochastic, i % 2 == 0
        )
        for i, tensor in enumerate(tensors)
        for layer_norm, biased, stochastic in ((False, i % 4 == 3, i % 3 > 0), (True, i % 4 != 1, i % 3 == 0))
    }


def _workloads(device: str) -> Sequence[Workload]:
    def unfused(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        """torch.compile of the norm, then the op that quantizes."""
        compiled = torch.compile(normalize, dynamic=False)
        return lambda: quantize_rows.quantize_rows(compiled(*inputs[:5])[0], *inputs[5:])

    def workload(R: int, C: int, layer_norm: bool, stochastic: bool) -> Workload:
        def inputs(on: str) -> Inputs:
            x = quantize_rows._normal(R, C, torch.bfloat16).to(on)
            weight, bias = (v.to(on) for v in _affine(C, torch.bfloat16))
            seed, step, offset = (quantize_rows._scalar(v, on) for v in (1, 2, 0))
            affine = (weight, bias if layer_norm else None)
            return (x, *affine, 1e-5, layer_norm, 127, stochastic, seed, step, 3, offset)

        kind, rounding = "layernorm" if layer_norm else "rmsnorm", "stochastic" if stochastic else "nearest"
        return Workload(
            f"{R}x{C}/bf16/{kind}/{rounding}",
            inputs,
            bytes=R * C * (2 + 1) + R * (8 + 4 * layer_norm) + C * 2 * (1 + layer_norm),
            rivals={"unfused": unfused},
        )

    shapes = [(1024, 768)] if device == "cpu" else [(15872, 4096), (15872, 16384), (16384, 768)]
    kinds = ((False, False), (False, True), (True, False))
    return [workload(*shape, *kind) for shape in shapes for kind in kinds]


norm_quantize = define_op(
    "norm_quantize",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.norm_quantize_triton:launch",
    rtol=2.0**-7,
    atol=1e-6,  # of a mean near zero
    code_flips=CODE_FLIPS,
)
