"""quantize_rows: one symmetric absmax scale a row and int8 codes, nearest or stochastic.

    amax_r  = max_c |x_rc|                                         float32
    scale_r = max(amax_r / qmax, 2^-100)                           IEEE division
    v_rc    = x_rc * (1 / scale_r), NaN -> 0                       IEEE division, then one product
    nearest:     code = clamp(half_even(v), -qmax - 1, qmax)
    stochastic:  f = floor(v);  up = [u_rc < v - f];  code = clamp(f + up, -qmax - 1, qmax)
    x ~ code * scale

R rows, C columns. u is ``counter_hash.uniform`` of the element's own bits, so splitting the rows, recomputing a
layer or changing the world size changes no code.

The floor 2^-100 keeps scale and 1/scale finite and positive, so a zero row has codes 0 without a branch. With
rounding to nearest -qmax - 1 never occurs; with stochastic rounding v of the row's largest negative element may
round one unit in the last place below -qmax, and then reaches it with probability below 2^-15.

A non-finite element poisons everything that shares its scale: with a NaN in the row, scale is NaN; with an
infinity, scale is infinite; all codes of the row are 0, and dequantizing gives 0 * NaN = 0 * inf = NaN. Nothing
vanishes silently, and no other row is touched.

The kernel is ``quantize_rows_triton``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain_kernels.counter_hash import random_bits, uniform
from qtrain_kernels.op import Workload, define_op

MIN_SCALE = 2.0**-100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> None:
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [R, C] of {DTYPES}, not {list(x.shape)} {x.dtype}; reshape or cast it")
    if not 1 <= qmax <= 127:
        raise ValueError(f"qmax must be 1 ... 127 (7 is int4, 127 is int8), not {qmax}")
    if not -(2**31) <= stream < 2**31:
        raise ValueError(
            f"stream must be a signed 32-bit id, not {stream}; make it with counter_hash.stream_id"
        )
    for name, scalar in (("seed", seed), ("step", step), ("row_offset", row_offset)):
        if scalar.dim() != 0 or scalar.dtype != torch.int64:
            raise ValueError(f"{name} must be a 0-d int64 tensor, not {list(scalar.shape)} {scalar.dtype}")
        if scalar.device != x.device:
            raise ValueError(
                f"{name} is on {scalar.device} but x is on {x.device}; move it there once, not each step"
            )


def reference(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[Tensor, Tensor]:
    """-> codes [R, C] int8, scale [R] float32, the value of one code step.

    ``x`` [R, C] float32, bfloat16 or float16, any strides; the codes are contiguous. ``seed``, ``step``: 0-d int64; ``stream``: int32 id of
    the operand (``counter_hash.stream_id``); ``row_offset``: 0-d int64, global index of the first row; all four
    are read by stochastic rounding only. Raises ValueError, see ``check``.
    """
    check(x, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    x = x.to(torch.float32)
    amax = x.abs().amax(dim=1) if C else x.new_zeros(R)  # amax propagates NaN
    # A tensor divisor: by a number, torch divides on CUDA as a product with the rounded reciprocal.
    scale = (amax / torch.full_like(amax, qmax)).clamp(min=MIN_SCALE)
    v = x * scale.reciprocal()[:, None]
    v = torch.where(v.isnan(), 0.0, v)
    if stochastic:
        floor = v.floor()
        v = floor + (uniform(random_bits(seed, step, stream, R, C, row_offset)) < v - floor)
    else:
        v = v.round()
    codes = v.clamp(-qmax - 1, qmax).to(torch.int8, memory_format=torch.contiguous_format)
    return codes, scale


def _fake(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[Tensor, Tensor]:
    check(x, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    return x.new_empty((R, C), dtype=torch.int8), x.new_empty((R,), dtype=torch.float32)


Inputs = tuple[Tensor, int, bool, Tensor, Tensor, int, Tensor]


def _scalar(value: int, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


def _normal(R: int, C: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(R * 1_000_003 + C)
    return torch.randn(R, C, generator=generator).to(dtype)


def _set(x: Tensor, *places: tuple[int, int, float]) -> Tensor:
    for r, c, value in places:
        x[r, c] = value
    return x


def _ties() -> Tensor:
    """amax = 127, so scale = 1 at qmax 127 and every k + 1/2 is an exact tie."""
    half = torch.arange(-126, 127) + 0.5
    return torch.cat([half, torch.tensor([127.0])])[None].repeat(3, 1)


def _rounding_edges() -> Tensor:
    """Products whose rounding to float32 decides the code: fusing product and rounding gives other codes."""
    x = torch.arange(1, 2001, dtype=torch.float32).reshape(8, 250) * 0.01
    return x * torch.tensor([1.0, 1.1, 1.3, 1.7, 3.0, 7.0, 11.0, 13.0])[:, None]


_ODD = (7, 33)
_MAX = 3.4028234663852886e38  # the largest float32
_TENSORS: dict[str, Callable[[], Tensor]] = {
    "fp32": lambda: _normal(*_ODD),
    "bf16": lambda: _normal(5, 130, torch.bfloat16),
    "fp16": lambda: _normal(3, 1000, torch.float16),
    "one_element": lambda: _normal(1, 1),
    "one_column": lambda: _normal(9, 1),
    "many_short_rows": lambda: _normal(1100, 3),
    "looped": lambda: _set(_normal(3, 8209, torch.bfloat16), (0, 8208, 9.0), (1, 0, -9.0), (2, 8200, 0.0)),
    "looped_nan": lambda: _set(_normal(3, 8209), (0, 8208, float("nan")), (2, 0, float("nan"))),
    "transposed": lambda: _normal(33, 7).t(),
    "strided": lambda: _normal(12, 66)[1::2, ::3],
    "storage_offset": lambda: _normal(9, 40, torch.bfloat16)[2:, 5:],
    "expanded_rows": lambda: _normal(1, 21).expand(6, 21),
    "zero_rows": lambda: _normal(6, 20) * torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0, 1.0])[:, None],
    "tiny": lambda: _normal(4, 40) * torch.tensor([2.0**-100, 1e-38, 1e-42, 1e-45])[:, None],
    "subnormal_beside_normal": lambda: _set(_normal(2, 300) * 1e-40, (0, 0, 1.0), (1, 299, -1.0)),
    "subnormal": lambda: _set(torch.full((1, 64), 1e-40), (0, 0, 1.0)),
    "one_hot": lambda: _set(torch.zeros(1, 64), (0, 0, 1.0)),
    "above_minus_one": lambda: _set(torch.full((1, 64), 2.0**-24 - 1), (0, 0, 127.0)),  # v = x
    "below_minus_qmax": lambda: _set(
        _normal(1, 64).clamp(-1, 1), (0, 8, -1.005)
    ),  # v = -127 - 2^-17 at column 8
    "huge_outlier": lambda: _set(_normal(*_ODD), (3, 5, 1e30), (4, 0, -_MAX)),
    "nan_inf": lambda: _set(
        _normal(6, 33),
        (0, 32, float("nan")),
        (1, 0, float("inf")),
        (2, 7, -float("inf")),
        (3, 1, float("inf")),
        (3, 2, float("nan")),
        (4, 3, -float("nan")),
    ),
    "ties": _ties,
    "rounding_edges": _rounding_edges,
    "no_rows": lambda: _normal(0, 8),
    "no_columns": lambda: _normal(3, 0),
}
# name -> (qmax, seed, step, stream, row_offset): the words of the hash at their edges
_SETTINGS: dict[str, tuple[int, int, int, int, int]] = {
    "int8": (127, 1234, 17, 99, 0),
    "int4": (7, -5, 2**33 + 3, -(2**31), 2**31 - 2),
    "ternary": (1, 2**62 + 11, 0, 2**31 - 1, 2**40 + 5),
    # u = 0 at column 52 of row 0 (found by search): any v > 0 rounds up there, a subnormal one too
    "zero_uniform": (127, 1234, 17, 99, 289742),
    # u = 1 - 2^-24, the largest, at column 8 of row 0 (found by search)
    "top_uniform": (127, 1234, 17, 99, 163935),
}


def _cases() -> dict[str, Callable[[], Inputs]]:
    def case(tensor: str, setting: str, stochastic: bool) -> Callable[[], Inputs]:
        qmax, seed, step, stream, row_offset = _SETTINGS[setting]
        return lambda: (
            _TENSORS[tensor](), qmax, stochastic, _scalar(seed), _scalar(step), stream, _scalar(row_offset)
        )  # fmt: skip

    cases = {}
    for i, tensor in enumerate(_TENSORS):
        for stochastic in (False, True):
            setting = ("int8", "int4")[(i + stochastic) % 2]
            if tensor in ("ties", "rounding_edges"):
                setting = "int8"
            cases[f"{tensor}/{setting}/{'stochastic' if stochastic else 'nearest'}"] = case(
                tensor, setting, stochastic
            )
    for tensor in ("fp32", "huge_outlier", "rounding_edges"):
        cases[f"{tensor}/ternary/nearest"] = case(tensor, "ternary", False)
        cases[f"{tensor}/ternary/stochastic"] = case(tensor, "ternary", True)
    cases["subnormal/zero_uniform/stochastic"] = case("subnormal", "zero_uniform", True)
    cases["one_hot/zero_uniform/stochastic"] = case("one_hot", "zero_uniform", True)
    cases["above_minus_one/zero_uniform/stochastic"] = case("above_minus_one", "zero_uniform", True)
    cases["below_minus_qmax/top_uniform/stochastic"] = case("below_minus_qmax", "top_uniform", True)
    return cases


def _workloads(device: str) -> Sequence[Workload]:
    shapes = [(4096, 768), (8192, 4096), (8192, 14336)] if device == "cuda" else [(512, 768), (4096, 768)]

    def workload(R: int, C: int, qmax: int, stochastic: bool) -> Workload:
        def inputs(on: str) -> Inputs:
            x = _normal(R, C, torch.bfloat16).to(on)
            return x, qmax, stochastic, _scalar(1, on), _scalar(2, on), 3, _scalar(0, on)

        name = f"{R}x{C}/bf16/{'stochastic' if stochastic else 'nearest'}"
        return Workload(name, inputs, bytes=R * C * (2 + 1) + R * 4)

    return [
        workload(*shape, qmax=127, stochastic=stochastic) for shape in shapes for stochastic in (False, True)
    ]


quantize_rows = define_op(
    "quantize_rows",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.quantize_rows_triton:launch",
)
