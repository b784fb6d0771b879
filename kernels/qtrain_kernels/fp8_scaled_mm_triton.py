"""fp8_scaled_mm on a GPU: the kernels of ``scaled_mm_triton`` with float32 sums, or ``torch._scaled_mm``.

Config("library") is torch's: cuBLAS with one scale a side, CUTLASS with scales of rows, ``use_fast_accum=False`` for
both. It takes N and K in multiples of 16, a bias in bfloat16 with outputs in bfloat16, and for scales of rows e4m3fn codes and bfloat16
outputs; ``library_takes`` says so, and there it is what the rule chooses. A config that cannot run raises; none is replaced by another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from qtrain_kernels import fp8_scaled_mm as declaration
from qtrain_kernels import scaled_mm_triton
from qtrain_kernels.aot import Build
from qtrain_kernels.int8_scaled_mm import epilogue
from qtrain_kernels.k_major_triton import k_major
from qtrain_kernels.scaled_mm_config import (
    DATA_CENTER,
    HOPPER,
    LIBRARY,
    PROMOTED,
    Config,
    choose,
    properties,
)
from qtrain_kernels.scaled_mm_launch_triton import PREPARED, Run, fastest, prepare, problem, remember


def launch(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference``; ``config``: this one instead of the one that is chosen for the shape. Raises RuntimeError on a GPU
    of another kind than Hopper and Blackwell of data centers."""
    key = (problem(a, b, a_scale, b_scale, bias), out_dtype, config)
    run = PREPARED.get(key)
    if run is None:
        declaration.check(a, b, a_scale, b_scale, bias, out_dtype)
        if properties(a.device)[0][0] not in DATA_CENTER:
            raise RuntimeError(
                f"fp8_scaled_mm has kernels for compute capabilities 9 and 10 (H100, B200), not for "
                f"{torch.cuda.get_device_name(a.device)}; use an int8 recipe there"
            )
        if 0 in (*a.shape, b.shape[0]):
            sums = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.device)
            return epilogue(sums, a_scale, b_scale, bias, out_dtype)
        taken = library_takes(a, b, a_scale, b_scale, bias, out_dtype)

        def prepared(chosen: Config) -> Run:
            if chosen == LIBRARY and not taken:
                raise ValueError(
                    "torch._scaled_mm does not compute this product, see library_takes; pass another config"
                )
            if chosen == LIBRARY:
                return functools.partial(_library, out_dtype)
            return prepare(a, b, a_scale, b_scale, bias, out_dtype, chosen, tl.float32, PROMOTED)

        (M, K), N = a.shape, b.shape[0]
        if config is None:
            timed = functools.partial(fastest, prepared, (a, b, a_scale, b_scale, bias))
            config = choose("fp8", M, N, K, out_dtype, a.device, timed, [LIBRARY] if taken else [])
        run = prepared(config)
        remember(key, run)
    return run(a, b, a_scale, b_scale, bias)


def library_takes(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> bool:  # fmt: skip
    """Whether ``torch._scaled_mm`` computes this op on these arguments."""
    of_tensors = all(v is None or v.shape[0] == 1 for v in (a_scale, b_scale))
    multiples = a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0
    of_rows = out_dtype == torch.bfloat16 and a.dtype == b.dtype == declaration.E4M3
    added = bias is None or (bias.dtype == out_dtype == torch.bfloat16)
    return a.is_cuda and multiples and added and (of_tensors or of_rows)


def _library(
    out_dtype: torch.dtype, a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None
) -> Tensor:  # fmt: skip
    left, right = (torch.ones(1, device=a.device) if v is None else v for v in (a_scale, b_scale))
    if left.shape[0] > 1 or right.shape[0] > 1:
        left = left.expand(a.shape[0]).contiguous()[:, None]
        right = right.expand(b.shape[0]).contiguous()[None, :]
    else:
        left, right = left.reshape(()), right.reshape(())
    return torch._scaled_mm(
        k_major(a), k_major(b).t(), left, right, bias=bias, out_dtype=out_dtype, use_fast_accum=False
    )


def builds() -> list[Build]:
    from qtrain_kernels.scaled_mm_specialised_triton import build_specialised

    whole = HOPPER["fp8", torch.bfloat16][0].config
    specialised = [
        build_specialised(config, declaration.E4M3, out)
        for config, out in ((whole, "bf16"), (whole, "fp32"), (replace(whole, SPLIT=3), "fp32"))
    ]
    return [*scaled_mm_triton.builds("fp8"), *specialised]


def variants() -> dict[str, Callable[..., Tensor]]:
    """Launches that the contract checks beside the one by rule."""
    return {config.name: functools.partial(launch, config=config) for config in scaled_mm_triton.VARIANTS}
