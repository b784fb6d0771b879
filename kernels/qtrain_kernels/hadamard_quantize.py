"""hadamard_quantize: int8 row codes of x after a blockwise Hadamard transform along its columns.

    y = (x * signs) H_B in each block of B columns; H_B[i, j] = (-1)^popcount(i & j) / sqrt(B)
    butterflies:  for h = 1, 2, 4 ... B / 2:  (x_i, x_(i + h)) -> (x_i + x_(i + h), x_i - x_(i + h))  for i with i & h = 0
    then          y = x / sqrt(B)             one product

in float32, then quantized as ``quantize_rows`` does. y is orthogonal to x block by block, so that the product of two operands
that share the transform stays, while an outlier spreads over its block (QuaRot, Ashkboos et al., 2404.00456).
The order of the butterflies is part of the equation: every implementation gives the same bits. It is the map
``hadamard:B`` of a recipe, and ``rht:B`` with signs.

R rows, C columns, B the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain_kernels import quantize_rows
from qtrain_kernels.op import Workload, define_op

BLOCKS = tuple(2**i for i in range(1, 11))


def check(
    x: Tensor, signs: Tensor | None, block: int,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    quantize_rows.check(x, qmax, stochastic, seed, step, stream, row_offset)
    C = x.shape[1]
    if block not in BLOCKS or C % block:
        raise ValueError(
            f"block={block} of {C} columns: must be a power of two, 2 ... 1024, that divides them"
        )
    if signs is not None and (
        signs.shape != (C,) or signs.dtype != torch.float32 or signs.device != x.device
    ):
        raise ValueError(
            f"signs must be [{C}] float32 on {x.device}, not {list(signs.shape)} {signs.dtype} on {signs.device}; "
            "counter_hash.random_signs makes them"
        )


def reference(
    x: Tensor, signs: Tensor | None, block: int,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> codes [R, C] int8, scale [R] float32.

    ``x`` [R, C] float32, bfloat16 or float16, any strides; ``signs`` [C] float32 of +-1, or None for none; ``block``: a power of two,
    2 ... 1024, that divides C. The rest as for ``quantize_rows``. Raises ValueError, see ``check``.
    """
    check(x, signs, block, qmax, stochastic, seed, step, stream, row_offset)
    y = transform(x, signs, block)
    return quantize_rows.reference(y, qmax, stochastic, seed, step, stream, row_offset)


def transform(x: Tensor, signs: Tensor | None, block: int) -> Tensor:
    """y [R, C] float32."""
    R, C = x.shape
    y = x.to(torch.float32)
    y = y if signs is None else y * signs
    h = 1
    while h < block:
        first, second = y.reshape(R, C // (2 * h), 2, h).unbind(2)
        y = torch.stack((first + second, first - second), 2)
        h *= 2
    return y.reshape(R, C) * block**-0.5


def _fake(
    x: Tensor, signs: Tensor | None, block: int,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(x, signs, block, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    return x.new_empty((R, C), dtype=torch.int8), x.new_empty((R,), dtype=torch.float32)


Inputs = tuple[Tensor, Tensor | None, int, int, bool, Tensor, Tensor, int, Tensor]


def _signs(C: int) -> Tensor:
    return torch.rand(C, generator=torch.Generator().manual_seed(C)).sub(0.5).sign()


def _cases() -> dict[str, Callable[[], Inputs]]:
    normal, changed = quantize_rows._normal, quantize_rows._set
    # block, tensor
    tensors: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "fp32": (16, lambda: normal(7, 48)),
        "bf16": (32, lambda: normal(5, 160, torch.bfloat16)),
        "fp16": (8, lambda: normal(3, 1000, torch.float16)),
        "one_block": (64, lambda: normal(9, 64)),
        "largest_block": (1024, lambda: normal(3, 2048, torch.bfloat16)),
        "smallest_block": (2, lambda: normal(5, 6)),
        "many_short_rows": (4, lambda: normal(1100, 4)),
        "block_128": (128, lambda: normal(33, 384, torch.bfloat16)),
        "block_256": (256, lambda: normal(2, 768)),
        "block_512": (512, lambda: normal(2, 512)),
        "looped": (64, lambda: changed(normal(3, 16512, torch.bfloat16), (0, 16500, 9.0), (1, 0, -9.0))),
        "looped_nan": (1024, lambda: changed(normal(2, 17408), (0, 17407, float("nan")))),
        "transposed": (16, lambda: normal(32, 7).t()),
        "strided": (4, lambda: normal(12, 72)[1::2, ::3]),
        "storage_offset": (32, lambda: normal(9, 69, torch.bfloat16)[2:, 5:]),
        "expanded_rows": (16, lambda: normal(1, 32).expand(6, 32)),
        "zero_rows": (16, lambda: normal(6, 32) * torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0, 1.0])[:, None]),
        "tiny": (8, lambda: normal(4, 40) * torch.tensor([2.0**-100, 1e-38, 1e-42, 1e-45])[:, None]),
        "one_hot": (16, lambda: changed(torch.zeros(2, 64), (0, 5, 1.0), (1, 63, -3.0))),
        "outlier": (16, lambda: changed(normal(7, 32), (3, 5, 1e30), (4, 0, -quantize_rows._MAX))),
        "overflow": (16, lambda: changed(normal(3, 32), (1, 0, quantize_rows._MAX), (1, 9, quantize_rows._MAX))),
        "nan_inf": (
            16,
            lambda: changed(
                normal(6, 48), (0, 32, float("nan")), (1, 0, float("inf")), (2, 7, -float("inf")), (4, 3, -float("nan"))
            ),
        ),
        "no_rows": (8, lambda: normal(0, 8)),
        "no_columns": (8, lambda: normal(3, 0)),
    }  # fmt: skip

    def case(block: int, make: Callable[[], Tensor], signed: bool, stochastic: bool) -> Callable[[], Inputs]:
        def inputs() -> Inputs:
            x = make()
            seed, step, offset = (quantize_rows._scalar(v) for v in (-5, 2**33 + 3, 2**31 - 2))
            signs = _signs(x.shape[1]) if signed else None
            return x, signs, block, 127, stochastic, seed, step, -(2**31), offset

        return inputs

    return {
        f"{name}/{block}{'/signs' if signed else ''}/{'stochastic' if stochastic else 'nearest'}": case(
            block, make, signed, stochastic
        )
        for i, (name, (block, make)) in enumerate(tensors.items())
        for signed, stochastic in ((False, i % 2 == 0), (True, i % 2 == 1))
    }


def _workloads(device: str) -> Sequence[Workload]:
    def unfused(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        """torch.compile of the transform as a GEMM in bfloat16, which is not the same y, then the op that quantizes."""
        x, signs, block, *_ = inputs
        H = transform(torch.eye(block, device=x.device), None, block).to(x.dtype)

        def matmul(x: Tensor, signs: Tensor | None) -> Tensor:
            y = x if signs is None else x * signs.to(x.dtype)
            return (y.unflatten(-1, (-1, block)) @ H).flatten(-2)

        compiled = torch.compile(matmul, dynamic=False)
        return lambda: quantize_rows.quantize_rows(compiled(x, signs), *inputs[3:])

    def workload(R: int, C: int, block: int, signed: bool, stochastic: bool) -> Workload:
        def inputs(on: str) -> Inputs:
            x = quantize_rows._normal(R, C, torch.bfloat16).to(on)
            seed, step, offset = (quantize_rows._scalar(v, on) for v in (1, 2, 0))
            return x, _signs(C).to(on) if signed else None, block, 127, stochastic, seed, step, 3, offset

        form = f"{'rht' if signed else 'hadamard'}_{block}/{'stochastic' if stochastic else 'nearest'}"
        return Workload(
            f"{R}x{C}/bf16/{form}",
            inputs,
            bytes=R * C * (2 + 1) + R * 4 + C * 4 * signed,
            flops=R * C * (block.bit_length() - 1),
            rivals={"unfused": unfused},
        )

    if device == "cpu":
        return [workload(1024, 768, 64, False, False)]
    return [
        workload(*shape, block, signed, signed)
        for shape in ((15872, 4096), (15872, 16384), (16384, 768))
        for block, signed in ((16, False), (64, True), (256, False))
    ]


hadamard_quantize = define_op(
    "hadamard_quantize",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.hadamard_quantize_triton:launch",
)
