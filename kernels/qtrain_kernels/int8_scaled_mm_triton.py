"""int8_scaled_mm on a GPU: the kernels of ``scaled_mm_triton`` with int32 sums, the same bits whatever the config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from qtrain_kernels import int8_scaled_mm as declaration
from qtrain_kernels import scaled_mm_triton
from qtrain_kernels.aot import Build
from qtrain_kernels.k_major_triton import k_major_build
from qtrain_kernels.scaled_mm_config import HOPPER, Config, choose
from qtrain_kernels.scaled_mm_launch_triton import PREPARED, Run, fastest, prepare, problem, remember


def launch(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference``; ``config``: this one instead of the one that is chosen for the shape."""
    key = (problem(a, b, a_scale, b_scale, bias), out_dtype, config)
    run = PREPARED.get(key)
    if run is None:
        declaration.check(a, b, a_scale, b_scale, bias, out_dtype)
        if 0 in (*a.shape, b.shape[0]):
            sums = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
            return declaration.epilogue(sums, a_scale, b_scale, bias, out_dtype)

        def prepared(chosen: Config) -> Run:
            return prepare(a, b, a_scale, b_scale, bias, out_dtype, chosen, tl.int32)

        (M, K), N = a.shape, b.shape[0]
        if config is None:
            timed = functools.partial(fastest, prepared, (a, b, a_scale, b_scale, bias))
            config = choose("int8", M, N, K, out_dtype, a.device, timed)
        run = prepared(config)
        remember(key, run)
    return run(a, b, a_scale, b_scale, bias)


def builds() -> list[Build]:
    """The copy to K-major as well, of a transposed operand."""
    from qtrain_kernels.scaled_mm_specialised_triton import build_specialised

    whole = HOPPER["int8", torch.bfloat16][0].config
    small = HOPPER["int8", torch.float32][1].config
    specialised = [
        build_specialised(whole, torch.int8, "bf16"),
        build_specialised(whole, torch.int8, "fp32"),
        build_specialised(replace(whole, SPLIT=3), torch.int8, "i32"),
        build_specialised(small, torch.int8, "fp32"),
        build_specialised(replace(small, SPLIT=3), torch.int8, "i32"),
    ]
    return [*scaled_mm_triton.builds("int8"), *specialised, k_major_build()]


def variants() -> dict[str, Callable[..., Tensor]]:
    """Launches that the contract checks beside the one by rule."""
    return {config.name: functools.partial(launch, config=config) for config in scaled_mm_triton.VARIANTS}
