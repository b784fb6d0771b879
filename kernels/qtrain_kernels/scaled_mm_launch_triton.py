"""How a scaled GEMM is launched: the kernels of a config on the arguments of a call.

A call whose arguments are like those of an earlier one in all that ``problem`` reads is launched as that one was. Operands that
are not K-major with rows of a multiple of 16 bytes are copied so first (``k_major``).

M, N free indices, K contraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qtrain_kernels.k_major_triton import ALIGNMENT, k_major
from qtrain_kernels.scaled_mm_config import Config, properties
from qtrain_kernels.scaled_mm_triton import (
    OPTIONS,
    PART_COLUMNS,
    PART_ROWS,
    _add_parts_kernel,
    _scaled_mm_pointer_kernel,
    _scaled_mm_tma_kernel,
)


def _mode(vector: Tensor | None) -> int:
    return 0 if vector is None else 1 if vector.shape[0] == 1 else 2


class _Kernel:
    """A kernel on arguments of one specialisation: bound and compiled at the first call, launched alone from then on."""

    def __init__(self, kernel: Any, programs: int, **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, (programs, 1, 1), constants
        self.values = [
            constants[name] for name in kernel.arg_names if name in constants
        ]  # they follow the arguments
        self.compiled: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.compiled is None:
            self.compiled = self.kernel[self.grid](*arguments, **self.constants)  # the interpreter gives None
        else:
            self.compiled[self.grid](*arguments, *self.values)


def _rebased(descriptor: Any) -> Callable[[Tensor], Any]:
    """Other tensors of the same shape and strides -> their descriptors, without checking all of it again."""
    kind, fields = type(descriptor), {k: v for k, v in vars(descriptor).items() if k != "base"}

    def describe(base: Tensor) -> Any:
        made = object.__new__(kind)
        made.__dict__.update(fields, base=base)
        return made

    return describe


Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
PREPARED: dict[tuple[Any, ...], Run] = {}
MAX_PREPARED = 4096  # a bound for shapes that keep changing


def problem(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All that checks, the choice of a config and the specialisation of a kernel read of the arguments."""
    return tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % ALIGNMENT)
        for t in tensors
    )


def remember(key: tuple[Any, ...], run: Run) -> None:
    """Keep ``run`` for the calls that have the same ``key``."""
    if len(PREPARED) >= MAX_PREPARED:
        PREPARED.clear()
    PREPARED[key] = run


def prepare(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    config: Config, acc: Any, imprecise: int | None = None,
) -> Run:  # fmt: skip
    """The launch of ``config`` on arguments that are the same ``problem`` as these, which are not kept. ``acc``: Triton dtype
    of the sums; ``imprecise``: how many products at most are summed in the tensor core's own accumulators."""
    (M, K), N, device = a.shape, b.shape[0], a.device
    a, b = k_major(a), k_major(b)
    modes = {"A_SCALE": _mode(a_scale), "B_SCALE": _mode(b_scale), "BIAS": bias is not None}
    shared = {"ACC": acc, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K}
    shared |= {"GROUP_M": config.GROUP_M, "num_warps": config.num_warps, **modes, **OPTIONS}
    split = config.SPLIT
    programs = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N) * split
    sizes: tuple[int, ...] = (M, N, K)
    operands: tuple[Callable[[Tensor], Any], ...] = (lambda x: x,) * 2
    if config.variant == "pointer":
        sizes += (a.stride(0), b.stride(0))
        kernel: Any = _scaled_mm_pointer_kernel
        shared |= {"EVEN_K": K % config.BLOCK_K == 0, "IMPRECISE": imprecise, "num_stages": config.num_stages}
    elif config.variant in ("tma", "specialised"):
        shared |= {"SPLIT": split}
        if config.variant == "tma":
            kernel, descriptors, constants = _tma_launch(a, b, config, imprecise)
        else:
            from qtrain_kernels.scaled_mm_specialised_triton import specialised_launch

            kernel, descriptors, constants = specialised_launch(a, b, config, imprecise is not None)
        shared |= constants
        operands = tuple(map(_rebased, descriptors))
        programs = min(programs, properties(device)[1])
    else:
        raise ValueError(
            f"config {config.name}: the variants of these kernels are tma, specialised and pointer"
        )
    product, add = _Kernel(kernel, programs, **shared), None
    sums = torch.int32 if a.dtype == torch.int8 else torch.float32
    if split > 1:
        blocks = triton.cdiv(M, PART_ROWS) * triton.cdiv(N, PART_COLUMNS)
        add = _Kernel(
            _add_parts_kernel, blocks, SPLIT=split, BLOCK_M=PART_ROWS, BLOCK_N=PART_COLUMNS, **modes, **OPTIONS
        )  # fmt: skip
    left, right = operands

    def run(
        a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y = torch.empty((M, N), dtype=out_dtype, device=device)
        target = y if add is None else torch.empty((split, M, N), dtype=sums, device=device)
        vectors = [y if v is None else v.contiguous() for v in (a_scale, b_scale, bias)]
        product(left(k_major(a)), right(k_major(b)), target, *vectors, *sizes)
        if add is not None:
            add(target, y, *vectors, M, N)
        return y

    return run


def _tma_launch(
    a: Tensor, b: Tensor, config: Config, imprecise: int | None
) -> tuple[Any, list[Any], dict[str, Any]]:
    """Kernel, descriptors and constants of a launch."""
    descriptors = [
        TensorDescriptor.from_tensor(x, [rows, config.BLOCK_K])
        for x, rows in ((a, config.BLOCK_M), (b, config.BLOCK_N))
    ]
    constants = {"SUBTILE": config.subtile, "IMPRECISE": imprecise, "num_stages": config.num_stages}
    return _scaled_mm_tma_kernel, descriptors, constants


def fastest(
    prepared: Callable[[Config], Run], arguments: tuple[Any, ...], configs: Sequence[Config]
) -> Config:
    """Time each config on ``arguments``; those that the GPU has not the shared memory for drop out. Raises the last error
    where none runs."""
    times: dict[Config, float] = {}
    error: Exception | None = None
    for config in configs:
        try:
            run = functools.partial(prepared(config), *arguments)
            times[config] = triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median")
        except triton.runtime.errors.OutOfResources as found:
            error = found
    if not times:
        assert error is not None
        raise error
    return min(times, key=lambda c: times[c])
